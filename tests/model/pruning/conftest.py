"""A model that the tests of pruning share."""

import pytest
from tiny_models import save, tiny


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A tiny Llama of two blocks; nobody may change it."""
    model = tiny("llama", layers=2)
    return save(model, tmp_path_factory.mktemp("small") / "model", shard="30KB")

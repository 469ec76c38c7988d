"""Models that the tests of training share."""

import functools

import pytest
import torch
from tiny_models import loud, save, tokens

from maskopt import prune_model


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A tiny model of a family with two blocks, and what Wanda makes of it at 50%; nobody may change them."""
    home = tmp_path_factory.mktemp("made")

    @functools.cache
    def of(family, dtype=torch.float32, model=loud, **more):
        name = f"{len(list(home.iterdir()))}-{family}"
        dense = save(model(family, dtype=dtype, layers=2), home / name)
        pruned = dense.with_name(f"{dense.name}-pruned")
        how = {"sparsity": 0.5, "solver": "wanda", "min_tokens": 1, **more}
        prune_model(dense, tokens(6), output=pruned, **how)
        return dense, pruned

    return of

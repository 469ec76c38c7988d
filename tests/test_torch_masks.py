"""Our masks under PyTorch's own pruning tools: the same function, the same zeros through training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_keep_masks import loaded, train
from tiny_models import save, tiny, tokens
from torch import nn
from torch.ao.pruning import FakeSparsity
from torch.nn.utils import parametrize, prune

from maskopt import keep_masks, prune_model, with_fake_sparsity, with_torch_prune
from maskopt.errors import ModelError


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pruned(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned tiny model; nobody may change it."""
    home = tmp_path_factory.mktemp("torch-masks")
    dense = save(tiny(request.param), home / "dense")
    prune_model(dense, tokens(6), output=home / "out", sparsity=0.5, solver="wanda", min_tokens=1)
    return home / "out"


def logits(model: nn.Module) -> torch.Tensor:
    """Without dropout."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(tokens(2)).logits
    model.train()
    return found


def remove_prune(model: nn.Module, name: str) -> None:
    owner, _, last = name.rpartition(".")
    prune.remove(model.get_submodule(owner), last)


def remove_parametrization(model: nn.Module, name: str) -> None:
    owner, _, last = name.rpartition(".")
    parametrize.remove_parametrizations(model.get_submodule(owner), last)


@pytest.mark.parametrize(
    ("put", "take"),
    [(with_torch_prune, remove_prune), (with_fake_sparsity, remove_parametrization)],
)
def test_training_keeps_every_zero_and_the_tool_gives_the_model_back(
    put: Callable[..., list[str]], take: Callable[[nn.Module, str], None], pruned: Path
) -> None:
    before, model = loaded(pruned), loaded(pruned)
    names = put(model, pruned)
    assert len(names) >= 12
    assert torch.equal(logits(model), logits(before))
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1), 5)
    for name in names:
        take(model, name)
        weight, old = model.get_parameter(name), before.get_parameter(name)
        assert bool((weight[old == 0] == 0).all()), name
        assert not torch.equal(weight, old), name
    assert set(model.state_dict()) == set(before.state_dict())


def test_they_are_what_the_tools_know(pruned: Path) -> None:
    model = loaded(pruned)
    name = with_torch_prune(model, pruned)[0]
    owner = model.get_submodule(name.rpartition(".")[0])
    assert prune.is_pruned(owner)
    other = loaded(pruned)
    with_fake_sparsity(other, pruned)
    owner = other.get_submodule(name.rpartition(".")[0])
    assert isinstance(owner.parametrizations["weight"][0], FakeSparsity)


def test_a_dense_model_is_pruned_by_it(pruned: Path) -> None:
    dense = loaded(pruned.parent / "dense")
    with_torch_prune(dense, pruned)
    assert torch.equal(logits(dense), logits(loaded(pruned)))


@pytest.mark.parametrize("put", [with_torch_prune, with_fake_sparsity])
@pytest.mark.parametrize("again", [with_torch_prune, with_fake_sparsity, keep_masks])
def test_masks_go_on_once(put: Any, again: Any, pruned: Path) -> None:
    model = loaded(pruned)
    put(model, pruned)
    with pytest.raises(ModelError, match="masks are on it already; remove those first"):
        again(model, pruned)


@pytest.mark.parametrize("put", [with_torch_prune, with_fake_sparsity])
def test_masks_of_another_model_are_refused(
    put: Callable[..., list[str]], pruned: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="has no layer"):
        put(tiny("opt"), pruned)

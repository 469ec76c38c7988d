"""Ctrl-C ends what goes on from a search: the best by then is nobody's answer."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from commands import import_path
from outputs import contents
from strategies import random_gram, random_weight
from test_scip import die_on_seven
from tiny_models import save, tiny, tokens

from maskopt import LayerProblem, Unstructured, prune_model, solve
from maskopt.certify import bound_layers
from maskopt.model.options import PruneOptions
from maskopt.model.solving import solve_layer
from maskopt.solvers.exact import tree, workers
from maskopt.trace import SearchTrace


def layer(rows: int = 1, n: int = 64) -> LayerProblem:
    return LayerProblem(random_weight(rows, n, 1), random_gram(n, "full", 2), Unstructured(0.6))


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tenth node of `branch` is Ctrl-C."""
    calls, original = itertools.count(), tree.bound_node

    def bound(*args: Any) -> Any:
        if next(calls) == 9:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(tree, "bound_node", bound)


@pytest.mark.usefixtures("interrupted")
def test_an_interrupted_start_is_none() -> None:
    with pytest.raises(KeyboardInterrupt):
        solve(layer(), "swap", start="branch")


@pytest.mark.usefixtures("interrupted")
def test_an_interrupted_layer_of_a_model_is_not_done() -> None:
    with pytest.raises(KeyboardInterrupt):
        solve_layer(layer(), PruneOptions(Unstructured(0.6), "branch"))


@pytest.mark.usefixtures("interrupted")
def test_an_interrupted_mask_has_no_gap() -> None:
    with pytest.raises(KeyboardInterrupt):
        bound_layers([layer()], method="box", solver="branch")


@pytest.mark.usefixtures("interrupted")
def test_a_portfolio_ends_with_its_member_and_keeps_what_that_has() -> None:
    found = solve(layer(), "portfolio", members=("branch", "swap", "tabu"))
    assert isinstance(found.trace, SearchTrace)
    assert found.trace.interrupted
    assert found.trace.stopped == ("interrupted",)
    assert found.trace.rounds is not None
    assert found.trace.rounds.tolist() == [1]
    assert bool((found.lower_bound > 0).all())
    assert not solve(layer(), "portfolio", members=("swap",)).trace.interrupted


def test_a_prune_goes_on_after_the_layers_that_were_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    how: dict[str, Any] = {"sparsity": 0.9, "solver": "branch", "min_tokens": 1}
    how |= {"include": "self_attn.k_proj", "solver_options": {"workers": 0}}
    prune_model(dense, tokens(6), output=tmp_path / "whole", **how)
    calls, original = itertools.count(), tree.Tree.search

    def search(self: tree.Tree, threads: int) -> Any:
        if next(calls) == 20:  # in the second layer
            raise KeyboardInterrupt
        return original(self, threads)

    with monkeypatch.context() as patched:
        patched.setattr(tree.Tree, "search", search)
        with pytest.raises(KeyboardInterrupt):
            prune_model(dense, tokens(6), output=tmp_path / "out", **how)
    prune_model(dense, tokens(6), output=tmp_path / "out", resume=True, **how)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("when", ["_start", "_receive"])
def test_a_worker_that_an_interrupt_ends_has_not_crashed(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes while the process is started, or before that can hand back anything."""
    monkeypatch.setenv("PYTHONPATH", import_path(__file__))
    crew = workers._Crew(die_on_seven, [7, 3], 512, math.inf)
    original = getattr(workers, when)

    def interrupted(*given: Any) -> Any:
        crew.stop.set()
        return original(*given)

    monkeypatch.setattr(workers, when, interrupted)
    crew.start(1)
    assert crew.done.get(timeout=120) == (-1, None)

"""Ctrl-C ends what goes on from a search: the best by then is nobody's answer."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from outputs import contents
from strategies import random_gram, random_weight
from tiny_models import save, tiny, tokens

from maskopt import LayerProblem, Unstructured, prune_model, solve
from maskopt.certify import bound_layers
from maskopt.model.options import PruneOptions
from maskopt.model.solving import solve_layer
from maskopt.solvers.exact import tree
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


def test_workers_that_are_only_beginning_end_in_silence() -> None:
    code = (
        "import os, signal, sys, threading; sys.path.insert(0, sys.argv[1])\n"
        "from test_scip import say_so_and_stay; from maskopt.solvers.exact.workers import run_tasks\n"
        "os.environ['PYTHONPATH'] = sys.argv[1]\n"
        "threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        "try:\n"
        "    print(list(run_tasks(say_so_and_stay, [1, 1, 1], workers=2)))\n"
        "except KeyboardInterrupt:\n"
        "    print('stopped')\n"
    )
    command = [sys.executable, "-c", code, os.path.dirname(__file__)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout == "stopped\n", result
    assert "Traceback" not in result.stderr

"""Ctrl-C leaves the incumbent and the bound of all open nodes, and ends what goes on from a search."""

import heapq
import itertools
import math

import pytest
from commands import import_path
from outputs import contents
from strategies import random_gram, random_weight
from test_scip import die_on_seven
from tiny_models import save, tiny, tokens

from maskopt import LayerProblem, Status, Unstructured, prune_model, solve, verify
from maskopt.certify import bound_layers
from maskopt.model.options import PruneOptions
from maskopt.model.solving import solve_layer
from maskopt.solvers.exact import branch, tree, workers

SIXTY = Unstructured(0.6)
LAYER = LayerProblem(random_weight(1, 64, 1), random_gram(64, "full", 2), SIXTY)


def interrupt(monkeypatch, owner, name, after, before=lambda *_: None):
    """A call after so many is Ctrl-C."""
    calls, original = itertools.count(), getattr(owner, name)

    def interrupted(*args):
        if next(calls) == after:
            before(*args)
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.fixture(params=["a bound", "a node that was taken", "the duals"])
def ended(request, monkeypatch):
    """Where `branch` is interrupted."""
    if request.param == "a bound":
        interrupt(monkeypatch, tree, "bound_node", 9)
    elif request.param == "the duals":
        interrupt(monkeypatch, branch, "qcr_duals", 0)
    else:
        calls, take = itertools.count(), heapq.heappop

        def taken(nodes):
            node = take(nodes)
            if next(calls) == 9:
                nodes.clear()  # as if all others were being branched on, too
                raise KeyboardInterrupt
            return node

        monkeypatch.setattr(tree.heapq, "heappop", taken)
    return request.param


def test_the_incumbent_and_the_least_open_bound_are_returned(ended, monkeypatch):
    solution = solve(LAYER, "branch")
    monkeypatch.undo()
    best = solve(LAYER, "branch").objective
    assert solution.trace.ended == ("userinterrupt",)
    assert solution.status == (Status.FEASIBLE,)
    assert bool((solution.objective <= solve(LAYER, "wanda").objective).all())
    if ended == "the duals":
        assert solution.lower_bound.tolist() == [0.0]
    else:
        assert bool((solution.lower_bound > 0.8 * best).all())
        assert bool((solution.lower_bound < best * (1 - 1e-4)).all())  # nodes are still open
    verify(LAYER, solution)


@pytest.mark.parametrize(
    "goes_on",
    [
        lambda: solve(LAYER, "swap", start="branch"),
        lambda: solve_layer(LAYER, PruneOptions(SIXTY, "branch")),
        lambda: bound_layers([LAYER], method="box", solver="branch"),
    ],
    ids=["a start", "a layer of a model", "a gap"],
)
def test_what_goes_on_from_a_search_ends_with_it(goes_on, monkeypatch):
    interrupt(monkeypatch, tree, "bound_node", 9)
    with pytest.raises(KeyboardInterrupt):
        goes_on()


def test_a_portfolio_ends_with_its_member_and_keeps_what_that_has(monkeypatch):
    interrupt(monkeypatch, tree, "bound_node", 9)
    found = solve(LAYER, "portfolio", members=("branch", "swap", "tabu"))
    assert found.trace.interrupted
    assert found.trace.stopped == ("interrupted",)
    assert found.trace.rounds.tolist() == [1]
    assert bool((found.lower_bound > 0).all())
    assert not solve(LAYER, "portfolio", members=("swap",)).trace.interrupted


def test_a_prune_goes_on_after_the_layers_that_were_done(tmp_path, monkeypatch):
    dense = save(tiny("llama"), tmp_path / "dense")
    how = {"sparsity": 0.9, "solver": "branch", "min_tokens": 1}
    how |= {"include": "self_attn.k_proj", "solver_options": {"workers": 0}}
    prune_model(dense, tokens(6), output=tmp_path / "whole", **how)
    with monkeypatch.context() as patched:
        interrupt(patched, tree.Tree, "search", 20)  # in the second layer
        with pytest.raises(KeyboardInterrupt):
            prune_model(dense, tokens(6), output=tmp_path / "out", **how)
    prune_model(dense, tokens(6), output=tmp_path / "out", resume=True, **how)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("when", ["_start", "_receive"])
def test_a_worker_that_an_interrupt_ends_has_not_crashed(when, monkeypatch):
    """It comes while the process is started, or before that can hand back anything."""
    monkeypatch.setenv("PYTHONPATH", import_path(__file__))
    crew = workers._Crew(die_on_seven, [7, 3], 512, math.inf)
    original = getattr(workers, when)

    def interrupted(*given):
        crew.stop.set()
        return original(*given)

    monkeypatch.setattr(workers, when, interrupted)
    crew.start(1)
    assert crew.done.get(timeout=120) == (-1, None)

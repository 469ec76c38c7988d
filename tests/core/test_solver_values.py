"""A solver is a value: by value or by name the same, starts as declared, one clock for everything."""

from dataclasses import dataclass, fields
from typing import ClassVar

import pytest
import torch
from strategies import random_gram, random_weight

from maskopt import LayerProblem, Limits, Refit, Solution, Unstructured, available_solvers, solve
from maskopt.errors import MaskoptError, OptionError, PatternError, SolverError, WarmStartError
from maskopt.limits import Progress
from maskopt.solver import Capabilities, Solver, make_solver, make_start
from maskopt.solvers import DSnoT, Relax, Ria, Swap, Tabu, Wanda

PROBLEM = LayerProblem(random_weight(3, 24, 1), random_gram(24, "full", 2), Unstructured(keep=10))
EVERYTHING = torch.ones(3, 24).bool()
AVAILABLE = {name: info for name, info in available_solvers().items() if info.available}


@dataclass(frozen=True)
class Spy(Solver):
    """Answers with its start, and remembers what it was given."""

    name: ClassVar[str] = "spy"
    capabilities: ClassVar[Capabilities] = Capabilities(start="needed", default_start="wanda")
    given: ClassVar[list] = []

    def run(self, problem, start, limits):
        self.given.append((start, limits))
        mask = solve(problem, "magnitude").mask if start is None else start
        return Solution.of(problem, mask)


def spy(needs, default=None, name="spy"):
    can = Capabilities(start=needs, default_start=default)
    Spy.given.clear()
    return type("Spy", (Spy,), {"capabilities": can, "name": name})()


def answering(answer):
    """A solver whose `run` returns this."""
    return type("Answers", (Spy,), {"name": "answers", "run": lambda self, problem, *_: answer})()


def test_by_value_and_by_name_are_the_same_and_values_are_frozen_equal_and_hashable():
    limits = Limits(seconds=600, seed=4, threads=2)
    by_value = solve(PROBLEM, Tabu(moves=50), start=Relax(), limits=limits)
    words = {"moves": 50, "time_limit": 600, "seed": 4, "threads": 2}
    by_name = solve(PROBLEM, "tabu", warm_start="relax", **words)
    assert torch.equal(by_value.mask, by_name.mask)
    assert by_value.solver == by_name.solver == "tabu"
    swapped = solve(PROBLEM, Swap(), start="ria")
    assert swapped.objective.equal(solve(PROBLEM, "swap", start=Ria()).objective)
    assert Tabu(moves=5) == make_solver("tabu", moves=5)
    assert hash(Tabu(moves=5)) == hash(Tabu(moves=5))
    with pytest.raises(AttributeError):
        Tabu().moves = 3


ILLEGAL = answering(Solution.of(PROBLEM, EVERYTHING))
ILLEGAL_MASK = r"'answers' answered with an illegal mask: its mask: row 0 prunes 0"


@pytest.mark.parametrize(
    ("solver", "options", "error", "message"),
    [
        (Swap(), {"max_swaps": 3}, MaskoptError, "given as a value"),
        ("swap", {"max_swap": 3}, MaskoptError, "did you mean 'max_swaps'"),
        ("swap", {"limits": Limits(), "time_limit": 3}, MaskoptError, "not both"),
        ("swap", {"start": "wanda", "warm_start": "ria"}, MaskoptError, "give one of them"),
        (7, {}, MaskoptError, "is no solver"),
        ("swap", {"start": "swap"}, MaskoptError, "its own start"),
        ("swap", {"start": Swap(max_swaps=1)}, MaskoptError, "its own start"),
        ("swap", {"start": "wandaa"}, MaskoptError, "did you mean 'wanda'"),
        ("swap", {"start": EVERYTHING[:2]}, MaskoptError, "start has shape"),
        ("swap", {"start": 3.5}, WarmStartError, None),
        ("swap", {"time_limit": "abc"}, MaskoptError, "time_limit"),
        ("swap", {"memory_limit": "2 apples"}, MaskoptError, "no amount of memory"),
        ("swap", {"seed": -1}, MaskoptError, "seed"),
        (spy("needed"), {}, MaskoptError, "needs a start"),
        # of no use, and wrong all the same
        (spy("ignored"), {"start": "no-such-solver"}, MaskoptError, "unknown solver"),
        (ILLEGAL, {}, SolverError, ILLEGAL_MASK),
        ("swap", {"start": ILLEGAL}, SolverError, ILLEGAL_MASK),
        (answering(EVERYTHING), {}, SolverError, "returned Tensor; return Solution"),
        (Swap, {}, SolverError, r"write Swap\(\)"),
    ],
)
def test_bad_calls_get_one_clear_line(solver, options, error, message):
    with pytest.raises(error, match=message) as found:
        solve(PROBLEM, solver, **options)
    assert "\n" not in str(found.value)


def test_what_is_no_solver_and_no_pattern_is_refused():
    with pytest.raises(OptionError, match="is no solver"):
        make_solver(object())
    with pytest.raises(PatternError, match="not '2:4'"):
        LayerProblem(PROBLEM.weight, PROBLEM.gram, "2:4")


def test_a_start_is_made_only_where_it_is_used():
    solve(PROBLEM, spy("needed", "wanda"))
    assert torch.equal(Spy.given[0][0], solve(PROBLEM, Wanda()).mask)
    for needs, start, used in (
        ("optional", None, False), ("ignored", None, False), ("optional", "wanda", True),
        ("ignored", "wanda", False),
    ):  # fmt: skip
        solve(PROBLEM, spy(needs), start=start)
        assert (Spy.given[0][0] is not None) == used


def test_start_and_solver_share_one_clock_and_only_the_solver_is_heard():
    heard = []
    inner, outer = spy("needed", "wanda", "other"), spy("needed")
    solve(PROBLEM, outer, start=inner, time_limit=60, on_progress=heard.append)
    (_, inner), (_, outer) = Spy.given
    assert inner.deadline == outer.deadline < float("inf")
    assert inner.on_progress is None
    assert outer.on_progress is not None
    solve(PROBLEM, "swap", on_progress=heard.append)
    assert heard[-1] == Progress(3, 3)
    assert all(isinstance(event, Progress) and event.total == 3 for event in heard)


def in_process(name):
    """Options with which an exact solver starts no worker processes, for a few tiny rows."""
    return {"workers": 0} if "workers" in {f.name for f in fields(make_solver(name))} else {}


@pytest.mark.parametrize("name", AVAILABLE)
def test_declared_starts_hold(name):
    """Needed: one is made by default. Optional: never worse than it. Ignored: changes nothing."""
    mean = torch.ones(8, dtype=torch.float64) / 9
    weight, gram = random_weight(2, 8, 3), random_gram(8, "full", 4)
    small = LayerProblem(weight, gram, Unstructured(keep=4), mean=mean)
    can = AVAILABLE[name].capabilities
    assert (can.default_start is not None) == (can.start == "needed")
    given = solve(small, "random", seed=1).mask
    how = in_process(name)
    with_start, without = solve(small, name, start=given, **how), solve(small, name, **how)
    if can.start == "ignored":
        assert torch.equal(with_start.mask, without.mask)
    elif name != "dsnot":  # looks at mean outputs, and can raise the objective
        slack = 1e-12 * small.diagonal_mass()
        assert bool((with_start.objective <= small.objective(given) + slack).all())


def test_make_start_leaves_out_what_the_next_solver_does_anyway():
    start = make_start(PROBLEM, "relax", Limits(seed=3))
    assert set(map(str, start.status)) == {"feasible"}
    assert start.certificate is None
    assert Relax(max_iterations=60).as_start(PROBLEM)[0].max_iterations == 60
    assert not Relax().as_start(PROBLEM)[0].refine
    assert DSnoT().as_start(PROBLEM)[0] == DSnoT()


@pytest.mark.parametrize("name", ["admm", "obs", "sparsegpt", "wanda", "swap"])
def test_a_start_is_the_mask_that_the_solver_makes_by_itself(name):
    problem = PROBLEM.refitting(Refit(0.2))
    start = make_start(problem, name)
    assert torch.equal(start.mask, solve(problem, name).mask)
    kept = PROBLEM.objective(start.mask)
    assert torch.equal(start.objective, kept) == (name != "swap")


@pytest.mark.parametrize("name", AVAILABLE)
def test_a_view_with_other_strides_is_the_same_problem(name):
    """As of the transposed weights of GPT-2 and of fused experts; starts may be views, too."""
    gram, pattern = random_gram(12, "low-rank", 2), Unstructured(keep=6)
    mean = gram.diagonal().sqrt() / 2
    problem = LayerProblem(random_weight(4, 12, 1), gram, pattern, mean=mean)
    weight, wide = problem.weight.t().contiguous().t(), gram.repeat_interleave(2, 1)[:, ::2]
    view = LayerProblem(weight, wide, pattern, mean=mean.repeat_interleave(2)[::2])
    starts = AVAILABLE[name].capabilities.start != "ignored"
    start = solve(problem, "wanda").mask if starts else None
    strided = None if start is None else start.t().contiguous().t()
    expected = solve(problem, name, start=start, **in_process(name))
    found = solve(view, name, start=strided, **in_process(name))
    assert torch.equal(found.mask, expected.mask)
    assert torch.equal(found.objective, expected.objective)
    assert str(found.lower_bound) == str(expected.lower_bound)

"""Limits: what they hold, and that every solver keeps to them, its start included."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from clock import Clock
from strategies import random_gram, random_weight

from maskopt import LayerProblem, Limits, Progress, Status, Unstructured, solve, verify
from maskopt.errors import OptionError
from maskopt.limits import one_thread_pool, parse_bytes, torch_threads
from maskopt.model.options import PruneOptions
from maskopt.model.solving import solve_layer
from maskopt.solver import available_solvers
from maskopt.trace import (
    CycleTrace,
    EliminationTrace,
    RelaxTrace,
    SearchTrace,
    SplittingTrace,
    SwapTrace,
    Trace,
    TreeTrace,
)

SOLVERS = {name: info for name, info in available_solvers().items() if info.available}
#: solvers without steps that could be counted
ONE_PASS = ("magnitude", "wanda", "ria", "random", "worst", "elimination", "sparsegpt")
STEPPING = [name for name in SOLVERS if name not in ONE_PASS]


def layer(rows: int = 5, n: int = 12) -> LayerProblem:
    gram = random_gram(n, "low-rank", 2)
    mean = torch.linspace(-1, 1, n, dtype=torch.float64) * gram.diagonal().sqrt() / 2
    return LayerProblem(random_weight(rows, n, 1), gram, Unstructured(keep=n // 2), mean=mean)


def test_without_seconds_nothing_ends(clock: Clock) -> None:
    limits = Limits().begin()
    assert not limits.timed
    assert not limits.expired
    assert limits.left == math.inf
    assert limits.share(0.5) is limits


def test_the_clock_runs_from_begin_and_is_never_set_back(clock: Clock) -> None:
    limits = Limits(seconds=10)
    assert not limits.timed
    begun = limits.begin()
    assert begun.deadline == 111.0
    assert begun.left == 9.0
    assert begun.begin().deadline == 111.0
    clock.now = 110.0
    assert begun.expired
    assert begun.left == 0.0
    assert Limits(seconds=0).begin().expired


def test_a_share_is_of_what_is_left_and_never_longer(clock: Clock) -> None:
    begun = Limits(seconds=100).begin()
    half = begun.share(0.5)
    assert begun.deadline - 60 < half.deadline < begun.deadline - 40
    clock.now = begun.deadline + 5
    assert begun.share(0.5).expired


def test_what_a_listener_is_told() -> None:
    told: list[Progress] = []
    limits = Limits(on_progress=told.append)
    limits.report(1, 3, "moves", 5, 10)
    limits.quiet().report(2, 3)
    limits.report(3, 3)
    assert told == [Progress(1, 3, "moves", 5, 10), Progress(3, 3)]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 2**30),
        ("500MB", 500 * 10**6),
        ("1.5g", 1_500_000_000),
        (" 3 KiB ", 3072),
        ("17", 17),
        ("17b", 17),
    ],
)
def test_amounts_of_memory(text: str, size: int) -> None:
    assert parse_bytes(text) == size
    assert Limits(memory=text).bytes(5) == size
    assert Limits().bytes(5) == 5


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "8GiBB", "1e400", "nan", "eight"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(OptionError, match="no amount of memory"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("seconds", -1.0, "time_limit"),
        ("seconds", math.nan, "time_limit"),
        ("seconds", True, "time_limit"),
        ("seconds", "1", "time_limit"),
        ("memory", 0, "memory_limit"),
        ("memory", "0", "memory_limit"),
        ("memory", 1.5, "memory_limit"),
        ("threads", 0, "threads"),
        ("threads", 10**6, "threads"),
        ("threads", True, "threads"),
        ("seed", -1, "seed"),
        ("seed", 2**63, "seed"),
        ("seed", 0.5, "seed"),
    ],
)
def test_values_out_of_range(field: str, value: object, named: str) -> None:
    with pytest.raises(OptionError, match=named):
        Limits(**{field: value})  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers() -> None:
    limits = Limits(
        seconds=np.float32(1.5), memory=np.int64(7), threads=np.int32(2), seed=np.uint8(3)
    )  # type: ignore[arg-type]
    assert limits == Limits(seconds=1.5, memory=7, threads=2, seed=3)
    assert [type(getattr(limits, name)) for name in ("seconds", "seed")] == [float, int]
    with pytest.raises(OptionError, match="threads"):
        Limits(threads=np.bool_(True))  # type: ignore[arg-type]


def test_threads_are_as_before_afterwards() -> None:
    before = torch.get_num_threads()
    with torch_threads(before + 1) as threads:
        assert threads == torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError), torch_threads(before + 2):
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


def test_a_thread_of_a_pool_has_one_inside_torch_whatever_is_set_elsewhere() -> None:
    before = torch.get_num_threads()
    with one_thread_pool(1) as pool, torch_threads(before + 1):
        pool.submit(int).result()  # the thread is there
        torch.set_num_threads(before + 2)
        assert pool.submit(torch.get_num_threads).result() == 1


@pytest.mark.parametrize("name", SOLVERS)
def test_no_solver_leaves_torch_with_other_threads(name: str) -> None:
    """Asked of the solver itself: `solve` would put the number back."""
    problem = layer()
    before = torch.get_num_threads()
    can = SOLVERS[name].capabilities
    start = solve(problem, "wanda").mask if can.start == "needed" else None
    try:
        torch.set_num_threads(before + 1)
        SOLVERS[name].kind().run(problem, start, Limits().begin())  # type: ignore[misc]
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


#: passes of the mixing method between two looks at the clock
SWEEPS = 20
#: masks that enumeration looks at together
MASKS = 2**16


def steps(name: str, trace: Trace) -> int:
    """The most steps that any row went: each of them comes after a look at the clock.

    0 where one pass makes the masks, as those of most starts.
    """
    if isinstance(trace, SwapTrace):
        return int(trace.scans.max())
    if isinstance(trace, SearchTrace):
        assert trace.rounds is not None
        return int(trace.rounds.max())
    if isinstance(trace, RelaxTrace):
        return -(-int(trace.iterations.max()) // (SWEEPS if name == "sdp" else 1))
    if isinstance(trace, SplittingTrace):
        return int(trace.iterations.max())
    if isinstance(trace, EliminationTrace):
        return int(trace.rounds.max())
    if isinstance(trace, CycleTrace):
        return int(trace.swaps.max())
    if isinstance(trace, TreeTrace):
        return -(-int(trace.nodes.max()) // (MASKS if name == "exhaustive" else 1))
    assert type(trace) is Trace, f"steps of a {type(trace).__name__} are not counted"
    return 0


@pytest.mark.parametrize("name", SOLVERS)
def test_all_solvers_but_those_of_one_pass_tell_their_steps(name: str) -> None:
    assert (type(solve(layer(), name).trace) is Trace) == (name in ONE_PASS)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Trace]:
    """The traces of the starts that are made."""
    from maskopt import solver

    made: list[Trace] = []
    make = solver.make_start

    def taken_down(*arguments, **named):  # type: ignore[no-untyped-def]
        found = make(*arguments, **named)
        made.append(found.trace)
        return found

    monkeypatch.setattr(solver, "make_start", taken_down)
    return made


@pytest.mark.parametrize("name", STEPPING)
def test_without_time_there_is_one_step_at_most(
    name: str, clock: Clock, starts: list[Trace]
) -> None:
    problem = layer()
    solution = solve(problem, name, limits=Limits(seconds=0))
    verify(problem, solution)
    for trace in (solution.trace, *starts):
        assert steps(name, trace) <= 1, trace
        for counter in ("swaps", "moves", "scans"):
            count = getattr(trace, counter, None)
            if count is not None:
                assert int(count.sum()) == 0, counter


@pytest.mark.parametrize("seconds", [2, 5, 11])
@pytest.mark.parametrize("name", STEPPING)
def test_in_little_time_there_are_few_steps(
    name: str, seconds: int, clock: Clock, starts: list[Trace]
) -> None:
    """The clock goes on by a second at each look, so that no more steps than seconds can begin."""
    small = SOLVERS[name].capabilities.largest_n is not None or name == "exhaustive"
    problem = layer() if small else layer(n=40)
    # engines of others look at a clock of their own: here at whether there is time to begin
    apart = {"workers": 1} if name in ("gurobi", "highs", "scip") else {}
    solution = solve(problem, name, limits=Limits(seconds=seconds), **apart)
    verify(problem, solution)
    for trace in (solution.trace, *starts):
        assert steps(name, trace) <= seconds + 1, trace


def test_the_time_of_a_start_is_taken_from_that_of_the_search(clock: Clock) -> None:
    """`kswap` from `swap`, whose first round uses all of the time, makes no round of its own."""
    problem = layer(n=40)
    solution = solve(problem, "kswap", start="swap", limits=Limits(seconds=1))
    assert isinstance(solution.trace, SearchTrace)
    assert solution.trace.rounds is not None
    assert int(solution.trace.rounds.sum()) == 0
    assert set(solution.trace.stopped or ()) == {"yes"}


def test_in_a_model_too(clock: Clock) -> None:
    """Of a layer's time the start takes its part, and no more than all."""
    pattern = Unstructured(0.5)
    options = PruneOptions(pattern, "kswap", "swap", solver_options={"time_limit": 1})
    solved = solve_layer(layer(n=40), options)
    assert solved.start is not None
    assert Status.SWAP_OPTIMAL not in solved.start.status
    assert Status.SWAP_OPTIMAL not in solved.solution.status

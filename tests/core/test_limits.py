"""Limits: what they hold, and that every solver keeps to them, its start included."""

import math

import numpy as np
import pytest
import torch
from strategies import HALF, random_gram, random_weight

from maskopt import LayerProblem, Limits, Progress, Status, Unstructured, solve, verify
from maskopt.core.limits import one_thread_pool, parse_bytes, torch_threads
from maskopt.errors import OptionError
from maskopt.models.options.prune import PruneOptions
from maskopt.models.pruning.solving import solve_layer
from maskopt.protocol import solver
from maskopt.protocol.trace import Trace

SOLVERS = {name: info for name, info in solver.available_solvers().items() if info.available}
ENGINES = ("gurobi", "highs", "scip")
#: solvers without steps that could be counted
ONE_PASS = ("magnitude", "wanda", "ria", "random", "worst", "elimination", "sparsegpt")
STEPPING = [name for name in SOLVERS if name not in ONE_PASS]
#: what counts the steps of a trace, the first that it has: each of them comes after a look at the clock
COUNTERS = ("scans", "iterations", "nodes", "rounds", "swaps")
#: between two looks at the clock: passes of the mixing method, masks that enumeration takes together
BETWEEN = {"sdp": 20, "exhaustive": 2**16}


def layer(rows=5, n=12):
    gram = random_gram(n, "low-rank", 2)
    mean = torch.linspace(-1, 1, n, dtype=torch.float64) * gram.diagonal().sqrt() / 2
    return LayerProblem(random_weight(rows, n, 1), gram, Unstructured(keep=n // 2), mean=mean)


def test_the_clock_runs_from_begin_and_is_never_set_back(clock):
    limits = Limits(seconds=10)
    assert not limits.timed
    begun = limits.begin()
    assert (begun.deadline, begun.left, begun.begin().deadline) == (111.0, 9.0, 111.0)
    clock.now = 110.0
    assert begun.expired
    assert begun.left == 0.0
    assert Limits(seconds=0).begin().expired
    # a share is of what is left, and never longer
    begun = Limits(seconds=100).begin()
    assert begun.deadline - 60 < begun.share(0.5).deadline < begun.deadline - 40
    clock.now = begun.deadline + 5
    assert begun.share(0.5).expired
    endless = Limits().begin()
    assert not endless.timed
    assert not endless.expired
    assert endless.left == math.inf
    assert endless.share(0.5) is endless
    # what a listener hears
    heard = []
    limits = Limits(on_progress=heard.append)
    limits.report(1, 3, "moves", 5, 10)
    limits.quiet().report(2, 3)
    limits.report(3, 3)
    assert heard == [Progress(1, 3, "moves", 5, 10), Progress(3, 3)]


def test_values_in_and_out_of_range():
    for field, named, values in (
        ("seconds", "time_limit", [-1.0, math.nan, True, "1"]),
        ("memory", "memory_limit", [0, "0", 1.5]),
        ("threads", "threads", [0, 10**6, True, np.bool_(True)]),
        ("seed", "seed", [-1, 2**63, 0.5]),
    ):
        for value in values:
            with pytest.raises(OptionError, match=named):
                Limits(**{field: value})
    # numbers of numpy are numbers
    given = {"seconds": np.float32(1.5), "memory": np.int64(7), "threads": np.int32(2)}
    limits = Limits(**given, seed=np.uint8(3))
    assert limits == Limits(seconds=1.5, memory=7, threads=2, seed=3)
    assert [type(getattr(limits, name)) for name in ("seconds", "seed")] == [float, int]
    # amounts of memory are read from text
    sizes = {"8GiB": 8 * 2**30, "500MB": 500 * 10**6, "1.5g": 1_500_000_000, " 3 KiB ": 3072}
    for text, size in {**sizes, "17": 17, "17b": 17}.items():
        assert parse_bytes(text) == Limits(memory=text).bytes(5) == size
    assert Limits().bytes(5) == 5
    for text in ("", "GiB", "-1GiB", "8GiBB", "1e400", "nan", "eight"):
        with pytest.raises(OptionError, match="no amount of memory"):
            parse_bytes(text)


def test_threads_are_as_before_afterwards_and_one_in_a_pool_whatever_is_set_elsewhere():
    before = torch.get_num_threads()
    with torch_threads(before + 1) as threads:
        assert threads == torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError), torch_threads(before + 2):
        raise ZeroDivisionError
    assert torch.get_num_threads() == before
    with one_thread_pool(1) as pool, torch_threads(before + 1):
        pool.submit(int).result()  # the thread is there
        torch.set_num_threads(before + 2)
        assert pool.submit(torch.get_num_threads).result() == 1


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_leaves_torch_its_threads_and_counts_its_steps(name):
    """Asked of the solver itself: `solve` would put the number back."""
    problem = layer()
    before = torch.get_num_threads()
    needed = SOLVERS[name].capabilities.start == "needed"
    start = solve(problem, "wanda").mask if needed else None
    try:
        torch.set_num_threads(before + 1)
        found = SOLVERS[name].kind().run(problem, start, Limits().begin())
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert (found.trace == Trace()) == (name in ONE_PASS)


def steps(name, found):
    """The most steps that any row went; 0 where one pass makes the masks."""
    counts = [count for c in COUNTERS if (count := getattr(found, c)) is not None]
    most = int(counts[0].max()) if counts else 0
    return -(-most // BETWEEN.get(name, 1))


TIMES = [
    pytest.param(name, seconds, marks=[pytest.mark.slow] * (seconds > 2))
    for name in STEPPING
    for seconds in (0, 2, 5, 11)
    if name not in ENGINES or seconds < 5 or (name, seconds) == ("scip", 11)
]


@pytest.mark.parametrize(("name", "seconds"), TIMES)
def test_in_little_time_there_are_few_steps(name, seconds, clock, monkeypatch):
    """The clock goes on by a second at each look, so that no more steps than seconds can begin."""
    starts, make = [], solver.make_start

    def taken_down(*arguments, **named):
        starts.append(found := make(*arguments, **named))
        return found

    monkeypatch.setattr(solver, "make_start", taken_down)
    can = SOLVERS[name].capabilities
    small = seconds == 0 or can.largest_n is not None or name == "exhaustive"
    problem = layer() if small else layer(n=40)
    # engines of others look at a clock of their own: here at whether there is time to begin
    apart = {"workers": 1} if seconds and name in ENGINES else {}
    solution = solve(problem, name, limits=Limits(seconds=seconds), **apart)
    verify(problem, solution)
    for found in (solution.trace, *(start.trace for start in starts)):
        assert steps(name, found) <= seconds + 1, found
        for counter in ("swaps", "moves", "scans") if seconds == 0 else ():
            count = getattr(found, counter, None)
            assert count is None or int(count.sum()) == 0, counter


def test_the_time_of_a_start_is_taken_from_that_of_the_search_in_a_model_too(clock):
    """`kswap` from `swap`, whose first round uses all of the time, makes no round of its own."""
    solution = solve(layer(n=40), "kswap", start="swap", limits=Limits(seconds=1))
    assert (int(solution.trace.rounds.sum()), set(solution.trace.stopped)) == (0, {"yes"})
    # of a layer's time the start takes its part, and no more than all
    limited = {"solver_options": {"time_limit": 1}}
    solved = solve_layer(layer(n=40), PruneOptions(HALF, "kswap", "swap", **limited))
    assert solved.start is not None
    assert Status.SWAP_OPTIMAL not in solved.start.status
    assert Status.SWAP_OPTIMAL not in solved.solution.status

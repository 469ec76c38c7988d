"""Solvers as values: starts, options, limits; and the package of docs/extending.md, installed and used."""

import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from typing import ClassVar
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from commands import ROOT, shows
from forging import fails
from strategies import HALF, drawn, random_gram, verified

from maskopt import LayerProblem, LeastSquaresUpdate, Solution, Status, Unstructured, solve
from maskopt.core.fields import build, check_options, option, options_of
from maskopt.core.limits import Limits, Progress, parse_bytes
from maskopt.core.threads import one_thread_pool, torch_threads
from maskopt.errors import MaskoptError, OptionError, PatternError, SolverError, WarmStartError
from maskopt.models.options.prune import PruneOptions
from maskopt.models.pruning.prune_layer import solve_layer
from maskopt.protocol import solver as protocol
from maskopt.protocol.bounds import REGISTRY as BOUNDS, available_bounds
from maskopt.protocol.solver import REGISTRY as SOLVERS, Capabilities, Solver, make_solver
from maskopt.protocol.trace import Trace
from maskopt.solvers import DSnoT, Relax, Ria, Swap, Tabu, Wanda

PROBLEM = drawn(3, 24, pattern=Unstructured(keep=10))
EVERYTHING = torch.ones(3, 24).bool()
AVAILABLE = {name: info for name, info in protocol.available_solvers().items() if info.available}
ENGINES = ("gurobi", "highs", "scip")
#: solvers without steps that could be counted
ONE_PASS = ("magnitude", "wanda", "ria", "random", "worst", "elimination", "sparsegpt")
STEPPING = [name for name in AVAILABLE if name not in ONE_PASS]
#: what counts the steps of a trace, the first that it has: each of them comes after a look at the clock
COUNTERS = ("scans", "iterations", "nodes", "rounds", "swaps")
#: between two looks at the clock: passes of the mixing method, masks that enumeration takes together
BETWEEN = {"sdp": 20, "exhaustive": 2**16}
TIMES = [
    pytest.param(name, seconds, marks=[pytest.mark.slow] * (seconds > 2))
    for name in STEPPING
    for seconds in (0, 2, 5, 11)
    if name not in ENGINES or seconds < 5 or (name, seconds) == ("scip", 11)
]


@dataclass(frozen=True)
class Spy(Solver):
    """Answers with its start, and remembers what it was given."""

    name: ClassVar[str] = "spy"
    capabilities: ClassVar[Capabilities] = Capabilities(start="needed", default_start="wanda")
    given: ClassVar[list] = []

    def run(self, problem, start, limits):
        self.given.append((start, limits))
        return Solution.of(problem, solve(problem, "magnitude").mask if start is None else start)


def spy(needs, default=None, name="spy"):
    can = Capabilities(start=needs, default_start=default)
    Spy.given.clear()
    return type("Spy", (Spy,), {"capabilities": can, "name": name})()


def answering(answer):
    return type("Answers", (Spy,), {"name": "answers", "run": lambda self, problem, *_: answer})()


def test_by_value_and_by_name_are_the_same_and_values_are_frozen_equal_and_hashable():
    limits = Limits(seconds=600, seed=4, threads=2)
    by_value = solve(PROBLEM, Tabu(moves=50), start=Relax(), limits=limits)
    words = {"moves": 50, "time_limit": 600, "seed": 4, "threads": 2}
    by_name = solve(PROBLEM, "tabu", start="relax", **words)
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
    fails(OptionError, "is no solver", make_solver, object())
    fails(PatternError, "not '2:4'", LayerProblem, PROBLEM.weight, PROBLEM.gram, "2:4")


def test_a_start_is_made_where_it_is_used_shares_one_clock_and_is_not_heard():
    solve(PROBLEM, spy("needed", "wanda"))
    assert torch.equal(Spy.given[0][0], solve(PROBLEM, Wanda()).mask)
    for needs, start, used in (
        ("optional", None, False), ("ignored", None, False), ("optional", "wanda", True),
        ("ignored", "wanda", False),
    ):  # fmt: skip
        solve(PROBLEM, spy(needs), start=start)
        assert (Spy.given[0][0] is not None) == used
    heard = []
    inner, outer = spy("needed", "wanda", "other"), spy("needed")
    solve(PROBLEM, outer, start=inner, time_limit=60, on_progress=heard.append)
    (_, inner), (_, outer) = Spy.given
    assert inner.deadline == outer.deadline < float("inf")
    assert (inner.on_progress is None, outer.on_progress is None) == (True, False)
    solve(PROBLEM, "swap", on_progress=heard.append)
    assert heard[-1] == Progress(3, 3)
    assert all(isinstance(event, Progress) and event.total == 3 for event in heard)


@pytest.mark.parametrize("name", AVAILABLE)
def test_starts_are_as_declared_and_a_view_with_other_strides_is_the_same_problem(name):
    """Views are those of the transposed weights of GPT-2 and of fused experts."""
    gram, pattern = random_gram(8, "full", 2), Unstructured(keep=4)
    mean = gram.diagonal().sqrt() / 2
    problem = drawn(3, 8, pattern=pattern, moments=mean)
    can = AVAILABLE[name].capabilities
    assert (can.default_start is not None) == (can.start == "needed")
    start = solve(problem, "random", seed=1).mask
    # exact solvers of a few tiny rows start no worker processes
    how = {"workers": 0} if "workers" in {f.name for f in fields(make_solver(name))} else {}
    found, without = solve(problem, name, start=start, **how), solve(problem, name, **how)
    if can.start == "ignored":
        assert torch.equal(found.mask, without.mask)
    elif name != "dsnot":  # looks at mean outputs, and can raise the objective
        slack = 1e-12 * problem.diagonal_mass()
        assert bool((found.objective <= problem.objective(start) + slack).all())
    weight, wide = problem.weight.t().contiguous().t(), gram.repeat_interleave(2, 1)[:, ::2]
    view = LayerProblem(weight, wide, pattern, moments=mean.repeat_interleave(2)[::2])
    strided = solve(view, name, start=start.t().contiguous().t(), **how)
    assert torch.equal(strided.mask, found.mask)
    assert torch.equal(strided.objective, found.objective)
    assert str(strided.lower_bound) == str(found.lower_bound)


def test_make_start_leaves_out_what_the_next_solver_does_anyway():
    start = protocol.make_start(PROBLEM, "relax", Limits(seed=3))
    assert set(map(str, start.status)) == {"feasible"}
    assert start.certificate is None
    assert Relax(max_iterations=60).as_start(PROBLEM)[0].max_iterations == 60
    assert not Relax().as_start(PROBLEM)[0].refine
    assert DSnoT().as_start(PROBLEM)[0] == DSnoT()
    problem = PROBLEM.with_update(LeastSquaresUpdate(0.2))
    for name in ("admm", "obs", "sparsegpt", "wanda", "swap"):
        start = protocol.make_start(problem, name)
        assert torch.equal(start.mask, solve(problem, name).mask)
        assert torch.equal(start.objective, PROBLEM.objective(start.mask)) == (name != "swap")


# --- options
@dataclass(frozen=True)
class Sample:
    count: int | None = option(3, "how many", unit="pieces", least=1)
    share: float = option(0.5, "which part", least=0, below=1)
    word: str = option("a", "which", choices=("a", "b"))
    names: tuple[str, ...] = option(("x",), "whose")
    loud: bool = option(False, "whether")
    above: float = option(1.0, "how much", least=0)
    plain: int = 7

    def __post_init__(self) -> None:
        check_options(self, "sample")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", 0, " must be a whole number or None ≥ 1, not 0"),
        ("count", np.float64(3), " must be a whole number or None ≥ 1, not 3.0"),
        ("share", 1.0, r" must be a number \[0, 1\), not 1.0"),
        ("above", float("inf"), " must be a number ≥ 0, not inf"),
        ("word", "c", " must be one of: a, b; not 'c'"),
        ("names", "x", " must be a list of names"),
        ("loud", 1, " must be true or false"),
        *(("count", bad, "") for bad in (1.5, True, "3", np.bool_(True))),
        *(("share", bad, "") for bad in (-0.1, float("nan"), None)),
        ("word", 1, ""), ("names", (1,), ""),
        ("above", np.float32("nan"), ""), ("above", np.ones(1), ""),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(name, value, message):
    fails(OptionError, name + message, Sample, **{name: value})


def test_what_fits_is_kept_numbers_of_numpy_become_those_of_python_and_options_are_listed():
    made = Sample(count=None, share=0, word="b", names=["y", "z"], loud=True, plain="anything")
    assert (made.count, made.share, made.word, made.loud) == (None, 0, "b", True)
    assert (made.names, made.plain) == (("y", "z"), "anything")
    hash(made)
    given = {"count": np.int64(4), "share": np.float32(0.25), "loud": np.bool_(True)}
    made = Sample(**given, word=np.str_("b"))
    assert made == Sample(count=4, share=0.25, word="b", loud=True)
    assert [type(getattr(made, name)) for name in given] == [int, float, bool]
    assert make_solver("swap", max_swaps=np.arange(9)[3]).max_swaps == 3
    near = r"thing 'sample' has no option 'shar'; did you mean 'share'"
    for kind, wrong, message in ((Sample, "shar", near), (object, "x", "it has none")):
        fails(OptionError, message, build, kind, "sample", {wrong: 1}, "thing")
    ranges = {"count": "≥ 1", "share": "[0, 1)", "word": "a or b", "names": "", "loud": ""}
    assert [(o.name, o.range) for o in options_of(Sample)] == [*ranges.items(), ("above", "≥ 0")]


@pytest.mark.parametrize("registry", [SOLVERS, BOUNDS], ids=["solvers", "bounds"])
def test_every_backend_documents_every_option_in_one_line(registry):
    for name in registry.names():
        kind = registry.find(name)
        assert kind.__doc__, name
        assert [o.name for o in options_of(kind)] == [f.name for f in fields(kind)], name
        for known in options_of(kind):
            assert 3 <= len(known.help) <= 160, (name, known)
            assert "\n" not in known.help, (name, known)
            numeric = "number" in known.type
            assert not numeric or known.range or known.unit, (name, known.name, "unit or range")


def test_a_backend_is_asked_once_whether_it_runs_and_hides_no_other(monkeypatch):
    broken = Mock(side_effect=OSError("licence server is silent"))
    assert {"swap", "scip"} <= set(protocol.available_solvers())
    assert {"sdp", "box"} <= set(available_bounds())
    monkeypatch.setattr("maskopt.solvers.exact.gurobi.Gurobi.unavailable", staticmethod(broken))
    found = protocol.available_solvers()
    assert found["gurobi"].unavailable == "OSError: licence server is silent"
    assert found["swap"].available
    assert all(info.available == (info.unavailable is None) for info in found.values())
    asked = []
    unavailable = staticmethod(lambda: asked.append(1))
    monkeypatch.setattr("maskopt.solvers.swap.solver.Swap.unavailable", unavailable)
    make_solver("swap")
    assert asked == [1]


# --- limits


def biased(rows=5, n=12):
    size = random_gram(n, "low-rank", 2).diagonal().sqrt()
    mean = torch.linspace(-1, 1, n, dtype=torch.float64) * size / 2
    return drawn(rows, n, "low-rank", moments=mean)


def test_the_clock_runs_from_begin_and_is_never_set_back(clock):
    limits = Limits(seconds=10)
    assert not limits.timed
    begun = limits.begin()
    assert (begun.deadline, begun.left, begun.begin().deadline) == (111.0, 9.0, 111.0)
    clock.now = 110.0
    assert (begun.expired, begun.left) == (True, 0.0)
    assert Limits(seconds=0).begin().expired
    # a share is of what is left, and never longer
    begun = Limits(seconds=100).begin()
    assert begun.deadline - 60 < begun.share(0.5).deadline < begun.deadline - 40
    clock.now = begun.deadline + 5
    assert begun.share(0.5).expired
    endless = Limits().begin()
    assert (endless.timed, endless.expired, endless.left) == (False, False, math.inf)
    assert endless.share(0.5) is endless
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
            fails(OptionError, named, Limits, **{field: value})
    given = {"seconds": np.float32(1.5), "memory": np.int64(7), "threads": np.int32(2)}
    limits = Limits(**given, seed=np.uint8(3))
    assert limits == Limits(seconds=1.5, memory=7, threads=2, seed=3)
    assert [type(getattr(limits, name)) for name in ("seconds", "seed")] == [float, int]
    sizes = {"8GiB": 8 * 2**30, "500MB": 500 * 10**6, "1.5g": 1_500_000_000, " 3 KiB ": 3072}
    for text, size in {**sizes, "17": 17, "17b": 17}.items():
        assert parse_bytes(text) == Limits(memory=text).bytes(5) == size
    assert Limits().bytes(5) == 5
    for text in ("", "GiB", "-1GiB", "8GiBB", "1e400", "nan", "eight"):
        fails(OptionError, "no amount of memory", parse_bytes, text)


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


@pytest.mark.parametrize("name", AVAILABLE)
def test_a_solver_leaves_torch_its_threads_and_counts_its_steps(name):
    """Asked of the solver itself: `solve` would put the number back."""
    problem = biased()
    before, needed = torch.get_num_threads(), AVAILABLE[name].capabilities.start == "needed"
    start = solve(problem, "wanda").mask if needed else None
    try:
        torch.set_num_threads(before + 1)
        found = AVAILABLE[name].kind().run(problem, start, Limits().begin())
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert (found.trace == Trace()) == (name in ONE_PASS)


def steps(name, found):
    """The most steps that any row went; 0 where one pass makes the masks."""
    counts = [count for c in COUNTERS if (count := getattr(found, c)) is not None]
    most = int(counts[0].max()) if counts else 0
    return -(-most // BETWEEN.get(name, 1))


@pytest.mark.parametrize(("name", "seconds"), TIMES)
def test_in_little_time_there_are_few_steps(name, seconds, clock, monkeypatch):
    """The clock goes on by a second at each look, so that no more steps than seconds can begin."""
    starts, make = [], protocol.make_start

    def taken_down(*arguments, **named):
        starts.append(found := make(*arguments, **named))
        return found

    monkeypatch.setattr(protocol, "make_start", taken_down)
    can = AVAILABLE[name].capabilities
    small = seconds == 0 or can.largest_n is not None or name == "exhaustive"
    problem = biased() if small else biased(n=40)
    # engines of others look at a clock of their own: here at whether there is time to begin
    apart = {"workers": 1} if seconds and name in ENGINES else {}
    solution = verified(problem, name, limits=Limits(seconds=seconds), **apart)
    for found in (solution.trace, *(start.trace for start in starts)):
        assert steps(name, found) <= seconds + 1, found
        for counter in ("swaps", "moves", "scans") if seconds == 0 else ():
            count = getattr(found, counter, None)
            assert count is None or int(count.sum()) == 0, counter


def test_the_time_of_a_start_is_taken_from_that_of_the_search_in_a_model_too(clock):
    """`tabu` from `swap`, whose first round uses all of the time, makes no move of its own."""
    solution = solve(biased(n=40), "tabu", start="swap", limits=Limits(seconds=1))
    assert (int(solution.trace.moves.sum()), set(solution.trace.stopped)) == (0, {"yes"})
    # of a layer's time the start takes its part, and no more than all
    limited = {"solver_options": {"time_limit": 1}}
    found = solve_layer(biased(n=40), PruneOptions(HALF, "tabu", "swap", **limited))
    assert not any(Status.SWAP_OPTIMAL in solution.status for solution in found)


# --- another distribution
@pytest.mark.slow
def test_a_backend_of_another_distribution(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"

    def python(*words):
        command = [sys.executable, *map(str, words)]
        more = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(site)}}
        done = subprocess.run(command, capture_output=True, text=True, **more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    page = (ROOT / "docs" / "extending.md").read_text()
    for name, text in re.findall(r'```\w+ title="(\S+)"\n(.*?)```', page, re.DOTALL):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    assert len((source / "exchange" / "__init__.py").read_text().strip().splitlines()) <= 45
    # nothing is fetched: setuptools is that of the tests
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    python("-m", "pip", "install", "-q", *offline, "--target", site, source)
    shows(python(source / "use.py"), "8 rows checked", "random_exchange")
    main = "from maskopt.cli import main; main()"
    assert "tries" in python("-c", main, "solvers", "random_exchange")

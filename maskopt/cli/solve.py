"""`maskopt solve`: masks of an instance, and proofs of optimality; `maskopt solvers`: registered solvers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from maskopt.checks.verification import CHECKED, CLAIMS, EXACT, Require, verify
from maskopt.cli.command import CARDINALITY, JOBS, MAXIMIZE, OVERWRITE, command, given
from maskopt.cli.console import INTERRUPTED, screen, written
from maskopt.cli.view import view
from maskopt.core.clock import clock
from maskopt.core.fields import OUTPUT, argument, option, options_of
from maskopt.core.files import atomic_write, check_writable
from maskopt.core.problem import LayerProblem, RowProblem
from maskopt.errors import OptionError
from maskopt.experiments.prove import BRANCH, SECONDS, SMALL, prove as prove_rows, search
from maskopt.instances.formats import load_problem
from maskopt.protocol.bounds import available_bounds
from maskopt.protocol.solution import Solution, Status
from maskopt.protocol.solver import REGISTRY, available_solvers, limits_of

_JSON = ".json"


@command(example="maskopt solve Q.npy --cardinality 20 --prove --output proof.npz")
def solve(
    instance: Path = argument(
        "A matrix (.npy, .npz, .csv, .mtx; with --cardinality), another quadratic (.dat, .mc, .mdp, .qplib), "
        "or a layer or row (.npz, see `maskopt export`)."
    ),
    solver: str | None = option(
        None,
        f"See `maskopt solvers`. Default: branch up to {SMALL} inputs and with --prove; sdp and tabu for one "
        "larger row, swap for a larger layer.",
    ),
    start: str | None = option(None, "Initial mask: the name of a solver, or a solution .npz."),
    solver_options: Mapping[str, Any] = option(dict, "Solver option; may be repeated."),
    prove: bool = option(
        False,
        "Prove the optimum of every row by branch and bound, and store the proof trees. Finished rows are "
        "kept: after Ctrl-C the same command continues. The exit status is 1 if a row is not proven.",
    ),
    jobs: int = JOBS,
    time_limit: float | None = option(
        None, f"Seconds for all rows. Default: {SECONDS:.0f} without --solver and --prove.", least=0
    ),
    memory_limit: str | None = option(
        None, "Maximum memory in addition to the instance, e.g. 2GiB.", unit="bytes"
    ),
    seed: int = option(0, "Random seed.", least=0),
    cardinality: int | None = CARDINALITY,
    maximize: bool = MAXIMIZE,
    output: Path | None = option(
        None, "File for masks, bounds and proofs (.npz), or for the chosen set (.json).", OUTPUT
    ),
    overwrite: bool = OVERWRITE,
) -> None:
    """Minimize xᵀQx over sets of a given size, or choose the masks of every row of an instance.

    `maskopt verify INSTANCE SOLUTION` checks the result, including every leaf of each proof tree.
    """
    if output is not None:
        check_writable(output, overwrite=overwrite, instance=instance, start=start)
    _check_prove(prove, solver, jobs)
    problem = load_problem(instance, cardinality, maximize)
    if output and output.suffix == _JSON and (prove or problem.as_layer().rows > 1):
        raise OptionError(f"{output}: proofs and several rows are written as .npz")
    begin = Solution.load(Path(start)).mask if start and Path(start).is_file() else start
    with view() as shown:
        asked = given(time_limit=time_limit, memory_limit=memory_limit, seed=seed or None)
        asked["on_progress"] = lambda x: shown.show(x.step or "rows", x.done, x.total)
        limits, own = limits_of(None, {**asked, **solver_options})
        how: dict[str, Any] = {"start": begin, "limits": limits}
        if prove:
            how |= {"jobs": jobs, "on_progress": partial(shown.show, "rows proven")}
            solution = prove_rows(problem, output, **how, **own)
        else:
            solution = search(problem, solver, **how, **own)
            _write(solution, output)
    _show(problem, solution)
    proven = set(solution.status) == {Status.OPTIMAL}
    if not (solver or prove or proven or limits.seconds) and solution.solver == BRANCH:
        screen.print(f"not proven within {SECONDS:.0f} s; --time-limit or --prove gives it more")
    written(output and f"{output}{_trees(solution)}")
    if solution.trace.interrupted or (prove and not proven):
        raise typer.Exit(INTERRUPTED if solution.trace.interrupted else 1)


def _check_prove(prove: bool, solver: str | None, jobs: int) -> None:
    """Raise OptionError for options that go with a proof only, or not with one."""
    if prove and solver not in (None, BRANCH):
        raise OptionError(f"`prove` takes the solver {BRANCH}, not {solver}")
    if jobs != 1 and not prove:
        raise OptionError("`jobs` is for `prove`")


def check(
    instance: Path, solution: Path, require: Require, cardinality: int | None, maximize: bool
) -> None:
    """Check a solution and print the result.

    Every leaf of a proof is checked in float64, by code that no search shares. VerificationError: a claim
    does not hold, or is of a trusted solver where only checked ones are allowed.
    """
    problem, found = load_problem(instance, cardinality, maximize), Solution.load(solution)
    if found.proof is not None and require == CLAIMS:
        require = CHECKED
    began = clock()
    result = verify(problem, found, require=require)
    seconds = clock() - began
    _show(problem, found)
    exactly = " in exact arithmetic" if require == EXACT else ""
    screen.print(
        f"{solution}: holds: {result}{_trees(found)}; checked{exactly} in {seconds:.3g} s, "
        f"found in {found.seconds:.3g} s",
        soft_wrap=True,
    )


def _trees(solution: Solution) -> str:
    """Describe the number of rows that trees prove, and their size; empty for a solution without trees."""
    trees = [tree for tree in solution.proof or () if tree is not None]
    leaves, size = sum(tree.leaves for tree in trees), sum(tree.nbytes for tree in trees)
    proven = sum(status is Status.OPTIMAL for status in solution.status)
    if not trees:
        return ""
    return (
        f"; {proven} of {len(solution.status)} rows proven optimal; {len(trees)} trees, "
        f"{leaves} leaves, {size / 1e6:.3g} MB"
    )


def _show(problem: LayerProblem | RowProblem, solution: Solution) -> None:
    for line in (repr(problem), *solution.summary().splitlines()):
        screen.print(line, soft_wrap=True)


def _write(solution: Solution, output: Path | None) -> None:
    """Write a solution; as JSON one row in the caller's units, with null for numbers that are not finite."""
    if output is None:
        return
    if output.suffix != _JSON:
        return solution.save(output)
    numbers = {name: getattr(solution, name) for name in ("value", "bound", "gap", "seconds")}
    known = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
    words = {"status": str(solution.status[0]), "solver": solution.solver}
    text = json.dumps({"selected": solution.selected.tolist(), **known, **words}) + "\n"
    with atomic_write(output) as file:
        file.write(text.encode())


_HEADINGS = ("solver", "patterns", "device", "start", "proves", "n up to", "also", "note")
#: terminal columns that the whole table needs; columns that a narrower one leaves out
_WIDE, _LEFT_OUT = 110, ("patterns", "device", "start", "also")


@command(example="maskopt solvers swap")
def solvers(
    name: str | None = argument("Solver whose options are listed.", None),
) -> None:
    """List solvers and bounds with what each supports; or the options of one solver."""
    if name is not None:
        screen.print(_options(name))
        return
    screen.print(_solvers())
    screen.print(_bounds())


def _solvers() -> Table:
    """Return the table of solvers; a narrow terminal leaves out columns in which most solvers agree."""
    narrow = screen.width < _WIDE
    shown = [heading for heading in _HEADINGS if not (narrow and heading in _LEFT_OUT)]
    table = _columns(shown, shown[1:] if narrow else ["note"])
    for info in available_solvers().values():
        can = info.capabilities
        also = (("update", can.update), ("shared budget", can.shared_budget))
        cells = {
            "solver": info.name,
            "patterns": "all" if len(can.patterns) == 2 else can.patterns[0],
            "device": ", ".join(can.devices),
            "start": f"{can.start}, {can.default_start}" if can.default_start else can.start,
            "proves": can.proves,
            "n up to": "any" if can.largest_n is None else str(can.largest_n),
            "also": ", ".join(word for word, has in also if has),
            "note": can.note if info.available else f"unavailable: {info.unavailable}",
        }
        table.add_row(*(cells[heading] for heading in shown))
    return table


def _columns(headings: Sequence[str], wrapped: Sequence[str], **how: Any) -> Table:
    table = Table(**how)
    for heading in headings:
        table.add_column(heading, no_wrap=heading not in wrapped, overflow="fold")
    return table


def _bounds() -> Table:
    table = _columns(("bound", "n up to", "note"), ["note"])
    for info in available_bounds().values():
        n, note = (getattr(info.kind, name, "") for name in ("largest_n", "note"))
        note = note if info.available else f"unavailable: {info.unavailable}"
        table.add_row(info.name, str(n or "any"), note)
    return table


def _options(name: str) -> Table:
    headings = ("option", "default", "may be", "unit", "meaning")
    table = _columns(headings, headings[1:], title=f"{name}: options", title_justify="left")
    for one in options_of(REGISTRY.find(name)):
        may = " ".join(part for part in (one.type, one.range) if part)
        table.add_row(one.name, str(one.default), may, one.unit, one.help)
    return table

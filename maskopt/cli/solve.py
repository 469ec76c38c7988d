"""`maskopt solve`: masks of an instance in a file, with a proof of optimality on request."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from maskopt.checks.verification import CHECKED, CLAIMS, EXACT, Require, verify
from maskopt.cli.command import CARDINALITY, OVERWRITE, command
from maskopt.cli.console import INTERRUPTED, NO_BOUND, make_table, screen
from maskopt.cli.view import view
from maskopt.core.fields import OUTPUT, REQUIRED, option
from maskopt.core.files import check_writable
from maskopt.core.limits import Limits, clock
from maskopt.core.problem import LayerProblem, RowProblem
from maskopt.core.units import OriginalValues
from maskopt.errors import OptionError
from maskopt.experiments.prove import BRANCH, prove as prove_rows
from maskopt.instances.formats import load_problem
from maskopt.protocol.solution import Solution, Status, is_bounded
from maskopt.protocol.solver import limits_of, make_solver, solve as library


@command(example="maskopt solve row.npz --prove --output proof.npz")
def solve(
    instance: Path = option(
        REQUIRED,
        "Instance: weights and Gram matrix of a layer or a row (.npz, see `maskopt export`), or a quadratic "
        "problem (.dat, .mc, .mdp, .qplib).",
        argument=True,
    ),
    solver: str | None = option(
        None, "See `maskopt solvers`. Default: swap, and branch with --prove."
    ),
    start: str | None = option(None, "Initial mask: the name of a solver, or a solution .npz."),
    solver_options: Mapping[str, Any] = option(dict, "Solver option; may be repeated."),
    prove: bool = option(
        False,
        "Prove the optimum of every row by branch and bound, and store the proof trees. Finished rows are "
        "kept: after Ctrl-C the same command continues. The exit status is 1 if a row is not proven.",
    ),
    jobs: int = option(-1, "Number of rows at a time; −1: one per core.", needs=("prove",)),
    time_limit: float | None = option(None, "Seconds for all rows, the start included.", least=0),
    memory_limit: str | None = option(
        None, "Maximum memory in addition to the instance, e.g. 2GiB.", unit="bytes"
    ),
    seed: int = option(0, "Random seed.", least=0),
    cardinality: int | None = CARDINALITY,
    output: Path = option(
        REQUIRED, "File for masks, bounds, certificates and proof trees; .npz.", OUTPUT
    ),
    overwrite: bool = OVERWRITE,
) -> None:
    """Solve every row of an instance; write masks, bounds and certificates to one file.

    `maskopt verify INSTANCE SOLUTION` checks the result, including every leaf of each proof tree.
    """
    check_writable(output, overwrite=overwrite, instance=instance, start=start)
    if prove and solver not in (None, BRANCH):
        raise OptionError(f"`prove` takes the solver {BRANCH}, not {solver}")
    if jobs != -1 and not prove:
        raise OptionError("`jobs` is for `prove`")
    problem = load_problem(instance, cardinality)
    shared, own = limits_of(None, solver_options)
    begin = Solution.load(Path(start)).mask if start and Path(start).is_file() else start
    with view() as shown:
        limits = Limits(
            shared.seconds if time_limit is None else time_limit,
            shared.memory if memory_limit is None else memory_limit,
            shared.threads,
            seed or shared.seed,
            lambda event: shown.show(event.step or "rows", event.done, event.total),
        )
        how: dict[str, Any] = {"start": begin, "limits": limits}
        if prove:
            how |= {"jobs": jobs, **own}
            report = partial(shown.show, "rows proven")
            solution = prove_rows(problem, output, on_progress=report, **how)
        else:
            solution = library(problem, make_solver(solver or "swap", **own), **how)
            solution.save(output)
    screen.print(solution_table(problem, solution))
    screen.print(f"written: {output}{_trees(solution)}", soft_wrap=True)
    if solution.trace.interrupted:
        raise typer.Exit(INTERRUPTED)
    if prove and any(status is not Status.OPTIMAL for status in solution.status):
        raise typer.Exit(1)


def check(instance: Path, solution: Path, require: Require, cardinality: int | None = None) -> None:
    """Check a solution and print the result; every leaf of a proof is checked in float64, by code that
    no search shares. Raises VerificationError: a claim does not hold, or is of a trusted solver where only
    checked ones are allowed."""
    problem, found = load_problem(instance, cardinality), Solution.load(solution)
    if found.proof is not None and require == CLAIMS:
        require = CHECKED
    began = clock()
    result = verify(problem, found, require=require)
    seconds = clock() - began
    screen.print(solution_table(problem, found))
    exactly = " in exact arithmetic" if require == EXACT else ""
    screen.print(
        f"{solution}: holds: {result}{_trees(found)}; checked{exactly} in {seconds:.3g} s, "
        f"found in {found.seconds:.3g} s",
        soft_wrap=True,
    )


def _trees(solution: Solution) -> str:
    """Number of rows that trees prove, and their size; empty for a solution without trees."""
    trees = [tree for tree in (solution.proof.rows if solution.proof else ()) if tree is not None]
    leaves, size = sum(tree.leaves for tree in trees), sum(tree.nbytes for tree in trees)
    proven = sum(status is Status.OPTIMAL for status in solution.status)
    if not trees:
        return ""
    return (
        f"; {proven} of {len(solution.status)} rows proven optimal; {len(trees)} trees, "
        f"{leaves} leaves, {size / 1e6:.3g} MB"
    )


def solution_table(problem: LayerProblem | RowProblem, solution: Solution) -> Table:
    """Statuses, objective and bound, summed over rows by status, with ω under a shared budget; of a row with
    original units, its value in them."""
    if isinstance(problem, RowProblem) and problem.as_layer().units is not None:
        return _posed_table(problem, solution, "at most" if problem.maximised else "at least")
    headings = ("status", "rows", "objective", "bound", "gap")
    table = make_table(*headings, title=repr(problem), title_justify="left")
    counts = problem.as_layer().shares.to(solution.objective)
    for status in dict.fromkeys(solution.status):
        rows = [i for i, s in enumerate(solution.status) if s == status]
        objective, bound = (
            float(counts[rows] @ x[rows]) for x in (solution.objective, solution.lower_bound)
        )
        cells = [f"{bound:.6g}", f"{OriginalValues.of(objective, bound).gap:.2%}"]
        known = is_bounded(objective, bound, status)
        cells = cells if known else [*NO_BOUND]
        table.add_row(str(status), str(len(rows)), f"{objective:.6g}", *cells)
    return table


def _posed_table(problem: RowProblem, solution: Solution, side: str) -> Table:
    """In original units."""
    objective, lower = float(solution.objective[0]), float(solution.lower_bound[0])
    values = problem.to_original_units(objective, lower)
    cells = [f"{values.bound:.9g}", f"{values.gap:.2%}"]
    known = is_bounded(objective, lower, solution.status[0])
    headings = ("status", "value", side, "gap")
    table = make_table(*headings, title=repr(problem), title_justify="left")
    table.add_row(str(solution.status[0]), f"{values.value:.9g}", *(cells if known else NO_BOUND))
    return table

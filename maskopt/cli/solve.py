"""`maskopt solve`: masks of an instance, with what proves them, in a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from maskopt.cli.cells import NO_BOUND
from maskopt.cli.console import INTERRUPTED, output
from maskopt.cli.parameters import Overwrite, Select, read_solver_options
from maskopt.cli.view import view
from maskopt.files import check_writable
from maskopt.formats import load_problem
from maskopt.limits import Limits, Progress, parse_bytes
from maskopt.problem import LayerProblem, RowProblem
from maskopt.solution import Solution, is_bounded
from maskopt.solver import Solver, limits_of, make_solver
from maskopt.solver import solve as library
from maskopt.units import Posed
from maskopt.verification import EXACT, Require, verify


def solve(
    instance: Annotated[
        Path, typer.Argument(help="A layer or a row, .npz; .dat, .mc, .mdp, .qplib.")
    ],
    out: Annotated[Path, typer.Option("--output", help="File for masks and proof, .npz.")],
    solver: Annotated[str, typer.Option(help="See `maskopt solvers`.")] = "swap",
    start: Annotated[
        str | None,
        typer.Option("--start", "--warm-start", help="The solver that makes the start."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="Of the solver, NAME=VALUE; may be repeated."),
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option(min=0, help="Seconds, the start included.")
    ] = None,
    memory_limit: Annotated[
        str | None, typer.Option(help="Beyond the instance, e.g. 2GiB.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    select: Select = None,
    overwrite: Overwrite = False,
) -> None:
    """Solve every row of an instance, and keep masks, bounds and certificate together.

    `maskopt verify INSTANCE SOLUTION` re-checks the result.
    """
    check_writable(out, overwrite=overwrite, instance=instance)
    problem = load_problem(instance, select)
    shared, own = limits_of(None, read_solver_options(option))
    backend = make_solver(solver, **own)
    memory = shared.memory if memory_limit is None else parse_bytes(memory_limit)
    seconds = shared.seconds if time_limit is None else time_limit
    limits = Limits(seconds, memory, shared.threads, seed or shared.seed)
    solution = solve_shown(problem, backend, start, limits)
    solution.save(out)
    output.print(solution_table(problem, solution))
    output.print(f"written: {out}", soft_wrap=True)
    if solution.trace.interrupted:
        raise typer.Exit(INTERRUPTED)


def solve_shown(
    problem: LayerProblem | RowProblem, backend: Solver, start: Any, limits: Limits
) -> Solution:
    """Solve with a bar."""
    with view() as shown:

        def show(event: Progress) -> None:
            shown.show(event.step or "rows", event.done, event.total)

        limits = replace(limits, on_progress=show)
        return library(problem, backend, start=start, limits=limits)


def check(instance: Path, solution: Path, require: Require, select: int | None = None) -> None:
    """What `maskopt verify INSTANCE SOLUTION` does and prints.

    Raises:
        VerificationError: a claim that does not hold, or one of a trusted solver where only checked
            ones are allowed.
    """
    problem, found = load_problem(instance, select), Solution.load(solution)
    result = verify(problem, found, require=require)
    output.print(solution_table(problem, found))
    exactly = ", decided in exact arithmetic" if require == EXACT else ""
    output.print(f"{solution}: holds: {result}{exactly}", soft_wrap=True)


def solution_table(problem: LayerProblem | RowProblem, solution: Solution) -> Table:
    """Statuses, objective and bound, summed over the rows of each status, each counting ω where they trade;
    of a row that somebody posed, its value in these units."""
    if isinstance(problem, RowProblem) and problem.as_layer().units is not None:
        return _posed_table(problem, solution, "at most" if problem.maximised else "at least")
    table = Table(title=repr(problem), title_justify="left")
    for heading in ("status", "rows", "objective", "bound", "gap"):
        table.add_column(heading, justify="left" if heading == "status" else "right")
    layer = problem.as_layer() if isinstance(problem, RowProblem) else problem
    counts = layer.shares.to(solution.objective)
    for status in dict.fromkeys(solution.status):
        rows = [i for i, s in enumerate(solution.status) if s == status]
        objective, bound = (
            float(counts[rows] @ x[rows]) for x in (solution.objective, solution.lower_bound)
        )
        cells = [f"{bound:.6g}", f"{Posed.of(objective, bound).gap:.2%}"]
        known = is_bounded(objective, bound, status)
        table.add_row(
            str(status), str(len(rows)), f"{objective:.6g}", *(cells if known else NO_BOUND)
        )
    return table


def _posed_table(problem: RowProblem, solution: Solution, side: str) -> Table:
    """In the units of whoever posed the problem."""
    objective, lower = float(solution.objective[0]), float(solution.lower_bound[0])
    posed = problem.posed(objective, lower)
    cells = [f"{posed.bound:.9g}", f"{posed.gap:.2%}"]
    known = is_bounded(objective, lower, solution.status[0])
    table = Table(title=repr(problem), title_justify="left")
    for heading in ("status", "value", side, "gap"):
        table.add_column(heading, justify="left" if heading == "status" else "right")
    table.add_row(str(solution.status[0]), f"{posed.value:.9g}", *(cells if known else NO_BOUND))
    return table

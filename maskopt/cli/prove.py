"""`maskopt prove` and `maskopt check`: optima with a proof that anybody can check."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from maskopt.cli.console import output
from maskopt.cli.parameters import Overwrite, Select, read_solver_options
from maskopt.cli.solve import solution_table
from maskopt.cli.view import view
from maskopt.errors import VerificationError
from maskopt.files import check_writable
from maskopt.formats import load_problem
from maskopt.limits import Limits, Progress
from maskopt.prove import prove as library
from maskopt.solution import Solution, Status
from maskopt.solver import limits_of
from maskopt.verification import verify


def prove(
    instance: Annotated[
        Path, typer.Argument(help="A layer or a row, .npz; .dat, .mc, .mdp, .qplib.")
    ],
    out: Annotated[Path, typer.Option("--output", help="File for masks and trees, .npz.")],
    start: Annotated[
        str | None,
        typer.Option(help="A solver that makes the start, or a solution .npz to begin with."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="Of `branch`, NAME=VALUE; may be repeated."),
    ] = None,
    time_limit: Annotated[float | None, typer.Option(min=0, help="Seconds, of all rows.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    jobs: Annotated[int, typer.Option(help="Rows at a time; −1: one a core.")] = -1,
    select: Select = None,
    overwrite: Overwrite = False,
) -> None:
    """Prove optima of small rows by branch and bound, and write the trees that prove them.

    A row whose tree is not closed in time is written with the bound that its tree proves; the status is 1
    then. Rows that are proven are kept: after Ctrl-C the same command goes on. `maskopt check INSTANCE PROOF`
    checks every leaf by itself.
    """
    check_writable(out, overwrite=overwrite, instance=instance, start=start)
    problem = load_problem(instance, select)
    shared, own = limits_of(None, read_solver_options(option))
    begin = Solution.load(Path(start)).mask if start and Path(start).is_file() else start
    seconds = shared.seconds if time_limit is None else time_limit
    with view() as shown:

        def step(event: Progress) -> None:
            shown.show(event.step or "rows", event.done, event.total)

        solution = library(
            problem,
            out,
            start=begin,
            limits=Limits(seconds, shared.memory, shared.threads, seed or shared.seed, step),
            jobs=jobs,
            on_progress=lambda done, total: shown.show("rows proven", done, total),
            **own,
        )
    output.print(solution_table(problem, solution))
    output.print(f"{out}: {_facts(solution)}", soft_wrap=True)
    if any(status is not Status.OPTIMAL for status in solution.status):
        raise typer.Exit(1)


def check(
    instance: Annotated[Path, typer.Argument(help="The instance.")],
    proof: Annotated[Path, typer.Argument(help="What `maskopt prove` wrote.")],
    select: Select = None,
) -> None:
    """Check the trees of a proof leaf by leaf, in float64, by code that no search shares.

    Nothing is taken on trust but the instance. The status is 1 where a claim is not proven.
    """
    problem, solution = load_problem(instance, select), Solution.load(proof)
    if solution.proof is None:
        raise VerificationError(
            f"{proof} holds no proof, or none was found in the time that there was; write one by "
            f"`maskopt prove {instance} --output …`"
        )
    began = time.perf_counter()
    result = verify(problem, solution, require="checked")
    seconds = time.perf_counter() - began
    output.print(solution_table(problem, solution))
    output.print(
        f"{proof}: holds: {result}; {_facts(solution)}; checked in {seconds:.3g} s, "
        f"found in {solution.seconds:.3g} s",
        soft_wrap=True,
    )


def _facts(solution: Solution) -> str:
    trees = [tree for tree in (solution.proof.rows if solution.proof else ()) if tree is not None]
    leaves, size = sum(tree.leaves for tree in trees), sum(tree.nbytes for tree in trees)
    proven = sum(status is Status.OPTIMAL for status in solution.status)
    return (
        f"{proven} of {len(solution.status)} rows proven optimal; {len(trees)} trees, "
        f"{leaves} leaves, {size / 1e6:.3g} MB"
    )

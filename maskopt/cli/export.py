"""`maskopt export`: one row as an instance that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from maskopt.cli.console import output
from maskopt.cli.instances import load_layers, takes_source
from maskopt.cli.parameters import Calibration, Select, option_list
from maskopt.core.files import check_writable
from maskopt.errors import OptionError, SolverError
from maskopt.instances.formats import save_problem
from maskopt.models.options.walk import name_patterns
from maskopt.protocol.solver import WritesInstances, make_solver

FORMATS = ("npz", "cip", "lp", "mps", "qplib", "dat", "mc", "rudy", "mdp", "txt")


@takes_source
def export(
    source: Annotated[Path, typer.Argument(help="A model folder, or an instance.")],
    destination: Annotated[Path, typer.Argument(help="The file to write.")],
    options: dict[str, Any],
    row: Annotated[int, typer.Option(min=0, help="Which row of the layer.")] = 0,
    layer: Annotated[str | None, typer.Option(help="Layer of a model, as --include.")] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="Number of inputs to sample, or their indices separated by commas."),
    ] = None,
    calibration: Calibration = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format", help=f"One of {', '.join(FORMATS)}; by default the ending of the name."
        ),
    ] = None,
    formulation: Annotated[
        str, typer.Option(help="factored, linear (mps holds no squares) or epigraph.")
    ] = "factored",
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the sampled inputs.")] = 0,
    cardinality: Select = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Write one row, or a toy instance out of it, for this program or for any other IP solver."""
    form = form or destination.suffix.lstrip(".").lower()
    if form not in FORMATS:
        raise OptionError(f"unknown format {form!r}; one of {', '.join(FORMATS)}")
    check_writable(destination, overwrite=overwrite, instance=source)
    options["include"] += name_patterns(layer)
    found = load_layers(
        [source], options, calibration=calibration, seed=seed, cardinality=cardinality
    )
    if len(found.problems) != 1:
        names = ", ".join(problem.name for problem in found.problems[:8])
        raise OptionError(f"--include must name one layer; {len(found.problems)} match: {names}")
    problem = found.problems[0].row(row)
    chosen = np.arange(problem.n)
    if columns is not None:
        chosen = _columns(columns, problem.n, seed)
    if columns is not None or found.pattern is not None:
        problem = problem.restrict(chosen, found.pattern)
    if form in ("cip", "lp", "mps"):
        solver = make_solver("scip")
        if not isinstance(solver, WritesInstances):
            raise SolverError("the solver registered as 'scip' cannot write instances")
        solver.write_instance(problem, destination, form=form, formulation=formulation)
    else:
        save_problem(problem, destination, form)
    output.print(f"{destination}: {problem!r}", soft_wrap=True)
    units = problem.as_layer().units
    if units is not None and form in ("cip", "lp", "mps"):
        sign, shift = ("−" if problem.maximised else ""), units.shift * problem.as_layer().pruned
        told = f"value = {sign}(objective − {shift:.17g}) + {units.constant:.17g}"
        output.print(f"it is minimised, shifted to be convex: {told}", soft_wrap=True)


def _columns(text: str, n: int, seed: int) -> np.ndarray:
    parts = option_list(text)
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        raise OptionError(f"--columns takes whole numbers, not {text!r}") from None
    if len(numbers) > 1 and all(0 <= number < n for number in numbers):
        return np.array(numbers)
    if len(numbers) != 1 or not 1 <= numbers[0] <= n:
        raise OptionError(
            f"--columns is how many, 1 … {n}, or which ones, 0 … {n - 1} separated by commas"
        )
    return np.sort(np.random.default_rng(seed).choice(n, size=numbers[0], replace=False))

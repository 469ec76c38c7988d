"""`maskopt export`: one row as an instance that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from maskopt.cli.command import CARDINALITY, OVERWRITE, TEXT_OF_A_MODEL, command, option_list
from maskopt.cli.console import screen
from maskopt.cli.instances import OF_A_MODEL, load_layers
from maskopt.core.fields import REQUIRED, option
from maskopt.core.files import check_writable
from maskopt.core.problem import RowProblem
from maskopt.errors import OptionError, SolverError
from maskopt.instances.formats import save_problem
from maskopt.protocol.solver import WritesInstances, make_solver

FORMATS = ("npz", "cip", "lp", "mps", "qplib", "dat", "mc", "rudy", "mdp", "txt")
#: formats of solvers of integer programs
_PROGRAMS = ("cip", "lp", "mps")


@command(
    *OF_A_MODEL,
    example="maskopt export MODEL row.npz --include up_proj --calibration text.txt --sparsity 0.6",
)
def export(
    source: Path = option(REQUIRED, "A model folder, or an instance.", argument=True),
    destination: Path = option(REQUIRED, "The file to write.", argument=True),
    row: int = option(0, "Index of the row in the layer.", least=0),
    columns: str | None = option(
        None, "Number of inputs to sample, or their indices separated by commas."
    ),
    format: str | None = option(
        None, f"One of {', '.join(FORMATS)}. Default: the ending of the name."
    ),
    formulation: str = option("factored", "factored, linear (mps holds no squares) or epigraph."),
    seed: int = option(0, "Random seed of the sampled inputs.", least=0),
    cardinality: int | None = CARDINALITY,
    calibration: str | None = TEXT_OF_A_MODEL,
    overwrite: bool = OVERWRITE,
    **options: Any,
) -> None:
    """Write one row, or a toy instance out of it, for this program or for any other IP solver."""
    form = format or destination.suffix.lstrip(".").lower()
    if form not in FORMATS:
        raise OptionError(f"unknown format {form!r}; one of {', '.join(FORMATS)}")
    check_writable(destination, overwrite=overwrite, instance=source)
    found = load_layers(
        [source], options, calibration=calibration, seed=seed, cardinality=cardinality
    )
    if len(found.problems) != 1:
        names = ", ".join(problem.name for problem in found.problems[:8])
        raise OptionError(f"--include must name one layer; {len(found.problems)} match: {names}")
    problem = found.problems[0].row(row)
    if columns is not None or found.pattern is not None:
        chosen = np.arange(problem.n) if columns is None else _columns(columns, problem.n, seed)
        problem = problem.restrict(chosen, found.pattern)
    if form in _PROGRAMS:
        solver = make_solver("scip")
        if not isinstance(solver, WritesInstances):
            raise SolverError("the solver registered as 'scip' cannot write instances")
        solver.write_instance(problem, destination, form=form, formulation=formulation)
    else:
        save_problem(problem, destination, form)
    screen.print(f"{destination}: {problem!r}", soft_wrap=True)
    if form in _PROGRAMS:
        _print_units(problem)


def _print_units(problem: RowProblem) -> None:
    """Print how an objective that was shifted is converted to the value in the original units."""
    units = problem.as_layer().units
    if units is None:
        return
    sign, shift = ("−" if problem.maximised else ""), units.shift * problem.as_layer().pruned
    value = f"value = {sign}(objective − {shift:.17g}) + {units.constant:.17g}"
    screen.print(f"it is minimised, shifted to be convex: {value}", soft_wrap=True)


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

"""The solver of a run: its default start, and whether both exist and fit."""

from collections.abc import Mapping
from typing import Any

from maskopt.core.pattern import Pattern
from maskopt.errors import OptionError, SolverError
from maskopt.protocol.solver import holds_budget, limits_of, make_solver

#: starts that serve whole layers better than the solvers' own, which also have to serve single rows
DEFAULT_STARTS = {"swap": "relax"}
UPDATE_STARTS = {"swap": "admm", "memetic": "admm"}


def default_start(solver: str, *, least_squares: bool = False) -> str | None:
    """What `solver` starts from in a prune where nothing is named."""
    starts = UPDATE_STARTS if least_squares else DEFAULT_STARTS
    return starts.get(solver) or make_solver(solver).capabilities.default_start


def check_solver(
    solver: str, options: Mapping[str, Any], start: str | None, pattern: Pattern | None = None
) -> None:
    """Raise where solver or start do not exist, cannot run here, or do not fit the pattern."""
    backend = make_solver(solver, **limits_of(None, options)[1])
    if pattern is not None and not holds_budget(backend, pattern):
        lacks, other = "needs an equal count in every row", ""
        if backend.capabilities.shared_budget:
            lacks, other = (
                "holds no `max_deviation` of rows",
                "; or set no limits, with `max_deviation` 1",
            )
        raise SolverError(
            f"solver {solver!r} {lacks}; for a shared budget take swap, which may start from "
            f"{solver!r}{other}"
        )
    if start is not None:
        make_solver(start)
    if start == solver:
        raise OptionError(
            f"solver {solver!r} cannot be its own start; leave `start` out, or name another solver"
        )


def check_size(
    solver: str,
    options: Mapping[str, Any],
    start: str | None,
    n: int,
    pattern: Pattern,
    *,
    least_squares: bool = False,
) -> None:
    """Raise SolverError where solver or start cannot answer rows of so many inputs."""
    make_solver(solver, **limits_of(None, options)[1]).check_size(n, pattern, update=least_squares)
    if start is not None:
        make_solver(start).check_size(n, pattern, update=True)

"""The solver protocol, the registry of backends, and `solve`.

Backends register a class under the entry-point group `maskopt.solvers`:

    [project.entry-points."maskopt.solvers"]
    swap = "maskopt.solvers.swap:SwapSolver"

so another distribution can add one without touching this repository, and nothing here imports one.
"""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from maskopt.errors import (
    OptionError,
    SolverError,
    SolverUnavailableError,
    UnknownSolverError,
    WarmStartError,
    near,
)
from maskopt.pattern import NM
from maskopt.problem import LayerProblem, RowProblem
from maskopt.solution import Solution

ENTRY_POINT_GROUP = "maskopt.solvers"


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do, as `maskopt solvers` lists it.

    `largest_n` is the largest number of inputs for which the backend is sensible; None: any.
    """

    patterns: tuple[Literal["unstructured", "n:m"], ...] = ("unstructured", "n:m")
    devices: tuple[str, ...] = ("cpu", "cuda")
    proves: Literal["optimality", "1-swap", "nothing"] = "nothing"
    largest_n: int | None = None
    note: str = ""


@runtime_checkable
class Solver(Protocol):
    """A backend. The keyword-only parameters of `solve` are the options that exist."""

    name: str
    capabilities: Capabilities
    #: the solver that makes the start where the caller names none; None: needs no start
    default_warm_start: str | None

    def unavailable(self) -> str | None:
        """Why the backend cannot run here (a package, a licence), or None."""
        ...

    def solve(self, problem: LayerProblem, *, warm_start: Tensor | None = None) -> Solution:
        """Answer for every row. `warm_start` is a legal bool mask [rows, n] or None."""
        ...


@dataclass(frozen=True)
class SolverInfo:
    """One line of `available_solvers()`."""

    name: str
    capabilities: Capabilities
    unavailable: str | None

    @property
    def available(self) -> bool:
        return self.unavailable is None


def available_solvers() -> dict[str, SolverInfo]:
    """Every registered backend by name, with what it can do and why it is unavailable, if it is."""
    found = {}
    for name in sorted(_entry_points()):
        try:
            solver = _load(name)
            found[name] = SolverInfo(name, solver.capabilities, solver.unavailable())
        except SolverError as error:
            found[name] = SolverInfo(name, Capabilities(), str(error))
    return found


def get_solver(name: str) -> Solver:
    """The backend of that name.

    Raises:
        UnknownSolverError: no such name (near names are given).
        SolverUnavailableError: it cannot run here.
    """
    if name not in _entry_points():
        raise UnknownSolverError(f"unknown solver {name!r}{near(name, _entry_points())}")
    solver = _load(name)
    reason = solver.unavailable()
    if reason:
        raise SolverUnavailableError(f"solver {name!r} is unavailable: {reason}")
    return solver


def check_options(name: str, options: dict[str, Any]) -> None:
    """Raise OptionError for an option that the solver `name` does not have."""
    parameters = inspect.signature(get_solver(name).solve).parameters.values()
    known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"warm_start"}
    for option in options:
        if option not in known:
            hint = near(option, known) if known else "; it has none"
            raise OptionError(f"solver {name!r} has no option {option!r}{hint}")


def solve(
    problem: LayerProblem | RowProblem,
    solver: str = "swap",
    warm_start: str | Any | None = None,
    **options: Any,
) -> Solution:
    """Solve every row of a problem with the named backend.

    Args:
        problem: a layer, or one row (the Solution then has rows = 1).
        solver: a name out of `available_solvers()`.
        warm_start: a solver's name, a bool mask [rows, n] with True = kept, or None for the
            backend's own default.
        options: the backend's keyword options; unknown ones are refused with near names.

    Raises:
        UnknownSolverError, SolverUnavailableError, OptionError, WarmStartError, SolverError.
    """
    layer = problem.as_layer() if isinstance(problem, RowProblem) else problem
    backend = get_solver(solver)
    check_options(solver, options)
    _check_fit(backend, layer)
    began = time.perf_counter()
    start = _resolve_start(backend, layer, warm_start, options)
    solution = backend.solve(layer, warm_start=start, **options)
    return replace(solution, solver=solver, seconds=time.perf_counter() - began)


def _resolve_start(
    backend: Solver, layer: LayerProblem, warm_start: Any, options: dict[str, Any]
) -> Tensor | None:
    if warm_start is None:
        warm_start = backend.default_warm_start
    if warm_start is None:
        return None
    if not isinstance(warm_start, str):
        try:
            return layer.check_mask(warm_start, "warm start")
        except (TypeError, ValueError, RuntimeError) as error:
            raise WarmStartError(str(error)) from None
    if warm_start == backend.name:
        raise WarmStartError(f"solver {backend.name!r} cannot be its own warm start")
    shared = {k: v for k, v in options.items() if k in ("seed", "memory_limit")}
    return make_start(layer, warm_start, **shared).mask


def make_start(layer: LayerProblem, solver: str, **options: Any) -> Solution:
    """The start that `solver` makes for another one: with its `start_options`, if it has any, and those
    of the given options that it knows."""
    backend = get_solver(solver)
    known = inspect.signature(backend.solve).parameters
    given = {k: v for k, v in options.items() if k in known}
    return solve(layer, solver, **{**getattr(backend, "start_options", {}), **given})


def _check_fit(backend: Solver, layer: LayerProblem) -> None:
    kind = "n:m" if isinstance(layer.pattern, NM) else "unstructured"
    if kind not in backend.capabilities.patterns:
        raise SolverError(f"solver {backend.name!r} does not do {kind} patterns")
    if layer.device.type not in backend.capabilities.devices:
        raise SolverError(
            f"solver {backend.name!r} runs on {', '.join(backend.capabilities.devices)}; the "
            f"problem is on {layer.device.type}: move weight and gram there first"
        )


@cache
def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


@cache
def _load(name: str) -> Solver:
    point = _entry_points()[name]
    try:
        solver = point.load()()
    except Exception as error:  # a third party's backend may fail in any way
        raise SolverUnavailableError(
            f"solver {name!r} ({point.value}) could not be loaded: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(solver, Solver):
        raise SolverUnavailableError(f"solver {name!r} ({point.value}) is not a maskopt Solver")
    return solver

"""The solver protocol, the registry of backends, and `solve`.

A solver is a value, a frozen dataclass whose fields are its options. Backends register a class under the
entry-point group `maskopt.solvers`, also from other distributions; nothing here imports one.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from maskopt.core.clock import clock
from maskopt.core.fields import build, check_options
from maskopt.core.limits import KEYWORDS, Limits
from maskopt.core.pattern import NM, Pattern, Unstructured
from maskopt.core.problem import LayerProblem, RowProblem
from maskopt.core.threads import torch_threads
from maskopt.errors import OptionError, SolverError, SolverUnavailableError, WarmStartError, near
from maskopt.protocol.solution import Solution

ENTRY_POINT_GROUP = "maskopt.solvers"
#: of a trusted solver, as its package states it
_VERSION = re.compile(r"[0-9][0-9A-Za-z.+-]{0,39}")


@dataclass(frozen=True)
class Registered:
    """A member of a registry: its class, None where it cannot be loaded; why it cannot run here, or None."""

    name: str
    kind: type[Any] | None
    unavailable: str | None

    @property
    def available(self) -> bool:
        return self.unavailable is None

    @property
    def capabilities(self) -> Capabilities:
        """The capabilities of a solver."""
        return Capabilities() if self.kind is None else self.kind.capabilities


class Registry:
    """The classes of one entry-point group, whose instances satisfy a protocol; messages call them `what`."""

    def __init__(self, group: str, what: str, protocol: type) -> None:
        self.group, self.what, self.protocol = group, what, protocol

    def names(self) -> list[str]:
        return sorted(_entry_points(self.group))

    def find(self, name: str) -> type[Any]:
        """Return the class of a name; SolverError for an unknown one, SolverUnavailableError if unusable."""
        points = _entry_points(self.group)
        if name not in points:
            raise SolverError(f"unknown {self.what} {name!r}{near(name, points)}")
        return _load_member(points[name], self.what, self.protocol)

    def make(self, member: Any, options: Mapping[str, Any]) -> Any:
        """Return a member ready to run, by name with options, or a value unchanged.

        Raises:
            MaskoptError: as of `find`; OptionError: an option that it does not have, or a bad value of one.
        """
        if isinstance(member, str):
            kind = self._available(self.find(member))
            # a callback is nothing that anybody mistypes
            return build(kind, member, options, self.what, KEYWORDS.keys() - {"on_progress"})
        if not isinstance(member, self.protocol):
            raise OptionError(
                f"{member!r} is no {self.what}; give a name or a value such as Swap()"
            )
        if options:
            first, name = next(iter(options)), getattr(member, "name", "")
            raise OptionError(
                f"{self.what} {name!r} is given as a value: {first!r} belongs among its fields"
            )
        return self._available(member)

    def _available(self, member: Any) -> Any:
        reason = member.unavailable()
        if reason:
            raise SolverUnavailableError(f"{self.what} {member.name!r} is unavailable: {reason}")
        return member

    def entries(self) -> dict[str, Registered]:
        """Return every member by name."""
        members = {}
        for name in self.names():
            kind = None
            try:
                kind = self.find(name)
                reason = kind.unavailable()
            except Exception as error:  # a third party's backend may fail in any way
                reason = str(error) if kind is None else f"{type(error).__name__}: {error}"
            members[name] = Registered(name, kind, reason)
        return members


@cache
def _entry_points(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}


@cache
def _load_member(point: EntryPoint, what: str, protocol: type) -> type[Any]:
    try:
        kind: type[Any] = point.load()
        sound = isinstance(kind(), protocol)
    except Exception as error:  # a third party's backend may fail in any way
        fault = f"could not be loaded: {type(error).__name__}: {error}"
        raise SolverUnavailableError(f"{what} {point.name!r} ({point.value}) {fault}") from error
    if not sound:
        fault = f"is not a {protocol.__name__}"
        raise SolverUnavailableError(f"{what} {point.name!r} ({point.value}) {fault}")
    return kind


@dataclass(frozen=True)
class Capabilities:
    """The abilities of a backend, as `maskopt solvers` lists them.

    Attributes:
        start: `needed` (a mask to improve), `optional` (the answer is never worse than it), or `ignored`.
        default_start: the solver that makes a needed start.
        proves: the best status that it can give.
        largest_n: rows of more inputs are refused; None: any.
        update: it answers problems of updated weights: by F, or by a score that ignores the objective.
        shared_budget: it answers layers with a shared budget; limited: also with a `max_deviation`.
        apart: without a shared budget, a row's answer depends at most on rows of the same tile of 128.
        trusted: of an exact solver, the names in `Solution.trusted` for bounds that nothing else proves.
        note: one line.
    """

    patterns: tuple[Literal["unstructured", "n:m"], ...] = ("unstructured", "n:m")
    devices: tuple[str, ...] = ("cpu", "cuda")
    start: Literal["needed", "optional", "ignored"] = "ignored"
    default_start: str | None = None
    proves: Literal["optimality", "1-swap", "nothing"] = "nothing"
    largest_n: int | None = None
    update: bool = False
    shared_budget: bool = False
    limited: bool = True
    apart: bool = False
    trusted: tuple[str, ...] = ()
    note: str = ""


class Member(Protocol):
    """A class in a registry: a frozen dataclass whose fields are its options, checked on construction.

    Attributes:
        name: in the registry.
        package: that must be installed, as pip and Python call it; none where it is empty.
    """

    name: ClassVar[str]
    package: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_options(self, self.name)

    @classmethod
    def unavailable(cls) -> str | None:
        """Return why it cannot run here (a package, a licence), or None."""
        if cls.package and importlib.util.find_spec(cls.package) is None:
            return f"the package {cls.package} is not installed; pip install {cls.package}"
        return None


@runtime_checkable
class Solver(Member, Protocol):
    """A backend."""

    capabilities: ClassVar[Capabilities]

    def as_start(self, layer: LayerProblem) -> tuple[Solver, LayerProblem]:
        """Return the solver and the problem that make a start for another solver.

        The solver may have less to do than on its own, since the other one improves and proves its mask. The
        problem has unchanged weights where the mask is the same or F is not supported.
        """
        return self, layer if self.capabilities.update else layer.with_update(None)

    def check_size(self, n: int, pattern: Pattern, *, update: bool) -> None:
        """Raise SolverError for rows of too many inputs; `update`: the problem has updated weights."""
        largest = self.capabilities.largest_n
        if largest is not None and n > largest:
            raise SolverError(
                f"{self.name}: a row of {n} inputs is beyond it (at most {largest}); "
                "use maskopt.lower_bound for a certified gap, or row.restrict(columns)"
            )

    def run(self, problem: LayerProblem, start: Tensor | None, limits: Limits) -> Solution:
        """Solve every row, with the clock of `limits` running.

        Args:
            start: a legal bool mask [rows, n] on the problem's device, True = kept. Never None for a solver
                that needs one, always None for one that ignores it.
        """
        ...


REGISTRY = Registry(ENTRY_POINT_GROUP, "solver", Solver)


def available_solvers() -> dict[str, Registered]:
    """Return every registered backend by name."""
    return REGISTRY.entries()


def is_trusted(text: str) -> bool:
    """Return whether a text is a name in a solver's `trusted` and a version, such as `SCIP 10.0`."""
    name, _, version = text.rpartition(" ")
    if not _VERSION.fullmatch(version):
        return False
    for member in REGISTRY.names():
        with suppress(SolverError):  # one that cannot be loaded here
            if name in REGISTRY.find(member).capabilities.trusted:
                return True
    return False


def make_solver(solver: Solver | str, **options: Any) -> Solver:
    """Return a solver ready to run, by name with options, or a value unchanged; errors: `Registry.make`."""
    if isinstance(solver, type):
        raise SolverError(f"a solver is a value, not a class: write {solver.__name__}()")
    backend: Solver = REGISTRY.make(solver, options)
    return backend


def limits_of(limits: Limits | None, options: Mapping[str, Any]) -> tuple[Limits, dict[str, Any]]:
    """Return limits, given as such or by keywords, and the other options; OptionError if given twice."""
    keywords = {name: value for name, value in options.items() if name in KEYWORDS}
    others = {name: value for name, value in options.items() if name not in KEYWORDS}
    if limits is None:
        limits = Limits(**{KEYWORDS[name]: value for name, value in keywords.items()})
    elif keywords:
        raise OptionError(f"give either limits=… or {', '.join(keywords)}, not both")
    return limits, others


def solve(
    problem: LayerProblem | RowProblem,
    solver: Solver | str = "swap",
    *,
    start: Solver | str | Tensor | Any | None = None,
    limits: Limits | None = None,
    **options: Any,
) -> Solution:
    """Solve every row of a problem.

        problem = LayerProblem(weight, x.T @ x / len(x), Unstructured(sparsity=0.5))
        swapped = solve(problem)  # 1-swap search from Wanda's mask, proven 1-swap optimal
        best = solve(problem, "tabu", moves=500, start="relax", time_limit=60)
        best = solve(problem, Tabu(moves=500), start=Relax(), limits=Limits(seconds=60))  # the same
        best.mask, best.objective, best.status  # bool [rows, n], float64 [rows], a word a row

    Args:
        problem: a layer, or one row (the Solution then has rows = 1).
        solver: a value such as `Tabu(moves=500)`, or a name out of `available_solvers()`.
        start: a solver (value or name), a bool mask [rows, n] with True = kept, or a Solution for its mask;
            None: the solver's own default. A solver that ignores a start gets none.
        limits: for start, search and bound together.
        options: of a named solver; and `time_limit` (seconds), `memory_limit` (bytes), `threads`, `seed`,
            `on_progress` in place of `limits`.

    Returns:
        A legal mask of every row, its float64 objective, a lower bound where one is known, and a status.

    Raises:
        MaskoptError: an unknown or unavailable solver, an unknown option, an illegal start, a pattern, device
            or size that the solver does not support; an answer that is no legal Solution.
    """
    layer = problem.as_layer()
    limits, solver_options = limits_of(limits, options)
    backend = make_solver(solver, **solver_options)
    check_fit(backend, layer)
    limits = limits.begin()
    began = clock()
    with torch_threads(limits.threads):
        mask = _start_mask(backend, layer, start, limits)
        solution = backend.run(layer, mask, limits)
    _check_answer(backend, layer, solution)
    seconds = clock() - began
    return replace(
        solution, solver=backend.name, seconds=seconds, units=layer.units, omega=layer.omega
    )


def _check_answer(backend: Solver, layer: LayerProblem, solution: Any) -> None:
    """Raise SolverError for an answer that is no Solution, or whose mask is not legal."""
    if not isinstance(solution, Solution):
        raise SolverError(
            f"solver {backend.name!r} returned {type(solution).__name__}; return Solution.of(problem, mask)"
        )
    try:
        layer.check_mask(solution.mask, "its mask")
    except WarmStartError as error:
        raise SolverError(
            f"solver {backend.name!r} answered with an illegal mask: {error}"
        ) from None


def make_start(layer: LayerProblem, solver: Solver | str, limits: Limits | None = None) -> Solution:
    """Return the start that `solver` makes for another solver.

    The start is for unchanged weights or equal counts where the solver supports no others.
    """
    backend, problem = make_solver(solver).as_start(layer)
    limits = (limits or Limits()).quiet()
    if holds_budget(backend, layer.pattern):
        return solve(problem, backend, limits=limits).raise_if_interrupted()
    began = clock()
    count, remainder = divmod(problem.pruned, problem.rows)
    masks = []
    # The first rows prune one entry more.
    for first, end, pruned in ((0, remainder, count + 1), (remainder, problem.rows, count)):
        if first < end:
            part = problem.take(slice(first, end)).under(Unstructured(keep=problem.n - pruned))
            masks.append(solve(part, backend, limits=limits).raise_if_interrupted().mask)
    solution = Solution.of(problem, torch.cat(masks))
    return replace(solution, solver=backend.name, seconds=clock() - began)


def holds_budget(backend: Solver, pattern: Pattern) -> bool:
    """Return whether the solver holds the pattern's shared budget and its limits, if it has them."""
    can = backend.capabilities
    return not pattern.shared_budget or (
        can.shared_budget and (pattern.max_deviation is None or can.limited)
    )


def _start_mask(backend: Solver, layer: LayerProblem, start: Any, limits: Limits) -> Tensor | None:
    needs = backend.capabilities.start
    start = start.mask if isinstance(start, Solution) else start
    if start is None and needs == "needed":
        start = backend.capabilities.default_start
        if start is None:
            raise WarmStartError(f"solver {backend.name!r} needs a start: pass start=…")
    if start is None:
        return None
    if isinstance(start, str | Solver):
        maker = make_solver(start)
        if needs == "ignored":
            return None
        if maker.name == backend.name:
            raise WarmStartError(f"solver {backend.name!r} cannot be its own start")
        return make_start(layer, maker, limits).mask
    try:
        mask = layer.check_mask(start, "start")
    except (TypeError, ValueError, RuntimeError) as error:
        raise WarmStartError(str(error)) from None
    return None if needs == "ignored" else mask


def check_fit(backend: Solver, layer: LayerProblem) -> None:
    """Raise SolverError for a pattern, device or number of inputs that a backend does not support."""
    can = backend.capabilities
    kind = "n:m" if isinstance(layer.pattern, NM) else "unstructured"
    if kind not in can.patterns:
        raise SolverError(f"solver {backend.name!r} does not do {kind} patterns")
    if layer.device.type not in can.devices:
        raise SolverError(
            f"solver {backend.name!r} runs on {', '.join(can.devices)}; the "
            f"problem is on {layer.device.type}: move weight and gram there first"
        )
    if layer.update is not None and not can.update:
        raise SolverError(
            f"solver {backend.name!r} chooses for unchanged weights, not for updated ones; take "
            "problem.with_update(None), or its mask as a start of solver 'swap'"
        )
    if layer.shared_budget and not can.shared_budget:
        raise SolverError(
            f"solver {backend.name!r} needs an equal count in every row; take "
            "problem.under(problem.pattern.uniform()), or use it as a start of solver 'swap'"
        )
    if layer.pattern.max_deviation is not None and not can.limited:
        raise SolverError(
            f"solver {backend.name!r} holds no limits on what a row prunes; leave out the pattern's "
            "`max_deviation`, or take it as a start of solver 'swap'"
        )
    backend.check_size(layer.n, layer.pattern, update=layer.update is not None)

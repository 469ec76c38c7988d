"""Certified lower bounds of every row.

A method makes a certificate (`certificates.certificate`), whose own check computes the bound. Methods
register a class under the entry-point group `maskopt.bounds`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from maskopt.certificates.certificate import Certificate
from maskopt.core.clock import clock
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem, RowProblem
from maskopt.core.threads import torch_threads
from maskopt.errors import SolverError
from maskopt.protocol.solution import relative_gap
from maskopt.protocol.solver import Member, Registered, Registry, limits_of
from maskopt.protocol.trace import Trace

ENTRY_POINT_GROUP = "maskopt.bounds"


@dataclass(frozen=True)
class Bound:
    """A certified lower bound of every row.

    Attributes:
        value: float64 [rows], no legal mask of the row costs less; with a shared budget one bound of Σ ωᵣ fᵣ,
            in equal parts.
        certificate: for `Solution.of(certificate=…)`; its check computed the value.
        method: its name.
        seconds: wall-clock time of all rows together.
        trace: the course of the computation.
        omega: float64 [rows], ω of a shared budget; None without one.
    """

    value: Float[Tensor, " rows"]
    certificate: Certificate
    method: str = ""
    seconds: float = math.nan
    trace: Trace = field(default_factory=Trace)
    omega: Float[Tensor, " rows"] | None = None

    def __repr__(self) -> str:
        value = self.value if self.omega is None else self.omega.to(self.value) * self.value
        total = float(value.sum())
        return f"Bound({self.method}, rows={len(self.value)}, value={total:.6g} in all, {self.seconds:.3g} s)"

    def gap(self, objective: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """Return `relative_gap` per row; with a shared budget that of the layer, for all rows."""
        if self.omega is not None:
            sums = [(self.omega @ x.to(self.omega)).expand(len(x)) for x in (objective, self.value)]
            return relative_gap(*sums)
        return relative_gap(objective.to(self.value), self.value)


@runtime_checkable
class BoundMethod(Member, Protocol):
    """A method that makes certificates.

    Attributes:
        largest_n: rows of more inputs are refused; None: any.
        shared_budget: it bounds shared budgets, too.
        update: it bounds F, and nothing else.
        note: one line for lists.
    """

    largest_n: ClassVar[int | None] = None
    shared_budget: ClassVar[bool] = False
    update: ClassVar[bool] = False
    note: ClassVar[str] = ""

    def certify(self, problem: LayerProblem, limits: Limits) -> tuple[Certificate, Trace]:
        """Return a certificate for every row, and its trace. The clock of `limits` is running."""
        ...


REGISTRY = Registry(ENTRY_POINT_GROUP, "bound", BoundMethod)


def lower_bound(
    problem: LayerProblem | RowProblem,
    method: BoundMethod | str = "sdp",
    *,
    limits: Limits | None = None,
    **options: Any,
) -> Bound:
    """Compute a lower bound on the objective of every legal mask of every row, with its certificate.

    Args:
        problem: a layer or a row (then rows = 1).
        method: a value such as `SdpBound(cuts=8)`, or a name: `box`, `shift`, `sdp`, for updated weights
            `perspective`, or another one of the entry-point group `maskopt.bounds`.
        limits: for all rows together; the state at the end of the time is certified.
        options: of a named method, and keywords in place of `limits`, as for `solve`.

    Raises:
        MaskoptError: an unknown or unavailable method, an unknown option, more inputs than the method takes.
    """
    layer = problem.as_layer()
    limits, method_options = limits_of(limits, options)
    maker: BoundMethod = REGISTRY.make(method, method_options)
    if layer.update is not None and not maker.update:
        raise SolverError(
            f"bound {maker.name!r} is for unchanged weights; take method 'perspective' for updated ones"
        )
    if layer.update is None and maker.update:
        raise SolverError(
            f"bound {maker.name!r} is for updated weights, and the problem keeps its own; take method 'sdp', "
            "or problem.with_update(LeastSquaresUpdate(damping))"
        )
    if layer.shared_budget and not maker.shared_budget:
        raise SolverError(
            f"bound {maker.name!r} needs an equal count in every row; take method 'box' or 'shift' for a "
            "shared budget with unchanged weights"
        )
    if maker.largest_n is not None and layer.n > maker.largest_n:
        raise SolverError(
            f"bound {maker.name!r} takes at most {maker.largest_n} inputs, the row has {layer.n}; "
            "use method 'sdp', or 'box' for a quick bound"
        )
    began = clock()
    with torch_threads(limits.threads):
        certificate, trace = maker.certify(layer, limits.begin())
        value = certificate.check(layer)
    seconds, omega = clock() - began, layer.shares if layer.shared_budget else None
    return Bound(value, certificate, maker.name, seconds, trace, omega)


def available_bounds() -> dict[str, Registered]:
    """Return every registered method by name."""
    return REGISTRY.entries()

"""Solutions: the mask of every row, its objective, and what is proven about it."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskopt.certificates.certificate import Certificate
from maskopt.certificates.proof import RowProof
from maskopt.core.files import (
    join_rows,
    pack,
    read_arrays,
    take_rows,
    unpack,
    unpack_rows,
    write_arrays,
)
from maskopt.core.inputs import ArrayLike, as_tensor
from maskopt.core.least_squares import LeastSquaresUpdate
from maskopt.core.problem import LayerProblem, RowProblem
from maskopt.core.table import Table, value_text
from maskopt.core.units import ObjectiveTransform, OriginalValues
from maskopt.errors import OptionError, ProblemError, printable
from maskopt.protocol.trace import Trace


class Status(StrEnum):
    """The claim that is proven about one row's mask."""

    OPTIMAL = "optimal"
    """No legal mask is better by more than `optimal_slack`; of an integral problem none is better at all."""
    SWAP_OPTIMAL = "swap-optimal"
    """No legal 1-swap lowers the objective by more than `swap_threshold`; with a shared budget no swap
    between two rows lowers the layer's sum by more than that of both."""
    FEASIBLE = "feasible"
    """The mask is legal; nothing else is claimed."""


#: SWAP_OPTIMAL holds up to this part of the row's objective
SWAP_TOLERANCE = 1e-6
#: … or up to this part of Σⱼ wⱼ²Gⱼⱼ, the float64 rounding of the terms of a swap
SWAP_FLOOR = 1e-13
#: … or of updated weights up to this part, the rounding of systems that are solved
REFIT_FLOOR = 1e-10
#: OPTIMAL holds up to this part of the row's objective (feasibility tolerances of exact solvers)
OPTIMAL_TOLERANCE = 1e-6
#: the rounding of an objective counts where the objective is at most this part of Σⱼ wⱼ²Gⱼⱼ
_NOISE = 1e-6
#: indices of a chosen set that a summary lists at most
_LISTED = 200


def size_of(layer: LayerProblem, objective: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Return the size that tolerances are relative to: the objective, or that of its original value if less.

    A large penalty in U makes f, which includes the shift, much larger than the original value.
    """
    if layer.units is None:
        return objective
    zero = layer.units.zero(layer.pruned // layer.rows)
    return objective.minimum((objective - zero).abs())


def optimal_slack(
    layer: LayerProblem, mask: Bool[Tensor, "rows n"], objective: Float[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """Return the distance that the bound of an OPTIMAL row may have from its objective, float64 [rows].

    The distance is a part of the objective's size, and for tiny objectives `LayerProblem.rounding`. It is 0
    for an integral problem, whose sums are exact.
    """
    if layer.integral:
        return torch.zeros_like(objective)
    slack = OPTIMAL_TOLERANCE * size_of(layer, objective)
    small = objective <= _NOISE * layer.diagonal_mass().to(objective)
    if layer.units is None and bool(small.any()):
        small_rows = layer.take(small.to(layer.device))
        weights = small_rows.weights(mask[small.to(mask.device)])
        slack[small] += small_rows.rounding(weights).to(slack)
    return slack


def swap_threshold(
    objective: Float[Tensor, " rows"],
    diagonal_mass: Float[Tensor, " rows"],
    tolerance: float = SWAP_TOLERANCE,
    *,
    update: LeastSquaresUpdate | None = None,
) -> Float[Tensor, " rows"]:
    """Return the least decrease that counts as an improving swap, float64 [rows].

    The decrease is a part of the objective, with a floor where the objective is nothing but rounding. Both
    terms scale with w² and with G.
    """
    return tolerance * objective + (REFIT_FLOOR if update else SWAP_FLOOR) * diagonal_mass


def relative_gap(
    objective: Float[Tensor, " rows"], lower_bound: Float[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """Return (objective − lower_bound)/objective; 0 for an objective of 0, NaN for one that is not finite."""
    gap = (objective - lower_bound) / objective.where(objective != 0, 1.0)
    return gap.masked_fill(objective <= 0, 0.0)


def is_bounded(objective: float, lower_bound: float, status: str = "") -> bool:
    """Return whether a lower bound is informative: it is above 0, or the objective is 0 or proven."""
    return lower_bound > 0 or objective == 0 or status == Status.OPTIMAL


@dataclass(frozen=True)
class Solution:
    """One mask a row, with its objective and the claims about it.

    Attributes:
        mask: bool [rows, n], True = kept.
        objective: float64 [rows], f of the mask, F of a problem with `update`, or the cost of own weights.
        lower_bound: float64 [rows], no legal mask has a smaller objective; 0 where none is known. With a
            shared budget Σ ωᵣ lower_boundᵣ is one bound of the sum.
        status: per row OPTIMAL, SWAP_OPTIMAL or FEASIBLE.
        solver: name of the solver that answered.
        seconds: wall-clock time of the solve, start included, compilation of loops not.
        trace: the course of the search.
        certificate, proof: prove lower bounds to `verify`; `proof` holds the tree of each row, None where it
            has none, of an exact search.
        trusted: per row the exact solver whose bound nothing here proves, with its version, such as `SCIP
            10.0`; an empty text where the bound is proven. Empty altogether: all are.
        weight: float64 [rows, n], updated weights where the solver has them; saved only with `own_weight`.
        own_weight: the weights are the solver's own, not those of least squares.
        units: of a quadratic objective, to convert f to the caller's units; None: they are the same.
        omega: float64 [rows], weights of the rows in `value` and `bound`; None: 1.
    """

    mask: Bool[Tensor, "rows n"]
    objective: Float[Tensor, " rows"]
    lower_bound: Float[Tensor, " rows"]
    status: tuple[Status, ...]
    solver: str = ""
    seconds: float = math.nan
    trace: Trace = field(default_factory=Trace)
    certificate: Certificate | None = None
    trusted: tuple[str, ...] = ()
    weight: Float[Tensor, "rows n"] | None = None
    own_weight: bool = False
    proof: Sequence[RowProof | None] | None = None
    units: ObjectiveTransform | None = None
    omega: Float[Tensor, " rows"] | None = None

    @property
    def selected(self) -> np.ndarray:
        """Indices of the chosen set, p = 1, which is what the mask prunes; ProblemError for several rows."""
        if len(self.mask) != 1:
            raise ProblemError(f"selected is of one row; read the masks of these {len(self.mask)}")
        return np.flatnonzero(~self.mask[0].cpu().numpy())

    @property
    def value(self) -> float:
        """The objective in the caller's units, such as xᵀQx; of several rows their sum, weighted by ω."""
        return _total(self, range(len(self.mask))).value

    @property
    def bound(self) -> float:
        """The lower bound in the caller's units: no legal choice has a better `value`."""
        return _total(self, range(len(self.mask))).bound

    @property
    def gap(self) -> float:
        """The gap |value − bound| / |value|; 0 where they are equal. `columns` has it for every row."""
        return _total(self, range(len(self.mask))).gap

    def apply(self, weight: ArrayLike) -> Any:
        """Return the pruned weights: zero where the mask prunes, updated where the solution has updates.

        Args:
            weight: [rows, n], or [n] of one row; the result has its kind (torch or NumPy) and dtype.

        Raises:
            ProblemError: another shape.
        """
        dense = as_tensor(weight, "weight")
        one_row = self.mask.shape[1:] if len(self.mask) == 1 else self.mask.shape
        if dense.shape not in (self.mask.shape, one_row):
            raise ProblemError(
                f"weight has shape {list(dense.shape)}, the mask {list(self.mask.shape)}"
            )
        new = dense if self.weight is None else self.weight.to(dense).reshape(dense.shape)
        pruned = new.where(self.mask.to(dense.device).reshape(dense.shape), 0.0)
        return pruned if isinstance(weight, Tensor) else pruned.numpy()

    @classmethod
    def of(
        cls,
        problem: LayerProblem | RowProblem,
        mask: Bool[Tensor, "rows n"],
        *,
        status: Status | Sequence[Status] = Status.FEASIBLE,
        lower_bound: Float[Tensor, " rows"] | None = None,
        trace: Trace | None = None,
        certificate: Certificate | None = None,
        trusted: Sequence[str] = (),
        weight: Float[Tensor, "rows n"] | None = None,
        proof: Sequence[RowProof | None] | None = None,
    ) -> Solution:
        """Make a Solution with the float64 objective of the mask, or of a solver's own `weight`.

        Only problems with `update` take a `weight`. A lower bound above the objective by rounding alone is
        cut back to it.
        """
        layer = problem.as_layer()
        mask = mask.reshape(layer.weight.shape)
        has_weight = weight is not None
        if has_weight and not layer.update:
            raise ProblemError("weights of a solver's own are for a problem with update")
        weight = layer.weights(mask) if weight is None else weight
        objective = layer.cost(weight)
        if lower_bound is None:
            lower_bound = torch.zeros_like(objective)
        else:
            bound = lower_bound.to(objective)
            if layer.shared_budget:  # one bound, shared out so that every row has the layer's gap
                cost = layer.shares @ objective
                bound = objective * (layer.shares @ bound / cost if cost > 0 else 0.0)
            rounding = OPTIMAL_TOLERANCE * objective + SWAP_FLOOR * layer.diagonal_mass()
            bound = torch.where(bound <= objective + rounding, bound.minimum(objective), bound)
            lower_bound = bound.clamp(min=0.0)
        return cls(
            mask=mask,
            objective=objective,
            lower_bound=lower_bound,
            status=(status,) * layer.rows if isinstance(status, Status) else tuple(status),
            trace=trace if trace is not None else Trace(),
            certificate=certificate,
            trusted=tuple(trusted),
            weight=weight if layer.update else None,
            own_weight=has_weight,
            proof=proof,
            units=layer.units,
            omega=layer.omega,
        )

    @classmethod
    def joined(cls, parts: Sequence[Solution], certificate: Certificate | None = None) -> Solution:
        """Join one solver's solutions of a layer's parts, in order, with one certificate of all rows."""
        weighted = all(p.weight is not None for p in parts)
        filled = [
            replace(
                p,
                certificate=None,
                trusted=p.trusted or ("",) * len(p.status),
                weight=p.weight if weighted else None,
                proof=p.proof or [None] * len(p.status),
            )
            for p in parts
        ]
        whole = join_rows(filled)
        return replace(
            whole,
            seconds=sum(p.seconds for p in parts),
            certificate=certificate,
            proof=whole.proof if any(whole.proof) else None,
        )

    def take(self, rows: Sequence[int]) -> Solution:
        """Return the solution of some rows only."""
        return take_rows(self, rows)

    def with_rows(self, rows: Sequence[int], part: Solution) -> Solution:
        """Return the solution with those of `part` in the place of some rows."""
        order = torch.arange(len(self.status))
        order[rows] = len(order) + torch.arange(len(rows))
        return take_rows(join_rows([self, part]), order)

    def raise_if_interrupted(self) -> Solution:
        """Return this solution; raise KeyboardInterrupt if Ctrl-C ended its search."""
        if self.trace.interrupted:
            raise KeyboardInterrupt
        return self

    def columns(self) -> dict[str, list[Any]]:
        """Return one entry a row: objective, bound, gap, status, trusted solver, columns of the trace."""
        rows = len(self.status)
        return {
            "objective": self.objective.tolist(),
            "lower_bound": self.lower_bound.tolist(),
            "gap": [values.gap for values in _values(self)],
            "status": [str(status) for status in self.status],
            "trusted": list(self.trusted) or [""] * rows,
            **self.trace.columns(rows),
        }

    def to_frame(self) -> Any:
        """Return `columns` as a pandas.DataFrame; OptionError where pandas is not installed."""
        try:
            import pandas
        except ImportError:
            raise OptionError(
                "to_frame needs the package pandas: pip install pandas; or take columns()"
            ) from None
        return pandas.DataFrame(self.columns())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz (atomically; no pickle inside): masks, statuses, trace, and the proof."""
        words, arrays = pack(replace(self, weight=self.weight if self.own_weight else None))
        seconds = None if math.isnan(self.seconds) else self.seconds
        write_arrays(path, "solution", {**words, "seconds": seconds}, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Solution:
        """Read what `save` wrote, to be checked by `verify`; ProblemError: no such file, or no solution."""
        words, arrays = read_arrays(path, "solution")
        try:
            seconds, rows = words["seconds"], len(arrays["mask"])
            trace = unpack(Trace, words, arrays, "trace")
            if any(len(values) != rows for values in trace.columns(rows).values()):
                raise ValueError("its trace is one of other rows")
            certified, posed = "certificate.diagonal" in arrays, "units.sign" in words
            return unpack(
                cls,
                words,
                arrays,
                status=tuple(Status(word) for word in words["status"]),
                solver=str(words["solver"]),
                seconds=math.nan if seconds is None else float(seconds),
                trace=trace,
                certificate=Certificate.unpacked(words, arrays, "certificate")
                if certified
                else None,
                trusted=tuple(str(word) for word in words["trusted"]),
                own_weight="weight" in arrays,
                units=unpack(ObjectiveTransform, words, arrays, "units") if posed else None,
                proof=unpack_rows(RowProof, words, arrays, "proof", rows),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ProblemError(f"{path}: not a sound solution ({error})") from None

    def __repr__(self) -> str:
        counts = {s: self.status.count(s) for s in Status if s in self.status}
        parts = [
            *([self.solver] if self.solver else []),
            f"rows={len(self.status)}",
            f"objective={float(self.objective.sum()):.6g}",
            f"lower_bound={float(self.lower_bound.sum()):.6g}",
            *(f"{count} {name}" for name, count in counts.items()),
            *([] if math.isnan(self.seconds) else [f"{self.seconds:.3g} s"]),
        ]
        return f"Solution({', '.join(parts)})"

    def summary(self) -> str:
        """Describe rows, value, bound and gap by status, and the chosen set of one row, on one screen."""
        table = Table("", ("status", "rows", "value", "bound", "gap"))
        (rows, n), digits = self.mask.shape, 9 if self.units else 6
        time = "" if math.isnan(self.seconds) else f", {self.seconds:.3g} s"
        sense = ", maximized" if self.units and self.units.sign < 0 else ""
        name = printable(self.solver) or "solution"
        lines = [f"{name}{time}: {rows} row{'s' * (rows > 1)} of {n} inputs{sense}"]
        for status in dict.fromkeys(self.status):
            group = [row for row, word in enumerate(self.status) if word == status]
            total, bound, gap = _total(self, group), "–", "–"
            objective, lower = (float(x[group].sum()) for x in (self.objective, self.lower_bound))
            if is_bounded(objective, lower, status):
                bound, gap = value_text(total.bound, digits), f"{total.gap:.2%}"
            table.add(status, str(len(group)), value_text(total.value, digits), bound, gap)
        lines += table.lines()
        if rows == 1:
            chosen, verb = self.selected.tolist(), "selected" if self.units else "pruned"
            listed = " ".join(map(str, chosen[:_LISTED])) + " …" * (len(chosen) > _LISTED)
            text = f"{verb}, {len(chosen)} of {n}: {listed}"
            lines += textwrap.wrap(text, 80, subsequent_indent="  ")
        if any(self.trusted):
            lines.append(f"bounds trusted: {printable(', '.join(sorted({*self.trusted} - {''})))}")
        return "\n".join(lines)

    __str__ = summary


def _values(solution: Solution) -> list[OriginalValues]:
    """Return the original values of every row, without ω."""
    units, pruned = solution.units or ObjectiveTransform(), (~solution.mask).sum(1).tolist()
    rows = zip(solution.objective.tolist(), solution.lower_bound.tolist(), pruned, strict=True)
    return [OriginalValues.of(units.value(f, s), units.value(b, s)) for f, b, s in rows]


def _total(solution: Solution, rows: Iterable[int]) -> OriginalValues:
    values = _values(solution)
    omega = [1.0] * len(values) if solution.omega is None else solution.omega.tolist()
    pairs = [(omega[row] * values[row].value, omega[row] * values[row].bound) for row in rows]
    return OriginalValues.of(*map(sum, zip(*pairs, strict=True)))

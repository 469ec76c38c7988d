"""The mask-selection problem: one linear layer, or one row of it.

A mask prunes a set of every row's inputs at a cost (`maskopt.core.objective`); the pattern says which sets
are allowed. Rows share the Gram matrix of the layer's inputs and are independent, except under a shared
budget (`Unstructured(…, per="layer")`): then Σᵣ ωᵣ fᵣ is minimised with one count for the layer.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, fields
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from maskopt.core.files import pack, read_arrays, unpack, write_arrays
from maskopt.core.inputs import (
    ArrayLike,
    as_mask,
    as_tensor,
    check_costs,
    check_integral,
    check_pattern,
    check_rows,
    check_semidefinite,
    column_index,
    moments_of,
    shares_of_rows,
    symmetric,
    weight_and_gram,
)
from maskopt.core.least_squares import LeastSquares, LeastSquaresUpdate
from maskopt.core.objective import LinearTerm, Objective
from maskopt.core.pattern import Pattern, Unstructured, parse_sparsity
from maskopt.core.units import (
    ObjectiveTransform,
    OriginalValues,
    Values,
    semidefinite,
    values_of,
)
from maskopt.errors import ProblemError, WarmStartError


class LayerProblem(Objective):
    """Mask selection for every row of one linear layer. The objective of a row is f, or F with `update`.

    Zero rows, zero or duplicate columns and a rank-deficient G are ordinary input.

    Args:
        weight: [rows, n], any real floating dtype, torch or NumPy; kept as a torch tensor.
        gram: [n, n], float32 or float64 (half precision becomes float32), torch or NumPy; symmetric, finite
            and positive semidefinite up to rounding.
        pattern: `Unstructured` or `NM`.
        name: of the layer, in messages and reports.
        moments: of the inputs (for `dsnot`): [n], the mean over tokens; or [2, n], that and the variance
            within sequences, on average.
        linear: correlation [rows, n] and constant [rows] of the dense error, brought to float64.
        update: the objective is F, of updated weights; None: f, of unchanged ones.
        assume_psd: skip the check of definiteness (n³/3 operations), for a G accumulated as XᵀX.

    Raises:
        ProblemError: wrong shapes, values that are not finite, G or G + λD indefinite, negative f.
        PatternError: a pattern that does not fit n.
    """

    def __init__(
        self,
        weight: ArrayLike,
        gram: ArrayLike,
        pattern: Pattern,
        *,
        name: str = "",
        moments: ArrayLike | None = None,
        linear: LinearTerm | None = None,
        update: LeastSquaresUpdate | None = None,
        assume_psd: bool = False,
    ) -> None:
        self.name, label = name, _label(name)
        self.weight, gram_tensor = weight_and_gram(weight, gram, label)
        check_pattern(pattern, self.n, label)
        self.pattern = pattern
        self.gram: Float[Tensor, "n n"] = symmetric(gram_tensor, label)
        self.moments = moments_of(moments, self.n, label)
        check_costs(self.weight, self.gram, label)
        self.linear = linear and linear.checked(self.weight, label)
        if not assume_psd:
            check_semidefinite(self.gram, label)
            if self.linear is not None:
                self.linear.check_moments(self.gram, label)
        self.omega, self.units, self.update = None, None, update
        self._squares: LeastSquares | None = None
        _check_update(self)

    @classmethod
    def from_inputs(
        cls, weight: ArrayLike, inputs: ArrayLike, sparsity: Pattern | float | str, **more: Any
    ) -> LayerProblem:
        """Pose the problem of a layer with inputs X [tokens, n]: G = XᵀX / tokens in float64, and their mean.

        `sparsity`: 0.5, "50%", "2:4" or a pattern; other arguments and errors as of the constructor.
        """
        x = as_tensor(inputs, "inputs").double()
        if x.ndim != 2 or 0 in x.shape:
            raise ProblemError(f"inputs must be [tokens, n], both at least 1, not {list(x.shape)}")
        more = {"moments": x.mean(0), "assume_psd": True, **more}
        return cls(weight, x.T @ x / len(x), parse_sparsity(sparsity), **more)

    def as_layer(self) -> LayerProblem:
        """Return the layer; for a `RowProblem`, the layer of that one row."""
        return self

    def check_mask(self, mask: Any, what: str = "mask") -> Bool[Tensor, "rows n"]:
        """Return the mask as a bool tensor on the problem's device; WarmStartError for an illegal one."""
        # contiguous: the last bits of a product may depend on the strides of its factors
        legal = as_mask(mask, self.weight, what, WarmStartError).contiguous()
        if fault := self.fault(legal):
            raise WarmStartError(f"{what}{fault}")
        return legal

    def row(self, index: int) -> RowProblem:
        """Return one row as a problem, without a copy; under a shared budget it prunes the layer's share."""
        if not -self.rows <= index < self.rows:
            raise ProblemError(f"row {index} of a layer with {self.rows} rows")
        index %= self.rows
        # the layer of a `RowProblem` has the name of that row
        same = self.rows == 1 and re.search(r"\[\d+\]$", self.name)
        name = self.name if same else f"{self.name}[{index}]"
        return RowProblem._of(self.take(slice(index, index + 1))._with(name=name))

    def take(self, rows: Tensor | slice | list[int]) -> LayerProblem:
        """Select rows by a slice, a list or tensor of indices, or a bool tensor [rows].

        ProblemError for anything else, an empty list or an index out of range.
        """
        check_rows(rows, self.rows)
        linear = self.linear and self.linear.take(rows)
        omega = None if self.omega is None else self.omega[rows]
        return self._with(weight=self.weight[rows], linear=linear, omega=omega)

    def tiles(self, size: int) -> Iterator[tuple[slice, LayerProblem]]:
        """Yield the slice and the problem of every `size` consecutive rows; the last may be fewer."""
        for first in range(0, self.rows, size):
            rows = slice(first, min(first + size, self.rows))
            yield rows, self.take(rows)

    def under(self, pattern: Pattern) -> LayerProblem:
        """Return the same rows under another pattern; PatternError where it does not fit n."""
        check_pattern(pattern, self.n, _label(self.name))
        return self._with(pattern=pattern)

    def with_update(self, update: LeastSquaresUpdate | None) -> LayerProblem:
        """Return the same rows under F, or f (None); ProblemError where G + λD is indefinite."""
        if update == self.update:
            return self
        problem = self._with(update=update, _squares=None)
        _check_update(problem)
        return problem

    def with_units(self, units: ObjectiveTransform | None) -> LayerProblem:
        """Return the same rows with f in the units of another objective.

        ProblemError with `update`, or where the units say `integral` and f is not.
        """
        problem = self._with(units=units)
        _check_update(problem)
        if problem.integral:
            check_integral(self.weight, self.gram, self.linear is not None, _label(self.name))
        return problem

    def with_omega(self, omega: ArrayLike | None) -> LayerProblem:
        """Return the same rows with other weights ω [rows] in the sum of a shared budget; None: 1.

        ProblemError unless there is one positive number for each row.
        """
        return self._with(omega=shares_of_rows(omega, self.weight, _label(self.name)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz for `load_problem`, atomically and without a pickle. bf16 is widened to float32."""
        _save(self, path, "layer")

    def _with(self, **changes: Any) -> LayerProblem:
        """Return a copy with some attributes changed, without checks."""
        problem = copy.copy(self)
        vars(problem).update(changes)
        return problem

    def __repr__(self) -> str:
        return _shown(self, "LayerProblem", f"rows={self.rows}, ")


class RowProblem:
    """Mask selection for one row: weight [n], gram [n, n]; arguments and errors as of `LayerProblem`."""

    def __init__(self, weight: ArrayLike, gram: ArrayLike, pattern: Pattern, **more: Any) -> None:
        tensor = as_tensor(weight, "weight")
        if tensor.ndim != 1:
            raise ProblemError(f"a row's weight must be [n], not {list(tensor.shape)}")
        layer = LayerProblem(tensor[None], gram, pattern, **more)
        self._layer: LayerProblem = RowProblem._of(layer).as_layer()

    @classmethod
    def from_quadratic(
        cls,
        quadratic: np.ndarray,
        *,
        cardinality: int,
        maximize: bool = False,
        constant: float = 0.0,
        name: str = "",
    ) -> RowProblem:
        """Pose min (or max) pᵀUp + constant over p ∈ {0,1}ⁿ with `cardinality` ones.

        The ones are the pruned inputs (`Solution.selected`). The symmetric part of U [n, n] counts, in
        float64; the diagonal of an indefinite U is shifted, and `value` subtracts the shift. A U of whole
        numbers makes an `integral` problem. ProblemError: no square matrix of finite numbers, or a
        cardinality beyond 0 … n.
        """
        gram, units = semidefinite(quadratic, maximize, constant)
        n = len(gram)
        if not isinstance(cardinality, Integral) or not 0 <= cardinality <= n:
            raise ProblemError(f"cardinality must be a whole number, 0 … {n}, not {cardinality!r}")
        pattern = Unstructured(keep=n - int(cardinality))
        problem = LayerProblem(np.ones((1, n)), gram, pattern, name=name)
        return cls._of(problem.with_units(units))

    def quadratic(self) -> tuple[Float[np.ndarray, "n n"], float]:
        """Return U [n, n] and the constant in the problem's original units; without units Q and 0."""
        q, units = self.q().cpu().numpy(), self._layer.units
        if units is None:
            # Q has the constant in its entries, unless nothing is chosen
            return q, 0.0 if self._layer.pruned else float(self._layer.constant[0])
        return units.sign * (q - units.shift * np.eye(self.n)), units.constant

    def value(self, cost: float) -> float:
        """Convert an objective, or a bound of it, to the problem's original units.

        Bounds of a maximised objective (`sign` −1) are upper ones then.
        """
        units = self._layer.units
        return cost if units is None else units.value(cost, self._layer.pruned)

    def to_original_units(self, objective: float, lower_bound: float) -> OriginalValues:
        """Convert an objective and a lower bound of it to the problem's original units, with their gap."""
        return OriginalValues.of(self.value(objective), self.value(lower_bound))

    @classmethod
    def _of(cls, layer: LayerProblem) -> RowProblem:
        """Make a row of a layer of one row without checks; its count is its own, not a shared budget's."""
        problem = cls.__new__(cls)
        problem._layer = layer.under(layer.pattern.uniform())
        return problem

    def __getattr__(self, name: str) -> Any:
        """Return `gram`, `pattern`, `name`, `n`, `linear`, `update` or `integral` of the layer."""
        if name in ("gram", "pattern", "name", "n", "linear", "update", "integral"):
            return getattr(self._layer, name)
        raise AttributeError(f"RowProblem has no attribute {name!r}")

    @property
    def weight(self) -> Float[Tensor, " n"]:
        return self._layer.weight[0]

    def as_layer(self) -> LayerProblem:
        """Return the same problem as a layer of one row."""
        return self._layer

    def q(self) -> Float[Tensor, "n n"]:
        """Compute Q [n, n], float64, with f(p) = pᵀQp for every legal p; ProblemError with `update`.

        Q is diag(w)·G·diag(w), and with a linear part l = w⊙g and c, since 1ᵀp = s,

            Q + (l1ᵀ + 1lᵀ)/s + c/s²·11ᵀ = [I | 1/s]·[[Q, l], [lᵀ, c]]·[I | 1/s]ᵀ,  semidefinite too.

        c is left out where nothing is pruned.
        """
        if self.update is not None:
            raise ProblemError("the objective of updated weights is no quadratic form of the mask")
        weight = self.weight.double()
        q = weight[:, None] * self.gram.double() * weight[None, :]
        pruned = self._layer.pruned
        if self.linear is None or pruned == 0:
            return q
        half = weight * self.linear.correlation[0] / pruned
        return q + half[:, None] + half[None, :] + self.linear.constant / pruned**2

    def values(self) -> Values | None:
        """Return the values that f of an integral problem can take; None for other problems."""
        return values_of(self.q(), self._layer.pruned) if self.integral else None

    def objective(self, mask: Bool[Tensor, " n"]) -> float:
        """Compute f, or F with `update`, of one mask [n] (True = kept), in float64."""
        return float(self._layer.objective(mask.reshape(1, -1)))

    def with_update(self, update: LeastSquaresUpdate | None) -> RowProblem:
        """Return the same row under the other objective; see `LayerProblem.with_update`."""
        return RowProblem._of(self._layer.with_update(update))

    def restrict(self, columns: Any, pattern: Pattern | None = None) -> RowProblem:
        """Return the row with only these inputs, in this order, under its pattern or another one.

        ProblemError for other columns, or with `update` for an indefinite G + λD.
        """
        index = column_index(columns, self.n).to(self.weight.device)
        new, old = pattern or self.pattern, self._layer
        new.check(len(index))
        layer = old._with(
            weight=old.weight[:, index].contiguous(),
            linear=old.linear and old.linear.restrict(index),
            gram=old.gram[index][:, index].contiguous(),
            moments=None if old.moments is None else old.moments[:, index],
            pattern=new,
            _squares=None,
        )
        _check_update(layer)
        return RowProblem._of(layer)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz for `load_problem`; see `LayerProblem.save`."""
        _save(self._layer, path, "row")

    def __repr__(self) -> str:
        return _shown(self._layer, "RowProblem")


def load_npz(path: str | os.PathLike[str]) -> LayerProblem | RowProblem:
    """Read a layer or a row that `save` wrote, and check it; ProblemError for another file."""
    header, arrays = read_arrays(path, "layer", "row")
    if not {"weight", "gram"} <= set(arrays):
        raise ProblemError(f"{path}: not a maskopt instance (it lacks weight or gram)")
    linear = {"correlation", "constant"} & set(arrays)
    if len(linear) == 1:
        raise ProblemError(f"{path}: half a linear part (correlation or constant is missing)")
    update, units = header.get("update"), header.get("units")
    problem = LayerProblem(
        arrays["weight"],
        arrays["gram"],
        parse_sparsity(header.get("pattern", "")),
        name=str(header.get("name", "")) or Path(path).stem,
        moments=arrays.get("moments"),
        linear=unpack(LinearTerm, {}, arrays) if linear else None,
        update=_described(LeastSquaresUpdate, update, "how kept weights are updated"),
    )
    problem = problem.with_units(_described(ObjectiveTransform, units, "units"))
    problem = problem.with_omega(arrays.get("omega"))
    if header["kind"] == "layer":
        return problem
    if problem.rows != 1:
        shape = list(problem.weight.shape)
        raise ProblemError(f"{path}: a row's weight must be [1, n], not {shape}")
    return RowProblem._of(problem)


def _save(problem: LayerProblem, path: str | os.PathLike[str], kind: str) -> None:
    header = {
        "name": problem.name,
        "pattern": str(problem.pattern),
        "update": problem.update and asdict(problem.update),
        "units": problem.units and asdict(problem.units),
    }
    _, arrays = pack(problem.linear)
    for name in ("weight", "gram", "moments", "omega"):
        arrays |= pack(getattr(problem, name), name)[1]
    write_arrays(path, kind, header, arrays)


def _described(kind: type[Any], data: Any, what: str) -> Any:
    """Make the dataclass that a dict of its fields describes; None stays None."""
    if data is None:
        return None
    if not isinstance(data, dict) or set(data) != {field.name for field in fields(kind)}:
        raise ProblemError(f"{data!r} does not describe {what}")
    return kind(**data)


def _check_update(problem: LayerProblem) -> None:
    if problem.update is None:
        return
    if problem.units is not None:
        raise ProblemError("a quadratic objective has no weights to update; take `update` none")
    problem.least_squares.check(_label(problem.name))


def _label(name: str) -> str:
    return f"layer {name!r}: " if name else ""


def _shown(problem: LayerProblem, kind: str, sizes: str = "") -> str:
    name = f"{problem.name!r}, " if problem.name else ""
    update = "" if problem.update is None else f", {problem.update}"
    return f"{kind}({name}{sizes}n={problem.n}, pattern={problem.pattern}{update})"

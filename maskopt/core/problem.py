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
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from maskopt.core.files import pack, read_arrays, write_arrays
from maskopt.core.inputs import (
    PSD_TOLERANCE,
    ArrayLike,
    as_mask,
    as_tensor,
    check_costs,
    check_integral,
    check_pattern,
    check_rows,
    check_semidefinite,
    column_index,
    linear_part,
    of_shape,
    shares_of_rows,
    symmetric,
    weight_and_gram,
)
from maskopt.core.least_squares import LeastSquares, LeastSquaresUpdate
from maskopt.core.linear_term import LinearTerm
from maskopt.core.objective import Objective
from maskopt.core.pattern import (
    Counts,
    Pattern,
    Unstructured,
    parse_sparsity,
    pattern_from_dict,
    pattern_to_dict,
)
from maskopt.core.units import (
    MOST_WHOLE,
    ObjectiveTransform,
    OriginalValues,
    Real,
    Values,
    semidefinite,
    values_of,
)
from maskopt.errors import ProblemError, WarmStartError


class LayerProblem(Objective, Counts):
    """Mask selection for every row of one linear layer. The objective of a row is f, or F with `update`.

    Zero rows, zero or duplicate columns and a rank-deficient G are ordinary input.

    Args:
        weight: [rows, n], any real floating dtype, torch or NumPy; kept as a torch tensor.
        gram: [n, n], float32 or float64 (half precision becomes float32), torch or NumPy; symmetric, finite
            and positive semidefinite up to rounding.
        pattern: `Unstructured` or `NM`.
        name: of the layer, in messages and reports.
        mean: [n], of the inputs over tokens (for `dsnot`).
        variance: [n], of the inputs within sequences, on average (for `dsnot`).
        linear: correlation [rows, n] and constant [rows] of the dense error, brought to float64.
        update: the objective is F, of updated weights; None: f, of unchanged ones.
        omega: [rows], above 0, the weight of a row in the sum of a shared budget; None: 1.
        integral: weights, Gᵢᵢ and 2Gᵢⱼ are whole, so that a bound holds up to the next whole value of f.
        units: the units of a quadratic objective (`RowProblem.from_quadratic`).
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
        mean: ArrayLike | None = None,
        variance: ArrayLike | None = None,
        linear: LinearTerm | None = None,
        update: LeastSquaresUpdate | None = None,
        omega: ArrayLike | None = None,
        integral: bool = False,
        units: ObjectiveTransform | None = None,
        assume_psd: bool = False,
    ) -> None:
        self.name = name
        label = self._label
        self.weight, gram_tensor = weight_and_gram(weight, gram, label)
        n = self.n
        check_pattern(pattern, n, label)
        self.pattern = pattern
        self.gram: Float[Tensor, "n n"] = symmetric(gram_tensor, label)
        self.mean = of_shape(mean, (n,), f"{label}mean")
        self.variance = of_shape(variance, (n,), f"{label}variance")
        if self.variance is not None and bool((self.variance < 0).any()):
            raise ProblemError(f"{label}variance is a mean of squares, and not below 0")
        check_costs(self.weight, self.gram, label)
        self.linear = linear and linear_part(linear, self.weight, label)
        self.omega = shares_of_rows(omega, self.weight, label)
        self.integral, self.units = integral, units
        if integral:
            check_integral(self.weight, self.gram, self.linear, label)
        if not assume_psd:
            check_semidefinite(self.gram, label)
            if self.linear is not None:
                ridge = PSD_TOLERANCE * float(self.gram.double().trace())
                self.linear.check_moments(self.gram, ridge or 1.0, label)
        self.update = update
        self._squares: LeastSquares | None = None
        self._check_update()

    @classmethod
    def from_inputs(
        cls, weight: ArrayLike, inputs: ArrayLike, sparsity: Pattern | float | str, **more: Any
    ) -> LayerProblem:
        """The problem of a layer with inputs X [tokens, n]: G = XᵀX / tokens in float64, and their mean.
        `sparsity`: 0.5, "50%", "2:4" or a pattern; other arguments and errors as of the constructor."""
        x = as_tensor(inputs, "inputs").double()
        if x.ndim != 2 or 0 in x.shape:
            raise ProblemError(f"inputs must be [tokens, n], both at least 1, not {list(x.shape)}")
        more = {"mean": x.mean(0), "assume_psd": True, **more}
        return cls(weight, x.T @ x / len(x), parse_sparsity(sparsity), **more)

    @property
    def _label(self) -> str:
        return f"layer {self.name!r}: " if self.name else ""

    def as_layer(self) -> LayerProblem:
        """Itself; of a `RowProblem` the layer of that one row."""
        return self

    def raised(self, bounds: list[Real]) -> list[Real]:
        """Bounds of f, raised to its next values for an integral problem without a shared budget."""
        if not self.integral or self.shared_budget:
            return bounds
        values = [self.row(row).values() for row in range(self.rows)]
        return [v.at_least(b) for v, b in zip(values, bounds, strict=True) if v]

    def next_value(self, bound: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """`raised` of a tensor."""
        return bound.new_tensor(self.raised(bound.tolist()))

    def check_mask(self, mask: Any, what: str = "mask") -> Bool[Tensor, "rows n"]:
        """The mask as a bool tensor on the problem's device, or WarmStartError with the reason."""
        # lines side by side: the last bits of a product may depend on how its factors lie in memory
        legal = as_mask(mask, self.weight, what, WarmStartError).contiguous()
        if fault := self.fault(legal):
            raise WarmStartError(f"{what}{fault}")
        return legal

    def row(self, index: int) -> RowProblem:
        """One row as a problem, without a copy; under a shared budget it prunes the layer's share."""
        if not -self.rows <= index < self.rows:
            raise ProblemError(f"row {index} of a layer with {self.rows} rows")
        # what was a row before is that row
        same = self.rows == 1 and re.search(r"\[\d+\]$", self.name)
        name = self.name if same else f"{self.name}[{index % self.rows}]"
        rows = slice(index % self.rows, index % self.rows + 1)
        return RowProblem._of(self._like(rows, name))

    def at_count_of(self, mask: Bool[Tensor, "rows n"], index: int) -> RowProblem:
        """One row of a shared budget, with the count that a mask [rows, n] gives it."""
        kept = Unstructured(keep=int(mask[index].sum()))
        return RowProblem._of(self.take([index]).under(kept))

    def take(self, rows: Tensor | slice | list[int]) -> LayerProblem:
        """The problem of some rows: a slice, or a list or tensor of indices, or a bool tensor [rows];
        ProblemError for anything else, an empty list or an index out of range."""
        check_rows(rows, self.rows)
        return self._like(rows, self.name)

    def tiles(self, size: int) -> Iterator[tuple[slice, LayerProblem]]:
        """The slice and the problem of every `size` consecutive rows; the last tile may be smaller."""
        for first in range(0, self.rows, size):
            rows = slice(first, min(first + size, self.rows))
            yield rows, self._like(rows, self.name)

    def under(self, pattern: Pattern) -> LayerProblem:
        """The same rows under another pattern; PatternError where it does not fit n."""
        check_pattern(pattern, self.n, self._label)
        return self._with(pattern=pattern)

    def with_update(self, update: LeastSquaresUpdate | None) -> LayerProblem:
        """The same rows under F, or f (None); ProblemError for a damping that leaves G + λD indefinite."""
        if update == self.update:
            return self
        problem = self._with(update=update, _squares=None)
        problem._check_update()
        return problem

    def _check_update(self) -> None:
        if self.update is None:
            return
        if self.units is not None:
            raise ProblemError("a quadratic objective has no weights to update; take `update` none")
        if self.integral:
            raise ProblemError(
                f"{self._label}integral: what updated weights cost is no sum of wholes"
            )
        self.least_squares.check(self._label)

    def counting(self, omega: ArrayLike | None) -> LayerProblem:
        """The same rows with other ω, None being 1; ProblemError unless one positive number for each row."""
        return self._with(omega=shares_of_rows(omega, self.weight, self._label))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz (atomically; no pickle inside). bf16 weights are widened to float32."""
        self._save(path, "layer")

    def _save(self, path: str | os.PathLike[str], kind: Literal["layer", "row"]) -> None:
        header = {
            "name": self.name,
            "pattern": pattern_to_dict(self.pattern),
            "update": self.update and asdict(self.update),
            "integral": self.integral,
            "units": self.units and asdict(self.units),
        }
        names = ("weight", "gram", "mean", "variance", "omega")
        values = {name: getattr(self, name) for name in names}
        if self.linear is not None:
            values |= {"correlation": self.correlation, "constant": self.constant}
        arrays = [pack(value, name)[1] for name, value in values.items()]
        write_arrays(path, kind, header, {k: v for part in arrays for k, v in part.items()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LayerProblem:
        """Read what `save` wrote, with all checks of the constructor; ProblemError for another file."""
        return load_npz(path, "layer").as_layer()

    def _like(self, rows: Tensor | slice | list[int], name: str) -> LayerProblem:
        """Some rows of the same layer: nothing is checked again."""
        linear = self.linear and self.linear.take(rows)
        omega = None if self.omega is None else self.omega[rows]
        return self._with(weight=self.weight[rows], name=name, linear=linear, omega=omega)

    def _with(self, **changes: Any) -> LayerProblem:
        problem = copy.copy(self)
        vars(problem).update(changes)
        return problem

    def __repr__(self) -> str:
        return self._shown("LayerProblem", f"rows={self.rows}, ")

    def _shown(self, kind: str, sizes: str = "") -> str:
        name = f"{self.name!r}, " if self.name else ""
        update = "" if self.update is None else f", {self.update}"
        return f"{kind}({name}{sizes}n={self.n}, pattern={self.pattern}{update})"


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
        """min (or max) pᵀUp + constant over p ∈ {0,1}ⁿ with `cardinality` ones, which are the pruned inputs
        (`Solution.selected`).

        The symmetric part of U [n, n] counts, in float64; the diagonal of an indefinite U is shifted, and
        `value` subtracts the shift. A U of whole numbers makes an `integral` problem. ProblemError: no square
        matrix of finite numbers, or a cardinality beyond 0 … n.
        """
        gram, units, whole = semidefinite(quadratic, maximize, constant)
        n = len(gram)
        if not isinstance(cardinality, Integral) or not 0 <= cardinality <= n:
            raise ProblemError(f"cardinality must be a whole number, 0 … {n}, not {cardinality!r}")
        pattern = Unstructured(keep=n - int(cardinality))
        integral = whole and float(np.abs(gram).sum()) < MOST_WHOLE  # beyond, sums are not exact
        return cls(np.ones(n), gram, pattern, name=name, units=units, integral=integral)

    def quadratic(self) -> tuple[Float[np.ndarray, "n n"], float]:
        """U [n, n] and the constant in the problem's own units; without units Q and 0."""
        q, units = self.q().cpu().numpy(), self._layer.units
        if units is None:
            # Q has the constant in its entries, unless nothing is chosen
            return q, 0.0 if self._layer.pruned else float(self._layer.constant[0])
        return units.sign * (q - units.shift * np.eye(self.n)), units.constant

    @property
    def maximized(self) -> bool:
        """Whether `value` is to be maximized; bounds of it are from above, then."""
        units = self._layer.units
        return units is not None and units.sign < 0

    def value(self, cost: float) -> float:
        """An objective, or a bound of it, in the problem's own units."""
        units = self._layer.units
        return cost if units is None else units.value(cost, self._layer.pruned)

    def to_original_units(self, objective: float, lower_bound: float) -> OriginalValues:
        """An objective, a lower bound of it and the gap between them in the problem's own units."""
        return OriginalValues.of(self.value(objective), self.value(lower_bound))

    @classmethod
    def _of(cls, layer: LayerProblem) -> RowProblem:
        """A layer of one row that was checked already; alone, it has a count of its own."""
        problem = cls.__new__(cls)
        problem._layer = layer.under(layer.pattern.uniform())
        return problem

    def __getattr__(self, name: str) -> Any:
        """`gram`, `pattern`, `name`, `n`, `linear`, `update` and `integral` of its layer."""
        if name in ("gram", "pattern", "name", "n", "linear", "update", "integral"):
            return getattr(self._layer, name)
        raise AttributeError(f"RowProblem has no attribute {name!r}")

    @property
    def weight(self) -> Float[Tensor, " n"]:
        return self._layer.weight[0]

    def as_layer(self) -> LayerProblem:
        """The same problem as a layer of one row."""
        return self._layer

    def q(self) -> Float[Tensor, "n n"]:
        """Q [n, n], float64, with f(p) = pᵀQp for every legal p; ProblemError with `update`.

        diag(w)·G·diag(w), and with a linear part l = w⊙g and c, since 1ᵀp = s,

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
        """The values that f of an integral problem can take; None of another one."""
        return values_of(self.q(), self._layer.pruned) if self.integral else None

    def objective(self, mask: Bool[Tensor, " n"]) -> float:
        """f, or F with `update`, of one mask [n] (True = kept), float64."""
        return float(self._layer.objective(mask.reshape(1, -1)))

    def weights(self, mask: Bool[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The weights that one mask [n] leaves, float64; see `LayerProblem.weights`."""
        return self._layer.weights(mask.reshape(1, -1))[0]

    def with_update(self, update: LeastSquaresUpdate | None) -> RowProblem:
        """The same row under the other objective; see `LayerProblem.with_update`."""
        return RowProblem._of(self._layer.with_update(update))

    def restrict(self, columns: Any, pattern: Pattern | None = None) -> RowProblem:
        """The row with only these inputs, in this order, under its own pattern or another one; ProblemError
        for other columns, or with `update` an indefinite G + λD."""
        index = column_index(columns, self.n).to(self.weight.device)
        new, old = pattern or self.pattern, self._layer
        new.check(len(index))
        kept = {name: getattr(old, name) for name in ("mean", "variance")}
        layer = old._with(
            weight=old.weight[:, index].contiguous(),
            linear=old.linear and old.linear.restrict(index),
            gram=old.gram[index][:, index].contiguous(),
            pattern=new,
            _squares=None,
            **{name: None if x is None else x[index] for name, x in kept.items()},
        )
        layer._check_update()
        return RowProblem._of(layer)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz (atomically; no pickle inside). bf16 weights are widened to float32."""
        self._layer._save(path, "row")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RowProblem:
        """As `LayerProblem.load`, of a row."""
        found = load_npz(path, "row")
        assert isinstance(found, RowProblem)
        return found

    def __repr__(self) -> str:
        return self._layer._shown("RowProblem")


def load_npz(path: str | os.PathLike[str], *kinds: str) -> LayerProblem | RowProblem:
    """What `save` of a layer or a row wrote, of some `kinds` or any; errors as of `LayerProblem.load`."""
    header, arrays = read_arrays(path, *(kinds or ("layer", "row")))
    if not {"weight", "gram"} <= set(arrays):
        raise ProblemError(f"{path}: not a maskopt instance (it lacks weight or gram)")
    correlation, constant = (arrays.get(name) for name in ("correlation", "constant"))
    if (correlation is None) != (constant is None):
        raise ProblemError(f"{path}: half a linear part (correlation or constant is missing)")
    pattern = pattern_from_dict(header.get("pattern"))
    more: dict[str, Any] = {
        "name": str(header.get("name", "")) or Path(path).stem,
        "mean": arrays.get("mean"),
        "variance": arrays.get("variance"),
        "linear": None if correlation is None else LinearTerm(correlation, constant),  # type: ignore[arg-type]
        "update": _described(
            LeastSquaresUpdate, header.get("update"), "how kept weights are updated"
        ),
        "integral": header.get("integral", False) is True,
        "units": _described(ObjectiveTransform, header.get("units"), "units"),
    }
    weight, gram = arrays["weight"], arrays["gram"]
    if header["kind"] == "layer":
        return LayerProblem(weight, gram, pattern, omega=arrays.get("omega"), **more)
    if weight.ndim != 2 or weight.shape[0] != 1:
        raise ProblemError(f"{path}: a row's weight must be [1, n], not {list(weight.shape)}")
    return RowProblem(weight[0], gram, pattern, **more)


def _described(kind: type[Any], data: Any, what: str) -> Any:
    """The dataclass that a dict of its fields describes; None of None."""
    if data is None:
        return None
    if not isinstance(data, dict) or set(data) != {field.name for field in fields(kind)}:
        raise ProblemError(f"{data!r} does not describe {what}")
    return kind(**data)

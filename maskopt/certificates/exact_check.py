"""Exact rational checks of certificates and trees, for rows of up to MOST_INPUTS inputs.

Every float64 is a dyadic rational, so the claims of a certificate and of a proof can be decided without any
rounding. Both are bounds by a convex quadratic

    g(p) = pᵀAp + aᵀp + α ≥ g(p̂) + ∇g(p̂)ᵀ(v − p̂),      A ⪰ 0,

with v the vertex of least slope. A is written down from the definitions, by other formulas than in those
modules: a cut with signs b is ((Σ bᵢzᵢ)² − Σ zᵢ²)/2 + (k − 1)/2, expanded as a whole. A ⪰ 0 is decided
without rounding (`exactly_semidefinite`). Where A lacks a little, θ is added to its diagonal and −θ to a,
which changes g on no mask. θ comes from float64 eigenvalues, and is only a proposal.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskopt.certificates.certificate import Certificate, next_values
from maskopt.certificates.cuts import NO_INPUT, OF_Z0, Cuts
from maskopt.certificates.proof import RowProof, TreeCheck
from maskopt.core.problem import LayerProblem
from maskopt.core.units import exactly_semidefinite
from maskopt.errors import VerificationError

#: entries of a matrix up to which n³/3 operations on growing integers end within minutes
MOST_INPUTS = 200
#: factors of a float64 proposal for θ
_TRIES = (1, 2**10, 2**20)


class Quadratic(NamedTuple):
    """pᵀAp + aᵀp + α: Fractions in an object array [n, n], one [n], and one number."""

    matrix: np.ndarray
    linear: np.ndarray
    constant: Any

    def value(self, p: np.ndarray) -> Fraction:
        return p @ (self.matrix @ p) + self.linear @ p + self.constant

    def slope(self, p: np.ndarray) -> np.ndarray:
        return 2 * (self.matrix @ p) + self.linear


def rational(array: Tensor | np.ndarray) -> np.ndarray:
    """Return the numbers as Fractions, in an object array of the same shape."""
    floats = np.asarray(array.double().cpu() if isinstance(array, Tensor) else array, dtype=float)
    made = [Fraction(x) for x in floats.ravel().tolist()]
    return np.array(made, dtype=object).reshape(floats.shape)


def objective(layer: LayerProblem, row: int) -> Quadratic:
    """Return f of one row: Qᵢⱼ = wᵢGᵢⱼwⱼ, 2wᵢgᵢ, c."""
    w, gram = rational(layer.weight[row]), rational(layer.gram)
    linear = 2 * w * rational(layer.correlation[row])
    return Quadratic(w[:, None] * gram * w, linear, Fraction(float(layer.constant[row])))


def _folded(f: Quadratic, s: int) -> Quadratic:
    """Return f with linear part and constant in the matrix, the same on masks of s ones: trees' form."""
    if s == 0:
        return f
    half = f.linear / (2 * s)
    matrix = f.matrix + half[:, None] + half[None, :] + f.constant / s**2
    return Quadratic(matrix, 0 * f.linear, Fraction(0))


def exact_cost(layer: LayerProblem, mask: Tensor, row: int) -> Fraction:
    """Return f of one row's mask [n], True = kept."""
    return max(objective(layer, row).value(_ones(~mask.cpu().numpy())), Fraction(0))


def exact_bounds(
    layer: LayerProblem, certificate: Certificate | None = None, trees: Any = None
) -> list[Fraction]:
    """Return the bounds, at least 0, that a `Certificate` and a `RowProof` (or None) for each row prove.

    A shared budget has one bound. VerificationError for updated weights, more than MOST_INPUTS inputs, or
    arrays that do not fit.
    """
    if layer.update is not None:
        raise VerificationError("exact checks are for rows whose weights are kept unchanged")
    if layer.n > MOST_INPUTS:
        raise VerificationError(
            f"exact checks are for rows of at most {MOST_INPUTS} inputs, not {layer.n}; leave exact out"
        )
    bounds = [Fraction(0)] * (layer.rows // layer.rows_per_budget)
    if certificate is not None:
        certificate.check_shapes(layer)
        bounds = _of_certificate(certificate, layer)
    for row, tree in enumerate(trees or ()):
        if tree is not None:
            bounds[row] = max(bounds[row], Fraction(ExactTreeCheck(layer, row, tree).bound()))
    return next_values(layer, bounds)


def _of_certificate(certificate: Certificate, layer: LayerProblem) -> list[Fraction]:
    offsets, slopes = [], []
    for row in range(layer.rows):
        point = rational(certificate.point[row])
        form = _convex(_form(certificate, layer, row), np.arange(layer.n))
        # Without a convex form the row's bound is 0.
        slopes.append(form.slope(point) if form else rational(np.zeros(layer.n)))
        offsets.append(form.value(point) - slopes[-1] @ point if form else Fraction(0))
    if not layer.shared_budget:
        return [
            max(offset + _least_sum(slope, layer.group_size, layer.pruned_per_group), Fraction(0))
            for offset, slope in zip(offsets, slopes, strict=True)
        ]
    shares = rational(layer.shares)
    (least, most), total = layer.row_limits, shares @ np.array(offsets, dtype=object)
    free: list[Fraction] = []
    for share, slope in zip(shares, slopes, strict=True):
        ordered = sorted(share * slope)
        total, free = total + sum(ordered[:least]), free + ordered[least:most]
    total += sum(sorted(free)[: layer.pruned - least * layer.rows])
    return [max(total, Fraction(0))]


def _form(certificate: Certificate, layer: LayerProblem, row: int) -> Quadratic:
    """Sum g of `maskopt.certificates.certificate` term by term."""
    n, size = layer.n, layer.group_size
    # of a group; μ and ν are 0 with a shared budget
    s = layer.pruned * size // layer.weight.numel()
    matrix, linear, constant = objective(layer, row)
    lam = rational(certificate.diagonal[row])
    matrix[np.diag_indices(n)] += lam
    linear = linear - lam
    for group, mu in enumerate(rational(certificate.penalty[row])):
        of = slice(group * size, (group + 1) * size)
        if mu:
            matrix[of, of] += mu
            linear[of] -= 2 * s * mu
            constant += s * s * mu
        if certificate.product is not None:
            half = rational(certificate.product[row, group]) / 2
            matrix[:, of] += half[:, None]
            matrix[of, :] += half[None, :]
            linear = linear - 2 * s * half
    cuts = None if certificate.cuts is None else certificate.cuts[row]
    return _without(Quadratic(matrix, linear, constant), cuts)


def _without(form: Quadratic, cuts: Cuts | None) -> Quadratic:
    """Subtract Σ τ c(p): with S = Σ bᵢzᵢ = 2bᵀp + t, c = 2(bᵀp)² + 2t bᵀp − 2Σpᵢ² + 2Σpᵢ + (t² − 1)/2."""
    if cuts is None or len(cuts.multiplier) == 0:
        return form
    matrix, linear, constant = form.matrix.copy(), form.linear.copy(), form.constant
    parts = [cuts.index.long(), cuts.sign.long(), cuts.multiplier.view(torch.int64)[:, None]]
    lines, counts = torch.cat(parts, 1).unique(dim=0, return_counts=True)
    places = cuts.index.shape[1]
    taus = lines[:, -1].contiguous().view(torch.float64).tolist()
    for line, tau, count in zip(lines.tolist(), taus, counts.tolist(), strict=True):
        signs = dict(zip(line[:places], (1, *line[places:-1]), strict=True))
        signs.pop(NO_INPUT, None)
        by, t = count * Fraction(tau), signs.pop(OF_Z0, 0) - sum(signs.values())
        for i, b in signs.items():
            linear[i] -= by * (2 * t * b + 2)
            for j, other in signs.items():
                if i != j:
                    matrix[i, j] -= 2 * by * b * other
        constant -= by * Fraction(t * t - 1, 2)
    return Quadratic(matrix, linear, constant)


def _convex(form: Quadratic, free: np.ndarray) -> Quadratic | None:
    """Make A ⪰ 0 in the free entries, unchanged on masks; None where no proposal of θ does."""
    theta = _theta(form.matrix[np.ix_(free, free)])
    if theta is None:
        return None
    matrix, linear = form.matrix.copy(), form.linear.copy()
    matrix[free, free] += theta
    linear[free] -= theta
    return Quadratic(matrix, linear, form.constant)


def _theta(a: np.ndarray) -> Fraction | None:
    """Return θ with A + θI ⪰ 0 for certain, or None."""
    try:
        floats = a.astype(float)
        least = float(np.linalg.eigvalsh(floats)[0]) if len(a) else 0.0
    except (OverflowError, np.linalg.LinAlgError):
        return None
    size = float(np.linalg.norm(floats))
    for factor in _TRIES:
        theta = max(0.0, -least) + factor * 4 * len(a) * 2.0**-53 * size
        if math.isfinite(theta) and exactly_semidefinite(
            a + Fraction(theta) * np.eye(len(a), dtype=int)
        ):
            return Fraction(theta)
    return None


def _least_sum(slope: np.ndarray, group: int, count: Any) -> Fraction:
    """Return the least sum with `count` entries of every group; inf marks entries that are not free."""
    parts = slope.reshape(-1, group)
    counts = np.broadcast_to(count, len(parts))
    return sum(
        (x for part, k in zip(parts, counts, strict=True) for x in sorted(part)[:k]), Fraction(0)
    )


def _ones(pruned: np.ndarray) -> np.ndarray:
    return np.array([Fraction(int(x)) for x in pruned])


class _ExactForm(NamedTuple):
    """A form of a tree by its number; None: it is not convex, and proves nothing."""

    number: int
    convex: Quadratic | None


class ExactTreeCheck(TreeCheck):
    """The check of a row's tree in rational numbers: the walk of `TreeCheck`, with bounds of its own."""

    def __init__(self, layer: LayerProblem, row: int, tree: RowProof) -> None:
        super().__init__(layer, row, tree)
        self.f = _folded(objective(layer, row), self.pruned * (self.n // self.group))
        self.twins = [twins for twins in self.twins if self._same(twins)]

    def _same(self, twins: np.ndarray) -> bool:
        """Return whether exchanging any two of these inputs leaves f unchanged, without rounding."""
        q, first = self.f.matrix, twins[0]
        for other in twins[1:]:
            order = np.arange(self.n)
            order[[first, other]] = other, first
            linear = self.f.linear
            if (q[order, other] != q[:, first]).any() or linear[first] != linear[other]:
                return False
        return True

    def _made(self, number: int, free: np.ndarray, cuts: Cuts) -> Any:
        form = _without(self.f, cuts)
        lam, mu = rational(self.tree.forms[number]), Fraction(self.tree.penalty)
        matrix, linear = form.matrix.copy(), form.linear.copy()
        matrix[free, free] += lam[free]
        linear[free] -= lam[free]
        for first in range(0, self.n, self.group):
            of = slice(first, first + self.group)
            matrix[of, of] += mu
            linear[of] -= 2 * self.pruned * mu
        constant = form.constant + mu * self.pruned**2 * (self.n // self.group)
        return _ExactForm(number, _convex(Quadratic(matrix, linear, constant), free))

    def _step(
        self, form: Any, state: np.ndarray, free: np.ndarray, point: np.ndarray
    ) -> tuple[Any, np.ndarray]:
        p = _ones(state == 1)
        if len(free) == 0:
            return self.f.value(p), np.zeros((2, 0))
        if form is not None:
            self._check_point(point, free)
        if form is None or form.convex is None:
            return Fraction(0), np.zeros((2, len(free)))
        p[free] = rational(point)
        slope = form.convex.slope(p)
        ranked = np.full(self.n, math.inf, dtype=object)
        ranked[free] = slope[free]
        left = self.pruned - (state == 1).reshape(-1, self.group).sum(1)
        value = form.convex.value(p) - slope[free] @ p[free] + _least_sum(ranked, self.group, left)
        order = [sorted(part) for part in ranked.reshape(-1, self.group)]
        last = np.array([order[i // self.group][left[i // self.group] - 1] for i in free])
        first = np.array([order[i // self.group][left[i // self.group]] for i in free])
        rise = np.stack([slope[free] - last, first - slope[free]])
        return value, np.maximum(rise, 0)

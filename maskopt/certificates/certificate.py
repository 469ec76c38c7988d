"""Certificates of lower bounds, and their check in float64.

For any λ ∈ Rⁿ, μ ∈ R per group, ν ∈ Rⁿ per group and multipliers τ ≥ 0 of inequalities c_t(p) ≥ 0
that hold for all p ∈ {0,1}ⁿ, put

    g(p) = pᵀQp + Σ_i λ_i(p_i² − p_i) + Σ_g μ_g(1_gᵀp − s)² + Σ_g (ν_gᵀp)(1_gᵀp − s) − Σ_t τ_t c_t(p).

On every legal p all added terms but the last vanish, and the last is ≤ 0: g(p) ≤ f(p). Where the
matrix A of g's quadratic form is positive semidefinite, g is convex, and for *any* point p̂

    f(p) ≥ g(p) ≥ g(p̂) + min_v ∇g(p̂)ᵀ(v − p̂),       v over {0 ≤ v ≤ 1, 1_gᵀv = s}

(the Frank–Wolfe bound; the minimum is a sort). A linear part 2lᵀp + c of f is one of g as
well. With a shared budget the sum Σ ωᵣ gᵣ has one such bound, with v over all rows and one count; μ and ν,
which need a count of each row, are 0 then. So (λ, μ, ν, τ, p̂) is a certificate that anybody can check
in float64, and however badly it was computed, it costs tightness and never validity.

The check shares no code with the methods that make certificates. A ⪰ 0 is settled by a Cholesky
factorisation with an explicit margin: if it runs to completion in floating point, then
λ_min(A) ≥ −c with c = γ/(1−γ)·tr A, γ = (n+2)u (Rump, *Verification of positive definiteness*,
BIT 46, 2006). Whatever is missing to A ⪰ 0 is added to λ, which costs θ·Σ p̂(1 − p̂).

The c_t are triangle and pentagonal inequalities (`maskopt.certificates.cuts`).

Of updated weights, with A = G + λD, b = Aw + g and C = wᵀAw + 2gᵀw + c, F(p) is the least of vᵀAv − 2bᵀv +
C over v that is zero where p prunes. Take d ≥ 0 with B = A − diag(d) ⪰ 0. On every legal set S of kept
inputs, for any α,

    dⱼvⱼ² ≥ 2αⱼvⱼ − αⱼ²/dⱼ  for j in S,     dⱼvⱼ² = 0  elsewhere,

so that F ≥ C + minᵥ {vᵀBv − 2(b−α)ᵀv} − Σ_S αⱼ²/dⱼ: the dual of the perspective relaxation (Günlük and
Linderoth, *Perspective reformulations of mixed integer nonlinear programs*, Math. Program. 2010). With
α = b − Bv̂ for *any* v̂ the minimum is at v̂, and

    F(p) ≥ C − v̂ᵀBv̂ − the greatest sum of (b − Bv̂)ⱼ²/dⱼ over as many j as are kept.

With a shared budget the sum Σ ωᵣFᵣ has one such bound, with the greatest of all rows' ωᵣ(b − Bv̂)ⱼ²/dⱼ over
as many as the layer keeps. So (d, v̂) is a certificate of F. What is missing to B ⪰ 0 is taken off d.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.certificates.cuts import CutForm, Cuts, check_cuts, cut_form
from maskopt.core.files import join_rows, take_rows, unpack, unpack_rows
from maskopt.core.problem import LayerProblem, RowProblem
from maskopt.core.units import Real
from maskopt.errors import VerificationError

#: unit roundoff of float64
_U = 2.0**-53
#: what several rows may lack together beyond G, in parts of what rounding may hide
_ROUNDED = 128.0
#: squares of weights below it are no longer exact
_LEAST_SQUARE = 1e-300


@dataclass(frozen=True)
class Certificate:
    """A proof of the lower bounds of a layer's rows, of f or of F.

    Attributes:
        diagonal: float64 [rows, n], λ; of F d ≥ 0.
        penalty: float64 [rows, groups], μ; [rows, 0] in a certificate of F.
        point: float64 [rows, n], p̂, of F v̂; any point is valid.
        product: float64 [rows, groups, n], ν, or None.
        cuts: one `Cuts` a row, or None.
    """

    diagonal: Float[Tensor, "rows n"]
    penalty: Float[Tensor, "rows groups"]
    point: Float[Tensor, "rows n"]
    product: Float[Tensor, "rows groups n"] | None = None
    cuts: Sequence[Cuts | None] | None = None

    def check(self, problem: LayerProblem | RowProblem) -> Float[Tensor, " rows"]:
        """Return the lower bound of every row that this certificate proves, float64, at least 0.

        Of an integral problem it is the next value of f. With a shared budget it is one bound of the sum,
        divided into equal parts.

        Raises:
            VerificationError: a certificate of the other objective, shapes that do not fit, values that are
                not finite, τ < 0 or d < 0, or an index or a sign that makes no inequality of all masks.
        """
        layer = problem.as_layer()
        self.check_shapes(layer)
        value = (
            _bounds_of_f(self, layer) if layer.update is None else _bounds_of_update(self, layer)
        )
        # sums beyond float64 prove nothing
        value = torch.where(torch.isfinite(value), value, 0.0).clamp(min=0.0)
        return value.new_tensor(next_values(layer, value.tolist()))

    def take(self, rows: Sequence[int]) -> Certificate:
        """Return the certificate of some rows only."""
        return take_rows(self, rows)

    @classmethod
    def box(cls, problem: LayerProblem, point: Float[Tensor, "rows n"]) -> Certificate:
        """Return λ = μ = ν = 0 at a point: what the convex relaxation of Q itself proves."""
        zero = torch.zeros((), dtype=torch.float64, device=point.device)
        penalty = zero.expand(problem.rows, problem.n // problem.group_size)
        return cls(zero.expand(problem.rows, problem.n), penalty, point.double())

    @classmethod
    def unpacked(
        cls, words: Mapping[str, Any], arrays: Mapping[str, np.ndarray], name: str
    ) -> Certificate:
        """Invert `maskopt.core.files.pack`; errors as of `unpack`, KeyError without a diagonal."""
        rows = len(arrays[f"{name}.diagonal"])
        cuts = unpack_rows(Cuts, words, arrays, f"{name}.cuts", rows)
        return unpack(cls, words, arrays, name, cuts=cuts)

    @classmethod
    def of_rows(
        cls, problem: LayerProblem, rows: Sequence[Certificate | None]
    ) -> Certificate | None:
        """Join those of single rows; a row without proves f ≥ 0. None where no row has one."""
        if not any(rows):
            return None
        nothing = cls.box(problem, torch.zeros_like(problem.weight, dtype=torch.float64))
        return cls.stack(part or nothing.take([row]) for row, part in enumerate(rows))

    @classmethod
    def stack(cls, parts: Iterable[Certificate]) -> Certificate:
        """Join the certificates of consecutive rows."""
        parts = list(parts)
        if any(part.product is not None for part in parts):
            parts = [part._with_product() for part in parts]
        cut = any(any(part.cuts or ()) for part in parts)
        lists = [list(part.cuts or [None] * len(part.diagonal)) if cut else None for part in parts]
        return join_rows([replace(p, cuts=c) for p, c in zip(parts, lists, strict=True)])

    def of_linear(self, problem: LayerProblem) -> Certificate:
        """Return the certificate of a problem with a linear part from one of its rows' forms `RowProblem.q`.

        The forms differ from f by (2lᵀp/S + c/S²·1ᵀp)(1ᵀp − S), a part of ν with S pruned inputs, and a
        multiple of 1ᵀp − S, which changes no bound.
        """
        if problem.linear is None or not problem.pruned:
            return self
        pruned = problem.pruned // problem.rows
        pull = problem.weight.double() * problem.correlation
        extra = 2 * pull / pruned + problem.constant[:, None] / pruned**2
        product = self._with_product().product
        assert product is not None
        return replace(self, product=product + extra[:, None, :].expand_as(product))

    def _with_product(self) -> Certificate:
        """Return the same with an array of zeros for ν where there is none."""
        if self.product is not None:
            return self
        zeros = self.diagonal.new_zeros(*self.penalty.shape, self.diagonal.shape[1])
        return replace(self, product=zeros)

    def check_shapes(self, layer: LayerProblem) -> None:
        """Raise VerificationError where arrays do not fit the layer, or hold what no certificate does."""
        rows, n, groups = layer.rows, layer.n, layer.n // layer.group_size
        of_update = self.penalty.shape[1:] == (0,) and self.product is None and self.cuts is None
        if of_update != (layer.update is not None):
            of, other = ("updated", "unchanged") if of_update else ("unchanged", "updated")
            raise _refused(f"it is of {of} weights, and proves nothing of {other} ones")
        shapes: dict[str, tuple[int, ...]] = {"diagonal": (rows, n), "point": (rows, n)}
        shapes["penalty"] = rows, 0 if of_update else groups
        if self.product is not None:
            shapes["product"] = rows, groups, n
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor.shape != shape or tensor.dtype != torch.float64:
                actual = f"{tensor.dtype} {list(tensor.shape)}"
                raise _refused(f"{name} must be float64 {list(shape)}, not {actual}")
            if not bool(torch.isfinite(tensor).all()):
                raise _refused(f"{name} holds NaN or infinite values")
        if of_update and bool((self.diagonal < 0).any()):
            raise _refused("the split of the diagonal is negative")
        if layer.shared_budget and (bool(self.penalty.any()) or self.product is not None):
            raise _refused(
                "penalty and product need a count of each row, and these rows share a budget"
            )
        if self.cuts is not None and len(self.cuts) != rows:
            raise _refused(f"{len(self.cuts)} cut lists for {rows} rows")
        for row, cuts in enumerate(self.cuts or ()):
            if cuts is not None:
                check_cuts(cuts, n, row)


def _refused(reason: str) -> VerificationError:
    return VerificationError(f"certificate: {reason}")


def next_values(layer: LayerProblem, bounds: list[Real]) -> list[Real]:
    """Raise bounds of f to its next values for an integral problem without a shared budget."""
    if not layer.integral or layer.shared_budget:
        return bounds
    values = [layer.row(row).values() for row in range(layer.rows)]
    return [v.at_least(b) for v, b in zip(values, bounds, strict=True) if v]


def evenly(total: Tensor, layer: LayerProblem) -> Float[Tensor, " rows"]:
    """Divide a number into equal parts ωᵣ xᵣ, and return x."""
    return total / layer.rows / layer.shares


def least_total(
    values: Float[Tensor, "rows n"], count: int, limits: tuple[int, int]
) -> Float[Tensor, ""]:
    """Return the least sum of `count` of the values; `limits`: least and most of every row."""
    least, most = limits
    ordered = values.sort(1).values
    free = ordered[:, least:most].flatten().sort().values
    return ordered[:, :least].sum() + free[: count - least * len(values)].sum()


def _bounds_of_f(certificate: Certificate, layer: LayerProblem) -> Float[Tensor, " rows"]:
    """Return the bounds of f."""
    slacks = _shared_slacks(certificate, layer)
    gram = layer.gram.double()
    parts = [_at_point(certificate, layer, gram, row, slacks[row]) for row in range(layer.rows)]
    offset, gradient = (torch.stack([part[i] for part in parts]) for i in (0, 1))
    if not layer.shared_budget:
        size, pruned = layer.group_size, layer.pruned_per_group
        ranked = [slope.view(-1, size).sort(dim=1).values for slope in gradient]
        return offset + torch.stack([slope[:, :pruned].sum() for slope in ranked])
    least = least_total(gradient * layer.shares[:, None], layer.pruned, layer.row_limits)
    return evenly(layer.shares @ offset + least, layer)


def _at_point(
    certificate: Certificate, layer: LayerProblem, gram: Tensor, row: int, shared: float | None
) -> tuple[Tensor, Tensor]:
    """Return g(p̂) − ∇g(p̂)ᵀp̂, less what rounding may add to the row's bound, and ∇g(p̂)."""
    w = layer.weight[row].double()
    n, group = layer.n, layer.group_size
    parts = certificate.point, certificate.diagonal, certificate.penalty
    point, diagonal, penalty = (part[row].to(w) for part in parts)
    # of a group; μ and ν are 0 with a shared budget
    pruned = layer.pruned / penalty.numel() / layer.rows
    product = None if certificate.product is None else certificate.product[row].to(w)
    cut = cut_form(None if certificate.cuts is None else certificate.cuts[row], n, w)
    # |Q_ij| ≤ reach_i·reach_j, up to G's own rounding
    reach = w.abs() * gram.diagonal().clamp(min=0.0).sqrt()
    # what is missing to A ⪰ 0, added to λ
    if shared is not None:
        lam = diagonal + shared * w.square()
    else:
        lam = diagonal + _lacking(w[:, None] * gram * w[None, :], diagonal, penalty, product, cut)

    # g(p̂) and its gradient
    qp = w * (gram @ (w * point))
    excess = point.view(-1, group).sum(1) - pruned
    spread = (penalty * excess).repeat_interleave(group)
    value = point @ qp + lam @ (point.square() - point) + (penalty * excess.square()).sum()
    gradient = 2 * qp + lam * (2 * point - 1) + 2 * spread
    if product is not None:
        inner = product @ point
        value = value + inner @ excess
        gradient = gradient + product.T @ excess + inner.repeat_interleave(group)
    if cut.matrix is not None:
        value = value - (point @ (cut.matrix @ point) + cut.linear @ point + cut.constant)
        gradient = gradient - (2 * (cut.matrix @ point) + cut.linear)
    pull, constant = w * layer.correlation[row], layer.constant[row]
    value = value + 2 * pull @ point + constant
    gradient = gradient + 2 * pull
    # rounding of everything above and of the sum of all rows: no sum has more terms in a row
    terms = 2 * n + 8 + (layer.rows * n if layer.shared_budget else 0)
    far = point.abs().clamp(min=1.0)
    size = 4 * (reach @ far) ** 2 + 4 * (lam.abs() @ far.square())
    widest = group * far.max() + pruned
    size = size + 4 * penalty.abs().sum() * widest**2
    if product is not None:
        size = size + 4 * (product.abs() @ far).sum() * widest
    size = size + 16 * cut.size * n * far.max() ** 2
    size = size + 4 * (pull.abs() @ far) + 4 * constant
    # the form of the cuts enters g(p̂), its slope at p̂ and the least slope
    off = 8 * cut.error * far.max() ** 2
    return value - gradient @ point - terms * _U * size - off, gradient


def _lacking(
    a: Tensor, diagonal: Tensor, penalty: Tensor, product: Tensor | None, cut: CutForm
) -> float:
    """Return θ with A + θI ⪰ 0 for certain. `a` is Q, and becomes A."""
    n, groups, size = len(a), len(penalty), _norm(a)
    group = n // groups
    a.diagonal().add_(diagonal)
    a.view(groups, group, groups, group).diagonal(dim1=0, dim2=2).add_(penalty)
    size += float(diagonal.norm()) + group * float(penalty.norm())
    if product is not None:
        half = product.T.repeat_interleave(group, dim=1) / 2
        a += half + half.T
        size += 2 * float(half.norm())
    if cut.matrix is not None:
        a -= cut.matrix
        size += cut.size
    return missing(a) + 8 * _U * size + cut.error


def missing(a: Tensor) -> float:
    """Return θ ≥ 0 with A + θI ⪰ 0 for certain."""
    n, rump = len(a), _rump(a)
    for factor in (2.0, 1e2, 1e4):
        shift = factor * rump
        shifted = a.clone()
        shifted.diagonal().add_(shift)
        if int(torch.linalg.cholesky_ex(shifted).info) == 0:
            return shift + 2 * rump
    # the residual of a computed symmetric eigenvalue is a small multiple of n·u·‖A‖
    try:
        least = float(torch.linalg.eigvalsh(a)[0])
    except torch.linalg.LinAlgError:  # of entries near the end of float64's range
        return torch.inf
    return max(0.0, -least) + 16 * n * _U * _norm(a) + 2 * rump


def _rump(a: Float[Tensor, "n n"]) -> float:
    """Return what rounding may hide from a Cholesky factorisation that succeeds."""
    n, trace = len(a), float(a.diagonal().abs().sum())
    gamma = (n + 2) * _U
    return 2 * gamma / (1 - gamma) * trace + n * 1e-300


def _norm(a: Float[Tensor, "n n"]) -> float:
    """Return ‖A‖ in Frobenius' norm, also where squares of its entries leave float64's range."""
    norm, largest = float(torch.linalg.matrix_norm(a)), float(a.abs().max())
    if 1e-140 < norm < 1e300 or largest in (0.0, torch.inf):
        return norm
    return largest * float(torch.linalg.matrix_norm(a / largest))


def _shared_slacks(certificate: Certificate, layer: LayerProblem) -> list[float | None]:
    """Return for every row a slack with A ⪰ −slack·diag(w²) where one factorisation of G serves several rows.

    These are all rows that have μ ≥ 0, ν = 0 and no cuts, or else those of them with λ ≥ 0.
    """
    plain = (certificate.penalty >= 0).all(1)
    if certificate.product is not None:
        plain &= (certificate.product == 0).all(2).all(1)
    if certificate.cuts is not None:
        plain &= torch.tensor([cuts is None for cuts in certificate.cuts], device=plain.device)
    for rows in (plain, plain & (certificate.diagonal >= 0).all(1)):
        if int(rows.sum()) < 2:
            break
        slack = _slack_of(certificate.diagonal[rows], layer, rows.to(layer.device))
        if slack is not None:
            return [slack if shared else None for shared in rows.tolist()]
    return [None] * layer.rows


def _slack_of(lam: Tensor, layer: LayerProblem, rows: Tensor) -> float | None:
    """Return what diag(w)(G + diag(d))diag(w) ⪯ A lacks to semidefiniteness, in units of w².

    d_i is the least λ_i/w_i² over the rows. None where it is more than rounding and what G itself lacks,
    since no single row may lack it.
    """
    square = layer.weight[rows].double().square()
    lam = lam.to(square)
    if bool((lam[square < _LEAST_SQUARE] < 0).any()):
        return None
    # no ratio may exceed the truth
    ratio = torch.where(square > 0, lam / square.clamp(min=_LEAST_SQUARE), torch.inf)
    least = ratio.min(0).values.clamp(max=1e12 * float(layer.gram.diagonal().abs().max()) + 1.0)
    # inputs whose weights are all zero do not matter; a large entry there would only blur the rest
    least = torch.where((square > 0).any(0), least, 0.0)
    g = layer.gram.double().clone()
    g.diagonal().add_(least - 8 * _U * (least.abs() + g.diagonal().abs()))
    lack, rounding = missing(g), _ROUNDED * _rump(g)
    scale = float(layer.gram.diagonal().double().abs().mean())
    if lack > 1e-4 * scale or (lack > rounding and lack > missing(layer.gram.double()) + rounding):
        return None
    return lack


def _bounds_of_update(certificate: Certificate, layer: LayerProblem) -> Float[Tensor, " rows"]:
    """Return the bounds of F."""
    if layer.least_squares.flat:  # a G of 0: A is the identity that stands in for it
        return torch.zeros(layer.rows, dtype=torch.float64, device=layer.device)
    parts = [_update_at_point(certificate, layer, row) for row in range(layer.rows)]
    offset, price = (torch.stack([part[i] for part in parts]) for i in (0, 1))
    if not layer.shared_budget:
        kept = layer.group_size - layer.pruned_per_group
        grouped = price.view(layer.rows, -1, layer.group_size)
        dearest = grouped.topk(kept, dim=2).values.sum((1, 2))
        return offset - dearest * (1 + (layer.n + 8) * _U)
    every, kept = layer.shares[:, None] * price, price.numel() - layer.pruned
    least, most = layer.row_limits
    terms = (layer.rows + 4) * _U * (layer.shares @ offset.abs())
    dearest = -least_total(-every, kept, (layer.n - most, layer.n - least))
    dearest = dearest * (1 + (price.numel() + 8) * _U)
    return evenly(layer.shares @ offset - terms - dearest, layer)


def _update_at_point(
    certificate: Certificate, layer: LayerProblem, row: int
) -> tuple[Tensor, Tensor]:
    """Return C − v̂ᵀBv̂, less what rounding may add, and (b − Bv̂)ⱼ²/dⱼ, plus what it may take off."""
    w = layer.weight[row].double()
    a, n = layer.least_squares.damped, layer.n
    v = certificate.point[row].to(w)
    d = certificate.diagonal[row].to(w)
    b = a - torch.diag(d)
    lack = missing(b) + 4 * _U * float(a.diagonal().max())
    d = d - lack
    g, constant = layer.correlation[row], layer.constant[row]
    wanted = a @ w + g
    image = b @ v + lack * v
    offset = w @ (a @ w) + 2 * g @ w + constant - v @ image
    # |A_ij| ≤ √(A_ii A_jj), and |B_ij| no more than twice that
    size = a.diagonal().sqrt()
    reach, far = size @ w.abs(), size @ v.abs()
    off = (n + 6) * _U * (size * (reach + 4 * far) + g.abs() + lack * v.abs())
    terms = reach**2 + 2 * g.abs() @ w.abs() + constant + 4 * far**2 + lack * v @ v
    alpha = (wanted - image).abs() + off
    # an input of no d can be paid for only where nothing is asked of it
    price = torch.where(d > 0, (alpha / d.clamp(min=1e-300).sqrt()).square(), torch.inf)
    return offset - (2 * n + 8) * _U * terms, price * (1 + 8 * _U)

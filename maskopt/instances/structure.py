"""Row problems that remove whole inputs of a linear map, for all of its outputs at once.

With weight W and Gram matrix G of its inputs, removing the inputs P changes the outputs by

    Σ_rows (w_r⊙p)ᵀG(w_r⊙p) = pᵀQp,     Q = G ∘ (WᵀW),

positive semidefinite by Schur's product theorem. Inputs that go together (the columns of an attention head)
are one entry of p: rows and columns of Q are summed over them. With w the norms of the structures' columns, Q
= diag(w)·G'·diag(w), so that scores mean the same as for a row: `magnitude` ranks by norms, `wanda` by Q's
diagonal (Wanda-sp, in FLAP, arXiv 2312.11983).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskopt.core.inputs import is_whole
from maskopt.core.least_squares import LeastSquares, LeastSquaresUpdate
from maskopt.core.pattern import Pattern
from maskopt.core.problem import RowProblem
from maskopt.errors import ProblemError


def structure_problem(
    weight: Float[Tensor, "rows n"],
    gram: Float[Tensor, "n n"],
    pattern: Pattern,
    *,
    groups: Int[Tensor, " n"] | None = None,
    mean: Float[Tensor, " n"] | None = None,
    name: str = "",
) -> RowProblem:
    """Make the row problem of a layer's input structures, with unchanged kept weights; f sums over rows.

    Args:
        gram: G of the layer's inputs, the mean over tokens.
        pattern: the number of structures that stay, or N:M among neighbours.
        groups: the structure of each input, numbered 0 … m−1 without a gap; None: every input is one.
        mean: of the inputs over tokens; only used where every input is a structure.

    Raises:
        ProblemError: shapes that do not fit one another, numbers with a gap, or what `RowProblem` refuses.
        PatternError: a pattern that does not fit the structures.
    """
    if weight.ndim != 2 or gram.shape != (weight.shape[1],) * 2:
        raise ProblemError(
            f"weight must be [rows, n] and gram [n, n], not {list(weight.shape)} and {list(gram.shape)}"
        )
    exact = weight.double()
    quadratic, norms = gram.double() * (exact.T @ exact), exact.square().sum(0)
    if groups is not None:
        n = weight.shape[1]
        if groups.shape != (n,) or not is_whole(groups) or int(groups.min()) < 0:
            raise ProblemError(
                f"groups must be whole numbers of at least 0 for each of the {n} inputs"
            )
        if int(torch.bincount(groups).min()) == 0:
            raise ProblemError("groups must be numbered without a gap")
        quadratic, norms = _summed(_summed(quadratic, groups).T, groups), _summed(norms, groups)
    norms = norms.sqrt()
    scale = torch.where(norms > 0, norms, 1.0)  # Where there is no weight, Q is 0, too.
    correlation = quadratic / scale / scale[:, None]
    correlation = (correlation + correlation.T) / 2
    moments = mean if groups is None else None
    return RowProblem(norms, correlation, pattern, moments=moments, name=name)


def _summed(values: Tensor, groups: Tensor) -> Tensor:
    """Sum over the entries of each group, along the first axis."""
    total = torch.zeros(int(groups.max()) + 1, *values.shape[1:]).to(values)
    return total.index_add_(0, groups, values)


def refit_inputs(
    weight: Float[Tensor, "rows n"],
    gram: Float[Tensor, "n n"],
    kept: Bool[Tensor, " n"],
    update: LeastSquaresUpdate,
) -> Float[Tensor, "rows n"]:
    """Return the weights of the kept inputs by least squares, float64, zero for the others.

    V_S = A_SS⁻¹A_S:Wᵀ with A = G + λD; rows that it does not improve are unchanged. ProblemError for an
    indefinite A.
    """
    squares = LeastSquares.of(gram, update)
    squares.check("")
    a, exact = squares.damped, weight.double()
    inside = kept.nonzero()[:, 0]
    factor = torch.linalg.cholesky(a[inside][:, inside])
    solved = torch.cholesky_solve(a[inside] @ exact.T, factor).T
    new = torch.zeros_like(exact)
    new[:, inside] = solved
    unchanged = torch.where(kept, exact, 0.0)
    better = change(new, weight, gram) <= change(unchanged, weight, gram)
    return torch.where(better[:, None], new, unchanged)


def change(
    new: Float[Tensor, "rows n"], weight: Float[Tensor, "rows n"], gram: Float[Tensor, "n n"]
) -> Float[Tensor, " rows"]:
    """Return the mean squared change of every output, float64."""
    difference = new.double() - weight.double()
    return ((difference @ gram.double()) * difference).sum(1).clamp(min=0)

"""Layers whose kept weights are updated, and their objective F by its definition."""

import torch
from strategies import HALF, ONE_PERCENT, TWO_FOUR, random_gram, random_linear

from maskopt import NM, LayerProblem, LeastSquaresUpdate, Unstructured, solve

PATTERNS = (HALF, TWO_FOUR)
#: for rows of more inputs than a search has candidates
LARGE = (Unstructured(sparsity=0.6), TWO_FOUR, NM(keep=4, of=8))
#: damping, and the power of the diagonal that it counts by
REFITS = [LeastSquaresUpdate(*how) for how in ((0.0,), (0.01,), (0.3,), (0.1, 0.5), (0.1, 1))]
LINEAR = {"argnames": "linear", "argvalues": [False, True], "ids": ["plain", "linear"]}
F64 = torch.float64


def layer(
    pattern=HALF, rows=4, n=16, kind="full", how=ONE_PERCENT, linear=False, seed=1, dtype=F64
):
    """Weights none of which is 0, so that there are no ties."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, n, generator=generator, dtype=F64).to(dtype)
    gram = random_gram(n, kind, seed + 1, dtype)
    part = random_linear(weight, gram, seed + 2) if linear else None
    return LayerProblem(weight, gram, pattern, linear=part, update=how)


def wide(problem):
    """The same numbers in float64."""
    same = {"linear": problem.linear, "update": problem.update, "assume_psd": True}
    return LayerProblem(problem.weight.double(), problem.gram.double(), problem.pattern, **same)


def changed(problem, w=1.0, g=1.0, columns=None):
    """Weights times w and the Gram matrix times g, its inputs in another order."""
    at, linear = torch.arange(problem.n) if columns is None else columns, problem.linear
    if linear is not None:
        linear = type(linear)(linear.correlation[:, at] * w * g, linear.constant * w * w * g)
    weight, gram = problem.weight[:, at] * w, problem.gram[at][:, at] * g
    return LayerProblem(weight, gram, problem.pattern, linear=linear, update=problem.update)


def shuffled(problem, seed=0):
    """An order of the inputs under which groups stay groups."""
    size, generator = problem.group_size, torch.Generator().manual_seed(seed)
    groups = torch.randperm(problem.n // size, generator=generator)
    return (size * groups[:, None] + torch.randperm(size, generator=generator)).flatten()


def metric(problem):
    """A in float64, from its definition."""
    gram, update = problem.gram.double(), problem.update
    mean = gram.diagonal().mean()
    own = mean ** (1 - update.power) * gram.diagonal().clamp(min=0.0) ** update.power
    return gram + torch.diag((update.damping * own).clamp(min=1e-6 * mean))


def dense(problem, mask, a=None):
    """F and v of every row by the eigenvectors of A_SS, where A is singular by its pseudo-inverse."""
    a, weight = metric(problem) if a is None else a, problem.weight.double()
    value, best = torch.zeros(problem.rows, dtype=F64), torch.zeros_like(weight)
    for row, w in enumerate(weight):
        g, c = torch.zeros_like(w), 0.0
        if problem.linear is not None:
            g, c = problem.linear.correlation[row], problem.linear.constant[row]
        kept = mask[row].nonzero()[:, 0]
        values, vectors = torch.linalg.eigh(a[kept][:, kept])
        real = values > 2.3e-16 * len(a) * values.abs().max() if len(kept) else values > 0
        parts = (vectors.T @ (a[kept] @ w + g[kept]) / values).where(real, 0.0)
        best[row, kept] = vectors @ parts
        lost = w - best[row]
        value[row] = lost @ a @ lost + 2 * g @ lost + c
    return value, best


def rounding(problem):
    return 1e-12 * float(problem.diagonal_mass().max()) + 1e-300


def residual(squares, weight, target, mask):
    off = torch.where(mask, target - weight @ squares.damped, 0.0)
    return off.norm(dim=1) / torch.where(mask, target, 0.0).norm(dim=1).clamp(min=1e-300)


def random_mask(problem, seed=0):
    return solve(problem.with_update(None), "random", seed=seed).mask


def assert_equal_but_for_rounding(problem, found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=rounding(problem))

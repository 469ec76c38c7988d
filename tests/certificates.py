"""What a certificate proves as it is defined, in rational numbers, and certificates to try that on."""

from fractions import Fraction

import numpy as np
import torch
from strategies import TWO_FOUR, drawn

from maskopt import NM, Certificate, Solution, Unstructured, solve, verify
from maskopt.certificates.certificate import _at_point
from maskopt.certificates.cuts import Cuts
from maskopt.certificates.proof import KINDS, LEAF, RowProof

PATTERNS = (Unstructured(keep=4), NM(keep=1, of=4), TWO_FOUR, Unstructured(keep=8))
fractions = np.vectorize(lambda x: Fraction(float(x)), otypes=[object])


def layer(pattern=PATTERNS[2], rows=2, kind="full", linear=False):
    return drawn(rows, 8, kind, pattern, linear=3 if linear else None)


def proven(problem, **options):
    """What `branch` proves by a tree, which `verify` checks."""
    solution = solve(problem, "branch", proof=True, workers=0, **options)
    verify(problem, solution, require="checked")
    return solution


def stating(problem, mask, bound, **more):
    """A solution with a bound and its certificate."""
    known = {"lower_bound": bound.value, "certificate": bound.certificate, **more}
    return Solution.of(problem, mask, **known)


def claimed(problem, solution, bound, factor=1.0, certificate=None):
    """What verify says of a solution with so much of a bound, and its certificate or another."""
    more = {"certificate": certificate or bound.certificate, "status": solution.status}
    value = factor * bound.value
    return verify(problem, stating(problem, solution.mask, bound, lower_bound=value, **more))


def triangles(size=0.05):
    """Every kind of index: inputs alone, z_0 first, z_0 last; every sign."""
    index = torch.tensor([[0, 1, 2], [-1, 3, 5], [4, 7, -1], [6, 2, 3], [5, -1, 6]])
    sign = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1], [-1, 1]], dtype=torch.int8)
    return Cuts(index, sign, size * torch.arange(1, 6, dtype=torch.float64))


def certificate(problem, *, product=False, cuts=False):
    """Duals of both signs under which every A is positive definite by far, and no special point."""
    rows, n, groups = problem.rows, problem.n, problem.n // problem.group_size

    def noise(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    diagonal, penalty, point = 2 + noise(rows, n).abs(), 0.1 * noise(rows, groups), noise(rows, n)
    products = 0.1 * noise(rows, groups, n) if product else None
    lists = [triangles(), *[None] * (rows - 1)] if cuts else None
    return Certificate(diagonal, penalty, point, products, lists)


def formula(certificate, problem, row):
    """g of one row as it is defined, in rational numbers."""
    w, gram, linear = fractions(problem.weight[row]), fractions(problem.gram), problem.linear
    q = w[:, None] * gram * w
    lam, mu = fractions(certificate.diagonal[row]), fractions(certificate.penalty[row])
    cuts = certificate.cuts[row] if certificate.cuts else None

    def g(p):
        p = np.array(p)
        value = p @ q @ p + lam @ (p * p - p)
        if linear is not None:
            value += 2 * (fractions(linear.correlation[row]) * w) @ p
            value += Fraction(float(linear.constant[row]))
        excess = p.reshape(-1, problem.group_size).sum(1) - problem.pruned_per_group
        value += mu @ (excess * excess)
        if certificate.product is not None:
            value += excess @ (fractions(certificate.product[row]) @ p)
        if cuts is not None:
            z = [*(2 * p - 1), Fraction(1)]  # index −1 is z_0
            tau = fractions(cuts.multiplier)
            for (i, j, k), (a, b), t in zip(cuts.index, cuts.sign.tolist(), tau, strict=True):
                value -= t * (a * z[i] * z[j] + b * z[i] * z[k] + a * b * z[j] * z[k] + 1)
        return value

    return g


def exact(certificate, problem, row):
    """The bound as it is defined: g at p̂, and its slope over all legal masks."""
    g, point = formula(certificate, problem, row), fractions(certificate.point[row])
    # g is a quadratic: central differences are its gradient exactly
    gradient = np.array([g(point + e) - g(point - e) for e in fractions(np.eye(problem.n) / 2)])
    ranked = np.sort(gradient.reshape(-1, problem.group_size), axis=1)
    return g(point) + ranked[:, : problem.pruned_per_group].sum() - gradient @ point


def single(lam, mu, point, cuts=None) -> RowProof:
    """A tree of one step."""
    if cuts is None:
        cuts = Cuts(torch.zeros(0, 3), torch.zeros(0, 2), torch.zeros(0))
    parts = {"forms": np.atleast_2d(lam), "points": point, "cuts": [len(cuts.multiplier)]}
    parts |= {"cut_index": cuts.index, "cut_sign": cuts.sign, "multiplier": cuts.multiplier}
    parts |= {"form": [0], "branch": [LEAF], "fixes": [0], "fixed": [], "side": []}
    return RowProof(penalty=mu, **{k: np.asarray(parts[k], dtype=KINDS[k]) for k in KINDS})


def unclamped(certificate, problem, row, shared=None):
    """What `check` computes of one row before it says 0 of all that is below."""
    offset, slope = _at_point(certificate, problem, problem.gram.double(), row, shared)
    ranked = slope.view(-1, problem.group_size).sort(1).values
    return float(offset + ranked[:, : problem.pruned_per_group].sum())

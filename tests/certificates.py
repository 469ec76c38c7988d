"""What a certificate proves as it is defined, in rational numbers, and certificates to try that on."""

import itertools
from fractions import Fraction

import torch
from strategies import random_gram, random_linear, random_weight

from maskopt import NM, Certificate, LayerProblem, Solution, Unstructured, verify
from maskopt.certificate import Cuts, _check_row

PATTERNS = (Unstructured(keep=4), NM(keep=1, of=4), NM(keep=2, of=4), Unstructured(keep=8))


def layer(pattern=PATTERNS[2], rows=2, kind="full", linear=False):
    weight, gram = random_weight(rows, 8, 1), random_gram(8, kind, 2)
    part = random_linear(weight, gram, 3) if linear else None
    return LayerProblem(weight, gram, pattern, linear=part)


def claimed(problem, solution, bound, factor=1.0, certificate=None):
    """What verify says of a solution with so much of a bound, and its certificate or another."""
    more = {"certificate": certificate or bound.certificate, "status": solution.status}
    value = factor * bound.value
    return verify(problem, Solution.of(problem, solution.mask, lower_bound=value, **more))


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

    return Certificate(
        2 + noise(rows, n).abs(),
        0.1 * noise(rows, groups),
        noise(rows, n),
        0.1 * noise(rows, groups, n) if product else None,
        [triangles(), *[None] * (rows - 1)] if cuts else None,
    )


def formula(certificate, problem, row):
    """g of one row as it is defined, in rational numbers."""
    w = [Fraction(float(x)) for x in problem.weight[row]]
    gram = [[Fraction(float(x)) for x in line] for line in problem.gram]
    lam = [Fraction(float(x)) for x in certificate.diagonal[row]]
    mu = [Fraction(float(x)) for x in certificate.penalty[row]]
    n, size, s = problem.n, problem.group_size, problem.pruned_per_group
    groups = [range(first, first + size) for first in range(0, n, size)]
    cuts = certificate.cuts[row] if certificate.cuts else None

    def g(p):
        value = sum(
            w[i] * gram[i][j] * w[j] * p[i] * p[j] for i, j in itertools.product(range(n), repeat=2)
        )
        value += sum(lam[i] * (p[i] ** 2 - p[i]) for i in range(n))
        if problem.linear is not None:
            slope, constant = problem.linear.correlation[row], problem.linear.constant[row]
            value += 2 * sum(Fraction(float(slope[i])) * w[i] * p[i] for i in range(n))
            value += Fraction(float(constant))
        for group, members in enumerate(groups):
            excess = sum(p[i] for i in members) - s
            value += mu[group] * excess**2
            if certificate.product is not None:
                nu = [Fraction(float(x)) for x in certificate.product[row, group]]
                value += sum(nu[i] * p[i] for i in range(n)) * excess
        if cuts is not None:
            z = [*(2 * x - 1 for x in p), Fraction(1)]  # index −1 is z_0
            for (i, j, k), (a, b), tau in zip(
                cuts.index.tolist(), cuts.sign.tolist(), cuts.multiplier.tolist(), strict=True
            ):
                cut = a * z[i] * z[j] + b * z[i] * z[k] + a * b * z[j] * z[k] + 1
                value -= Fraction(tau) * cut
        return value

    return g


def exact(certificate, problem, row):
    """The bound as it is defined: g at p̂, and its slope over all legal masks."""
    g = formula(certificate, problem, row)
    n, size, s = problem.n, problem.group_size, problem.pruned_per_group
    point = [Fraction(float(x)) for x in certificate.point[row]]
    # g is a quadratic: central differences are its gradient exactly
    half = Fraction(1, 2)
    gradient = []
    for i in range(n):
        up, down = list(point), list(point)
        up[i], down[i] = up[i] + half, down[i] - half
        gradient.append(g(up) - g(down))
    least = sum(sum(sorted(gradient[first : first + size])[:s]) for first in range(0, n, size))
    slope = least - sum(x * y for x, y in zip(gradient, point, strict=True))
    return g(point) + slope


def unclamped(certificate, problem, row):
    """What `check` computes of one row before it says 0 of all that is below."""
    return float(_check_row(certificate, problem, problem.gram.double(), row, None))

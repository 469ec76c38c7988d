"""Certificates and trees with many, repeated and tiny cuts, judged in exact rational arithmetic."""

import functools
import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from certificates import layer, single
from commands import run
from strategies import random_gram, random_linear, random_weight

from maskopt import NM, LayerProblem, Solution, Status, Unstructured, lower_bound, solve, verify
from maskopt.certificates.certificate import Certificate
from maskopt.certificates.cuts import Cuts
from maskopt.certificates.exact_check import exact_bounds, exact_cost, rational, semidefinite
from maskopt.certificates.proof import Proof
from maskopt.certificates.proof_check import check_proof
from maskopt.core.least_squares import LeastSquaresUpdate
from maskopt.errors import OptionError, VerificationError

SLOW = pytest.mark.slow


def many_cuts(groups, size, copies, part=0.99):
    """Of every pair (2g, 2g + 1) the cut 4pᵢpⱼ ≥ 0, which 1:2 masks meet with equality: once with the
    multiplier `size`, then many times with less than half a unit in its last place.

    Added one after the other to 2·size, the linear terms of the copies are lost, and the terms that cancel
    them are not: by rounding alone Σ τ c(p) is 2·copies·τ too small wherever pᵢ + pⱼ = 1.
    """
    pairs = torch.tensor([[-1, 2 * group, 2 * group + 1] for group in groups], dtype=torch.int32)
    tau = torch.full((len(pairs), copies + 1), part * size * 2.0**-53, dtype=torch.float64)
    tau[:, 0] = size
    sign = torch.ones(tau.numel(), 2, dtype=torch.int8)
    return Cuts(pairs.repeat_interleave(copies + 1, 0), sign, tau.flatten())


def forged_certificate(problem, honest, groups, size, copies, part=0.99):
    """An honest certificate, and cuts that μ and λ cancel: μ = 2τ takes the products, λ = −2τ the squares."""
    diagonal, penalty = honest.diagonal.clone(), honest.penalty.clone()
    for group in groups:
        penalty[:, group] += 2 * size
        diagonal[:, 2 * group : 2 * group + 2] -= 2 * size
    cuts = [many_cuts(groups, size, copies, part)] * problem.rows
    return Certificate(diagonal, penalty, honest.point, cuts=cuts)


def forged_tree(problem, honest, size, copies, part=0.99):
    """The same as a tree of one leaf, whose μ holds for all groups."""
    cuts = many_cuts(range(problem.n // 2), size, copies, part)
    return single(np.full(problem.n, -2 * size), 2 * size, honest.point[0].numpy(), cuts)


def one_of_two(n, seed):
    weight, gram = random_weight(1, n, seed, torch.float64), random_gram(n, "full", seed + 1)
    return LayerProblem(weight, gram, NM(keep=1, of=2))


@functools.cache
def toy(n, seed):
    """A 1:2 row, its box certificate, its exact optimum and the worst of its masks."""
    problem, costs = one_of_two(n, seed), {}
    for pruned in itertools.product((0, 1), repeat=n // 2):
        mask = torch.ones(n, dtype=torch.bool)
        mask[[2 * pair + one for pair, one in enumerate(pruned)]] = False
        costs[exact_cost(problem, mask, 0)] = mask
    assert max(costs) > 1.001 * float(min(costs)) > 0
    honest = lower_bound(problem, "box").certificate
    return problem, honest, min(costs), Solution.of(problem, costs[max(costs)])


def test_rounding_of_many_cuts_proves_nothing(tmp_path):
    """By the library and by the command."""
    problem, honest, optimum, _ = toy(8, 4)
    tree = forged_tree(problem, honest, 2.0**41, 40_000)
    assert Fraction(float(check_proof(problem, Proof([tree])))) <= optimum
    problem, instance = one_of_two(32, seed=4), tmp_path / "row.npz"
    problem.save(instance)
    best = solve(problem, "branch", proof=True, workers=0)
    starts = (solve(problem, "random", seed=seed).mask for seed in range(12))
    found = (solve(problem, "swap", start=start) for start in starts)
    other = next(s for s in found if float(s.objective) > 1.01 * float(best.objective))
    honest = lower_bound(problem, "box").certificate
    forged = forged_certificate(problem, honest, [0], 2.0**37, 500_000)
    more = {"lower_bound": other.objective, "certificate": forged}
    claim = Solution.of(problem, other.mask, status=Status.OPTIMAL, **more)
    for require in ("claims", "exact"):
        with pytest.raises(VerificationError, match="lower bound: row 0 states"):
            verify(problem, claim, require=require)
    assert bool((forged.check(problem) <= best.objective).all())
    best.save(tmp_path / "best.npz")
    said = run("verify", instance, tmp_path / "best.npz", "--exact")
    assert "holds: 1 row checked" in said
    assert "checked in exact arithmetic in" in said
    # a bound above what the tree proves
    off = replace(best, status=(Status.FEASIBLE,), lower_bound=best.lower_bound * (1 + 1e-8))
    off.save(tmp_path / "off.npz")
    run("verify", instance, tmp_path / "off.npz", "--exact", fails=VerificationError)
    run("verify", tmp_path, "--exact", fails=OptionError)


@pytest.mark.parametrize("first", [0, *(pytest.param(k, marks=SLOW) for k in (50, 100, 150, 200))])
def test_forged_certificates_and_trees_are_refused(first, monkeypatch):
    """250 of them: none proves more than the optimum, or than it does in exact arithmetic."""
    # else verify tries all masks of a toy
    monkeypatch.setattr("maskopt.checks.verification.ENUMERATION_LIMIT", 0)
    for seed in range(first, first + 50):
        generator = np.random.default_rng(seed)
        problem, honest, optimum, poor = toy(int(generator.choice([4, 6, 8])), 1 + seed % 4)
        size = 2.0 ** generator.integers(0, 60)
        copies = int(generator.choice([3, 40, 500] if seed % 50 else [30_000]))
        part = float(generator.choice([0.99, 0.5, 1.01, 1e-3]))
        groups = generator.permutation(problem.n // 2)[: generator.integers(1, problem.n // 2 + 1)]
        bad = forged_certificate(problem, honest, groups.tolist(), size, copies, part)
        tree = forged_tree(problem, honest, size, copies, part)
        claim = replace(poor, lower_bound=poor.objective)
        for forged, judge in (
            (replace(claim, certificate=bad), exact_bounds(problem, bad)),
            (replace(claim, proof=Proof([tree])), exact_bounds(problem, trees=[tree])),
        ):
            with pytest.raises(VerificationError, match="lower bound: row 0 states"):
                verify(problem, forged, require="checked")
            proof = forged.proof
            found = bad.check(problem) if proof is None else check_proof(problem, proof)
            assert Fraction(float(found)) <= judge[0] + optimum / 10**6, seed
            assert judge[0] <= optimum, seed


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(keep=2, of=4)], ids=str)
@pytest.mark.parametrize("linear", [False, True])
def test_trees_and_certificates_of_searches_hold_exactly(pattern, linear):
    weight, gram = random_weight(2, 12, 5, torch.float64), random_gram(12, "full", 6)
    part = random_linear(weight, gram, 7) if linear else None
    problem = LayerProblem(weight, gram, pattern, linear=part)
    optimum = solve(problem, "branch", proof=True, workers=0)
    assert verify(problem, optimum, require="exact").checked
    bound = lower_bound(problem, "sdp")
    more = {"lower_bound": bound.value, "certificate": bound.certificate}
    claim = Solution.of(problem, optimum.mask, **more)
    assert verify(problem, claim, require="exact").checked
    higher = replace(claim, lower_bound=1.001 * claim.lower_bound)
    for wrong in (higher, replace(optimum, proof=None, trusted=("SCIP 10.0.0",) * 2)):
        with pytest.raises(VerificationError):
            verify(problem, wrong, require="exact")


def test_a_shared_budget_has_one_exact_bound():
    weight, gram = random_weight(3, 8, 5, torch.float64), random_gram(8, "full", 6)
    problem = LayerProblem(weight, gram, Unstructured(0.5, per="layer"))
    problem = problem.counting(torch.tensor([1.0, 2.0, 0.5]))
    bound, mask = lower_bound(problem, "box"), solve(problem, "exhaustive").mask
    more = {"lower_bound": bound.value, "certificate": bound.certificate}
    verify(problem, Solution.of(problem, mask, **more), require="exact")
    (exactly,) = exact_bounds(problem, bound.certificate)
    assert float(exactly) == pytest.approx(float(problem.shares @ bound.value), rel=1e-9)
    assert float(exactly) <= float(problem.shares @ problem.objective(mask))
    # and what has none is refused by name
    with pytest.raises(VerificationError, match="weights are kept unchanged"):
        exact_bounds(layer().with_update(LeastSquaresUpdate(0.1)))
    wide = LayerProblem(torch.ones(1, 256), torch.eye(256), Unstructured(0.5))
    with pytest.raises(VerificationError, match="at most 200 inputs, not 256"):
        verify(wide, solve(wide, "wanda"), require="exact")


def test_semidefinite_is_decided_without_rounding():
    tiny = Fraction(1, 2**200)
    one = np.array([[Fraction(1)] * 3] * 3)
    assert semidefinite(one)
    for i in range(3):
        less, more = one.copy(), one.copy()
        less[i, i] -= tiny
        more[i, i] += tiny
        assert semidefinite(more)
        assert not semidefinite(less)
    assert semidefinite(rational(np.zeros((2, 2))))
    assert not semidefinite(rational(np.array([[0.0, 1.0], [1.0, 5.0]])))
    for seed in range(20):
        x = np.random.default_rng(seed).integers(-3, 4, (6, 4)).astype(float)
        assert semidefinite(rational(x @ x.T))
        assert not semidefinite(rational(x @ x.T - 2.0**-40 * np.eye(6)))

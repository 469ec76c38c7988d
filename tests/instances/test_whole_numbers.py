"""Quadratic objectives of whole numbers are decided without tolerance: definiteness, values, OPTIMAL."""

from itertools import combinations

import numpy as np
import pytest
import torch
from commands import run, shows
from forging import fails

from maskopt import LayerProblem, RowProblem, Solution, Unstructured, load_problem, solve, verify
from maskopt.core.units import ObjectiveTransform, exactly_semidefinite
from maskopt.errors import ProblemError, VerificationError
from maskopt.protocol.solution import Status

#: indefinite by less than the tolerance of real numbers: entries 2 and 3 have the value −1
BY_A_HAIR = """\
10126751058984,-10126751058984,0,0,0
-10126751058984,10126751058984,0,0,0
0,0,535752004010622,-535752004010622,-263646996033486
0,0,-535752004010622,535752004010621,263646996033486
0,0,-263646996033486,263646996033486,133233166674018
"""


def best_value(matrix, cardinality, maximize):
    """The optimum by enumeration in Python's integers."""
    rows = [[int(x) for x in row] for row in matrix.tolist()]
    values = (
        sum(rows[i][j] for i in chosen for j in chosen)
        for chosen in combinations(range(len(rows)), cardinality)
    )
    return max(values) if maximize else min(values)


def value_of(matrix, selected):
    rows = [[int(x) for x in row] for row in matrix.tolist()]
    return sum(rows[i][j] for i in selected for j in selected)


def test_a_value_below_zero_is_not_cut_off(tmp_path):
    (file := tmp_path / "M.csv").write_text(BY_A_HAIR)
    out = tmp_path / "out.npz"
    words = (file, "--cardinality", 2)
    # float64 bounds next to sums of 10¹⁵ prove nothing about a difference of 1: the status stays feasible
    said = run("solve", *words, "--solver", "branch", "--prove", "--output", out, fails=SystemExit)
    assert said == "1"
    assert Solution.load(out).value == -1
    said = run("solve", *words, "--solver", "exhaustive", "--output", out, "--overwrite")
    line = [*["optimal", "1", "-1", "-1", "0.00%"]]
    assert line in map(str.split, said.splitlines())
    shows(said, "selected, 2 of 5: 2 3")
    problem, solution = load_problem(file, 2), Solution.load(out)
    verify(problem, solution, require="checked")
    assert solution.value == solution.bound == -1
    mask = torch.tensor([[False, False, True, True, True]])
    claim_optimal_is_refused(problem, mask)


def claim_optimal_is_refused(problem, mask):
    objective = Solution.of(problem, mask).objective
    claim = Solution.of(problem, mask, status=Status.OPTIMAL, lower_bound=objective)
    for require in ("claims", "checked", "exact"):
        fails(VerificationError, None, verify, problem, claim, require=require)


@pytest.mark.parametrize("c", [10**6, 10**9, 10**14])
def test_an_instance_of_whole_numbers_that_is_indefinite_by_a_hair_is_refused(c, tmp_path):
    gram = np.zeros((4, 4))
    gram[:2, :2] = [[c, -c - 50], [-c - 50, c]] if c > 10**6 else [[c, -c - 1], [-c - 1, c]]
    gram[2:, 2:] = [[c, -c], [-c, c]]
    layer = LayerProblem(np.ones((1, 4)), gram, Unstructured(keep=2), assume_psd=True)
    whole = ObjectiveTransform(integral=True)
    fails(ProblemError, "without tolerance.*from_quadratic", layer.with_units, whole)
    layer._with(units=whole).save(tmp_path / "forged.npz")
    fails(ProblemError, "semidefinite", load_problem, tmp_path / "forged.npz")
    row = RowProblem.from_quadratic(gram, cardinality=2)
    solution = solve(row, "branch", proof=True)
    assert solution.value == best_value(gram, 2, False) < 0
    verify(row, solution, require="exact")


def test_sums_beyond_float64_are_refused_with_the_remedy():
    large = np.full((3, 3), 2.0**50)
    fails(
        ProblemError, "beyond 2⁵².*common factor", RowProblem.from_quadratic, large, cardinality=1
    )
    halves = np.full((3, 3), 2.0**49) - 0.25  # not whole: nothing is exact, nothing refused
    assert not RowProblem.from_quadratic(halves, cardinality=1).integral


def matrix_by_a_hair(rng):
    """A symmetric matrix of whole numbers up to 2⁵², singular up to changes by ones; n ≤ 8."""
    n = int(rng.integers(2, 9))
    rank = int(rng.integers(1, n + 1))
    size = 2.0 ** rng.uniform(0, 25)
    factor = np.rint(rng.normal(size=(n, rank)) * size)
    matrix = factor @ factor.T
    if np.abs(matrix).max() > 2.0**51:
        return matrix_by_a_hair(rng)
    if rng.random() < 0.5:
        change = rng.integers(-1, 2, size=(n, n)).astype(float)
        matrix += np.triu(change) + np.triu(change, 1).T
    return matrix


def too_large(matrix):
    """Return whether sums over the matrix reach 2⁵²."""
    return np.abs(matrix).sum() >= 2.0**52


@pytest.mark.parametrize("draws", [60, pytest.param(2_000, marks=pytest.mark.slow)])
def test_solve_and_verify_agree_with_enumeration_in_integers(draws):
    rng = np.random.default_rng(draws)
    indefinite = refused = proven = 0
    for draw in range(draws):
        matrix, maximize = matrix_by_a_hair(rng), bool(draw % 2)
        n, sign = len(matrix), -1 if maximize else 1
        matrix *= sign
        count = int(rng.integers(1, n))
        if too_large(matrix):
            refused += 1
            fails(ProblemError, "beyond 2⁵²", RowProblem.from_quadratic, matrix, cardinality=count)
            continue
        problem = RowProblem.from_quadratic(matrix, cardinality=count, maximize=maximize)
        assert problem.integral
        exact = np.array([int(sign * x) for x in matrix.ravel()], dtype=object).reshape(n, n)
        indefinite += not exactly_semidefinite(exact)
        best = best_value(matrix, count, maximize)
        optimum = solve(problem, "exhaustive")
        assert optimum.status == (Status.OPTIMAL,)
        assert optimum.value == optimum.bound == best == value_of(matrix, optimum.selected)
        assert f" {best} " in optimum.summary()
        verify(problem, optimum, require="checked")
        tree = solve(problem, "branch", workers=0, proof=True)
        assert tree.value == value_of(matrix, tree.selected)
        assert sign * tree.bound <= sign * best <= sign * tree.value
        verify(problem, tree, require="exact")
        if tree.status == (Status.OPTIMAL,):
            assert tree.value == tree.bound == best
            proven += 1
        other = solve(problem, "worst")
        assert other.value == value_of(matrix, other.selected)
        if other.value != best:
            claim_optimal_is_refused(problem, other.mask)
    assert min(indefinite, proven) > draws / 5
    assert refused < draws / 3


def test_real_numbers_below_zero_by_less_than_the_tolerance_count_as_zero():
    c = 1e9 + 0.5
    gram = np.array([[c, -c - 0.25], [-c - 0.25, c]])
    layer = LayerProblem(np.ones((1, 2)), gram, Unstructured(keep=0))
    solution = solve(layer, "exhaustive")
    assert (float(solution.objective), solution.status) == (0.0, (Status.OPTIMAL,))
    verify(layer, solution, require="checked")
    # in original units the shift keeps it: max xᵀUx is −0.5
    row = RowProblem.from_quadratic(-gram, cardinality=2, maximize=True)
    assert solve(row, "exhaustive").value == pytest.approx(0.5, abs=1e-2)

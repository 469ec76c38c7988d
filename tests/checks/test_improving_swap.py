"""What counts as an improving swap: how much, which of several, and in whatever unit."""

import itertools

import pytest
import torch
from hypothesis import given
from strategies import problems, random_gram, random_weight

from maskopt import NM, LayerProblem, Unstructured, improving_swap, solve
from maskopt.errors import VerificationError
from maskopt.solution import SWAP_FLOOR, SWAP_TOLERANCE

TWO, SIX, TWO_FOUR = Unstructured(keep=2), Unstructured(keep=6), NM(keep=2, of=4)


def diagonal(*squares, pattern=TWO, gram=1.0):
    """A row whose objective is `gram` times the sum of what is pruned of `squares`."""
    weight = torch.tensor([squares], dtype=torch.float64).sqrt()
    return LayerProblem(weight, gram * torch.eye(len(squares), dtype=torch.float64), pattern)


def keep(n, *kept):
    return torch.tensor([i in kept for i in range(n)])


def swapped(mask, kept, pruned):
    places = torch.arange(len(mask))
    return mask & (places != kept) | (places == pruned)


@given(problems(max_n=9, max_rows=2))
def test_it_is_the_best_pair_of_brute_force(problem):
    solution, group = solve(problem, "random"), problem.group_size
    for i in range(problem.rows):
        row, mask = problem.row(i), solution.mask[i]
        q = row.q()
        mass = float(q.diagonal().sum())

        def cost(m, q=q):
            return float((~m).double() @ q @ (~m).double())

        pairs = itertools.product(mask.nonzero()[:, 0].tolist(), (~mask).nonzero()[:, 0].tolist())
        every = (swapped(mask, u, p) for u, p in pairs if u // group == p // group)
        best = min((cost(other) - cost(mask) for other in every), default=0.0)
        swap = improving_swap(row, mask)
        if swap is None:
            slack = SWAP_TOLERANCE * cost(mask) + SWAP_FLOOR * mass
            assert best >= -slack * (1 + 1e-6) - 1e-13 * mass
        else:
            assert bool(mask[swap.kept])
            assert not bool(mask[swap.pruned])
            assert swap.delta == pytest.approx(best, rel=1e-6, abs=1e-9 * mass)
            assert cost(swapped(mask, swap.kept, swap.pruned)) < cost(mask)


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("gram", [1e-9, 1.0, 1e9])
def test_a_swap_counts_above_1e_6_of_the_objective_and_1e_13_of_the_diagonal(gram, unit):
    mask = keep(4, 2, 3)
    for off, counts in ((0.5e-6, False), (3e-6, True)):
        problem = diagonal(unit * (1 + 2 * off), unit, unit, 2 * unit, gram=gram)
        swap = improving_swap(problem, mask)
        assert (swap is not None) == counts
        if swap:
            assert swap[:2] == (2, 0)
            assert swap.delta == pytest.approx(-2 * off * unit * gram, rel=1e-6)
        # asked for any decrease
        assert improving_swap(problem, mask, tolerance=0) is not None
        off *= 1e-7
        problem = diagonal(unit * (1 + 1e6 * off), unit, unit, (1e6 - 3) * unit, gram=gram)
        assert (improving_swap(problem, mask, tolerance=0) is not None) == counts


def test_the_best_swap_of_all_groups_is_named_and_the_first_of_equals():
    squares = [2.0, 1.0, 1.0, 3.0, 5.0, 1.0, 1.0, 6.0, 3.0, 1.0, 1.0, 4.0]
    mask = keep(12, 2, 3, 6, 7, 10, 11)
    problem = diagonal(*squares, pattern=TWO_FOUR)
    assert improving_swap(problem, mask) == pytest.approx((6, 4, -4.0))
    equal = diagonal(*[2.0, 2.0, 1.0, 1.0] * 3, pattern=TWO_FOUR)
    assert improving_swap(equal, mask) == pytest.approx((2, 0, -1.0))
    # of one row
    problem = LayerProblem(random_weight(2, 8, 1), random_gram(8, "full", 2), TWO_FOUR)
    with pytest.raises(VerificationError, match=r"takes one row; use problem\.row\(i\)"):
        improving_swap(problem, solve(problem, "wanda").mask)
    row = problem.row(0)
    mask = solve(row, "worst").mask
    assert improving_swap(row.as_layer(), mask) == improving_swap(row, mask[0])


def test_weights_of_any_size_are_brought_within_range():
    """Squares of small ones end at 2⁻⁵¹² or so, sums of large ones before 2⁵¹² (as do problems)."""
    weight, gram = random_weight(1, 12, 1), random_gram(12, "full", 2)
    mask = solve(LayerProblem(weight, gram, SIX), "worst").mask[0]
    expected = improving_swap(LayerProblem(weight, gram, SIX), mask)
    for exponent in (-900, -540, -150, 150, 500):
        found = improving_swap(LayerProblem(weight * 2.0**exponent, gram, SIX), mask)
        assert found[:2] == expected[:2]
        if abs(exponent) < 500:
            assert found.delta == pytest.approx(expected.delta * 4.0**exponent)
    mixed, outlier = weight.clone(), weight.abs()
    mixed[0, 0] = 0.0
    mixed[0, int(mask.nonzero()[0])] = -(2.0**-300)
    assert improving_swap(LayerProblem(mixed, gram, SIX), mask) is not None
    first = int((~mask).nonzero()[0])
    outlier[0, first] = -(2.0**500)
    assert improving_swap(LayerProblem(outlier, gram, SIX), mask).pruned == first
    assert improving_swap(LayerProblem(0 * weight, gram, SIX), mask) is None
    # and narrow ones are scanned in float64
    for dtype in (torch.float32, torch.bfloat16):
        narrow = LayerProblem(weight.to(dtype), gram.float(), SIX)
        wide = LayerProblem(weight.to(dtype).double(), gram.float().double(), SIX)
        mask = solve(wide, "worst").mask[0]
        assert improving_swap(narrow, mask) == improving_swap(wide, mask)

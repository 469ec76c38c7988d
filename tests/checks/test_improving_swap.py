"""What counts as an improving swap: how much, which of several, and in whatever unit."""

import pytest
import torch
from strategies import random_gram, random_weight

from maskopt import NM, LayerProblem, Unstructured, improving_swap, solve
from maskopt.errors import VerificationError


def diagonal(*squares, pattern, gram=1.0):
    """A row whose objective is `gram` times the sum of what is pruned of `squares`."""
    weight = torch.tensor([squares], dtype=torch.float64).sqrt()
    return LayerProblem(weight, gram * torch.eye(len(squares), dtype=torch.float64), pattern)


def keep(n, *kept):
    return torch.tensor([i in kept for i in range(n)])


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("gram", [1e-9, 1.0, 1e9])
def test_a_swap_counts_above_1e_6_of_the_objective(gram, unit):
    for off, counts in ((0.5e-6, False), (3e-6, True)):
        squares = (unit * (1 + 2 * off), unit, unit, 2 * unit)
        problem = diagonal(*squares, pattern=Unstructured(keep=2), gram=gram)
        swap = improving_swap(problem, keep(4, 2, 3))
        assert (swap is not None) == counts
        if swap:
            assert swap[:2] == (2, 0)
            assert swap.delta == pytest.approx(-2 * off * unit * gram, rel=1e-6)
        # asked for any decrease
        assert improving_swap(problem, keep(4, 2, 3), tolerance=0) is not None


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_and_above_1e_13_of_the_diagonal(unit):
    for off, counts in ((0.5e-13, False), (3e-13, True)):
        squares = (unit * (1 + 1e6 * off), unit, unit, (1e6 - 3) * unit)
        problem = diagonal(*squares, pattern=Unstructured(keep=2))
        assert (improving_swap(problem, keep(4, 2, 3), tolerance=0) is not None) == counts


def test_the_best_swap_of_all_groups_is_named_and_the_first_of_equals():
    squares = [2.0, 1.0, 1.0, 3.0, 5.0, 1.0, 1.0, 6.0, 3.0, 1.0, 1.0, 4.0]
    mask = keep(12, 2, 3, 6, 7, 10, 11)
    problem = diagonal(*squares, pattern=NM(keep=2, of=4))
    assert improving_swap(problem, mask) == pytest.approx((6, 4, -4.0))
    equal = diagonal(*[2.0, 2.0, 1.0, 1.0] * 3, pattern=NM(keep=2, of=4))
    assert improving_swap(equal, mask) == pytest.approx((2, 0, -1.0))


def test_weights_of_any_size_are_brought_within_range():
    """Squares of small ones end at 2⁻⁵¹² or so, sums of large ones before 2⁵¹² (as do problems); which swap
    is best does not."""
    weight, gram = random_weight(1, 12, 1), random_gram(12, "full", 2)
    mask = solve(LayerProblem(weight, gram, Unstructured(keep=6)), "worst").mask[0]
    expected = improving_swap(LayerProblem(weight, gram, Unstructured(keep=6)), mask)
    for exponent in (-900, -540, -150, 150, 500):
        problem = LayerProblem(weight * 2.0**exponent, gram, Unstructured(keep=6))
        found = improving_swap(problem, mask)
        assert found[:2] == expected[:2]
        if abs(exponent) < 500:
            assert found.delta == pytest.approx(expected.delta * 4.0**exponent)
    mixed = weight.clone()
    mixed[0, 0] = 0.0
    mixed[0, int(mask.nonzero()[0])] = -(2.0**-300)
    problem = LayerProblem(mixed, gram, Unstructured(keep=6))
    assert improving_swap(problem, mask) is not None
    outlier = weight.abs()
    outlier[0, int((~mask).nonzero()[0])] = -(2.0**500)
    problem = LayerProblem(outlier, gram, Unstructured(keep=6))
    assert improving_swap(problem, mask).pruned == int((~mask).nonzero()[0])
    nothing = LayerProblem(0 * weight, gram, Unstructured(keep=6))
    assert improving_swap(nothing, mask) is None


def test_float32_and_bfloat16_rows_are_scanned_in_float64():
    weight, gram = random_weight(1, 12, 1), random_gram(12, "full", 2, torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        narrow = LayerProblem(weight.to(dtype), gram, Unstructured(keep=6))
        wide = LayerProblem(weight.to(dtype).double(), gram.double(), Unstructured(keep=6))
        mask = solve(wide, "worst").mask[0]
        assert improving_swap(narrow, mask) == improving_swap(wide, mask)


def test_a_layer_of_several_rows_is_refused():
    problem = LayerProblem(random_weight(2, 8, 1), random_gram(8, "full", 2), NM(keep=2, of=4))
    with pytest.raises(VerificationError, match=r"takes one row; use problem\.row\(i\)"):
        improving_swap(problem, solve(problem, "wanda").mask)
    row = problem.row(0)
    mask = solve(row, "worst").mask
    assert improving_swap(row.as_layer(), mask) == improving_swap(row, mask[0])

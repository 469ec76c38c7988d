"""Groups of an N:M mask: against all partitions, and against every exchange."""

from itertools import combinations

import numpy as np
import pytest

from maskopt.errors import PatternError
from maskopt.solvers.grouping import group_inputs


def cost(score, order, keep, of):
    groups = np.sort(score[:, order].reshape(len(score), -1, of), axis=2)
    return float(groups[:, :, : of - keep].sum())


def partitions(inputs, of):
    if not inputs:
        yield ()
        return
    first, *others = inputs
    for some in combinations(others, of - 1):
        left = [x for x in others if x not in some]
        for rest in partitions(left, of):
            yield (first, *some, *rest)


def drawn(seed, rows, n):
    return np.random.default_rng(seed).exponential(size=(rows, n)) ** 2


@pytest.mark.parametrize(
    ("n", "keep", "of", "number"), [(8, 2, 4, 35), (12, 2, 4, 5775), (6, 1, 2, 15)]
)
def test_the_cost_is_between_that_of_the_best_partition_and_that_of_the_given_order(
    n, keep, of, number
):
    orders = list(partitions(list(range(n)), of))
    assert len(orders) == number
    reached = 0
    for seed in range(6):
        score = drawn(seed, 3, n)
        found = group_inputs(score, keep, of)
        best = min(cost(score, list(order), keep, of) for order in orders)
        assert sorted(found.order) == list(range(n))
        assert found.cost == pytest.approx(cost(score, found.order, keep, of))
        assert found.before == pytest.approx(cost(score, np.arange(n), keep, of))
        assert best * (1 - 1e-9) <= found.cost <= found.before
        reached += found.cost <= best * (1 + 1e-9)
    assert reached >= 3


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2)])
def test_no_exchange_lowers_the_cost(keep, of):
    score, n = drawn(keep * of, 5, 24), 24
    found = group_inputs(score, keep, of)
    assert found.exchanges > 0
    assert found.cost < found.before
    for a, b in combinations(range(n), 2):
        order = found.order.copy()
        order[[a, b]] = order[[b, a]]
        assert cost(score, order, keep, of) >= found.cost * (1 - 1e-8)


def test_rows_of_zeros_and_equal_scores_end():
    for score in (np.zeros((3, 8)), np.ones((2, 8)), np.eye(8)):
        found = group_inputs(score, 2, 4)
        assert found.cost == pytest.approx(cost(score, found.order, 2, 4))


def test_groups_that_do_not_divide_the_inputs_are_refused():
    with pytest.raises(PatternError, match="10 inputs do not form groups of 4"):
        group_inputs(np.ones((2, 10)), 2, 4)

"""Compounds of two exchanges: better than single ones, and free of what they claim to lack."""

import itertools

from hypothesis import given
from local_search import drawn
from strategies import problems

from maskopt import solve, verify


@given(problems(max_n=7, max_rows=2))
def test_no_exchange_of_two_for_two_is_left_when_all_inputs_are_candidates(problem):
    solution = solve(problem, "kswap", warm_start="random", candidates=16)
    group = problem.group_size
    for i in range(problem.rows):
        q, mask = problem.row(i).q(), solution.mask[i]
        steps = [
            (u, p)
            for u in range(problem.n)
            for p in range(problem.n)
            if mask[u] and not mask[p] and u // group == p // group
        ]
        value = float(solution.objective[i])
        slack = 1e-6 * value + 1e-12 * float(q.diagonal().sum())
        for (u, p), (v, r) in itertools.combinations(steps, 2):
            if u == v or p == r:
                continue
            other = mask.clone()
            other[[u, v]], other[[p, r]] = False, True
            pruned = (~other).double()
            assert float(pruned @ q @ pruned) >= value - slack


def test_it_finds_better_masks_than_single_exchanges():
    better = 0
    for seed in range(1, 21):
        problem = drawn(4, 40, "low-rank", seeds=(seed * 5 + 1, seed))
        one, two = solve(problem, "swap"), solve(problem, "kswap")
        verify(problem, two)
        assert bool((two.objective <= one.objective * (1 + 1e-9)).all())
        better += int((two.objective < one.objective * (1 - 1e-3)).sum())
    assert better >= 20  # of 80 rows

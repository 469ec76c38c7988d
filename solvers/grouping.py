"""Groups of inputs for an N:M mask: a partition that makes the best mask of a score cheapest.

The best N:M mask of a separable score prunes the M − N least scores of every group, so that a partition costs
Σ over rows and groups of these. `group_inputs` exchanges two inputs of different groups as long as one such
exchange lowers the cost, and ends with a scan of all of them.

For an input x, let base_x be the sum over rows of the M − N − 1 least scores of the others of its group, and
t_x the next one of each row. With y in place of x the group costs base_x + P_xy, P_xy = Σ over rows of
min(s_y, t_x). An exchange changes the lines of P of two groups alone.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from maskopt.errors import PatternError
from maskopt.solvers.kernels import RowThreads, njit

#: an exchange is made where it gains more than this part of the mean cost of a group
_LEAST_GAIN = 1e-9


class Grouping(NamedTuple):
    """An order of the inputs, group after group, that no exchange between two groups makes cheaper.

    Attributes:
        cost, before: of this order, and of the order before, in units of the score.
        exchanges: how many were made.
    """

    order: Int[np.ndarray, " n"]
    cost: float
    before: float
    exchanges: int


def group_inputs(score: Float[np.ndarray, "rows n"], keep: int, of: int) -> Grouping:
    """Exchange inputs of groups of `of`, of which every row keeps `keep`, until no exchange pays.

    The search begins with the given order. It takes 8n² bytes and two copies of the score, at least 0.

    Raises:
        PatternError: `of` does not divide the inputs, or `keep` is not within 1 … `of` − 1.
    """
    rows, n = score.shape
    if n % of or not 0 < keep < of:
        raise PatternError(f"{n} inputs do not form groups of {of}, {keep} of which are kept")
    scores = np.ascontiguousarray(score.T, dtype=np.float64)
    order, place = np.arange(n), np.arange(n)
    base, limit, p = np.empty(n), np.empty((n, rows)), np.empty((n, n))
    threads = RowThreads(least=1)

    def compute(inputs: np.ndarray) -> None:
        """Compute base, t and the lines of P of inputs."""
        for x in inputs:
            group = order[place[x] // of * of :][:of]
            least = np.sort(scores[group[group != x]], axis=0)[: of - keep]
            base[x], limit[x] = least[:-1].sum(), least[-1]
        threads.run(_lines, inputs, scores, limit, p)

    compute(order)
    diagonal = p.diagonal()
    before = cost = float((base + diagonal)[::of].sum())
    threshold = -_LEAST_GAIN * cost * of / n
    exchanges = x = tried = 0  # so many inputs before x have no exchange, one after the other
    while tried < n:
        change = p[x] - diagonal[x] + p[:, x] - diagonal
        change[place // of == place[x] // of] = 0.0
        y = int(change.argmin())
        if change[y] < threshold:
            cost, exchanges, tried = cost + float(change[y]), exchanges + 1, 0
            order[place[x]], order[place[y]], place[x], place[y] = y, x, place[y], place[x]
            groups = order.reshape(-1, of)[[place[y] // of, place[x] // of]]
            compute(groups.ravel())
        else:
            tried += 1
        x = (x + 1) % n
    return Grouping(order, cost, before, exchanges)


@njit(fastmath=True)
def _lines(scores, limit, p, inputs):
    """Compute the lines of P of several inputs, so that the scores pass through memory once."""
    n, rows = scores.shape
    for y in range(n):
        for x in inputs:
            total = 0.0
            for r in range(rows):
                total += min(scores[y, r], limit[x, r])
            p[x, y] = total

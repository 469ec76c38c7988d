"""Greedy elimination for updated weights: the Optimal Brain Surgeon (Hassibi and Stork, NeurIPS 1992).

With S the inputs that are left, M = A_SS⁻¹ and v = M b_S, pruning u adds v_u²/M_uu to F, and afterwards

    v ← v − M_:u v_u/M_uu,      M ← M − M_:u M_u:/M_uu    without u.

The cheapest goes, again and again, as long as its group has to give. In place of a rank-one update of n²
numbers for every weight, the cheapest few are eliminated on their own small block, and then M follows in one
product (`panel` = 1: the recursion itself).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from maskopt.core.fields import option
from maskopt.core.limits import Limits, one_thread_each, threads_on
from maskopt.core.problem import LayerProblem
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import Capabilities
from maskopt.protocol.trace import Trace
from maskopt.solvers.greedy.select import keep_highest
from maskopt.solvers.least_squares.block import one_sided
from maskopt.solvers.least_squares.damped import Damped

#: candidates on the small block for each that is eliminated there
_CANDIDATES = 4


@dataclass(frozen=True)
class Obs(Damped):
    """A mask for updated weights, by the price of each removal after the ones before it. Rows that are left
    when the time is over prune by the first prices."""

    name: ClassVar[str] = "obs"
    capabilities: ClassVar[Capabilities] = Capabilities(
        update=True, apart=True, note="greedy removal at exact prices, for weights that are updated"
    )

    panel: int = option(
        64, "eliminated between two updates of the whole inverse; 1: the exact recursion", least=1
    )

    def run(self, problem: LayerProblem, start: Tensor | None, limits: Limits) -> Solution:
        refitted = self.refitted(problem)
        squares = refitted.least_squares
        target = squares.target(refitted.weight, refitted.correlation)
        inverse = squares.inverse
        group, quota = problem.group_size, problem.pruned_per_group
        done = limits.counter(problem.rows)
        first = keep_highest(problem, (target @ inverse).square() / inverse.diagonal())

        def eliminated(row: int) -> tuple[Tensor, int]:
            if limits.expired:
                return first[row], 0
            found = _eliminated(inverse, target[row], group, quota, self.panel)
            done()
            return found

        found = one_thread_each(eliminated, problem.rows, threads_on(problem.device))
        mask, rounds = torch.stack([row[0] for row in found]), [row[1] for row in found]
        return Solution.of(problem, mask, trace=Trace(rounds=torch.tensor(rounds)))


def _eliminated(
    inverse: Tensor, target: Tensor, group: int, quota: int, panel: int
) -> tuple[Tensor, int]:
    """The mask [n] of one row, and its panels."""
    n, rounds = len(target), 0
    left = torch.arange(n, device=target.device)
    room = np.full(n // group, quota)
    m, v = inverse, inverse @ target
    while room.any():
        rounds += 1
        cost = v.square() / m.diagonal()
        full = torch.from_numpy(room == 0).to(left.device)[left // group]
        cost.masked_fill_(full, torch.inf)
        most = min(len(left), _CANDIDATES * panel if panel > 1 else 1, int((~full).sum()))
        slots = cost.topk(most, largest=False, sorted=True).indices
        block = -m[slots[:, None], slots[None, :]].cpu().numpy()
        groups = (left[slots] // group).cpu().numpy()
        order, _ = one_sided(block, v[slots].cpu().numpy(), groups, room, panel)
        gone = slots[torch.from_numpy(order).to(slots.device)]
        columns = m[:, gone]
        weights = torch.linalg.solve(columns[gone], torch.cat([columns.T, v[gone, None]], 1))
        stays = torch.ones_like(left, dtype=torch.bool)
        stays[gone] = False
        kept = stays.nonzero()[:, 0]
        columns = columns[kept]
        v = v[kept] - columns @ weights[:, -1]
        m = m[kept[:, None], kept[None, :]].addmm_(columns, weights[:, kept], alpha=-1)
        left = left[kept]
    mask = torch.zeros(n, dtype=torch.bool, device=left.device)
    return mask.index_fill_(0, left, True), rounds

"""`perspective`: bounds of F, of updated weights: a perspective relaxation with a split of A's diagonal.

The relaxation and its turns are those of `convex.perspective`. As a function of d its minimum is concave,
with the slope vⱼ²(1/zⱼ − 1): d goes step by step towards the best split of the slope, by Frank and Wolfe.
Under a shared budget the z of all rows share one count: after turns of all rows together, an input that is
kept has a price for each row, at which the split of each row alone is improved. The bound is computed from d
and v by `maskopt.certificates.certificate`, wherever the steps end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from maskopt.certificates.certificate import Certificate
from maskopt.core.fields import option
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.core.threads import one_thread_each, threads_on
from maskopt.protocol.bounds import BoundMethod
from maskopt.protocol.trace import Trace
from maskopt.solvers.bounds.box import diagonal_shift
from maskopt.solvers.convex.perspective import OUT_SHARE, levels, shares
from maskopt.solvers.least_squares.masks import Scaled

#: B keeps this part of the room that d leaves to indefiniteness, and d is no less than this of its mean
_ROOM, _LEAST = 1e-4, 1e-6
#: in A_jj = 1, and d is no less than this, whatever rounding leaves
_TINIEST = 1e-12
#: steps towards another split that are tried, the longest first
_STEPS = (0.7, 0.4, 0.2, 0.1, 0.05, 0.02)
#: turns of v and z after a step of d, where they begin near their end
_TURNS_AFTER = 25
#: times that the rows of a shared budget are priced
_PRICES = 2
#: a round of d that gains less than this part of the bound is the last
_SETTLED = 1e-4


@dataclass(frozen=True)
class PerspectiveBound(BoundMethod):
    """The perspective relaxation of updated weights; one row a thread, n³ operations a turn."""

    name: ClassVar[str] = "perspective"
    shared_budget: ClassVar[bool] = True
    update: ClassVar[bool] = True
    note: ClassVar[str] = "of updated weights: perspective relaxation, best split of the diagonal"

    turns: int = option(60, "of v and z at most, with the first split", least=1)
    splits: int = option(20, "rounds that better the split; 0: the least eigenvalue", least=0)

    def certify(self, problem: LayerProblem, limits: Limits) -> tuple[Certificate, Trace]:
        scaled = Scaled.of(problem)
        room = float(torch.linalg.eigvalsh(scaled.a)[0])
        pairs = zip(scaled.target, scaled.constant.tolist(), strict=True)
        rows = [_Row(problem, scaled.a, room, target, constant) for target, constant in pairs]
        threads = threads_on(problem.device)
        passes = _PRICES if problem.shared_budget else 1
        done = limits.counter(passes * problem.rows)
        rounds = torch.zeros(problem.rows, dtype=torch.int64)

        def improve(row: int) -> int:
            made = rows[row].improve(self.turns, self.splits, limits)
            done()
            return made

        for _ in range(passes):
            if problem.shared_budget:
                _set_prices(rows, problem, self.turns, limits, threads)
            rounds += torch.tensor(one_thread_each(improve, problem.rows, threads))
        if problem.shared_budget:
            _set_prices(rows, problem, _TURNS_AFTER, limits, threads)
        d, v = torch.stack([row.d for row in rows]), torch.stack([row.v for row in rows])
        size = scaled.size
        return Certificate(d * size.square(), d[:, :0], v / size), Trace(iterations=rounds)


def _set_prices(
    rows: Sequence[_Row], problem: LayerProblem, turns: int, limits: Limits, threads: int
) -> None:
    """Take turns of v and z for all rows of a shared budget at once, and give each its price of an input."""
    share = problem.shares.cpu().numpy()[:, None]
    inputs = problem.weight.numel()
    kept, level = inputs - problem.pruned, np.inf

    def solve(row: int) -> None:
        rows[row].v, _ = rows[row].take_turns(rows[row].d, rows[row].z, 1)

    for _ in range(turns if kept else 0):
        if limits.expired:
            break
        one_thread_each(solve, len(rows), threads)
        size = np.stack([_size(row.d, row.v) for row in rows]) * np.sqrt(share)
        level = float(levels(size.ravel(), inputs, kept)[0])
        all_z = torch.from_numpy(shares(size.ravel(), inputs, kept).reshape(size.shape))
        for row, z in zip(rows, all_z, strict=True):
            row.z = z.to(row.v)
    with np.errstate(divide="ignore", over="ignore"):  # of rows that nothing is asked of
        prices = 1 / (np.float64(level) ** 2 * share.ravel())
    for row, price in zip(rows, prices.tolist(), strict=True):
        row.price = price


class _Row:
    """The relaxation of one row, whose inputs are scaled to A_jj = 1; `room` is the least eigenvalue of A.

    The row keeps so many inputs of every group, or, of a shared budget, pays `price` for every input.
    """

    price = 0.0

    def __init__(
        self, problem: LayerProblem, a: Tensor, room: float, target: Tensor, constant: float
    ) -> None:
        self.problem, self.a, self.target, self.constant = problem, a, target, constant
        kept = 1 - problem.pruned / problem.weight.numel()
        self.d = torch.full_like(target, (1 - _ROOM) * max(room, _TINIEST))
        self.z = torch.full_like(target, kept).clamp(min=OUT_SHARE)
        self.v = torch.zeros_like(target)
        self.empty = kept == 0  # then v = 0, and nothing is left to split

    def improve(self, turns: int, splits: int, limits: Limits) -> int:
        """Move d, v and z to a better bound; return the number of rounds that raised it."""
        if self.empty:
            return 0
        self.v, self.z = self.take_turns(self.d, self.z, turns)
        best = self._value(self.d, self.v)
        for done in range(splits):
            if limits.expired:
                return done
            slope = self.v.square() * (1 / self.z - 1)
            aim = (1 - _ROOM) * diagonal_shift(self.a, slope, limits)
            # where A is all but singular the shift may be below 0 by rounding
            aim = aim.clamp(min=max(_TINIEST, _LEAST * float(aim.mean())))
            gained = 0.0
            for step in _STEPS:
                d = self._shortened(self.d + step * (aim - self.d))
                v, z = self.take_turns(d, self.z, _TURNS_AFTER)
                value = self._value(d, v)
                if value > best + gained:
                    gained, split = value - best, (d, v, z)
                elif gained:
                    break
            if not gained > _SETTLED * abs(best):
                return done
            best += gained
            self.d, self.v, self.z = split
        return splits

    def _shortened(self, d: Tensor) -> Tensor:
        """Shorten d until A − diag(d) is definite."""
        part = _ROOM
        while int(torch.linalg.cholesky_ex(self.a - torch.diag(d)).info):
            d, part = d * (1 - part), min(0.5, 2 * part)
        return d

    def take_turns(self, d: Tensor, z: Tensor, turns: int) -> tuple[Tensor, Tensor]:
        """Compute v for z, then z for v, so many times, as long as the systems are definite."""
        b, v = self.a - torch.diag(d), self.v
        for _ in range(turns):
            factor, broken = torch.linalg.cholesky_ex(b + torch.diag(d / z))
            if int(broken):
                break
            v = torch.cholesky_solve(self.target[:, None], factor)[:, 0]
            z = torch.from_numpy(self._shares(_size(d, v))).to(v.device)
        return v, z

    def _shares(self, size: np.ndarray) -> np.ndarray:
        """Return the best z for √dⱼ|vⱼ|."""
        if not self.problem.shared_budget:
            group = self.problem.group_size
            return shares(size, group, group - self.problem.pruned_per_group)
        with np.errstate(divide="ignore", invalid="ignore"):  # where it is free
            return np.clip(np.nan_to_num(size / np.sqrt(self.price), nan=1.0), OUT_SHARE, 1.0)

    def _value(self, d: Tensor, v: Tensor) -> float:
        """Return the bound that (d, v) make, but for rounding and, of a shared budget, a constant."""
        image = self.a @ v - d * v
        price = (self.target - image).square() / d
        if self.problem.shared_budget:
            counted = (price - self.price).clamp(min=0.0).sum()
        else:
            group = self.problem.group_size
            kept = group - self.problem.pruned_per_group
            counted = price.view(-1, group).topk(kept, dim=1).values.sum()
        return self.constant - float(v @ image) - float(counted)


def _size(d: Tensor, v: Tensor) -> np.ndarray:
    """Return √dⱼ|vⱼ|."""
    return (d.sqrt() * v.abs()).cpu().numpy()

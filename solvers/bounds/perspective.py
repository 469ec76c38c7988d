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
    """One row a thread; n³ operations a turn, some hundred turns."""

    name: ClassVar[str] = "perspective"
    shared_budget: ClassVar[bool] = True
    update: ClassVar[bool] = True
    note: ClassVar[str] = "of updated weights: perspective relaxation, best split of the diagonal"

    turns: int = option(60, "of v and z at most, with the first split", least=1)
    splits: int = option(20, "rounds that better the split; 0: the least eigenvalue", least=0)

    def certify(self, problem: LayerProblem, limits: Limits) -> tuple[Certificate, Trace]:
        of = Scaled.of(problem)
        room = float(torch.linalg.eigvalsh(of.a)[0])
        parts = zip(of.target, of.constant.tolist(), strict=True)
        rows = [_Row(problem, of.a, room, target, constant) for target, constant in parts]
        threads = threads_on(problem.device)
        passes = _PRICES if problem.shared_budget else 1
        done = limits.counter(passes * problem.rows)
        rounds = torch.zeros(problem.rows, dtype=torch.int64)

        def better(row: int) -> int:
            made = rows[row].run(self.turns, self.splits, limits)
            done()
            return made

        for _ in range(passes):
            if problem.shared_budget:
                _together(rows, problem, self.turns, limits, threads)
            rounds += torch.tensor(one_thread_each(better, problem.rows, threads))
        if problem.shared_budget:
            _together(rows, problem, _TURNS_AFTER, limits, threads)
        d, v = torch.stack([row.d for row in rows]), torch.stack([row.v for row in rows])
        return Certificate(d * of.size.square(), d[:, :0], v / of.size), Trace(iterations=rounds)


def _together(
    rows: Sequence[_Row], problem: LayerProblem, turns: int, limits: Limits, threads: int
) -> None:
    """Turns of v and z of rows with a shared budget; at the end each row has its price of an input."""
    share = problem.shares.cpu().numpy()[:, None]
    every = problem.weight.numel()
    kept, level = every - problem.pruned, np.inf
    for _ in range(turns if kept else 0):
        if limits.expired:
            break
        one_thread_each(lambda row: rows[row].solve(), len(rows), threads)
        size = np.stack([_size(row.d, row.v) for row in rows]) * np.sqrt(share)
        level = float(levels(size.ravel(), every, kept)[0])
        found = shares(size.ravel(), every, kept).reshape(size.shape)
        for row, z in zip(rows, found, strict=True):
            row.z = torch.from_numpy(z).to(row.v)
    with np.errstate(divide="ignore", over="ignore"):  # of rows that nothing is asked of
        each = 1 / (np.float64(level) ** 2 * share.ravel())
    for row, price in zip(rows, each.tolist(), strict=True):
        row.price = price


class _Row:
    """The relaxation of one row; inputs are scaled to A_jj = 1, and `room` is the least eigenvalue of A. The
    row keeps so many inputs of every group, or, of a shared budget, pays `price` for every input."""

    price = 0.0

    def __init__(
        self, problem: LayerProblem, a: Tensor, room: float, target: Tensor, constant: float
    ) -> None:
        self.problem, self.a, self.target, self.constant = problem, a, target, constant
        kept = 1 - problem.pruned / problem.weight.numel()
        self.d = torch.full_like(target, (1 - _ROOM) * max(room, _TINIEST))
        self.z = torch.full_like(target, kept).clamp(min=OUT_SHARE)
        self.v = torch.zeros_like(target)
        self.none = kept == 0  # then v = 0, and nothing is left to split

    def solve(self) -> None:
        """v for d and z; as it was where its system is not definite."""
        found = self._solved(self.a - torch.diag(self.d), self.d, self.z)
        self.v = self.v if found is None else found

    def run(self, turns: int, splits: int, limits: Limits) -> int:
        """The rounds that bettered the split."""
        if self.none:
            return 0
        self.v, self.z = self._turns(self.d, self.z, turns)
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
                d = self._safe(self.d + step * (aim - self.d))
                v, z = self._turns(d, self.z, _TURNS_AFTER)
                value = self._value(d, v)
                if value > best + gained:
                    gained, found = value - best, (d, v, z)
                elif gained:
                    break
            if not gained > _SETTLED * abs(best):
                return done
            best += gained
            self.d, self.v, self.z = found
        return splits

    def _safe(self, d: Tensor) -> Tensor:
        """d, shortened where A − diag(d) is not definite."""
        less = _ROOM
        while int(torch.linalg.cholesky_ex(self.a - torch.diag(d)).info):
            d, less = d * (1 - less), min(0.5, 2 * less)
        return d

    def _solved(self, b: Tensor, d: Tensor, z: Tensor) -> Tensor | None:
        factor, broken = torch.linalg.cholesky_ex(b + torch.diag(d / z))
        return None if int(broken) else torch.cholesky_solve(self.target[:, None], factor)[:, 0]

    def _turns(self, d: Tensor, z: Tensor, turns: int) -> tuple[Tensor, Tensor]:
        b, v = self.a - torch.diag(d), self.v
        for _ in range(turns):
            found = self._solved(b, d, z)
            if found is None:
                break
            v = found
            z = torch.from_numpy(self._shares(_size(d, v))).to(v.device)
        return v, z

    def _shares(self, size: np.ndarray) -> np.ndarray:
        """The best z for √dⱼ|vⱼ|."""
        group = self.problem.group_size
        if not self.problem.shared_budget:
            return shares(size, group, group - self.problem.pruned_per_group)
        with np.errstate(divide="ignore", invalid="ignore"):  # where it is free
            return np.clip(np.nan_to_num(size / np.sqrt(self.price), nan=1.0), OUT_SHARE, 1.0)

    def _counted(self, price: Tensor) -> float:
        """What counts of the prices (b − Bv)ⱼ²/dⱼ; of a shared budget less a part that does not depend on the
        row's d and v."""
        if self.problem.shared_budget:
            return float((price - self.price).clamp(min=0.0).sum())
        group = self.problem.group_size
        kept = group - self.problem.pruned_per_group
        return float(price.view(-1, group).topk(kept, dim=1).values.sum())

    def _value(self, d: Tensor, v: Tensor) -> float:
        """What (d, v) proves, but for rounding."""
        image = self.a @ v - d * v
        price = (self.target - image).square() / d
        return self.constant - float(v @ image) - self._counted(price)


def _size(d: Tensor, v: Tensor) -> np.ndarray:
    """√dⱼ|vⱼ|."""
    return (d.sqrt() * v.abs()).cpu().numpy()

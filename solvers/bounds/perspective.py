"""`perspective`: bounds of F, of refitted weights: a perspective relaxation with a split of A's diagonal.

The relaxation and its turns are those of `convex.perspective`. As a function of d its minimum is concave,
with the slope vⱼ²(1/zⱼ − 1): d goes step by step towards the best split of the slope, by Frank and Wolfe.

What is proven is computed from d and v by `maskopt.refit_certificate`, wherever the steps end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.bounds import BoundMethod
from maskopt.fields import option
from maskopt.limits import Limits, one_thread_each
from maskopt.problem import LayerProblem
from maskopt.refit_certificate import RefitCertificate
from maskopt.solvers.bounds.box import diagonal_shift
from maskopt.solvers.convex.perspective import OUT_SHARE, shares
from maskopt.trace import BoundTrace

#: B keeps this part of the room that d leaves to indefiniteness, and d is no less than this of its mean
_ROOM, _LEAST = 1e-4, 1e-6
#: steps towards another split that are tried, the longest first
_STEPS = (0.7, 0.4, 0.2, 0.1, 0.05, 0.02)
#: turns of v and z after a step of d, where they begin near their end
_TURNS_AFTER = 25
#: a round of d that gains less than this part of the bound is the last
_SETTLED = 1e-4


@dataclass(frozen=True)
class PerspectiveBound(BoundMethod):
    """One row a thread; n³ operations a turn, some hundred turns."""

    name: ClassVar[str] = "perspective"
    largest_n: ClassVar[int | None] = None
    refit: ClassVar[bool] = True
    note: ClassVar[str] = "of refitted weights: perspective relaxation, best split of the diagonal"

    turns: int = option(60, "of v and z at most, with the first split", least=1)
    splits: int = option(20, "rounds that better the split; 0: the least eigenvalue", least=0)

    def certify(self, problem: LayerProblem, limits: Limits) -> tuple[RefitCertificate, BoundTrace]:
        """See `BoundMethod.certify`."""
        squares = problem.least_squares
        size = squares.damped.diagonal().sqrt()
        a = squares.damped / size / size[:, None]
        target = squares.target(problem.weight, problem.correlation)
        weight = problem.weight.double()
        constant = (weight * target).sum(1)
        if problem.linear is not None:
            constant += (weight * problem.linear.correlation).sum(1) + problem.linear.constant
        target, group = target / size, problem.group_size
        kept = group - problem.pruned_per_group
        rounds: list[int] = [0] * problem.rows
        room, done = float(torch.linalg.eigvalsh(a)[0]), limits.counter(problem.rows)

        def split(row: int) -> tuple[Tensor, Tensor]:
            relaxed = _Row(a, room, target[row], float(constant[row]), kept, group)
            rounds[row] = relaxed.run(self.turns, self.splits, limits)
            done()
            return relaxed.d * size.square(), relaxed.v / size

        threads = torch.get_num_threads() if problem.device.type == "cpu" else 1
        found = one_thread_each(split, problem.rows, threads)
        d, v = (torch.stack([part[i] for part in found]) for i in (0, 1))
        return RefitCertificate(d, v), BoundTrace(iterations=torch.tensor(rounds))


class _Row:
    """The relaxation of one row; inputs are scaled to A_jj = 1, and `room` is the least eigenvalue of A."""

    def __init__(
        self, a: Tensor, room: float, target: Tensor, constant: float, kept: int, group: int
    ) -> None:
        self.a, self.target, self.constant = a, target, constant
        self.kept, self.group = kept, group
        self.d = torch.full_like(target, (1 - _ROOM) * max(room, 1e-12))
        self.z = torch.full_like(target, kept / group).clamp(min=OUT_SHARE)
        self.v = torch.zeros_like(target)

    def run(self, turns: int, splits: int, limits: Limits) -> int:
        """The rounds that bettered the split."""
        if not self.kept:  # then v = 0, and nothing is left to split
            return 0
        self.v, self.z = self._turns(self.d, self.z, turns)
        best = self._value(self.d, self.v)
        for done in range(splits):
            if limits.expired:
                return done
            slope = self.v.square() * (1 / self.z - 1)
            aim = (1 - _ROOM) * diagonal_shift(self.a, slope, limits)
            aim = aim.clamp(min=_LEAST * float(aim.mean()))
            gained = 0.0
            for step in _STEPS:
                d = self._safe(self.d + step * (aim - self.d))
                v, z = self._turns(d, self.z, _TURNS_AFTER)
                value = self._value(d, v)
                if value > best + gained:
                    gained, found = value - best, (d, v, z)
                elif gained:
                    break
            if gained <= _SETTLED * abs(best):
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

    def _turns(self, d: Tensor, z: Tensor, turns: int) -> tuple[Tensor, Tensor]:
        b = self.a - torch.diag(d)
        v = self.v
        for _ in range(turns):
            factor, broken = torch.linalg.cholesky_ex(b + torch.diag(d / z))
            if int(broken):
                break
            v = torch.cholesky_solve(self.target[:, None], factor)[:, 0]
            size = (d.sqrt() * v.abs()).cpu().numpy()
            z = torch.from_numpy(shares(size, self.group, self.kept)).to(v.device)
        return v, z

    def _value(self, d: Tensor, v: Tensor) -> float:
        """What (d, v) proves, but for rounding."""
        image = self.a @ v - d * v
        price = ((self.target - image).square() / d).view(-1, self.group)
        dearest = float(price.topk(self.kept, dim=1).values.sum())
        return self.constant - float(v @ image) - dearest

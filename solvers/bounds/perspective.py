"""`perspective`: bounds of F, of refitted weights: a perspective relaxation with a split of A's diagonal.

With A = B + diag(d), B ⪰ 0, and z the kept inputs relaxed to {0 ≤ z ≤ 1, Σ over a group = kept},

    F ≥ min over v and z of  vᵀBv + Σ dⱼvⱼ²/zⱼ − 2bᵀv + C,

convex in both. For a given z it is a system of equations, v = (B + diag(d/z))⁻¹b; for a given v the best z is
min(1, θ√dⱼ|vⱼ|). Taking turns goes down to the minimum. As a function of d that minimum is concave, with the
slope vⱼ²(1/zⱼ − 1): d goes step by step towards the best split of the slope, by Frank and Wolfe.

What is proven is computed from d and v by `maskopt.refit_certificate`, wherever the steps end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.bounds import BoundMethod
from maskopt.fields import option
from maskopt.limits import Limits, one_thread_each
from maskopt.problem import LayerProblem
from maskopt.refit_certificate import RefitCertificate
from maskopt.solvers.bounds.box import diagonal_shift
from maskopt.trace import BoundTrace

#: B keeps this part of the room that d leaves to indefiniteness, and d is no less than this of its mean
_ROOM, _LEAST = 1e-4, 1e-6
#: z is no less: an input that is out must be able to return
_OUT = 1e-9
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

        def split(row: int) -> tuple[Tensor, Tensor]:
            relaxed = _Row(a, target[row], float(constant[row]), kept, group)
            rounds[row] = relaxed.run(self.turns, self.splits, limits)
            limits.report(row, problem.rows)
            return relaxed.d * size.square(), relaxed.v / size

        threads = torch.get_num_threads() if problem.device.type == "cpu" else 1
        found = one_thread_each(split, problem.rows, threads)
        d, v = (torch.stack([part[i] for part in found]) for i in (0, 1))
        return RefitCertificate(d, v), BoundTrace(iterations=torch.tensor(rounds))


class _Row:
    """The relaxation of one row; inputs are scaled to A_jj = 1."""

    def __init__(self, a: Tensor, target: Tensor, constant: float, kept: int, group: int) -> None:
        self.a, self.target, self.constant = a, target, constant
        self.kept, self.group = kept, group
        room = float(torch.linalg.eigvalsh(a)[0])
        self.d = torch.full_like(target, (1 - _ROOM) * max(room, 1e-12))
        self.z = torch.full_like(target, kept / group).clamp(min=_OUT)
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
            z = self._shared_out(d.sqrt() * v.abs())
        return v, z

    def _shared_out(self, size: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """min(1, θ·size) with the sum `kept` in every group."""
        grouped = size.view(-1, self.group)
        down = grouped.sort(dim=1, descending=True).values
        rest = down.flip(1).cumsum(1).flip(1).clamp(min=1e-300)  # from each on
        # with m of them at 1, θ makes the others what is left; right where the next stays below 1
        m = torch.arange(self.group, device=size.device)
        theta = ((self.kept - m) / rest).where(m < self.kept, torch.inf)
        right = (theta * down <= 1).float().argmax(1, keepdim=True)
        return (theta.gather(1, right) * grouped).clamp(min=_OUT, max=1.0).view(-1)

    def _value(self, d: Tensor, v: Tensor) -> float:
        """What (d, v) proves, but for rounding."""
        image = self.a @ v - d * v
        price = ((self.target - image).square() / d).view(-1, self.group)
        dearest = float(price.topk(self.kept, dim=1).values.sum())
        return self.constant - float(v @ image) - dearest

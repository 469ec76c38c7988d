"""DSnoT: dynamic sparse no training (Zhang et al., arXiv 2310.08915).

Only the *mean* output counts: with μ the mean of the inputs, pruning a set changes a row's mean output by
ε = Σ_pruned c_j, c_j = w_j μ_j. Each cycle regrows the pruned weight whose return lowers |ε| the most for its
input's variance, and prunes the kept weight of least Wanda score whose loss moves ε back towards zero; in N:M
the one of least score in the same group, as long as ε keeps its first sign. A weight moves once. The squared
error, which the objective measures, may rise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.core.fields import option
from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem
from maskopt.errors import ProblemError
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import Capabilities, Solver
from maskopt.protocol.trace import Trace
from maskopt.solvers.greedy.scores import wanda_scores


@dataclass(frozen=True)
class DSnoT(Solver):
    """Dynamic sparse no training; needs the inputs' means, `LayerProblem(…, moments=…)`.

    Where `moments` holds no variances within sequences, those over all tokens are used.
    """

    name: ClassVar[str] = "dsnot"
    capabilities: ClassVar[Capabilities] = Capabilities(
        start="needed",
        default_start="wanda",
        note="mean-output correction; needs LayerProblem(moments=…)",
    )

    cycles: int = option(50, "swaps of a row at most", unit="swaps a row", least=0)
    power: float = option(
        1.0, "exponent of the inputs' variance in the regrowing score", unit="a power"
    )
    threshold: float = option(
        0.1,
        "a row stops at |ε| of so much, ε summed over one sequence as in the reference code",
        unit="of the row's output",
        least=0,
    )
    sequence_length: int = option(2048, "length of such a sequence", unit="tokens", least=1)

    def run(self, problem: LayerProblem, start: Tensor | None, limits: Limits) -> Solution:
        """Correct the mean output; see `Solver.run`. ProblemError for a problem without a mean."""
        assert start is not None
        if problem.moments is None:
            raise ProblemError(
                "dsnot needs the mean of the inputs: pass moments=… to LayerProblem, or gather it "
                "with the Gram matrix"
            )
        threshold = self.threshold / self.sequence_length
        moments = problem.moments.double()
        mean = moments[0]
        c = problem.weight.double() * mean
        if len(moments) == 1:
            mean_square = problem.gram.diagonal().double().clamp(min=0.0)
            variance = (mean_square - mean.square()).clamp(min=0.0)
        else:
            variance = moments[1]
        variance = variance**self.power
        # an input without variance is a constant: its return is free of noise, so it comes first
        regrow_score = c / variance.where(variance > 0, torch.finfo(torch.float64).tiny ** 0.5)
        wanda = wanda_scores(problem)
        mask = start.clone()
        grouped = problem.group_size < problem.n
        group_of = torch.arange(problem.n, device=mask.device) // problem.group_size
        rows = torch.arange(problem.rows, device=mask.device)
        swaps = torch.zeros(problem.rows, dtype=torch.long, device=mask.device)
        began = torch.where(start, 0.0, c).sum(1).sign()
        for _ in range(self.cycles):
            if limits.expired:
                break
            error = torch.where(mask, 0.0, c).sum(1)
            sign = error.sign()
            pruned = ~start & ~mask
            signed = sign[:, None] * c
            regrow = (sign[:, None] * regrow_score).where(pruned & (signed > 0), -torch.inf)
            incoming = regrow.argmax(1)
            candidates = start & mask
            candidates &= group_of == group_of[incoming][:, None] if grouped else signed < 0
            outgoing = wanda.where(candidates, torch.inf).argmin(1)
            go = (error.abs() > threshold) & (regrow[rows, incoming] > -torch.inf)
            go &= candidates[rows, outgoing]
            if grouped:
                go &= (error + c[rows, outgoing] - c[rows, incoming]).sign() == began
            if not bool(go.any()):
                break
            active = rows[go]
            mask[active, incoming[go]] = True
            mask[active, outgoing[go]] = False
            swaps += go
        return Solution.of(problem, mask, trace=Trace(swaps=swaps))

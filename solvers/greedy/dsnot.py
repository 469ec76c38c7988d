"""DSnoT: dynamic sparse no training (Zhang et al., arXiv 2310.08915).

Looks only at the *mean* output: with μ the mean of the inputs, pruning a set changes a row's mean output by
ε = Σ_pruned c_j, c_j = w_j μ_j. Each cycle regrows the pruned weight whose return lowers |ε| the most for
its variance, and prunes the kept weight of least Wanda score whose loss moves ε back towards zero.
It does not look at the squared error that the objective measures, and can raise it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskopt.errors import OptionError, ProblemError
from maskopt.problem import LayerProblem
from maskopt.solution import Solution
from maskopt.solver import Capabilities


class DSnoTSolver:
    """Needs the inputs' mean (`LayerProblem(…, mean=…)`), since G alone does not tell it."""

    name = "dsnot"
    capabilities = Capabilities(note="mean-output correction; needs LayerProblem(mean=…)")
    default_warm_start: str | None = "wanda"

    def unavailable(self) -> str | None:
        return None

    def solve(
        self,
        problem: LayerProblem,
        *,
        warm_start: Tensor | None = None,
        cycles: int = 50,
        power: float = 1.0,
        threshold: float = 0.1,
        sequence_length: int = 2048,
    ) -> Solution:
        """Up to `cycles` swaps a row.

        Args:
            power: exponent of the inputs' variance in the regrowing score.
            threshold: a row stops at |ε| ≤ threshold, ε summed over one sequence as in the
                reference code.
            sequence_length: tokens of such a sequence.
        """
        if cycles < 0 or threshold < 0 or sequence_length < 1:
            raise OptionError("dsnot: cycles, threshold ≥ 0 and sequence_length ≥ 1")
        if problem.mean is None:
            raise ProblemError(
                "dsnot needs the mean of the inputs: pass mean=… to LayerProblem, or gather it "
                "with the Gram matrix"
            )
        if warm_start is None:
            raise ProblemError("dsnot corrects a mask: pass warm_start, e.g. 'wanda'")
        mask, swaps = _correct(problem, warm_start, cycles, power, threshold / sequence_length)
        return Solution.of(problem, mask, solver=self.name, trace={"swaps": swaps})


def _correct(
    problem: LayerProblem, start: Tensor, cycles: int, power: float, threshold: float
) -> tuple[Tensor, Tensor]:
    assert problem.mean is not None
    weight, mean = problem.weight.double(), problem.mean.double()
    square = problem.gram.diagonal().double().clamp(min=0.0)
    c = weight * mean
    variance = (square - mean.square()).clamp(min=0.0) ** power
    # an input without variance is a constant: its return is free of noise, so it comes first
    regrow_score = c / variance.where(variance > 0, torch.finfo(torch.float64).tiny ** 0.5)
    wanda = weight.abs() * square.sqrt()
    mask = start.clone()
    group_of = torch.arange(problem.n, device=mask.device) // problem.group_size
    rows = torch.arange(problem.rows, device=mask.device)
    swaps = torch.zeros(problem.rows, dtype=torch.long, device=mask.device)
    for _ in range(cycles):
        error = torch.where(mask, 0.0, c).sum(1)
        sign = error.sign()
        regrow = (sign[:, None] * regrow_score).where(~mask & (sign[:, None] * c > 0), -torch.inf)
        incoming = regrow.argmax(1)
        # what leaves must push ε back, and in N:M come from the group that regrew
        candidates = mask & (sign[:, None] * c < 0) & (group_of == group_of[incoming][:, None])
        outgoing = wanda.where(candidates, torch.inf).argmin(1)
        go = (error.abs() > threshold) & (regrow[rows, incoming] > -torch.inf)
        go &= candidates[rows, outgoing]
        if not bool(go.any()):
            break
        active = rows[go]
        mask[active, incoming[go]] = True
        mask[active, outgoing[go]] = False
        swaps += go
    return mask, swaps

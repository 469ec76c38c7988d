"""The duals of the semidefinite bound, as the exact solvers want them."""

from __future__ import annotations

import numpy as np
import torch

from maskopt.bounds import lower_bound
from maskopt.pattern import NM, Unstructured
from maskopt.problem import LayerProblem
from maskopt.solvers.exact.scip_model import RowTask


def qcr_duals(task: RowTask) -> tuple[np.ndarray, float, float]:
    """λ, μ of the semidefinite bound, with A ⪰ 0 for certain, and the certified bound."""
    n = len(task.q)
    pattern = (
        Unstructured(keep=n - task.pruned)
        if task.group == n
        else NM(keep=task.group - task.pruned, of=task.group)
    )
    gram = torch.from_numpy((task.q + task.q.T) / 2)
    problem = LayerProblem(torch.ones(1, n, dtype=torch.float64), gram, pattern, assume_psd=True)
    bound = lower_bound(problem, "sdp", tolerance=1e-3, seed=task.seed)
    lam = bound.certificate.diagonal[0].numpy().copy()
    mu = float(bound.certificate.penalty[0, 0])
    same = np.arange(n)[:, None] // task.group == np.arange(n)[None, :] // task.group
    a = task.q + np.diag(lam) + mu * same
    # a margin that the rounding of a factorisation cannot eat
    least = float(np.linalg.eigvalsh(a)[0])
    unit = 1e-12 * float(np.abs(np.diag(a)).sum())
    lam += max(0.0, -least) + unit
    return lam, mu, float(bound.value[0])

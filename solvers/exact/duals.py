"""The duals of a row's semidefinite bound: what convexifies the objective (QCR) in `scip` and `branch`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from maskopt.certificates.certificate import Certificate
from maskopt.core.pattern import NM, Unstructured
from maskopt.core.problem import LayerProblem
from maskopt.protocol.bounds import lower_bound
from maskopt.solvers.exact.rows import RowTask

#: part of the bound that a stage of the semidefinite relaxation must gain for another one to follow
_TOLERANCE, _ROUGH = 1e-3, 0.05
#: share of the time of a row that the relaxation may use; the tree has the rest
_SHARE = 0.5
#: part of Σ|A_ii| that is added to a least eigenvalue of A: the rounding of a factorisation cannot eat it
_MARGIN = 1e-12


@dataclass(frozen=True)
class Duals:
    """A = Q + diag(λ) + μ Σ_g 1_g1_gᵀ ⪰ 0, as the check of the certificate has it.

    Attributes:
        diagonal: λ, float64 [n].
        penalty: μ, the same for all groups.
        certified: the lower bound that they prove.
        certificate: of one row, which `Certificate.check` re-checks.
    """

    diagonal: np.ndarray
    penalty: float
    certified: float
    certificate: Certificate

    def with_margin(self, task: RowTask) -> np.ndarray:
        """λ, raised so far that A ⪰ 0 also in the rounding of whoever factorises it."""
        a = task.q + np.diag(self.diagonal) + self.penalty * same_group(task)
        least = float(np.linalg.eigvalsh(a)[0])
        return self.diagonal + max(0.0, -least) + _MARGIN * float(np.abs(np.diag(a)).sum())


def same_group(task: RowTask) -> np.ndarray:
    """Whether two inputs share a group, float64 [n, n]."""
    member = np.arange(len(task.q)) // task.group
    return (member[:, None] == member[None, :]).astype(float)


def qcr_duals(task: RowTask) -> Duals:
    """Of the bound `sdp`, within half of the time that the row has left."""
    n = len(task.q)
    pattern = (
        Unstructured(keep=n - task.pruned)
        if task.group == n
        else NM(keep=task.group - task.pruned, of=task.group)
    )
    gram = torch.from_numpy((task.q + task.q.T) / 2)
    problem = LayerProblem(torch.ones(1, n, dtype=torch.float64), gram, pattern, assume_psd=True)
    limits = task.limits.share(_SHARE)
    tolerance = _TOLERANCE if task.values is None else _ROUGH
    bound = lower_bound(problem, "sdp", tolerance=tolerance, limits=limits)
    certificate = bound.certificate
    assert isinstance(certificate, Certificate)
    return Duals(
        diagonal=certificate.diagonal[0].numpy().copy(),
        penalty=float(certificate.penalty[0, 0]),
        certified=float(bound.value[0]),
        certificate=certificate,
    )

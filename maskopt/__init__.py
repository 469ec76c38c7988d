"""maskopt: which weights of a linear layer can go, with a proof of how good the choice is."""

import importlib
from typing import Any

from maskopt.certificates.certificate import Certificate
from maskopt.certificates.proof import Proof
from maskopt.checks.swap_check import SwapMove, improving_swap
from maskopt.checks.verification import Verification, verify
from maskopt.core.least_squares import LeastSquaresUpdate
from maskopt.core.limits import Limits, Progress
from maskopt.core.linear_term import LinearTerm
from maskopt.core.pattern import NM, Unstructured
from maskopt.core.problem import LayerProblem, RowProblem, UpdatedWeights, update_weights
from maskopt.errors import MaskoptError
from maskopt.instances.formats import load_problem, save_problem
from maskopt.instances.structure import structure_problem
from maskopt.protocol.bounds import Bound, available_bounds, lower_bound
from maskopt.protocol.solution import Solution, Status
from maskopt.protocol.solver import available_solvers, make_solver, solve

__version__ = "0.2.0"

#: imported on first use, since they bring transformers along
_MODEL_SIDE = {
    "collect_grams": "maskopt.models.pruning.gram_store",
    "collect_problems": "maskopt.models.pruning.problems",
    "distill_model": "maskopt.models.distillation.distill",
    "keep_masks": "maskopt.models.training.held_masks",
    "load_packed": "maskopt.models.checkpoints.pack",
    "perplexity": "maskopt.models.evaluation.evaluate",
    "PruneOptions": "maskopt.models.options.prune",
    "open_job": "maskopt.models.blockwise.job",
    "prune_model": "maskopt.models.pruning.prune",
    "remove_blocks": "maskopt.models.structured.blocks",
    "remove_experts": "maskopt.models.structured.experts",
    "shrink_model": "maskopt.models.structured.channels",
}


def __getattr__(name: str) -> Any:
    if name in _MODEL_SIDE:
        return getattr(importlib.import_module(_MODEL_SIDE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "NM",
    "Bound",
    "Certificate",
    "LayerProblem",
    "LeastSquaresUpdate",
    "Limits",
    "LinearTerm",
    "MaskoptError",
    "Progress",
    "Proof",
    "PruneOptions",
    "RowProblem",
    "Solution",
    "Status",
    "SwapMove",
    "Unstructured",
    "UpdatedWeights",
    "Verification",
    "__version__",
    "available_bounds",
    "available_solvers",
    "collect_grams",
    "collect_problems",
    "distill_model",
    "improving_swap",
    "keep_masks",
    "load_packed",
    "load_problem",
    "lower_bound",
    "make_solver",
    "open_job",
    "perplexity",
    "prune_model",
    "remove_blocks",
    "remove_experts",
    "save_problem",
    "shrink_model",
    "solve",
    "structure_problem",
    "update_weights",
    "verify",
]

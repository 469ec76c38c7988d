"""maskopt: which weights of a linear layer can go, with a proof of how good the choice is."""

import importlib
from typing import Any

from maskopt.bounds import Bound, available_bounds, lower_bound
from maskopt.certificate import Certificate
from maskopt.checks import Exchange, improving_swap
from maskopt.errors import MaskoptError
from maskopt.formats import load_problem, save_problem
from maskopt.least_squares import Refit
from maskopt.limits import Limits, Progress
from maskopt.linear import Linear
from maskopt.pattern import NM, Unstructured
from maskopt.pooled_checks import Trade
from maskopt.problem import LayerProblem, RowProblem
from maskopt.proof import Proof
from maskopt.refit_certificate import RefitCertificate
from maskopt.refitted import Refitted, refit
from maskopt.solution import Solution, Status
from maskopt.solver import available_solvers, make_solver, solve
from maskopt.structure import structure_problem
from maskopt.verification import Verification, verify

__version__ = "0.2.0"

#: imported on first use, since they bring transformers along
_MODEL_SIDE = {
    "collect_grams": "maskopt.model.gram_store",
    "collect_problems": "maskopt.model.problems",
    "distill_model": "maskopt.model.distill",
    "keep_masks": "maskopt.model.keep",
    "load_packed": "maskopt.model.pack",
    "perplexity": "maskopt.model.perplexity",
    "PruneOptions": "maskopt.model.options",
    "open_job": "maskopt.model.job",
    "prune_model": "maskopt.model.prune",
    "remove_blocks": "maskopt.model.remove_blocks",
    "remove_experts": "maskopt.model.remove_experts",
    "shrink_model": "maskopt.model.shrink",
}


def __getattr__(name: str) -> Any:
    if name in _MODEL_SIDE:
        return getattr(importlib.import_module(_MODEL_SIDE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "NM",
    "Bound",
    "Certificate",
    "Exchange",
    "LayerProblem",
    "Limits",
    "Linear",
    "MaskoptError",
    "Progress",
    "Proof",
    "PruneOptions",
    "Refit",
    "RefitCertificate",
    "Refitted",
    "RowProblem",
    "Solution",
    "Status",
    "Trade",
    "Unstructured",
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
    "refit",
    "remove_blocks",
    "remove_experts",
    "save_problem",
    "shrink_model",
    "solve",
    "structure_problem",
    "verify",
]

"""maskopt: which weights of a linear layer can go, with a proof of how good the choice is."""

import importlib

from maskopt.bounds import Bound, Certificate, lower_bound
from maskopt.checks import Swap, improving_swap, verify
from maskopt.errors import MaskoptError
from maskopt.pattern import NM, Unstructured
from maskopt.problem import LayerProblem, RowProblem
from maskopt.solution import Solution, Status
from maskopt.solver import available_solvers, solve

__version__ = "0.1.0"

#: imported on first use, since they bring transformers along
_MODEL_SIDE = {
    "collect_problems": "maskopt.model.problems",
    "perplexity": "maskopt.model.perplexity",
    "PruneOptions": "maskopt.model.options",
    "open_job": "maskopt.model.job",
    "prune_model": "maskopt.model.prune",
}


def __getattr__(name: str) -> object:
    if name in _MODEL_SIDE:
        return getattr(importlib.import_module(_MODEL_SIDE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "NM",
    "Bound",
    "Certificate",
    "LayerProblem",
    "MaskoptError",
    "PruneOptions",
    "RowProblem",
    "Solution",
    "Status",
    "Swap",
    "Unstructured",
    "__version__",
    "available_solvers",
    "collect_problems",
    "improving_swap",
    "lower_bound",
    "open_job",
    "perplexity",
    "prune_model",
    "solve",
    "verify",
]

"""maskopt: which weights of a linear layer can go, with a proof of how good the choice is."""

from maskopt.checks import Swap, improving_swap, verify
from maskopt.errors import MaskoptError
from maskopt.pattern import NM, Unstructured
from maskopt.problem import LayerProblem, RowProblem
from maskopt.solution import Solution, Status
from maskopt.solver import available_solvers, solve

__version__ = "0.1.0"

__all__ = [
    "NM",
    "LayerProblem",
    "MaskoptError",
    "RowProblem",
    "Solution",
    "Status",
    "Swap",
    "Unstructured",
    "__version__",
    "available_solvers",
    "improving_swap",
    "solve",
    "verify",
]

"""The backends of maskopt, imported as `maskopt.solvers` and found through entry points.

    from maskopt.solvers import Branch, Relax, Swap, Tabu

Each class is imported when it is asked for: exact solvers do not wait for compiled kernels of others.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maskopt.solvers.bounds.box import BoxBound, ShiftBound
    from maskopt.solvers.bounds.conic import ConicBound
    from maskopt.solvers.bounds.sdp import SdpBound
    from maskopt.solvers.exact.branch import Branch
    from maskopt.solvers.exact.exhaustive import Exhaustive
    from maskopt.solvers.exact.gurobi import Gurobi
    from maskopt.solvers.exact.highs import Highs
    from maskopt.solvers.exact.scip import Scip
    from maskopt.solvers.greedy.dsnot import DSnoT
    from maskopt.solvers.greedy.elimination import Elimination
    from maskopt.solvers.greedy.scores import Magnitude, Random, Ria, Wanda, Worst
    from maskopt.solvers.greedy.sparsegpt import SparseGPT
    from maskopt.solvers.rounding.frank_wolfe import FrankWolfe
    from maskopt.solvers.rounding.relax import Relax
    from maskopt.solvers.rounding.sdp_round import SdpRound
    from maskopt.solvers.search.kswap import KSwap
    from maskopt.solvers.search.portfolio import Portfolio
    from maskopt.solvers.search.tabu import Tabu
    from maskopt.solvers.swap import Swap

_PLACES = {
    "bounds.box": ("BoxBound", "ShiftBound"),
    "bounds.conic": ("ConicBound",),
    "bounds.sdp": ("SdpBound",),
    "exact.branch": ("Branch",),
    "exact.exhaustive": ("Exhaustive",),
    "exact.gurobi": ("Gurobi",),
    "exact.highs": ("Highs",),
    "exact.scip": ("Scip",),
    "greedy.dsnot": ("DSnoT",),
    "greedy.elimination": ("Elimination",),
    "greedy.scores": ("Magnitude", "Random", "Ria", "Wanda", "Worst"),
    "greedy.sparsegpt": ("SparseGPT",),
    "rounding.frank_wolfe": ("FrankWolfe",),
    "rounding.relax": ("Relax",),
    "rounding.sdp_round": ("SdpRound",),
    "search.kswap": ("KSwap",),
    "search.portfolio": ("Portfolio",),
    "search.tabu": ("Tabu",),
    "swap": ("Swap",),
}
_MODULE = {name: place for place, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE[name]}"), name)


__all__ = [
    "BoxBound",
    "Branch",
    "ConicBound",
    "DSnoT",
    "Elimination",
    "Exhaustive",
    "FrankWolfe",
    "Gurobi",
    "Highs",
    "KSwap",
    "Magnitude",
    "Portfolio",
    "Random",
    "Relax",
    "Ria",
    "Scip",
    "SdpBound",
    "SdpRound",
    "ShiftBound",
    "SparseGPT",
    "Swap",
    "Tabu",
    "Wanda",
    "Worst",
]

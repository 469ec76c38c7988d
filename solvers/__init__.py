"""The backends of maskopt, imported as `maskopt.solvers` and found through entry points.

    from maskopt.solvers import Branch, Relax, Swap, Tabu

Each class is imported when it is asked for: exact solvers do not wait for compiled kernels of others.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maskopt.solvers.bounds.box import BoxBound as BoxBound, ShiftBound as ShiftBound
    from maskopt.solvers.bounds.conic import ConicBound as ConicBound
    from maskopt.solvers.bounds.perspective import PerspectiveBound as PerspectiveBound
    from maskopt.solvers.bounds.sdp import SdpBound as SdpBound
    from maskopt.solvers.exact.branch import Branch as Branch
    from maskopt.solvers.exact.exhaustive import Exhaustive as Exhaustive
    from maskopt.solvers.exact.gurobi import Gurobi as Gurobi
    from maskopt.solvers.exact.highs import Highs as Highs
    from maskopt.solvers.exact.scip import Scip as Scip
    from maskopt.solvers.greedy.dsnot import DSnoT as DSnoT
    from maskopt.solvers.greedy.elimination import Elimination as Elimination
    from maskopt.solvers.greedy.scores import (
        Magnitude as Magnitude,
        Random as Random,
        Ria as Ria,
        Wanda as Wanda,
        Worst as Worst,
    )
    from maskopt.solvers.greedy.sparsegpt import SparseGPT as SparseGPT
    from maskopt.solvers.least_squares.admm import Admm as Admm
    from maskopt.solvers.least_squares.obs import Obs as Obs
    from maskopt.solvers.rounding.frank_wolfe import FrankWolfe as FrankWolfe
    from maskopt.solvers.rounding.relax import Relax as Relax
    from maskopt.solvers.rounding.sdp_round import SdpRound as SdpRound
    from maskopt.solvers.search.kswap import KSwap as KSwap
    from maskopt.solvers.search.memetic import Memetic as Memetic
    from maskopt.solvers.search.portfolio import Portfolio as Portfolio
    from maskopt.solvers.search.tabu import Tabu as Tabu
    from maskopt.solvers.swap import Swap as Swap

_PLACES = {
    "bounds.box": ("BoxBound", "ShiftBound"),
    "bounds.conic": ("ConicBound",),
    "bounds.perspective": ("PerspectiveBound",),
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
    "least_squares.admm": ("Admm",),
    "least_squares.obs": ("Obs",),
    "rounding.frank_wolfe": ("FrankWolfe",),
    "rounding.relax": ("Relax",),
    "rounding.sdp_round": ("SdpRound",),
    "search.kswap": ("KSwap",),
    "search.memetic": ("Memetic",),
    "search.portfolio": ("Portfolio",),
    "search.tabu": ("Tabu",),
    "swap": ("Swap",),
}
_MODULE = {name: place for place, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE[name]}"), name)


__all__ = sorted(_MODULE)

"""The backends of maskopt, imported as `maskopt.solvers` and found through entry points.

    from maskopt.solvers import Branch, Relax, Swap, Tabu

Each class is imported when it is asked for: exact solvers do not wait for compiled kernels of others.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maskopt.solvers.bounds.box import BoxBound as BoxBound, ShiftBound as ShiftBound
    from maskopt.solvers.bounds.perspective import PerspectiveBound as PerspectiveBound
    from maskopt.solvers.bounds.sdp import SdpBound as SdpBound
    from maskopt.solvers.exact.branch import Branch as Branch
    from maskopt.solvers.exact.exhaustive import Exhaustive as Exhaustive
    from maskopt.solvers.exact.gurobi import Gurobi as Gurobi
    from maskopt.solvers.exact.highs import Highs as Highs
    from maskopt.solvers.exact.scip import Scip as Scip
    from maskopt.solvers.greedy.dsnot import DSnoT as DSnoT
    from maskopt.solvers.greedy.scores import (
        Elimination as Elimination,
        Magnitude as Magnitude,
        Random as Random,
        Ria as Ria,
        Wanda as Wanda,
        Worst as Worst,
    )
    from maskopt.solvers.greedy.sparsegpt import SparseGPT as SparseGPT
    from maskopt.solvers.least_squares.masks import Admm as Admm, Obs as Obs
    from maskopt.solvers.rounding import (
        FrankWolfe as FrankWolfe,
        Relax as Relax,
        SdpRound as SdpRound,
    )
    from maskopt.solvers.search.memetic import Memetic as Memetic
    from maskopt.solvers.search.tabu import Tabu as Tabu
    from maskopt.solvers.swap import Swap as Swap


@cache
def _points() -> dict[str, EntryPoint]:
    """Return the entry points of this package by the name of the class."""
    points = [*entry_points(group="maskopt.solvers"), *entry_points(group="maskopt.bounds")]
    return {point.attr: point for point in points if point.module.startswith(__name__)}


def __getattr__(name: str) -> object:
    if name.startswith("_") or name not in _points():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _points()[name].load()

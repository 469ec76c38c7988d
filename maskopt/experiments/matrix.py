"""The least or greatest xᵀQx over sets of a given size, and the search where no solver is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem, RowProblem
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import Solver, limits_of, solve

#: rows of up to so many inputs are proven by default; seconds for that, or for the search of a larger row
SMALL, SECONDS = 128, 10.0


def minimize_quadratic(
    quadratic: np.ndarray,
    *,
    cardinality: int,
    maximize: bool = False,
    constant: float = 0.0,
    solver: Solver | str | None = None,
    **options: Any,
) -> Solution:
    """The least (or greatest) xᵀQx + constant over x ∈ {0,1}ⁿ with `cardinality` ones.

        best = minimize_quadratic(Q, cardinality=20)
        best.selected, best.value, best.bound, best.gap, best.status[0]

    Args:
        quadratic: Q [n, n], also indefinite; its symmetric part counts.
        solver, options: as for `search`; `proof=True` keeps the tree of `branch`.

    Raises:
        MaskoptError: as of `RowProblem.from_quadratic` and `solve`.
    """
    problem = RowProblem.from_quadratic(
        quadratic, cardinality=cardinality, maximize=maximize, constant=constant
    )
    return search(problem, solver, **options)


def search(
    problem: LayerProblem | RowProblem,
    solver: Solver | str | None = None,
    *,
    start: Any = None,
    limits: Limits | None = None,
    **options: Any,
) -> Solution:
    """`solve`; without a solver by `branch` for rows of at most `SMALL` inputs, by `sdp` and `tabu` for one
    larger row, both within `SECONDS` unless another limit is given. Larger layers and shared budgets get
    `swap`, without a limit."""
    layer = problem.as_layer()
    limits, own = limits_of(limits, options)
    if solver is None and not layer.shared_budget:
        if layer.n <= SMALL:
            solver, start = "branch", "swap" if start is None else start
        elif layer.rows == 1 and layer.update is None:
            solver, own = "portfolio", {"members": ("sdp", "tabu"), **own}
        if solver is not None and limits.seconds is None:
            limits = replace(limits, seconds=SECONDS)
    return solve(problem, solver or "swap", start=start, limits=limits, **own)

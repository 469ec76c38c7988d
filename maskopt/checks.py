"""Independent checks of masks and solutions. Nothing here is shared with any solver.

Everything is computed in float64 from the definition: f(p) = pᵀQp with Q = diag(w)·G·diag(w), and a
swap of a kept u against a pruned p changes f by

    Δ(u, p) = 2 w_u c_u + w_u² G_uu − 2 w_p c_p + w_p² G_pp − 2 w_u w_p G_up,   c = G (w ⊙ p)

(SparseSwaps, arXiv 2512.10922).
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from maskopt.errors import MaskoptError, VerificationError
from maskopt.problem import LayerProblem, RowProblem
from maskopt.solution import (
    OPTIMAL_TOLERANCE,
    SWAP_TOLERANCE,
    Solution,
    Status,
    swap_threshold,
)

#: verify enumerates all masks of a row with at most so many, to test OPTIMAL and lower bounds
ENUMERATION_LIMIT = 20_000
#: relative difference at which a stated objective is wrong
OBJECTIVE_TOLERANCE = 1e-9
#: pairs whose Δ is formed at a time
_PAIRS_AT_ONCE = 2**22


class Swap(NamedTuple):
    """Keep `pruned` instead of `kept`: the objective changes by `delta` (< 0)."""

    kept: int
    pruned: int
    delta: float


def improving_swap(
    problem: RowProblem | LayerProblem, mask: Tensor, tolerance: float = SWAP_TOLERANCE
) -> Swap | None:
    """The best legal 1-swap of one row in float64, or None where none improves.

    Args:
        problem: a row (or a layer of one row).
        mask: bool [n] or [1, n], True = kept; must be legal.
        tolerance: a swap improves when it lowers f by more than tolerance·f (and by more than
            float64 rounding, see `swap_threshold`); 0 asks for any decrease above rounding.

    Returns:
        (kept, pruned, delta), ties broken by lowest kept, then lowest pruned index; or None.
    """
    layer = problem.as_layer() if isinstance(problem, RowProblem) else problem
    if layer.rows != 1:
        raise VerificationError("improving_swap takes one row; use problem.row(i)")
    mask = layer.check_mask(mask)[0]
    w = layer.weight[0].double()
    # a power of two brings extreme weights within range without changing any comparison
    scale = 2.0 ** -math.frexp(float(w.abs().max()) or 1.0)[1]
    w = w * scale
    gram = layer.gram
    dropped = torch.where(mask, 0.0, w)
    c = torch.cat(
        [part.double() @ dropped for part in gram.split(max(1, _PAIRS_AT_ONCE // len(w)))]
    )
    objective = (dropped @ c).clamp(min=0.0)
    diagonal = w.square() * gram.diagonal().double()
    threshold = float(swap_threshold(objective, diagonal.sum(), tolerance))
    gain_kept = 2 * w * c + diagonal
    gain_pruned = diagonal - 2 * w * c

    group = layer.group_size
    best: Swap | None = None
    for first in range(0, layer.n, group):
        inside = torch.arange(first, first + group, device=mask.device)
        kept, pruned = inside[mask[inside]], inside[~mask[inside]]
        if not len(kept) or not len(pruned):
            continue
        for part in kept.split(max(1, _PAIRS_AT_ONCE // len(pruned))):
            cross = gram[part][:, pruned].double()
            delta = gain_kept[part][:, None] + gain_pruned[pruned][None, :]
            delta = delta - 2 * w[part][:, None] * w[pruned][None, :] * cross
            position = int(delta.argmin())
            value = float(delta.flatten()[position])
            if value < -threshold and (best is None or value < best.delta):
                row, column = divmod(position, len(pruned))
                best = Swap(int(part[row]), int(pruned[column]), value)
    return best and best._replace(delta=best.delta / scale**2)


def verify(problem: LayerProblem | RowProblem, solution: Solution) -> None:
    """Check everything that a solution claims, in float64.

    The mask's pattern, the objective, bound ≤ objective, a certificate where there is one,
    SWAP_OPTIMAL by a scan over all swaps, OPTIMAL by a closed gap; and where a row has at most
    ENUMERATION_LIMIT masks, OPTIMAL and the lower bound by enumeration. A positive lower bound needs
    a certificate, or a named solver in `trace["proof"]` that vouches for it.

    Raises:
        VerificationError: with the reason and the row.
    """
    layer = problem.as_layer() if isinstance(problem, RowProblem) else problem
    try:
        mask = layer.check_mask(solution.mask)
    except MaskoptError as error:
        raise VerificationError(f"pattern: {error}") from None
    for what in ("objective", "lower_bound"):
        value = getattr(solution, what)
        if value.shape != (layer.rows,) or value.dtype != torch.float64:
            raise VerificationError(
                f"{what} must be float64 [{layer.rows}], not {value.dtype} {list(value.shape)}"
            )
    if len(solution.status) != layer.rows:
        raise VerificationError(f"{len(solution.status)} statuses for {layer.rows} rows")
    mass = layer.diagonal_mass()
    _verify_objective(layer, mask, solution, mass)
    _verify_bound(layer, solution, mass)
    for index, status in enumerate(solution.status):
        _verify_status(layer, mask, solution, index, Status(status))
        _verify_by_enumeration(layer, solution, index, Status(status), float(mass[index]))


def _first(bad: Tensor) -> int | None:
    rows = bad.nonzero()
    return int(rows[0]) if len(rows) else None


def _verify_objective(layer: LayerProblem, mask: Tensor, solution: Solution, mass: Tensor) -> None:
    true = torch.stack([_objective(layer, mask, row) for row in range(layer.rows)])
    stated = solution.objective.to(true)
    slack = OBJECTIVE_TOLERANCE * true + 1e-12 * mass
    row = _first(~((stated - true).abs() <= slack))
    if row is not None:
        raise VerificationError(
            f"objective: row {row} states {float(stated[row]):.12g}, the mask costs "
            f"{float(true[row]):.12g}"
        )


def _objective(layer: LayerProblem, mask: Tensor, row: int) -> Tensor:
    """f of one row through the pruned columns only: another way than LayerProblem.objective."""
    pruned = (~mask[row]).nonzero()[:, 0]
    w = layer.weight[row, pruned].double()
    step = max(1, _PAIRS_AT_ONCE // max(1, len(pruned)))
    total = torch.zeros((), dtype=torch.float64, device=layer.device)
    for part, weight in zip(pruned.split(step), w.split(step), strict=True):
        total += weight @ (layer.gram[part][:, pruned].double() @ w)
    return total.clamp(min=0.0)


def _verify_bound(layer: LayerProblem, solution: Solution, mass: Tensor) -> None:
    bound, objective = solution.lower_bound, solution.objective
    row = _first(~torch.isfinite(bound) | (bound < 0))
    if row is not None:
        raise VerificationError(f"lower bound: row {row} states {float(bound[row])}; f ≥ 0 always")
    row = _first(bound > objective + 1e-12 * mass.to(objective))
    if row is not None:
        raise VerificationError(
            f"lower bound: row {row} states {float(bound[row]):.12g}, above the objective "
            f"{float(objective[row]):.12g}"
        )
    if solution.certificate is not None:
        proven = solution.certificate.check(layer)
        row = _first(bound.to(proven) > proven + OBJECTIVE_TOLERANCE * proven + 1e-12 * mass)
        if row is not None:
            raise VerificationError(
                f"lower bound: row {row} states {float(bound[row]):.12g}, its certificate proves "
                f"{float(proven[row]):.12g}"
            )
    elif bool((bound > 0).any()) and not solution.trace.get("proof"):
        raise VerificationError(
            "lower bound: positive without a certificate, and no solver vouches for it "
            "(trace['proof'])"
        )


def _verify_status(
    layer: LayerProblem, mask: Tensor, solution: Solution, index: int, status: Status
) -> None:
    row = layer.row(index)
    if status is Status.SWAP_OPTIMAL or status is Status.OPTIMAL:
        # an optimum within OPTIMAL_TOLERANCE can leave swaps of that size
        swap = improving_swap(row, mask[index], tolerance=SWAP_TOLERANCE)
        if swap is not None:
            raise VerificationError(
                f"status: row {index} claims {status}, yet keeping input {swap.pruned} instead of "
                f"{swap.kept} changes the objective by {swap.delta:.6g}"
            )
    if status is Status.OPTIMAL:
        objective, bound = float(solution.objective[index]), float(solution.lower_bound[index])
        floor = 1e-12 * float(layer.take([index]).diagonal_mass())
        if objective - bound > OPTIMAL_TOLERANCE * objective + floor:
            raise VerificationError(
                f"status: row {index} claims {status} without proof: objective {objective:.9g}, "
                f"lower bound {bound:.9g}"
            )


def _verify_by_enumeration(
    layer: LayerProblem, solution: Solution, index: int, status: Status, mass: float
) -> None:
    group, pruned = layer.group_size, layer.pruned_per_group
    count = math.comb(group, pruned) ** (layer.n // group)
    if count > ENUMERATION_LIMIT:
        return
    choices = [
        [
            tuple(first + i for i in chosen)
            for chosen in itertools.combinations(range(group), pruned)
        ]
        for first in range(0, layer.n, group)
    ]
    sets = [sum(parts, ()) for parts in itertools.product(*choices)]
    p = torch.zeros(count, layer.n, dtype=torch.float64)
    if sets[0]:
        p.scatter_(1, torch.tensor(sets), 1.0)
    q = layer.row(index).q().cpu()
    optimum = float(((p @ q) * p).sum(1).min())
    slack = OPTIMAL_TOLERANCE * abs(optimum) + 1e-12 * mass
    if float(solution.lower_bound[index]) > optimum + slack:
        raise VerificationError(
            f"lower bound: row {index} states {float(solution.lower_bound[index]):.12g}, but a mask "
            f"of objective {optimum:.12g} exists"
        )
    if status is Status.OPTIMAL and float(solution.objective[index]) > optimum + slack:
        raise VerificationError(
            f"status: row {index} claims {status}, but a mask of objective {optimum:.12g} exists"
        )

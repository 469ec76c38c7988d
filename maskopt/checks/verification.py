"""Checks of everything that a solution claims, in float64, and the basis of each claim.

They share nothing with any solver, nor with the computation of an objective.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from operator import mul
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from maskopt.certificates.exact_check import exact_bounds, exact_cost
from maskopt.certificates.proof import check_proof
from maskopt.checks.swap_check import costs_of, improving_swap
from maskopt.core.problem import LayerProblem, RowProblem
from maskopt.errors import MaskoptError, VerificationError
from maskopt.protocol.solution import OPTIMAL_TOLERANCE, Solution, Status, optimal_slack, size_of
from maskopt.protocol.solver import is_trusted

#: most masks of a row that are enumerated, to test OPTIMAL and lower bounds
ENUMERATION_LIMIT = 20_000
#: most operations for that of updated weights, where a mask costs s³ operations for s pruned
REFIT_ENUMERATION_LIMIT = 10**10
#: relative difference at which a stated objective is wrong, unless float64 can lose so much of its sum
OBJECTIVE_TOLERANCE = 1e-9
CLAIMS: Final = "claims"
CHECKED: Final = "checked"
EXACT: Final = "exact"
Require = Literal["claims", "checked", "exact"]


@dataclass(frozen=True)
class Verification:
    """The basis of each row's claims, which all hold: `checked`, or `trusted: SCIP 10.0` for a bound."""

    basis: tuple[str, ...]

    @property
    def checked(self) -> bool:
        """True if no solver had to be trusted."""
        return all(basis == CHECKED for basis in self.basis)

    def __str__(self) -> str:
        counts = {basis: self.basis.count(basis) for basis in sorted(set(self.basis))}
        return ", ".join(
            f"{count} row{'' if count == 1 else 's'} {basis}" for basis, count in counts.items()
        )


def verify(
    problem: LayerProblem | RowProblem, solution: Solution, *, require: Require = CLAIMS
) -> Verification:
    """Check everything that a solution claims, in float64.

    Checked are the mask's pattern; the objective; bound ≤ objective; certificates and trees; SWAP_OPTIMAL by
    a scan over all swaps, also between rows of a shared budget; OPTIMAL by a closed gap; and with at most
    ENUMERATION_LIMIT masks OPTIMAL and the lower bound by enumeration. A positive lower bound needs a
    certificate, a tree, enumeration, or a registered exact solver that is trusted with it.

    Args:
        require: `checked` refuses rows whose bound is a trusted solver's; `exact` also decides lower bounds
            and OPTIMAL in rational arithmetic, for rows of up to 200 inputs with unchanged weights.

    Raises:
        VerificationError: with the reason and the row.
    """
    if require not in get_args(Require):
        raise VerificationError(
            f"require must be one of: {', '.join(get_args(Require))}; not {require!r}"
        )
    layer = problem.as_layer()
    if not isinstance(solution, Solution):
        raise VerificationError(
            f"`verify` takes a Solution, not a {type(solution).__name__}; make one of a mask by "
            "Solution.of(problem, mask)"
        )
    mask = _legal_mask(layer, solution)
    rounding = _rounding(layer, mask, solution)
    _verify_objective(layer, mask, solution, rounding)
    _verify_bound(layer, solution, rounding)
    proven = _proven(layer, mask, solution)
    enumerated = _verify_claims(layer, mask, solution, rounding)
    size = size_of(layer, proven)
    slack = OBJECTIVE_TOLERANCE * size + rounding.cpu()
    if layer.integral and layer.shared_budget:  # the bound of the sum has been divided
        slack = 4 * (layer.rows + 8) * 2.0**-53 * size
    elif layer.integral:  # the next value is reached, or it is not
        slack = torch.zeros_like(size)
    basis = []
    for row, bound in enumerate(solution.lower_bound.tolist()):
        if bound <= float(proven[row]) + float(slack[row]):
            basis.append(CHECKED)
            continue
        solver = _trusted(solution, row, float(proven[row]))
        if require != CLAIMS and not enumerated:
            raise VerificationError(
                f"lower bound: row {row} is trusted ({solver}); only what can be checked is allowed"
            )
        basis.append(CHECKED if enumerated else f"trusted: {solver}")
    if require == EXACT:
        _verify_exactly(layer, mask, solution)
    return Verification(tuple(basis))


def _rounding(layer: LayerProblem, mask: Tensor, solution: Solution) -> Tensor:
    """Return the most that float64 can lose of every row's objective, float64 [rows]."""
    weight = solution.weight
    if solution.own_weight and weight is not None and weight.shape == mask.shape:
        return layer.rounding(weight.to(layer.device, torch.float64))
    return layer.rounding(layer.weights(mask))


def _verify_claims(layer: LayerProblem, mask: Tensor, solution: Solution, rounding: Tensor) -> bool:
    """Check statuses and bounds of each row, or of a shared budget; return whether masks were enumerated."""
    slack = optimal_slack(layer, mask, solution.objective)
    optimum_of = _enumeration(layer, rounding)
    claims = solution.objective, solution.lower_bound, slack
    sums = zip(*(layer.totals(x).tolist() for x in claims), strict=True)
    for number, (objective, bound, room) in enumerate(sums):
        first = number * layer.rows_per_budget
        rows = list(range(first, first + layer.rows_per_budget))
        status, *others = sorted({Status(solution.status[row]) for row in rows})
        if others:
            raise VerificationError(
                "status: rows of a shared budget are proven together, yet some claim "
                f"{' and some '.join((status, *others))}"
            )
        if layer.shared_budget:
            claim, bounded, quantity = f"the rows claim {status}", "the rows state", "sum"
        else:
            claim, bounded = f"row {first} claims {status}", f"row {first} states"
            quantity = "objective"
        claim = f"status: {claim}"
        if status is not Status.FEASIBLE:
            # an optimum within OPTIMAL_TOLERANCE can leave swaps of that size
            swap = improving_swap(layer.take(rows), mask[rows])
            if swap is not None:
                gained, lost = f"input {swap.pruned}", str(swap.kept)
                if layer.shared_budget:
                    gained, lost = f"{gained} of row {swap.other}", f"{lost} of row {swap.row}"
                raise VerificationError(
                    f"{claim}, yet keeping {gained} instead of {lost} changes the {quantity} by "
                    f"{swap.delta:.6g}"
                )
        if status is Status.OPTIMAL and objective - bound > room:
            raise VerificationError(
                f"{claim} without proof: {quantity} {objective:.9g}, lower bound {bound:.9g}"
            )
        if optimum_of is None:
            continue
        optimum, error = optimum_of(first)
        if layer.integral:
            error = 0.0
        exists = f"but a mask of {quantity} {optimum:.12g} exists"
        if bound > optimum + error:
            raise VerificationError(f"lower bound: {bounded} {bound:.12g}, {exists}")
        if status is Status.OPTIMAL and objective > optimum + error:
            raise VerificationError(f"{claim}, {exists}")
    return optimum_of is not None


def _enumeration(
    layer: LayerProblem, rounding: Tensor
) -> Callable[[int], tuple[float, float]] | None:
    """Return a function from a row to its least objective and the error of that; None: too many masks.

    With a shared budget it gives the least sum. `rounding`: of the masks that are claimed.
    """
    if layer.shared_budget:
        if layer.rows * 2**layer.n > ENUMERATION_LIMIT:
            return None
        least = _least_shared_objective(layer)
        off = OPTIMAL_TOLERANCE * least + float(layer.shares @ rounding)
        return lambda _: (least, off)
    every, costs = _every_mask(layer), costs_of(layer)
    if every is None:
        return None

    def optimum(row: int) -> tuple[float, float]:
        values = costs.costs(row, every)
        best = int(values.argmin())
        kept, value = (every[best : best + 1] == 0).to(layer.device), values[best : best + 1]
        # of the mask that is claimed, and of the best one
        off = float(optimal_slack(layer.take([row]), kept, value)) + float(rounding[row])
        return float(value), off

    return optimum


def _least_shared_objective(layer: LayerProblem) -> float:
    """Return min Σ ωᵣ fᵣ over all legal masks, float64: all 2ⁿ masks of every row, then counts row by row."""
    best, (least, most) = torch.zeros(1, dtype=torch.float64), layer.row_limits
    costs = costs_of(layer)
    masks = ((torch.arange(2**layer.n)[:, None] >> torch.arange(layer.n)) & 1).double()
    by_count = [masks[masks.sum(1) == count] for count in range(layer.n + 1)]
    for row in range(layer.rows):
        least_by_count = torch.stack([costs.costs(row, p).min() for p in by_count])
        least_by_count *= float(layer.shares[row])
        least_by_count[:least], least_by_count[most + 1 :] = torch.inf, torch.inf
        longer = torch.full((len(best) + layer.n,), torch.inf, dtype=torch.float64)
        for count, value in enumerate(least_by_count):
            end = count + len(best)
            longer[count:end] = torch.minimum(longer[count:end], best + value)
        best = longer
    return float(best[layer.pruned])


def _verify_exactly(layer: LayerProblem, mask: Tensor, solution: Solution) -> None:
    """Check lower bounds and OPTIMAL without rounding; of rows that share a budget those of their sum."""
    proven = exact_bounds(layer, solution.certificate, solution.proof)
    costs = [exact_cost(layer, mask[row], row) for row in range(layer.rows)]
    stated = [Fraction(bound) for bound in solution.lower_bound.tolist()]
    if layer.shared_budget:
        shares = [Fraction(share) for share in layer.shares.tolist()]
        costs, stated = ([sum(map(mul, shares, x), Fraction(0))] for x in (costs, stated))
    elif layer.one_mask:
        proven = costs
    zero = None if layer.units is None else Fraction(layer.units.zero(layer.pruned // layer.rows))
    for row, (cost, bound, least) in enumerate(zip(costs, stated, proven, strict=True)):
        size = cost if zero is None else min(cost, abs(cost - zero))
        slack, rounding = Fraction(OPTIMAL_TOLERANCE) * size, Fraction(OBJECTIVE_TOLERANCE) * least
        if layer.integral:
            slack = rounding = Fraction(0)
        if bound > least + rounding:
            raise VerificationError(
                f"lower bound: row {row} states {float(bound):.12g}; in exact arithmetic its proof gives "
                f"{float(least):.12g}"
            )
        if solution.status[row] == Status.OPTIMAL and cost - least > slack:
            raise VerificationError(
                f"status: row {row} claims optimal; in exact arithmetic its objective is {float(cost):.12g} "
                f"and its proof gives {float(least):.12g}"
            )


def _legal_mask(layer: LayerProblem, solution: Solution) -> Tensor:
    try:
        mask = layer.check_mask(solution.mask)
    except MaskoptError as error:
        raise VerificationError(f"pattern: {error}") from None
    for name in ("objective", "lower_bound"):
        value = getattr(solution, name)
        if value.shape != (layer.rows,) or value.dtype != torch.float64:
            raise VerificationError(
                f"{name} must be float64 [{layer.rows}], not {value.dtype} {list(value.shape)}"
            )
    stated, omega = (None if x is None else x.tolist() for x in (solution.omega, layer.omega))
    if solution.units != layer.units or stated != omega:
        raise VerificationError("units: the solution states its value in those of another problem")
    if len(solution.status) != layer.rows:
        raise VerificationError(f"{len(solution.status)} statuses for {layer.rows} rows")
    for row, status in enumerate(solution.status):
        if status not in tuple(Status):
            raise VerificationError(
                f"status: row {row} claims {status!r}; there are {list(map(str, Status))}"
            )
    if solution.trusted and len(solution.trusted) != layer.rows:
        raise VerificationError(f"trusted: {len(solution.trusted)} names for {layer.rows} rows")
    for name in set(solution.trusted) - {""}:
        if not is_trusted(name):
            raise VerificationError(
                f"trusted: {name!r} is no registered exact solver with its version, such as 'SCIP 10.0'"
            )
    return mask


def _proven(layer: LayerProblem, mask: Tensor, solution: Solution) -> Tensor:
    """Return the bounds that tree and certificate prove, else 0; of a single mask its objective."""
    if layer.one_mask:
        return layer.objective(mask).cpu()
    proven = torch.zeros(layer.rows, dtype=torch.float64)
    if solution.proof is not None:
        proven = check_proof(layer, solution.proof)
    if solution.certificate is None:
        return proven
    certified = solution.certificate.check(layer).cpu()
    if layer.shared_budget:  # one bound of the layer's sum, whichever way it is shared out
        share, stated = layer.shares.cpu(), solution.lower_bound.cpu()
        claimed = share @ stated
        certified = stated * (share @ certified / claimed) if claimed > 0 else certified
    return proven.maximum(certified)


def _trusted(solution: Solution, row: int, proven: float) -> str:
    """Return the exact solver that is trusted with a bound which no certificate proves."""
    if solution.trusted and solution.trusted[row]:
        return solution.trusted[row]
    bound = f"lower bound: row {row} states {float(solution.lower_bound[row]):.12g}"
    if solution.certificate is not None or solution.proof is not None:
        kind = "certificate" if solution.proof is None else "proof"
        raise VerificationError(f"{bound}, its {kind} proves {proven:.12g}")
    raise VerificationError(
        f"{bound}, positive without a certificate, and no exact solver is trusted with it"
    )


def _refuse(bad: Tensor, message: Callable[[int], str]) -> None:
    """Raise VerificationError for the first row that is bad."""
    if bool(bad.any()):
        raise VerificationError(message(int(bad.nonzero()[0])))


def _verify_objective(
    layer: LayerProblem, mask: Tensor, solution: Solution, rounding: Tensor
) -> None:
    if solution.own_weight:
        if layer.update is None or set(solution.status) != {Status.FEASIBLE}:
            raise VerificationError(
                "weights: a solver's own are claimed, which only FEASIBLE rows of a problem with update have"
            )
        true = _costs_of_weights(layer, mask, solution.weight)
    else:
        costs = costs_of(layer)
        true = torch.stack([costs.cost(mask, row) for row in range(layer.rows)])
    slack = OBJECTIVE_TOLERANCE * size_of(layer, true) + rounding
    if layer.integral:  # sums of whole numbers are exact
        slack = torch.zeros_like(slack)

    def compare(stated: Tensor, what: str) -> None:
        _refuse(
            ~((stated - true).abs() <= slack),
            lambda row: (
                f"{what} {row} states {float(stated[row]):.12g}, the mask costs "
                f"{float(true[row]):.12g}"
            ),
        )

    compare(solution.objective.to(true), "objective: row")
    if solution.weight is not None and not solution.own_weight:
        compare(_costs_of_weights(layer, mask, solution.weight), "weights: the cost of row")


def _costs_of_weights(layer: LayerProblem, mask: Tensor, weight: Tensor | None) -> Tensor:
    """Return the costs of updated weights, after a check of their type, shape and zeros."""
    if weight is None or weight.shape != mask.shape or weight.dtype != torch.float64:
        raise VerificationError(f"weights: they must be float64 {list(mask.shape)}")
    weight = weight.to(layer.device)
    _refuse(
        ~torch.isfinite(weight).all(1) | (weight.ne(0) & ~mask).any(1),
        lambda row: f"weights: those of row {row} are not finite, or not 0 where it prunes",
    )
    lost = layer.weight.double() - weight
    costs = ((lost @ layer.gram.double()) * lost).sum(1) + lost.square() @ layer.ridge
    costs += 2 * (lost * layer.correlation).sum(1) + layer.constant
    return costs.clamp(min=0.0)


def _verify_bound(layer: LayerProblem, solution: Solution, rounding: Tensor) -> None:
    bound, objective = solution.lower_bound, solution.objective

    def states(row: int) -> str:
        return f"lower bound: row {row} states {float(bound[row]):.12g}"

    _refuse(~torch.isfinite(bound) | (bound < 0), lambda row: f"{states(row)}; f ≥ 0 always")
    _refuse(
        bound > objective + rounding.to(objective),
        lambda row: f"{states(row)}, above the objective {float(objective[row]):.12g}",
    )


def _every_mask(layer: LayerProblem) -> Tensor | None:
    """Return all sets of pruned entries, 1 = pruned, float64 [masks, n]; None: too many to enumerate."""
    group, pruned = layer.group_size, layer.pruned_per_group
    count = math.comb(group, pruned) ** (layer.n // group)
    operations = count * (pruned * layer.n // group) ** 3
    if count > ENUMERATION_LIMIT or (layer.update and operations > REFIT_ENUMERATION_LIMIT):
        return None
    starts = range(0, layer.n, group)
    choices = [list(itertools.combinations(range(s, s + group), pruned)) for s in starts]
    sets = [sum(parts, ()) for parts in itertools.product(*choices)]
    p = torch.zeros(count, layer.n, dtype=torch.float64)
    if sets[0]:
        p.scatter_(1, torch.tensor(sets), 1.0)
    return p

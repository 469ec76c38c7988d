"""Proofs of optimality: the closed tree of a row's branch and bound as data, and its independent check.

The check computes each bound in float64.

A row's masks are the p ∈ {0,1}ⁿ with s entries of every group pruned (p = 1). A tree of *steps* splits them.
A step stands at a node, where some entries are fixed and F are free, and has a *form* (λ, μ, τ) and a point
p̂ ∈ [0,1]ⁿ that agrees with what is fixed. With inequalities c_t(p) ≥ 0 of all masks
(`maskopt.certificates.certificate`), the function

    g(p) = q(p) + Σ_F λᵢ(pᵢ² − pᵢ) + μ Σ_g (1_gᵀp − s)²,    q(p) = pᵀQp − Σ_t τ_t c_t(p)

is at most f on every mask of the node. Where its quadratic form is positive semidefinite in what is free,
then for h = ∇q(p̂)_F + λ_F(2p̂_F − 1)

    f(p) ≥ q(p̂) + Σ_F λᵢ(p̂ᵢ² − p̂ᵢ) − hᵀp̂_F − μ Σ_g (1_gᵀp̂ − s)² + min_v hᵀv                        (1)

the minimum over 0 ≤ v ≤ 1 with 1_gᵀv = what a group still has to prune: a sort. (The penalty's slope is the
same for a whole group, and all v of a group have the same sum.) Under the same form a mask with one free
entry on its other side costs at least (1) and the loss of the sort.

Inputs of a group are twins where exchanging them leaves Q unchanged. Every mask has its match of equal f with
the first ones of all twins pruned, and only such masks need be covered.

After a step some free entries may be fixed: the bound of their other side is a leaf. Then the step is a leaf,
another step follows at the same node, or an input is branched on, pruned first and then kept. The bound of
the row is the least over all leaves, each at least what any step above it proves. A list in preorder cannot
leave out a mask: a step that is no leaf is followed by what belongs below it.

Nothing here is shared with the search (`maskopt.solvers.exact.branch`) that makes the trees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.certificates.certificate import missing
from maskopt.certificates.cuts import Cuts, check_cuts, cut_form
from maskopt.core.problem import LayerProblem, RowProblem
from maskopt.errors import VerificationError

#: unit roundoff of float64
_U = 2.0**-53
#: in place of an input that is branched on: nothing follows; another step at the same node follows
LEAF, AGAIN = -1, -2
#: in place of a form: no bound but f ≥ 0
NO_FORM = -1
#: the arrays of a tree
KINDS = {
    "forms": np.float64,
    "cuts": np.int32,
    "cut_index": np.int32,
    "cut_sign": np.int8,
    "multiplier": np.float64,
    "form": np.int32,
    "branch": np.int32,
    "fixes": np.int32,
    "fixed": np.int32,
    "side": np.int8,
    "points": np.float64,
}


@dataclass(frozen=True)
class RowProof:
    """The tree of one row, its steps in preorder.

    Attributes:
        forms: float64 [forms, n], every λ.
        cuts: int32 [forms], how many triangle and pentagonal inequalities a form has.
        cut_index, cut_sign, multiplier: of all of them, as in `certificate.Cuts`, int32 and int8.
        penalty: μ.
        form: int32 [steps], which λ; NO_FORM: none.
        branch: int32 [steps], the input branched on; LEAF or AGAIN.
        fixes: int32 [steps], how many entries a step fixes.
        fixed: int32 [all of them], the inputs; side: int8, 1 pruned, 0 kept.
        points: float64, the free entries of the points of all steps that have a form.
    """

    forms: np.ndarray
    cuts: np.ndarray
    cut_index: np.ndarray
    cut_sign: np.ndarray
    multiplier: np.ndarray
    penalty: float
    form: np.ndarray
    branch: np.ndarray
    fixes: np.ndarray
    fixed: np.ndarray
    side: np.ndarray
    points: np.ndarray

    @property
    def leaves(self) -> int:
        """The number of ends of the tree, the other sides of fixed entries among them."""
        return int((self.branch == LEAF).sum()) + len(self.fixed)

    @property
    def nbytes(self) -> int:
        """The size in memory and in a file."""
        return sum(getattr(self, name).nbytes for name in KINDS)


def check_proof(
    problem: LayerProblem | RowProblem, proof: Sequence[RowProof | None]
) -> Float[Tensor, " rows"]:
    """Return the lower bound of every row that its tree proves, float64, at least 0; 0 without a tree.

    Raises:
        VerificationError: a tree that does not cover all masks, or is no tree; numbers that are not finite;
            updated weights; a shared budget.
    """
    layer = problem.as_layer()
    if layer.update is not None or layer.shared_budget:
        raise VerificationError(
            "proof: a tree bounds rows with a count of their own and unchanged weights, not a shared budget "
            "or updated weights"
        )
    if len(proof) != layer.rows:
        raise VerificationError(f"proof: {len(proof)} trees for {layer.rows} rows")
    with np.errstate(all="ignore"):  # what is not finite is looked for, and proves nothing
        bounds = [
            0.0 if tree is None else TreeCheck(layer, row, tree).bound()
            for row, tree in enumerate(proof)
        ]
    return torch.tensor(bounds, dtype=torch.float64)


class _Form(NamedTuple):
    """A form at a node and below it.

    Attributes:
        matrix, linear, constant: q, its matrix [n, n].
        lam: λ [n] with A ⪰ 0, 0 where an input is fixed.
        size: the sum of the sizes of all terms.
        off: the rounding error of the form's own sums.
    """

    number: int
    matrix: np.ndarray
    linear: np.ndarray
    constant: float
    lam: np.ndarray
    size: float
    off: float


class _Node(NamedTuple):
    """A node: its state, int8 [n]: 1 pruned, 0 kept, −1 free; its bound; the form of the step above."""

    state: np.ndarray
    value: float
    form: _Form | None


class TreeCheck:
    """The check of one row's tree: the walk through its steps, and their bounds in float64."""

    def __init__(self, layer: LayerProblem, row: int, tree: RowProof) -> None:
        self.row, self.tree, self.values = row, tree, layer.row(row).values()
        self.n, self.group, self.pruned = layer.n, layer.group_size, layer.pruned_per_group
        self.q = layer.row(row).q().cpu().numpy()
        self.size = _size_of_terms(layer, row)
        self._check_arrays()
        self.twins = _twins(self.q, self.group)
        self.first_cut = np.cumsum([0, *tree.cuts.tolist()])

    def bound(self) -> float:
        """Return the least bound of a leaf."""
        tree, least = self.tree, math.inf
        nodes = [_Node(np.full(self.n, -1, dtype=np.int8), 0.0, None)]
        first = taken = 0
        for step in range(len(tree.form)):
            if not nodes:
                raise self._refused(f"step {step} belongs to no node")
            state, value, form = nodes.pop()
            branch, fixes = int(tree.branch[step]), int(tree.fixes[step])
            if not self._settle(state):
                if branch != LEAF or fixes:
                    raise self._refused(f"step {step} goes on where no mask is left")
                continue
            free = np.flatnonzero(state < 0)
            form = self._form(int(tree.form[step]), form, free)
            count = 0 if form is None else len(free)
            at_step, rise = self._step(form, state, free, tree.points[first : first + count])
            value = max(value, self._raised(at_step))
            if fixes:
                chosen = slice(taken, taken + fixes)
                rises = self._fix(state, free, rise, tree.fixed[chosen], tree.side[chosen])
                least = min(least, max(value, self._raised(at_step + rises)))
            first, taken = first + count, taken + fixes
            if branch == LEAF:
                least = min(least, value)
            elif branch == AGAIN:
                nodes.append(_Node(state, value, form))
            elif 0 <= branch < self.n and state[branch] < 0:
                for side in (0, 1):
                    child = state.copy()
                    child[branch] = side
                    nodes.append(_Node(child, value, form))
            else:
                raise self._refused(f"step {step} branches on input {branch}, which is not free")
        if nodes:
            raise self._refused(f"{len(nodes)} nodes are left out")
        if taken != len(tree.fixed) or first != len(tree.points):
            raise self._refused("it holds fixings or points that belong to no step")
        return max(least, 0.0)

    def _settle(self, state: np.ndarray) -> bool:
        """Fix what reached counts and the order of twins imply, in place; False: no mask is left."""
        groups, before = state.reshape(-1, self.group), -1
        while before != np.count_nonzero(state < 0):
            before = int(np.count_nonzero(state < 0))
            for twins in self.twins:
                ones, zeros = (np.flatnonzero(state[twins] == side) for side in (1, 0))
                last, first = ones.max(initial=-1), zeros.min(initial=len(twins))
                if first < last:
                    return False
                state[twins[: last + 1]], state[twins[first:]] = 1, 0
            ones, free = (groups == 1).sum(1), (groups < 0).sum(1)
            if (ones > self.pruned).any() or (ones + free < self.pruned).any():
                return False
            groups[(ones == self.pruned)[:, None] & (groups < 0)] = 0
            groups[(ones + free == self.pruned)[:, None] & (groups < 0)] = 1
        return True

    def _form(self, number: int, above: Any, free: np.ndarray) -> Any:
        """Return a form where `free` are free. What is semidefinite at a node is so below it."""
        if number == NO_FORM or len(free) == 0:
            return None
        if above is not None and above.number == number:
            return above
        part = slice(*self.first_cut[number : number + 2])
        cuts = Cuts(*(torch.from_numpy(x[part]) for x in self._cuts()))
        check_cuts(cuts, self.n, self.row)
        return self._made(number, free, cuts)

    def _made(self, number: int, free: np.ndarray, cuts: Cuts) -> Any:
        """Return the form, in this checker's arithmetic."""
        cut = cut_form(cuts, self.n, torch.zeros(1).double())
        q = self.q if cut.matrix is None else self.q - cut.matrix.numpy()
        lam_free = self.tree.forms[number][free]
        penalty, group = self.tree.penalty, free // self.group
        a = q[np.ix_(free, free)] + penalty * (group[:, None] == group)
        a[np.diag_indices_from(a)] += lam_free
        size = self.size + cut.size * self.n + float(np.abs(lam_free).sum())
        lack = missing(torch.from_numpy(a)) + 8 * _U * (size + len(free) * abs(penalty)) + cut.error
        lam = np.zeros(self.n)
        lam[free] = lam_free + lack
        size += len(free) * lack
        return _Form(number, q, cut.linear.numpy(), cut.constant, lam, size, 8 * cut.error)

    def _cuts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.tree.cut_index, self.tree.cut_sign, self.tree.multiplier

    def _step(
        self, form: _Form | None, state: np.ndarray, free: np.ndarray, point: np.ndarray
    ) -> tuple[float, np.ndarray]:
        """Return (1), less its rounding, and its rise where a free input is pruned ([0]) or kept ([1])."""
        p = (state == 1).astype(float)
        if len(free) == 0:  # a single mask
            return self._rounded(float(p @ (self.q @ p)), self.size), np.zeros((2, 0))
        nothing = 0.0, np.zeros((2, len(free)))
        if form is None:
            return nothing
        self._check_point(point, free)
        p[free] = point
        product, lam = form.matrix @ p, form.lam[free]
        h = 2 * product[free] - form.linear[free] + lam * (2 * point - 1)
        ranked = np.full(self.n, np.inf)
        ranked[free] = h
        ranked = np.sort(ranked.reshape(-1, self.group), axis=1)
        left = self.pruned - (state == 1).reshape(-1, self.group).sum(1)
        value = p @ (product - form.linear) - form.constant
        value = value + lam @ (point * (point - 1)) - h @ point
        value += ranked[np.arange(self.group) < left[:, None]].sum()
        excess = np.abs(p.reshape(-1, self.group).sum(1) - self.pruned) + 4 * self.n**2 * _U
        value -= abs(self.tree.penalty) * (excess @ excess)
        value = self._rounded(float(value), form.size) - form.off
        if not math.isfinite(value):
            return nothing
        # where a group has free inputs, 0 < left < their number: the last of the sort and the first beyond
        of = free // self.group
        rise = np.stack([h - ranked[of, left[of] - 1], ranked[of, left[of]] - h])
        return value, np.maximum(rise, 0.0) * (1 - 4 * _U)

    def _check_point(self, point: np.ndarray, free: np.ndarray) -> None:
        if len(point) != len(free) or not ((point >= 0) & (point <= 1)).all():
            raise self._refused("a point is not one of its step's free entries")

    def _fix(
        self,
        state: np.ndarray,
        free: np.ndarray,
        rise: np.ndarray,
        inputs: np.ndarray,
        side: np.ndarray,
    ) -> float:
        """Fix inputs in place; return the least rise of the bound where one of them has its other side."""
        known = ((inputs >= 0) & (inputs < self.n)).all() and ((side == 0) | (side == 1)).all()
        if not known or (state[inputs] >= 0).any() or len(np.unique(inputs)) < len(inputs):
            raise self._refused("it fixes an input that is not free, or to no side")
        state[inputs] = side
        # the other side of a kept input is to prune it
        return rise[side, np.searchsorted(free, inputs)].min()

    def _rounded(self, value: float, size: float) -> float:
        """Subtract all that rounding may have added to a sum of terms of this size."""
        return value - (2 * self.n + 16) * _U * 6 * size

    def _raised(self, value: float) -> float:
        """Raise a bound to the next value that f can take, where these are known."""
        return value if self.values is None else self.values.at_least(value)

    def _check_arrays(self) -> None:
        tree = self.tree
        for name, kind in KINDS.items():
            array = getattr(tree, name)
            dimensions = 2 if name in ("forms", "cut_index", "cut_sign") else 1
            if array.dtype != kind or array.ndim != dimensions:
                raise self._refused(f"{name} must be {np.dtype(kind)} of {dimensions} dimensions")
        steps = len(tree.form)
        fit = tree.forms.shape[1] == self.n and len(tree.fixed) == len(tree.side)
        if not steps or not fit or len(tree.branch) != steps or len(tree.fixes) != steps:
            raise self._refused("its arrays do not fit each other, or the row")
        if (tree.form < NO_FORM).any() or (tree.form >= len(tree.forms)).any():
            raise self._refused("a step has a form that is not there")
        if len(tree.cuts) != len(tree.forms) or (tree.cuts < 0).any():
            raise self._refused("its cuts are not those of its forms")
        if any(len(x) != tree.cuts.sum(dtype=np.int64) for x in self._cuts()):
            raise self._refused("its forms do not have as many cuts as it lists")
        if (tree.fixes < 0).any() or tree.fixes.sum(dtype=np.int64) != len(tree.fixed):
            raise self._refused("its steps do not fix as many entries as it lists")
        if not np.isfinite(tree.forms).all() or not np.isfinite([tree.penalty]).all():
            raise self._refused("it holds NaN or infinite values")

    def _refused(self, reason: str) -> VerificationError:
        return VerificationError(f"proof: the tree of row {self.row}: {reason}")


def _twins(q: np.ndarray, group: int) -> list[np.ndarray]:
    """Return all sets of at least two twins, ascending."""
    same: dict[bytes, list[list[int]]] = {}  # by the entries of their rows, in any order
    for i, line in enumerate(q + 0.0):
        sets = same.setdefault(np.sort(line).tobytes(), [])
        for twins in sets:
            j, exchanged = twins[0], line.copy()
            exchanged[i], exchanged[j] = line[j], line[i]
            if i // group == j // group and np.array_equal(exchanged, q[j]):
                twins.append(i)
                break
        else:
            sets.append([i])
    return [np.array(twins) for sets in same.values() for twins in sets if len(twins) > 1]


def _size_of_terms(layer: LayerProblem, row: int) -> float:
    """Return Σ |Qᵢⱼ|, of the terms that Qᵢⱼ is summed from where there is a linear part."""
    weight = layer.weight[row].double().abs()
    size = float(weight @ (layer.gram.double().abs() @ weight))
    pruned = layer.pruned // layer.rows
    if pruned:
        pull = float(weight @ layer.correlation[row].abs())
        constant = float(layer.constant[row].abs())
        size += 2 * layer.n * pull / pruned + layer.n**2 * constant / pruned**2
    return size

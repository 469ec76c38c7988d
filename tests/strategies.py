"""Random problems for tests, with Gram matrices as layers give them, and brute force."""

from itertools import chain, combinations, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from maskopt import NM, LayerProblem, LeastSquaresUpdate, LinearTerm, Unstructured
from maskopt.checks.verification import verify
from maskopt.core.pattern import Pattern
from maskopt.core.units import ObjectiveTransform
from maskopt.protocol.solution import Solution, Status
from maskopt.protocol.solver import solve

HALF, TWO_FOUR = Unstructured(sparsity=0.5), NM(keep=2, of=4)
ONE_PERCENT = LeastSquaresUpdate(0.01)
F64 = torch.float64
WHOLE = ObjectiveTransform(integral=True)
KINDS = ("full", "low-rank", "zero-columns", "duplicates", "diagonal", "outliers")


def slow(*values: Any) -> Any:
    """A case that runs with --slow only."""
    return pytest.param(*values, marks=pytest.mark.slow)


def random_gram(n: int, kind: str, seed: int, dtype: torch.dtype = F64) -> Tensor:
    """A PSD [n, n] of the named kind: the mean of xxᵀ over random tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = max(2, n // 3) if kind == "low-rank" else 4 * n
    x = torch.randn(tokens, n, generator=generator, dtype=F64)
    x = x @ (torch.eye(n, dtype=F64) + torch.randn(n, n, generator=generator) / n**0.5)
    if kind == "zero-columns":
        x[:, torch.rand(n, generator=generator) < 0.3] = 0
    elif kind == "duplicates":
        x = x[:, torch.randint(0, max(1, n // 2), (n,), generator=generator)]
    elif kind == "outliers":
        x = x * 10 ** torch.randint(-1, 4, (n,), generator=generator).double()
    gram = x.T @ x / tokens
    if kind == "diagonal":
        gram = torch.diag(gram.diagonal())
    return ((gram + gram.T) / 2).to(dtype)


def random_weight(rows: int, n: int, seed: int, dtype: torch.dtype = F64) -> Tensor:
    """[rows, n] with some zero entries and, at times, a zero row."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, n, generator=generator, dtype=F64)
    weight[torch.rand(rows, n, generator=generator) < 0.1] = 0
    if seed % 5 == 0:
        weight[0] = 0
    return weight.to(dtype)


def random_linear(weight: Tensor, gram: Tensor, seed: int) -> LinearTerm:
    """Moments of r = aᵀx + noise: a about the size of the weights, the noise of some rows none."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(weight.shape, generator=generator, dtype=F64) / 2
    own = (a @ gram.double() * a).sum(1)
    noise = torch.rand(len(a), generator=generator, dtype=F64).round(decimals=1) * own
    return LinearTerm(a @ gram.double(), own + noise)


def drawn(
    rows: int, n: int, kind: str = "full", pattern: Pattern = HALF, seeds: tuple[int, int] = (1, 2),
    dtype: torch.dtype = F64, linear: int | None = None, **more: Any,
) -> LayerProblem:  # fmt: skip
    """A layer of random weights and a Gram matrix of that kind, with a seed each (`linear`: its seed)."""
    weight, gram = random_weight(rows, n, seeds[0], dtype), random_gram(n, kind, seeds[1], dtype)
    part = None if linear is None else random_linear(weight, gram, linear)
    return LayerProblem(weight, gram, pattern, linear=part, **more)


def refit_layer(
    pattern: Pattern = HALF, rows: int = 3, n: int = 16, kind: str = "full", damping: float = 0.01,
    seed: int = 1, dtype: torch.dtype = F64,
) -> LayerProblem:  # fmt: skip
    """A layer whose kept weights are updated."""
    update = LeastSquaresUpdate(damping)
    return drawn(rows, n, kind, pattern, (seed, seed + 1), dtype, update=update)


def floor(problem: LayerProblem) -> Tensor:
    """What an objective may be off by, per row."""
    return 1e-9 * problem.diagonal_mass() + 1e-300


def verified(problem: LayerProblem, solver: str, **options: Any) -> Solution:
    """What a solver answers, which `verify` confirms."""
    solution = solve(problem, solver, **options)
    verify(problem, solution)
    return solution


def alone(problem: LayerProblem, solver: Any, **options: Any) -> Tensor:
    """The masks that a solver gives each row by itself."""
    return torch.cat([solve(problem.row(i), solver, **options).mask for i in range(problem.rows)])


def swap_optimal(problem: LayerProblem, solver: str = "swap", **options: Any) -> Solution:
    """The same, of which every row is proven 1-swap optimal."""
    solution = verified(problem, solver, **options)
    assert set(solution.status) == {Status.SWAP_OPTIMAL}
    return solution


def legal_masks(problem: LayerProblem) -> Tensor:
    """Every legal mask of a row, bool [masks, n]."""
    group, groups = problem.group_size, problem.n // problem.group_size
    chosen = combinations(range(group), problem.pruned_per_group)
    sides = [[i not in one for i in range(group)] for one in chosen]
    return torch.tensor([[*chain(*sides)] for sides in product(sides, repeat=groups)])


@st.composite
def patterns(draw: st.DrawFn, n: int) -> Pattern:
    """Any legal pattern of n inputs, the empty and the full mask among them."""
    sizes = [m for m in range(2, min(n, 8) + 1) if n % m == 0]
    if sizes and bool(draw(st.booleans())):
        of = draw(st.sampled_from(sizes))
        return NM(keep=draw(st.integers(0, of)), of=of)
    return Unstructured(keep=draw(st.integers(0, n)))


@st.composite
def problems(
    draw: st.DrawFn, max_n: int = 16, max_rows: int = 5, dtype: torch.dtype = F64,
    kinds: tuple[str, ...] = KINDS, linear: bool = True,
) -> LayerProblem:  # fmt: skip
    """A layer with any kind of Gram matrix, any pattern, and at times a linear part if `linear`."""
    n = draw(st.integers(1, max_n))
    rows = draw(st.integers(1, max_rows))
    seed = draw(st.integers(0, 2**31 - 1))
    gram = random_gram(n, draw(st.sampled_from(kinds)), seed, dtype)
    weight, pattern = random_weight(rows, n, seed + 1, dtype), draw(patterns(n))
    part = random_linear(weight, gram, seed + 2) if linear and draw(st.booleans()) else None
    return LayerProblem(weight, gram, pattern, linear=part)


def graph(
    n: int = 14, chance: float = 0.5, keep: int = 7, seed: int = 0, integral: bool = True
) -> LayerProblem:
    """Densest subgraph: the pruned vertices are those of the cluster."""
    upper = np.triu(np.random.default_rng(seed).random((n, n)) < chance, 1)
    adjacent = (upper | upper.T).astype(float)
    gram = np.ceil(np.linalg.eigvalsh(adjacent)[-1]) * np.eye(n) - adjacent
    problem = LayerProblem(np.ones((1, n)), gram, Unstructured(keep=keep))
    return problem.with_units(WHOLE) if integral else problem

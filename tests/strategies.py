"""Random mask-selection problems for property tests.

The Gram matrices are what layers really give: full rank, rank-deficient, with dead inputs (zero
columns), with duplicate inputs, diagonal, and badly scaled by outlier features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from maskopt import NM, LayerProblem, LeastSquaresUpdate, LinearTerm, RowProblem, Unstructured
from maskopt.core.pattern import Pattern

HALF = Unstructured(sparsity=0.5)
KINDS = ("full", "low-rank", "zero-columns", "duplicates", "diagonal", "outliers")


def random_gram(n: int, kind: str, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A PSD [n, n] of the named kind: the mean of xxᵀ over random tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = max(2, n // 3) if kind == "low-rank" else 4 * n
    x = torch.randn(tokens, n, generator=generator, dtype=torch.float64)
    x = x @ (torch.eye(n, dtype=torch.float64) + torch.randn(n, n, generator=generator) / n**0.5)
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


def random_weight(rows: int, n: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """[rows, n] with some zero entries and, at times, a zero row."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, n, generator=generator, dtype=torch.float64)
    weight[torch.rand(rows, n, generator=generator) < 0.1] = 0
    if seed % 5 == 0:
        weight[0] = 0
    return weight.to(dtype)


def random_linear(weight: Tensor, gram: Tensor, seed: int) -> LinearTerm:
    """Moments of r = aᵀx + noise: a about the size of the weights, the noise of some rows none."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(weight.shape, generator=generator, dtype=torch.float64) / 2
    own = (a @ gram.double() * a).sum(1)
    noise = torch.rand(len(a), generator=generator, dtype=torch.float64).round(decimals=1) * own
    return LinearTerm(a @ gram.double(), own + noise)


def refit_layer(
    pattern: Pattern = HALF, rows: int = 3, n: int = 16, kind: str = "full",
    damping: float = 0.01, seed: int = 1, dtype: torch.dtype = torch.float64,
) -> LayerProblem:  # fmt: skip
    """A layer whose kept weights are refitted."""
    weight, gram = random_weight(rows, n, seed, dtype), random_gram(n, kind, seed + 1, dtype)
    return LayerProblem(weight, gram, pattern, update=LeastSquaresUpdate(damping))


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
    draw: st.DrawFn, max_n: int = 16, max_rows: int = 5, dtype: torch.dtype = torch.float64,
    kinds: tuple[str, ...] = KINDS, linear: bool = True,
) -> LayerProblem:  # fmt: skip
    """A layer of up to max_rows rows and max_n inputs, any kind of Gram matrix, any pattern, and where
    `linear` allows it at times a linear part."""
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
    shift = np.ceil(np.linalg.eigvalsh(adjacent)[-1])
    gram = shift * np.eye(n) - adjacent
    return RowProblem(np.ones(n), gram, Unstructured(keep=keep), integral=integral).as_layer()


# Maximum diversity: which m of n elements are the farthest from one another? After the recipes of Martí,
# Gallego, Duarte and Pardo (*Heuristics and metaheuristics for the maximum diversity problem*, J. Heuristics
# 19, 2013); the instances are drawn here and are none of the library's.


def gkd(n: int, rng: np.random.Generator) -> np.ndarray:
    """Euclidean distances of points with 2 to 21 coordinates from 0 to 10 (Glover, Kuo and Dhir)."""
    points = rng.uniform(0, 10, (n, int(rng.integers(2, 22))))
    return np.linalg.norm(points[:, None] - points[None, :], axis=2)


def som(n: int, rng: np.random.Generator) -> np.ndarray:
    """Whole numbers from 0 to 9 (Silva, Ochi and Martins)."""
    return _symmetric(rng.integers(0, 10, (n, n)).astype(float))


def mdg(n: int, rng: np.random.Generator) -> np.ndarray:
    """Real numbers from 0 to 10 (Duarte and Martí, MDG-a)."""
    return _symmetric(rng.uniform(0, 10, (n, n)))


Recipe = Callable[[int, np.random.Generator], np.ndarray]
RECIPES: dict[str, Recipe] = {"GKD": gkd, "SOM": som, "MDG": mdg}


def diversity(recipe: str, n: int, cardinality: int, seed: int) -> RowProblem:
    """The problem of an instance: its value is the sum of the distances between the chosen, each once."""
    distance = RECIPES[recipe](n, np.random.default_rng([seed, n]))
    more: Any = {"name": f"{recipe} {n} of {cardinality}, {seed}", "maximise": True}
    return RowProblem.from_quadratic(distance / 2, cardinality=cardinality, **more)


def _symmetric(matrix: np.ndarray) -> np.ndarray:
    upper = np.triu(matrix, 1)
    return np.asarray(upper + upper.T)

"""Maximum diversity after the recipes of MDPLIB: which m of n elements are the farthest from one another?

The recipes are those of Martí, Gallego, Duarte and Pardo (*Heuristics and metaheuristics for the maximum
diversity problem*, J. Heuristics 19, 2013); the instances are drawn here and are none of the library's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from maskopt import RowProblem


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


RECIPES: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "GKD": gkd, "SOM": som, "MDG": mdg,
}  # fmt: skip


def diversity(recipe: str, n: int, cardinality: int, seed: int) -> RowProblem:
    """The problem of an instance: its value is the sum of the distances between the chosen, each once."""
    distance = RECIPES[recipe](n, np.random.default_rng([seed, n]))
    name = f"{recipe} {n} of {cardinality}, {seed}"
    return RowProblem.from_quadratic(
        distance / 2, cardinality=cardinality, maximize=True, name=name
    )


def _symmetric(matrix: np.ndarray) -> np.ndarray:
    upper = np.triu(matrix, 1)
    return np.asarray(upper + upper.T)

"""Maximum diversity by the recipes of MDPLIB (Martí, Gallego, Duarte and Pardo, J. Heuristics 19, 2013)."""

from collections.abc import Callable

import numpy as np

from maskopt import RowProblem


def gkd(n: int, rng: np.random.Generator) -> np.ndarray:
    """Euclidean distances of points with 2 to 21 coordinates from 0 to 10 (Glover, Kuo and Dhir)."""
    points = rng.uniform(0, 10, (n, int(rng.integers(2, 22))))
    return np.linalg.norm(points[:, None] - points[None, :], axis=2)


def symmetric(matrix: np.ndarray) -> np.ndarray:
    upper = np.triu(matrix, 1)
    return np.asarray(upper + upper.T)


RECIPES: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "GKD": gkd,
    # whole numbers from 0 to 9 (Silva, Ochi and Martins), real ones from 0 to 10 (Duarte and Martí, MDG-a)
    "SOM": lambda n, rng: symmetric(rng.integers(0, 10, (n, n)).astype(float)),
    "MDG": lambda n, rng: symmetric(rng.uniform(0, 10, (n, n))),
}


def diversity(recipe: str, n: int, size: int, seed: int) -> RowProblem:
    """The problem of an instance: its value is the sum of the distances between the chosen, each once."""
    distance = RECIPES[recipe](n, np.random.default_rng([seed, n]))
    name = f"{recipe} {n} of {size}, {seed}"
    return RowProblem.from_quadratic(distance / 2, cardinality=size, maximize=True, name=name)

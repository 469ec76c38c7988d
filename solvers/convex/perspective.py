"""The perspective relaxation of updated weights, by turns: what the bound and the tree have in common.

With A = B + diag(d), B ⪰ 0, and z the kept inputs relaxed to {0 ≤ z ≤ 1, Σ over a group = kept},

    F ≥ min over v and z of  vᵀBv + Σ dⱼvⱼ²/zⱼ − 2bᵀv + C,

convex in both. For a given z it is a system of equations, v = (B + diag(d/z))⁻¹b; for a given v the best z is
min(1, θ√dⱼ|vⱼ|). Whatever v the turns come to,

    F ≥ C − vᵀBv − the greatest sum of (b − Bv)ⱼ²/dⱼ over as many j of every group as are kept.

Instead of the count an input that is kept may have a price, 1/θ²: then what counts of each (b − Bv)ⱼ²/dⱼ is
what it is above that.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Shaped

#: z is no less: an input that is out must be able to return
OUT_SHARE = 1e-9

Vector = Float[np.ndarray, " n"]


def shares(size: Vector, group: int, kept: int) -> Vector:
    """Return min(1, θ·size) with the sum `kept` in every group; of infinite size 1."""
    grouped = size.reshape(-1, group)
    with np.errstate(invalid="ignore"):  # 0·∞
        share = levels(size, group, kept)[:, None] * grouped
    share[np.isinf(grouped)] = 1.0
    return np.clip(share, OUT_SHARE, 1.0).ravel()


def levels(size: Vector, group: int, kept: int) -> Vector:
    """Return θ of every group."""
    grouped = size.reshape(-1, group)
    down = -np.sort(-grouped, axis=1)
    remaining = np.maximum(np.cumsum(down[:, ::-1], axis=1)[:, ::-1], 1e-300)  # from each on
    # with m of them at 1, θ makes the others what is left; right where the next stays below 1
    m = np.arange(group)
    with np.errstate(invalid="ignore"):  # 0·∞, where it is not yet right
        theta = np.where(m < kept, (kept - m) / remaining, np.inf)
        right = (theta * down <= 1).argmax(axis=1)
    return theta[np.arange(len(grouped)), right]


def greatest(price: Vector, group: int, kept: int, first: Shaped[np.ndarray, " n"]) -> float:
    """Return the sum of the `kept` greatest prices of every group, those of `first` (bool) among them."""
    order = np.argsort(np.where(first, -np.inf, -price).reshape(-1, group), axis=1, kind="stable")
    counted = np.take_along_axis(price.reshape(-1, group), order[:, :kept], axis=1)
    return float(counted.sum())

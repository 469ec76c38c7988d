"""How much each block prunes by other methods, written by us from their papers.

OWL (Yin et al., ICML 2024, arXiv 2310.05175): a block keeps more, the more of its scores |W|·‖X‖ are
outliers, above M = 5 times their mean. DLP (Chen et al., ICML 2025, arXiv 2505.23807): the smaller their
median is compared with the other blocks'. What blocks keep lies in a range of 2λ, λ = 0.08 and 0.15.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from judges import Judge
from torch import Tensor

from maskopt import Unstructured
from maskopt.core.knapsack import choose_levels

#: method → what its blocks' scores make of a block's importance, and λ
METHODS: dict[str, tuple[Callable[[Tensor], float], float]] = {
    "OWL": (lambda scores: float((scores > 5 * scores.mean()).double().mean()), 0.08),
    "DLP": (lambda scores: -float(scores.median()), 0.15),
}
#: of a row's inputs, the steps in which they are shared out, for an exact count of the whole model
_STEP = 1 / 128


def shared_out(method: str, judges: Mapping[str, Judge], pattern: Unstructured) -> dict[str, int]:
    """Inputs that each row of a layer prunes, as many in all as at the pattern: `counts` of a prune."""
    kept = blocks_keep(method, judges)
    total, names, sizes, costs, levels = 0, [], [], [], []
    for name, judge in judges.items():
        rows, n = judge.problem.rows, judge.problem.n
        alike = pattern.pruned_per_group(n)
        step = max(1, round(_STEP * n))
        some = np.arange(alike % step, n, step)
        wanted = alike - kept[judge.block] * n
        total += rows * alike
        names.append(name)
        levels.append(some)
        sizes.append(rows * some)
        costs.append(rows * (some - wanted) ** 2 / n)
    chosen = zip(names, levels, choose_levels(sizes, costs, total), strict=True)
    return {name: int(some[level]) for name, some, level in chosen}


def blocks_keep(method: str, judges: Mapping[str, Judge]) -> dict[int, float]:
    """What each block keeps beyond the model's part."""
    of, reach = METHODS[method]
    importance = {}
    for block in sorted({judge.block for judge in judges.values()}):
        mine = [judge.problem for judge in judges.values() if judge.block == block]
        scores = [problem.weight.abs() * problem.gram.diagonal().sqrt() for problem in mine]
        importance[block] = of(torch.cat([part.flatten().float() for part in scores]))
    values = np.array(list(importance.values()))
    spread = values.max() - values.min()
    scaled = (values - values.min()) / spread * 2 * reach if spread else 0 * values
    return dict(zip(importance, scaled - scaled.mean(), strict=True))

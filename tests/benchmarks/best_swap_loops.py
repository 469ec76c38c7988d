"""Baselines: the paper's loop, compiled for the CPU that runs the benchmark.

`best_swaps` is what a careful programmer writes: rows in parallel, float32 scans of all pairs over
contiguous memory, c kept up to date. `best_swaps_simd` is the same with the reduction spelt so that
LLVM makes SIMD of it, the strongest form of the algorithm we know on a CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from maskopt import LayerProblem
from maskopt.solvers.swap.numba_common import minimum

_fast = njit(nogil=True, fastmath={"nnan", "ninf", "nsz", "contract", "reassoc"})


@_fast
def _least_plain(height: Any, factor: Any, line: Any, slope: Any) -> Any:
    best = np.float32(1e37)
    for j in range(len(line)):
        value = height[j] + slope * (factor[j] * line[j])
        if value < best:
            best = value
    return best


@_fast
def _least_simd(height: Any, factor: Any, line: Any, slope: Any) -> Any:
    best = np.float32(1e37)
    for j in range(len(line)):
        best = minimum(best, height[j] + slope * (factor[j] * line[j]))
    return best


def _make(least: Callable) -> Callable:
    @_fast
    def loop(
        gram: Any, weight: Any, kept: Any, most: int, first: int, last: int, swaps: Any
    ) -> None:
        n = weight.shape[1]
        height, factor = np.empty(n, np.float32), np.empty(n, np.float32)
        c = np.empty(n, np.float64)
        for r in range(first, last):
            w = weight[r]
            c[:] = 0.0
            for j in range(n):
                if not kept[r, j]:
                    line = gram[j]
                    for i in range(n):
                        c[i] += np.float64(w[j]) * line[i]
            objective = 0.0
            for j in range(n):
                if not kept[r, j]:
                    objective += w[j] * c[j]
            while swaps[r] < most:
                for j in range(n):
                    height[j] = w[j] * w[j] * gram[j, j] - 2.0 * w[j] * c[j]
                    factor[j] = w[j]
                    if kept[r, j]:
                        height[j], factor[j] = 1e37, 0.0
                best, u = 1e37, -1
                for i in range(n):
                    if kept[r, i]:
                        value = least(height, factor, gram[i], np.float32(-2) * w[i])
                        value += w[i] * w[i] * gram[i, i] + 2.0 * w[i] * c[i]
                        if value < best:
                            best, u = value, i
                if u < 0 or best >= -1e-6 * objective:
                    break
                line, slope = gram[u], np.float32(-2) * w[u]
                lowest, p = np.float32(1e37), 0
                for j in range(n):
                    value = height[j] + slope * (factor[j] * line[j])
                    if value < lowest:
                        lowest, p = value, j
                kept[r, u], kept[r, p] = False, True
                objective += best
                swaps[r] += 1
                other = gram[p]
                for i in range(n):
                    c[i] += np.float64(w[u]) * line[i] - np.float64(w[p]) * other[i]

    return loop


_plain, _simd = _make(_least_plain), _make(_least_simd)


def best_swaps(problem: LayerProblem, start: Tensor, most: int = 2**31) -> Tensor:
    """The mask after the compiled loop, plain."""
    return _run(_plain, problem, start, most)


def best_swaps_simd(problem: LayerProblem, start: Tensor, most: int = 2**31) -> Tensor:
    """The mask after the compiled loop, in SIMD."""
    return _run(_simd, problem, start, most)


def _run(loop: Callable, problem: LayerProblem, start: Tensor, most: int) -> Tensor:
    kept = start.clone().numpy()
    gram, weight = problem.gram.numpy(), problem.weight.float().numpy()
    swaps = np.zeros(problem.rows, np.int64)
    threads = torch.get_num_threads()
    edges = np.linspace(0, problem.rows, min(problem.rows, 8 * threads) + 1).astype(int)
    with ThreadPoolExecutor(threads) as pool:
        tasks = [
            pool.submit(loop, gram, weight, kept, most, first, last, swaps)
            for first, last in itertools.pairwise(edges)
        ]
        for task in tasks:
            task.result()
    return torch.from_numpy(kept)

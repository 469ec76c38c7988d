"""What a prune will take, before anything heavy happens: layers, memory, an estimate of time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from maskopt.errors import MaskoptError, ModelError
from maskopt.model.blocks import Layer
from maskopt.model.options import default_start
from maskopt.model.source import FolderSource, Source, stored_dtype
from maskopt.model.tokens import Windows
from maskopt.pattern import Pattern
from maskopt.problem import LayerProblem
from maskopt.solver import solve

GIB = 2**30
#: the interpreter with torch, transformers and a compiled solver
BASE = 2**30
#: inputs of the small problem that the solver's speed is measured on, and its rows: more of them
#: as long as they take next to no time
PROBE_N, PROBE_ROWS = 512, (2, 32, 512)


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of each part at the peak."""

    base: int
    outside: int
    block: int
    grams: int
    inputs: int
    solving: int
    activations: int

    @property
    def peak(self) -> int:
        return (
            self.base
            + self.outside
            + self.block
            + self.activations
            + max(self.grams + self.inputs, self.grams + self.solving)
        )


@dataclass(frozen=True)
class Plan:
    """The layers by block and kind, memory, and seconds by stage (None: not estimated)."""

    layers: Sequence[Layer]
    pruned: dict[str, int]
    memory: Memory
    forward_seconds: float
    solve_seconds: float | None
    disk: int


def estimate_memory(
    source: Source, layers: Sequence[Layer], samples: int, length: int, threads: int,
    activation_memory: int,
) -> Memory:  # fmt: skip
    """The parts of the peak, from shapes alone."""
    width = next(source.model.parameters()).dtype.itemsize
    named = dict(source.model.named_parameters())
    outside = sum(p.numel() for name, p in source.blocks.outside() if name in named) * width
    blocks = [sum(p.numel() for p in block.parameters()) * width for block in source.blocks.modules]
    block = max(blocks)
    if isinstance(source, FolderSource):
        # a block is read in its stored dtype and converted; one tensor of it is held twice
        stored = stored_dtype(source.checkpoint).itemsize
        block += block * stored // width if stored != width else 0
    else:
        block = sum(blocks)
    hidden = _hidden_size(source.model)
    state = length * hidden * width
    activations = samples * state
    by_block: dict[int, list[Layer]] = {}
    start = len(source.blocks.name) + 1
    for layer in layers:
        by_block.setdefault(int(layer.name[start:].split(".")[0]), []).append(layer)
    grams = inputs = solving = 0
    for mine in by_block.values():
        distinct = {(layer.n, layer.expert) for layer in mine}
        grams = max(grams, sum(8 * n * n for n, _ in distinct))
        inputs = max(inputs, threads * length * width * (sum(n for n, _ in distinct) + 6 * hidden))
        # the Gram in float32 and two more matrices of its size (of the start's relaxation: in float64
        # up to n = 4096), the weights in float32 a few times
        squares = [12 * y.n * y.n + 8 * min(y.n, 4096) ** 2 for y in mine]
        rows = [24 * y.rows * y.n for y in mine]
        solving = max(solving, max(map(sum, zip(squares, rows, strict=True))))
    spilled = activations > activation_memory and isinstance(source, FolderSource)
    return Memory(BASE, outside, block, grams, inputs, solving, state if spilled else activations)


def check_memory(
    source: Source,
    layers: Sequence[Layer],
    windows: Windows,
    threads: int,
    max_memory: int,
    activation_memory: int,
) -> int:
    """The bytes that hidden states may take in memory so that the peak stays below the limit.

    Raises:
        ModelError: it does not fit even with the hidden states in a file; with the numbers.
    """
    for limit in (activation_memory, 0):
        memory = estimate_memory(source, layers, len(windows), windows.length, threads, limit)
        if memory.peak <= max_memory:
            return limit
    parts = ", ".join(
        f"{name} {getattr(memory, name) / GIB:.2f}"
        for name in ("base", "outside", "block", "grams", "inputs", "solving", "activations")
    )
    raise ModelError(
        f"an estimated {memory.peak / GIB:.2f} GiB are needed, --max-memory allows "
        f"{max_memory / GIB:.2f} ({parts}); use fewer threads, shorter windows, or exclude the "
        "layers with most inputs"
    )


def make_plan(
    source: Source,
    layers: Sequence[Layer],
    pattern: Pattern,
    *,
    samples: int,
    length: int,
    threads: int,
    activation_memory: int,
    solver: str,
    solver_options: dict[str, Any],
    one_pass: bool = False,
) -> Plan:
    """Shapes and memory from the headers, times from two measurements of under a second each."""
    from maskopt.model.write import disk_needed

    pruned = {}
    for layer in layers:
        groups = layer.n // pattern.group_size(layer.n)
        pruned[layer.name] = layer.rows * groups * pattern.pruned_per_group(layer.n)
    tokens = samples * length
    weights = sum(p.numel() for block in source.blocks.modules for p in block.parameters())
    distinct = {(layer.name.rsplit(".", 1)[0], layer.n) for layer in layers}
    operations = tokens * (2 * weights * (1 if one_pass else 2) + sum(n * n for _, n in distinct))
    return Plan(
        layers,
        pruned,
        estimate_memory(source, layers, samples, length, threads, activation_memory),
        operations / _speed(),
        _solve_seconds(layers, pattern, solver, solver_options),
        disk_needed(source.checkpoint) if isinstance(source, FolderSource) else 0,
    )


def _speed() -> float:
    """Floating-point operations a second in a float32 matrix product here."""
    a = torch.rand(1024, 1024)
    a @ a
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < 0.3:
        a @ a
        count += 1
    return count * 2 * 1024**3 / (time.perf_counter() - began)


def _solve_seconds(
    layers: Sequence[Layer], pattern: Pattern, solver: str, options: dict[str, Any]
) -> float | None:
    """Time of a small random layer, scaled by rows·n²; None where it cannot be solved."""
    generator = torch.Generator().manual_seed(0)
    n = PROBE_N
    try:
        pattern.check(n)
        x = torch.randn(2 * n, n, generator=generator)
        gram = x.T @ x / (2 * n)
        start = default_start(solver)
        for rows in PROBE_ROWS:
            weight = torch.randn(rows, n, generator=generator)
            problem = LayerProblem(weight, gram, pattern, assume_psd=True)
            if rows == PROBE_ROWS[0]:
                solve(problem, solver, start, **options)  # compiles what has to be compiled
            seconds = solve(problem, solver, start, **options).seconds
            if seconds > 0.2:
                break
    except MaskoptError:
        return None
    work = sum(layer.rows * layer.n**2 for layer in layers)
    return seconds * work / (rows * n**2)


def _hidden_size(model: Any) -> int:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "hidden_size", None)
    if not isinstance(size, int):
        raise ModelError(f"{type(model).__name__}: the configuration names no hidden_size")
    return size


def parse_bytes(text: str) -> int:
    """`8GiB`, `500MB`, `1.5g`, or a number of bytes.

    Raises:
        ModelError: anything else.
    """
    units = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
    units |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
    cleaned = text.strip().lower().removesuffix("b")
    number = cleaned.rstrip("kmgti")
    try:
        value = float(number) * units[cleaned[len(number) :].strip()]
    except (ValueError, KeyError):
        value = math.nan
    if not 0 <= value < 2**62:
        raise ModelError(f"{text!r} is no amount of memory; write 8GiB or 500MB")
    return int(value)

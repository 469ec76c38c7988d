"""What a prune will take, before anything heavy happens: layers, memory, an estimate of time."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from maskopt.errors import MaskoptError, ModelError
from maskopt.limits import Limits
from maskopt.model.blocks import Layer, within
from maskopt.model.checkpoint import Checkpoint
from maskopt.model.options import PruneOptions
from maskopt.model.source import FolderSource, Source, stored_dtype
from maskopt.problem import LayerProblem
from maskopt.solver import make_start, solve

GIB = 2**30
#: the interpreter with torch, transformers and a compiled solver
BASE = 2**30
#: inputs of the small problem that the solver's speed is measured on, and its rows: more of them
#: as long as they take next to no time
PROBE_N, PROBE_ROWS = 512, (2, 32, 512)
#: of a shard, to learn how fast weights are read and hashed
PROBE_BYTES = 64 * 2**20
#: what forward passes and Gram matrices reach of the speed of a large matrix product, and seconds
#: until the libraries are there: from runs of Gemma 3 270M on a CPU (docs/pruning.md)
SHARE, START = 0.6, 5.0


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
    file_seconds: float
    disk: int

    @property
    def seconds(self) -> float | None:
        """All of it."""
        if self.solve_seconds is None:
            return None
        return START + self.forward_seconds + self.solve_seconds + self.file_seconds


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
        distinct = _inputs(mine)
        grams = max(grams, sum(8 * n * n for n in distinct))
        inputs = max(inputs, threads * length * width * (sum(distinct) + 6 * hidden))
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
    samples: int,
    length: int,
    threads: int,
    max_memory: int,
    activation_memory: int,
) -> int:
    """The bytes that hidden states may take in memory so that the peak stays below the limit.

    Raises:
        ModelError: it does not fit even with the hidden states in a file; with the numbers.
    """
    for limit in (activation_memory, 0):
        memory = estimate_memory(source, layers, samples, length, threads, limit)
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
    options: PruneOptions,
    *,
    samples: int,
    length: int,
    threads: int,
    activation_memory: int,
) -> Plan:
    """Shapes and memory from the headers; times from three measurements of about a second each: a
    matrix product, the solver on a small layer, and reading a piece of the weights."""
    from maskopt.model.write import disk_needed

    pattern = options.pattern
    pruned = {}
    for layer in layers:
        groups = layer.n // pattern.group_size(layer.n)
        pruned[layer.name] = layer.rows * groups * pattern.pruned_per_group(layer.n)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return Plan(
            layers,
            pruned,
            estimate_memory(source, layers, samples, length, threads, activation_memory),
            _forward_operations(source, layers, options, samples, length) / _speed(source),
            _solve_seconds(source, layers, options),
            _file_seconds(source.checkpoint) if isinstance(source, FolderSource) else 0.0,
            disk_needed(source.checkpoint) if isinstance(source, FolderSource) else 0,
        )
    finally:
        torch.set_num_threads(before)


def _forward_operations(
    source: Source, layers: Sequence[Layer], options: PruneOptions, samples: int, length: int
) -> float:
    """Of all forward passes and Gram matrices: two a weight and token, attention's two products,
    n² for a Gram matrix."""
    wanted = {layer.name for layer in layers}
    tokens, width = samples * length, _hidden_size(source.model)
    chosen = [within(source.blocks, index, wanted) for index in range(len(source.blocks))]
    last = max(index for index, mine in enumerate(chosen) if mine)
    total = 0.0
    for block, mine in zip(list(source.blocks.modules)[: last + 1], chosen, strict=False):
        distinct = _inputs(mine)
        passes = 1
        weights = sum(p.numel() for p in block.parameters())
        if mine and not options.one_pass:
            passes += len(distinct) if options.true_sequential else 1
            if mine[-1].expert is None:
                total -= (
                    2 * mine[-1].rows * mine[-1].n
                )  # its product is not needed once its inputs are seen
        total += passes * (2 * weights + 4 * length * width) + sum(n * n for n in distinct)
    return total * tokens


def _inputs(layers: Sequence[Layer]) -> list[int]:
    """Widths of the inputs that layers do not share, as far as shapes tell: alike layers of one module
    (queries, keys, values) share theirs, its last one (the output projection) has its own."""
    last = {layer.name.rsplit(".", 1)[0]: layer.name for layer in layers}
    distinct = set()
    for layer in layers:
        module = layer.name.rsplit(".", 1)[0]
        distinct.add((module, layer.n, last[module] == layer.name))
    return [n for _, n, _ in distinct]


def _speed(source: Source) -> float:
    """Operations a second that forward passes and Gram matrices reach here: a share of a large
    matrix product's."""
    dtype = next(source.model.parameters()).dtype
    a = torch.rand(1024, 1024, device=source.device).to(dtype)

    def timed(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            product = a @ a
        float(product[0, 0])  # waits for a device that runs on its own
        return time.perf_counter() - began

    timed(2)
    count = 2
    while (seconds := timed(count)) < 0.3:
        count *= 2
    return SHARE * count * 2 * 1024**3 / seconds


def _solve_seconds(source: Source, layers: Sequence[Layer], options: PruneOptions) -> float | None:
    """Time of a small random layer, scaled by rows·n²; None where it cannot be solved."""
    generator = torch.Generator().manual_seed(0)
    n, device = PROBE_N, source.device
    start, own = options.start, options.solver_options

    def timed(rows: int) -> float:
        weight = torch.randn(rows, n, generator=generator).to(device)
        problem = LayerProblem(weight, gram, options.pattern, assume_psd=True)
        seconds, mask = 0.0, None
        if start is not None and start != options.solver:
            first = make_start(problem, start, Limits(seed=options.seed))
            seconds, mask = first.seconds, first.mask
        return seconds + solve(problem, options.solver, start=mask, **own).seconds

    try:
        options.pattern.check(n)
        x = torch.randn(2 * n, n, generator=generator)
        gram = (x.T @ x / (2 * n)).to(device)
        timed(PROBE_ROWS[0])  # compiles what has to be compiled
        for rows in PROBE_ROWS:
            seconds = timed(rows)
            if seconds > 0.2:
                break
    except MaskoptError:
        return None
    work = sum(layer.rows * layer.n**2 for layer in layers)
    return seconds * work / (rows * n**2)


def _file_seconds(checkpoint: Checkpoint) -> float:
    """Time for the shards: read twice, written once, hashed on both ways, at the speed of reading
    and hashing the start of one."""
    shard = max(checkpoint.shards.values(), key=lambda shard: shard.path.stat().st_size)
    began = time.perf_counter()
    with shard.path.open("rb") as file:
        data = file.read(PROBE_BYTES)
    hashlib.sha256(data)
    seconds = time.perf_counter() - began
    total = sum(shard.path.stat().st_size for shard in checkpoint.shards.values())
    return 3 * total * seconds / max(len(data), 1)


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

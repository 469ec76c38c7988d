"""The memory of a walk through a model's blocks, estimated from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Layer, text_config, vocabulary_size
from maskopt.models.architecture.source import Source
from maskopt.models.blockwise.gradients import LOGITS
from maskopt.models.checkpoints.report import grouped
from maskopt.models.options.walk import WalkOptions

GIB = 2**30
#: the interpreter with torch, transformers and a compiled solver
BASE = 2**30
#: linear systems of the rows that a thread solves together
SYSTEMS = 2**27

#: positions whose logits of two models are computed at a time: so many that reading a head of 262,144 tokens
#: takes little time compared with its products
POSITIONS = 128
#: numbers per position and token: the logits of two models, values kept for a cap, and the derivative
LOGITS_OF_TWO = 4


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of each part at the peak."""

    base: int
    outside: int
    block: int
    grams: int = 0
    inputs: int = 0
    solving: int = 0
    gradients: int = 0
    activations: int = 0

    @property
    def peak(self) -> int:
        parts = max(self.grams + self.inputs, self.grams + self.solving, self.gradients)
        return self.base + self.outside + self.block + self.activations + parts

    @property
    def gib(self) -> float:
        """The peak in GiB."""
        return self.peak / GIB

    def __str__(self) -> str:
        """GiB by part."""
        return ", ".join(f"{name} {value / GIB:.2f}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class Load:
    """What the memory of a walk depends on.

    Attributes:
        samples, length: windows, and tokens in each.
        activation_memory: bytes of hidden states above which they go to a file.
        variants: windows of all variants of the model that are measured before anything is pruned.
        together: all layers are trained together, towards the dense model's predictions.
        recompute: for gradients only the inputs of each block are kept.
    """

    source: Source
    layers: Sequence[Layer]
    options: WalkOptions
    samples: int
    length: int
    threads: int
    activation_memory: int
    variants: int = 0
    together: bool = False
    recompute: bool = False


def estimate_memory(load: Load) -> Memory:
    """The parts of the peak."""
    if load.together:
        return _together(load)
    source, options, threads = load.source, load.options, load.threads
    copies, held = options.copies, options.holdout > 0
    # windows whose hidden states of every block are kept for gradients of the loss
    gradients = load.options.gradient_windows(load.samples)
    width = next(source.model.parameters()).dtype.itemsize
    hidden = hidden_size(source.model)
    state = load.length * hidden * width
    activations = max(copies * load.samples, load.variants) * state
    grams = inputs = solving = 0
    for mine in grouped(load.layers, "block").values():
        distinct = distinct_inputs(mine)
        # in float64
        grams = max(grams, (16 if held else 8) * sum(n * n for n in distinct))
        tokens = (1 if load.options.reconstruction is None else 3) * threads * load.length
        inputs = max(inputs, tokens * width * (sum(distinct) + 6 * hidden))
        # G in float32 (and that of the held-out windows) and two more matrices of its size (in the start's
        # relaxation float64 up to n = 4096), the weights in float32 a few times
        square = 16 if held else 12
        # damped G, its inverse and its eigenvectors, mostly float64; a thread's systems: one for a row
        # without pruned weights, or several smaller ones
        solved = load.options.least_squares is not None
        systems, fixed = (40 + 24 * threads, SYSTEMS * threads) if solved else (0, 0)
        for y in mine:
            matrices = (square + systems) * y.n**2 + 8 * min(y.n, 4096) ** 2 + fixed
            solving = max(solving, matrices + 24 * y.rows * y.n)
            if options.ordered is not None:  # of `group_inputs`, with G and weights in float64
                solving = max(solving, 16 * y.n**2 + 32 * y.rows * y.n)
        if load.options.reconstruction is not None:
            # in float32: weights, the best of them, two moments, gradients, those of every thread
            weights = 4 * (5 + threads) * sum(y.rows * y.n for y in mine)
            solving = max(solving, weights + 2 * inputs)
    # hidden states of all blocks but the first, and the memory of autograd for a head or a block
    blocks, states = len(source.blocks), gradients * state
    kept = blocks * states if (blocks + 1) * states <= load.activation_memory else 0
    logits = 4 * LOGITS * threads * load.length * vocabulary_size(source.model)
    return Memory(
        BASE,
        _outside(source) * width,
        source.block_memory(),
        grams,
        inputs,
        solving,
        kept + max(logits, 2 * inputs) if gradients else 0,
        copies * state if activations > load.activation_memory else activations,
    )


def _together(load: Load) -> Memory:
    """The parts of the peak of a model that is trained as a whole."""
    outside = _outside(load.source)
    weights = sum(p.numel() for p in load.source.model.parameters()) - outside
    # in float32: weights, the best, the judged ones, two moments, gradients, those of every thread
    trained = (4 * (6 + load.threads) + 1) * sum(y.rows * y.n for y in load.layers)
    logits = 4 * LOGITS_OF_TWO * POSITIONS * vocabulary_size(load.source.model)
    # inputs of the first block, and outputs of the dense model's last one
    states = load.samples * 4 * load.length * hidden_size(load.source.model)
    return Memory(
        BASE,
        4 * outside,
        4 * weights,
        solving=trained + load.threads * (autograd_memory(load) + logits),
        activations=0 if states > load.activation_memory else 2 * states,
    )


def _outside(source: Source) -> int:
    """Number of weights outside the blocks, shared ones once."""
    named = dict(source.model.named_parameters())
    return sum(p.numel() for name, p in source.blocks.outside() if name in named)


def autograd_memory(load: Load) -> int:
    """Bytes that autograd keeps of a window for a model that is trained as a whole."""
    # inputs and outputs of each product, and as much for norms and attention
    blocks = [
        8 * load.length * (sum(y.rows for y in mine) + sum(distinct_inputs(mine)))
        for mine in grouped(load.layers, "block").values()
    ]
    if not load.recompute:
        return sum(blocks)
    return len(blocks) * 4 * load.length * hidden_size(load.source.model) + max(blocks)


def check_memory(load: Load, max_memory: int) -> int:
    """Bytes of hidden states that may be in memory under the limit; ModelError where none may."""
    for limit in (load.activation_memory, 0):
        memory = estimate_memory(replace(load, activation_memory=limit))
        if memory.peak <= max_memory:
            return limit
    remedy = "exclude the layers with most inputs"
    if load.together:
        remedy = "train with `maskopt distill --recompute`"
    raise ModelError(
        f"an estimated {memory.gib:.2f} GiB are needed, `max_memory` allows "
        f"{max_memory / GIB:.2f} ({memory}); use fewer threads, shorter windows, or {remedy}"
    )


def distinct_inputs(layers: Sequence[Layer]) -> list[int]:
    """Widths of the distinct inputs of a block's layers, by their shapes and parents."""
    last = {layer.parent: layer for layer in layers}
    return [n for _, n, _ in {(y.parent, y.n, last[y.parent] is y) for y in layers}]


def hidden_size(model: Any) -> int:
    """By the configuration."""
    size = getattr(text_config(model), "hidden_size", None)
    if not isinstance(size, int):
        raise ModelError(f"{type(model).__name__}: the configuration names no hidden_size")
    return size

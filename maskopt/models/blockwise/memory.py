"""What a walk through a model's blocks takes of memory, estimated from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Layer, vocabulary_size
from maskopt.models.architecture.source import Source
from maskopt.models.blockwise.gradients import LOGITS
from maskopt.models.blockwise.parts import parts_of
from maskopt.models.options.training import BLOCK, Reconstruction

GIB = 2**30
#: the interpreter with torch, transformers and a compiled solver
BASE = 2**30
#: the systems of refitted rows that a thread works on together
SYSTEMS = 2**27

#: logits of two models at a time: so many positions that reading a head of 262,144 tokens takes little
#: time compared with its products
POSITIONS = 128
#: numbers a position and token: the logits of two models, what a cap of theirs keeps, and the derivative
LOGITS_OF_TWO = 4


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of each part at the peak."""

    base: int
    outside: int
    block: int
    grams: int
    inputs: int
    solving: int
    gradients: int
    activations: int

    @property
    def peak(self) -> int:
        return (
            self.base
            + self.outside
            + self.block
            + self.activations
            + max(self.grams + self.inputs, self.grams + self.solving, self.gradients)
        )

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
        held: windows are kept aside, whose Gram matrices are summed apart.
        beside: the dense model's hidden states go along, and moments of both.
        refit: kept weights are refitted: systems of their own for every row.
        gradients: windows whose hidden states of every block are kept, for the loss's gradients by them.
        variants: windows of variants of the model, which go through it before anything is pruned.
        trained: hidden states of a window that are kept while a block is trained towards the dense model's.
        together: all layers are, in the model as a whole, towards what the dense model predicts.
        recompute: of what gradients need only what enters each block is kept.
    """

    source: Source
    layers: Sequence[Layer]
    samples: int
    length: int
    threads: int
    activation_memory: int
    held: bool = False
    beside: bool = False
    refit: bool = False
    gradients: int = 0
    variants: int = 0
    trained: int = 0
    together: bool = False
    recompute: bool = False


def estimate_memory(load: Load) -> Memory:
    """The parts of the peak."""
    if load.together:
        return _together(load)
    source, length = load.source, load.length
    width = next(source.model.parameters()).dtype.itemsize
    named = dict(source.model.named_parameters())
    outside = sum(p.numel() for name, p in source.blocks.outside() if name in named) * width
    hidden = hidden_size(source.model)
    state = length * hidden * width
    copies = state_copies(beside=load.beside, trained=load.trained)
    activations = max(copies * load.samples, load.variants) * state
    grams = inputs = solving = 0
    for mine in by_block(load.layers).values():
        distinct = distinct_inputs(mine)
        # in float64: G, and of inputs beside those of the dense model two more moments
        moments = (2 if load.held else 1) * (3 if load.beside else 1)
        grams = max(grams, sum(8 * moments * n * n for n in distinct))
        inputs = max(inputs, copies * load.threads * length * width * (sum(distinct) + 6 * hidden))
        # the Gram in float32 (and that of the windows kept aside) and two more matrices of its size (of
        # the start's relaxation: in float64 up to n = 4096), the weights in float32 a few times
        square = (16 if load.held else 12) + (16 if load.beside else 0)
        squares = [square * y.n * y.n + 8 * min(y.n, 4096) ** 2 for y in mine]
        rows = [24 * y.rows * y.n for y in mine]
        # damped G, its inverse and its eigenvectors, mostly float64; a thread's systems: of one row, were all
        # kept, or of several smaller ones
        systems = [
            (40 + 24 * load.threads) * y.n**2 + SYSTEMS * load.threads if load.refit else 0
            for y in mine
        ]
        solving = max(solving, max(map(sum, zip(squares, rows, systems, strict=True))))
        if load.trained:
            # in float32: weights, the best of them, two moments, gradients, those of every thread
            weights = 4 * (5 + load.threads) * sum(y.rows * y.n for y in mine)
            solving = max(solving, weights + 2 * inputs)
    return Memory(
        BASE,
        outside,
        source.block_memory(),
        grams,
        inputs,
        solving,
        _of_gradients(load, load.gradients * state, inputs) if load.gradients else 0,
        copies * state if activations > load.activation_memory else activations,
    )


def _together(load: Load) -> Memory:
    """Of a model trained as a whole: the parts of the peak."""
    named = dict(load.source.model.named_parameters())
    outside = sum(p.numel() for name, p in load.source.blocks.outside() if name in named)
    weights = sum(p.numel() for p in named.values()) - outside
    # in float32: weights, the best, those that are judged, two moments, gradients, those of every thread
    trained = (4 * (6 + load.threads) + 1) * sum(y.rows * y.n for y in load.layers)
    logits = 4 * LOGITS_OF_TWO * POSITIONS * vocabulary_size(load.source.model)
    # what enters the first block, and what the dense model's last one gave
    states = load.samples * 4 * load.length * hidden_size(load.source.model)
    return Memory(
        BASE,
        4 * outside,
        4 * weights,
        grams=0,
        inputs=0,
        solving=trained + load.threads * (autograd_memory(load) + logits),
        gradients=0,
        activations=0 if states > load.activation_memory else 2 * states,
    )


def autograd_memory(load: Load) -> int:
    """Bytes that are kept of a window for the gradients of a model that is trained as a whole."""
    # what goes into each product and what comes out, and as much for norms and attention
    blocks = [
        8 * load.length * (sum(y.rows for y in mine) + sum(distinct_inputs(mine)))
        for mine in by_block(load.layers).values()
    ]
    if not load.recompute:
        return sum(blocks)
    return len(blocks) * 4 * load.length * hidden_size(load.source.model) + max(blocks)


def state_copies(*, beside: bool, trained: int) -> int:
    """Hidden states of every token that are kept at a time: those of the pruned model; those of the dense one
    beside them; and those that a block is trained by."""
    return 1 + beside + trained


def trained_states(source: Source, layers: Sequence[Layer], how: Reconstruction | None) -> int:
    """Hidden states of a window that are kept while a block is trained: what each part is to give, and what
    one part at a time is given, or with dense inputs every one. What a whole block is given is what waits
    before it anyhow. A part that is a layer of its own counts by its shape, in hidden states."""
    if how is None:
        return 0
    if how.granularity == BLOCK:
        return 1 + (how.inputs == "dense")
    hidden, most = hidden_size(source.model), 0
    for index, mine in by_block(layers).items():
        prefix = source.blocks.prefix(index)
        given, gives = [], []
        for part in parts_of(source.blocks.modules[index], prefix, mine):
            first = part.layers[0]
            alone = first.parameter.rpartition(".")[0] == prefix + part.name
            given.append(-(-first.n // hidden) if alone else 1)
            gives.append(-(-first.rows // hidden) if alone else 1)
        most = max(
            most, sum(gives) + (sum(given) if how.inputs == "dense" else max(given, default=0))
        )
    return most


def _of_gradients(load: Load, states: int, inputs: int) -> int:
    """Hidden states of all blocks but the first, and what autograd keeps of a head or of a block."""
    blocks = len(load.source.blocks)
    kept = blocks * states if (blocks + 1) * states <= load.activation_memory else 0
    logits = 4 * LOGITS * load.threads * load.length * vocabulary_size(load.source.model)
    return kept + max(logits, 2 * inputs)


def check_memory(load: Load, max_memory: int) -> int:
    """The bytes that hidden states may take in memory so that the peak stays below the limit.

    Raises:
        ModelError: it does not fit even with the hidden states in a file; with the numbers.
    """
    for limit in (load.activation_memory, 0):
        memory = estimate_memory(replace(load, activation_memory=limit))
        if memory.peak <= max_memory:
            return limit
    raise ModelError(
        f"an estimated {memory.gib:.2f} GiB are needed, `max_memory` allows "
        f"{max_memory / GIB:.2f} ({memory}); use fewer threads, shorter windows, or "
        f"{'`recompute`' if load.together else 'exclude the layers with most inputs'}"
    )


def by_block(layers: Sequence[Layer]) -> dict[int, list[Layer]]:
    """The layers of each block that has any."""
    found: dict[int, list[Layer]] = {}
    for layer in layers:
        found.setdefault(layer.block, []).append(layer)
    return found


def distinct_inputs(layers: Sequence[Layer]) -> list[int]:
    """Widths of the inputs that layers of a block do not share, as far as shapes tell: alike layers of
    one module (queries, keys, values) share theirs, its last one (the output projection) has its own."""
    last = {layer.parent: layer for layer in layers}
    return [n for _, n, _ in {(y.parent, y.n, last[y.parent] is y) for y in layers}]


def hidden_size(model: Any) -> int:
    """As the configuration has it."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "hidden_size", None)
    if not isinstance(size, int):
        raise ModelError(f"{type(model).__name__}: the configuration names no hidden_size")
    return size

"""Gram matrices of the layers of one block, from the samples that pass through it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskopt.errors import ModelError
from maskopt.gram import Gram, Moved
from maskopt.model.activations import Activations
from maskopt.model.all_experts import experts_see_all
from maskopt.model.blocks import Layer
from maskopt.model.forward import Call
from maskopt.model.threads import Threads
from maskopt.model.watch import Seen, Watch, WatchedWeights


@dataclass(frozen=True)
class BadSample:
    """A calibration sample that gave NaN or infinite values, and the first layer that saw them."""

    sample: int
    layer: str


class Samples:
    """The windows on their way through the model.

    Attributes:
        count: of all of them.
        active: indices still in use, ascending.
        bad: those that were left out.
        held: those that are kept aside: their inputs are summed apart, and nothing is fitted to them.
        dense: hidden states as the dense model has them, beside `states`, or None.

    Args:
        source: where the windows came from, in words.
        skip_bad: may bad ones be left out? None: they may not, whatever the options.
    """

    def __init__(
        self,
        states: Activations,
        count: int,
        source: str,
        *,
        skip_bad: bool | None = None,
        held: Set[int] = frozenset(),
        dense: Activations | None = None,
    ) -> None:
        self.states, self.dense, self.source = states, dense, source
        self.count = count
        self.active = list(range(count))
        self.bad: list[BadSample] = []
        self.skip_bad, self.held = skip_bad, held

    def leave_out(self, sample: int, layer: str) -> None:
        """Raise ModelError for a bad sample, or go on without it."""
        if not self.skip_bad:
            skip = "" if self.skip_bad is None else ", or leave it out with `skip_bad_samples`"
            raise ModelError(
                f"layer {layer!r}, {self.source}: sample {sample} has NaN or infinite activations; "
                f"try `dtype` float32{skip}"
            )
        self.bad.append(BadSample(sample, layer))
        self.drop({sample})
        if not set(self.active) - self.held:
            raise ModelError(
                f"layer {layer!r}: no calibration sample without NaN or infinity is left"
            )

    def drop(self, samples: Set[int]) -> None:
        self.active = [sample for sample in self.active if sample not in samples]


class Grams:
    """Gram matrices by layer name; layers that are given the same inputs share one.

    `held` are those of the samples that are kept aside, None where there are none.
    """

    def __init__(self, device: torch.device, held: Grams | None = None) -> None:
        self.device, self.held = device, held
        self.order: list[str] = []
        self._leader: dict[str, str] = {}
        self._grams: dict[str, Gram] = {}
        self._moved: dict[str, Moved] = {}

    @classmethod
    def restored(
        cls,
        device: torch.device,
        leaders: Mapping[str, str],
        grams: Mapping[str, Gram],
        held: Grams | None = None,
    ) -> Grams:
        """Those of an earlier walk.

        Args:
            leaders: by layer, in the order in which they were seen, the layer whose Gram matrix is its own.
            grams: by those layers.
        """
        found = cls(device, held)
        found.order, found._leader, found._grams = list(leaders), dict(leaders), dict(grams)
        return found

    @property
    def leaders(self) -> Mapping[str, str]:
        """By layer, in the order in which they were seen, the one whose Gram matrix is its own."""
        return {layer: self._leader[layer] for layer in self.order}

    def of(self, layer: str) -> Gram | None:
        """None where the layer never saw a token."""
        leader = self._leader.get(layer)
        return None if leader is None else self._grams[leader]

    def moved(self, layer: str) -> Moved | None:
        """How the layer's inputs differ from those in the dense model, where that walks beside."""
        return self._moved.get(self.leader(layer))

    def leader(self, layer: str) -> str:
        return self._leader.get(layer, layer)

    def neighbours(self, layers: Sequence[Layer]) -> list[Layer]:
        """The layers, those that share their inputs next to each other."""
        return sorted(layers, key=lambda layer: self.leader(layer.name))

    def tasks(
        self,
        watch: Watch,
        sizes: dict[str, int],
        beside: Watch | None = None,
        weights: Tensor | None = None,
    ) -> list[Callable[[], None]]:
        """Pieces of work that add one sample's inputs, with those that the dense model has `beside`.

        `weights` [tokens] say how often each counts; None: once.
        """
        by_inputs: dict[Any, str] = {}
        pieces: list[Callable[[], None]] = []
        sharing = watch.sharing()
        known = set(self._leader)
        for layer, key in sharing.items():
            first = by_inputs.setdefault(key, layer)
            if layer not in known:
                # a Gram that already holds earlier samples cannot be shared by a newcomer
                leads = self._leader.get(first) == first and first not in known
                self._leader[layer] = first if leads else layer
                if self._leader[layer] == layer:
                    self._grams[layer] = Gram(sizes[layer], self.device)
                    if beside is not None:
                        self._moved[layer] = Moved(sizes[layer], self.device)
                self.order.append(layer)
            leader = self._leader[layer]
            if leader == layer:
                joined = _joined(watch.inputs[layer])
                pieces.extend(self._grams[layer].tasks(joined, weights))
                if beside is not None:
                    dense = _joined(beside.inputs[layer])
                    pieces.extend(self._moved[layer].tasks(joined, dense, weights))
            elif sharing.get(leader) != key:
                raise ModelError(
                    f"layers {leader!r} and {layer!r} shared their inputs in one sample "
                    "and not in another"
                )
        return pieces


def _joined(inputs: Sequence[Tensor]) -> Tensor:
    return inputs[0] if len(inputs) == 1 else torch.cat(list(inputs))


@dataclass(frozen=True)
class OpenBlock:
    """A block whose weights are in memory, and what it takes to run samples through it.

    Attributes:
        module: the block.
        name: of the block in the model.
        calls: per sample, what the model calls it with.
    """

    model: nn.Module
    module: nn.Module
    name: str
    device: torch.device
    calls: Sequence[Call]
    samples: Samples
    threads: Threads

    def run(self, sample: int, states: Activations) -> Tensor:
        """The block's output for one sample, of which `states` holds the hidden state."""
        return self.calls[sample](self.module, states[sample].to(self.device))


class _Observed(NamedTuple):
    """One sample's pass: what layers were given, what came out where that is wanted, who saw NaN."""

    watch: Watch
    output: Tensor | None
    bad: str | None


@dataclass(frozen=True)
class _Passes:
    """Passes of single samples through a block, each under a watch of its own: `watch` in `local`."""

    block: OpenBlock
    weights: WatchedWeights
    local: threading.local

    def observe(
        self, sample: int, states: Activations, advance: bool, until: str | None = None
    ) -> _Observed:
        """One pass; it ends where the layer `until` has its inputs."""
        output = None
        for copy in (False, True):
            watch = self.local.watch = Watch(self.weights, copy=copy, until=until)
            with suppress(Seen), watch:
                output = self.block.run(sample, states)
            if not watch.overwritten:
                break
        output = output if advance else None
        return _Observed(watch, output, _first_bad(watch, output, self.block.name))


def collect(
    block: OpenBlock,
    layers: Sequence[Layer],
    *,
    advance: bool = False,
    moved: bool = False,
    all_experts: bool = False,
    weights: Callable[[int], Tensor] | None = None,
    tick: Callable[[int], None] = lambda _: None,
) -> Grams:
    """Send all samples through a block and sum the Gram matrix of every layer's inputs.

    Args:
        advance: store the block's outputs as the samples' new states; else passes end where the last
            layer has its inputs.
        moved: how inputs differ from those in the dense model is summed as well, and the block as it is now
            takes the dense hidden states on.
        all_experts: experts are observed on all tokens, not only on those routed to them; what
            the block computes stays as it is.
        weights: of a sample's tokens [length], while its state is what enters the block; None: all count
            once. See `maskopt.model.weighting`.

    Raises:
        ModelError: a sample with NaN or infinite activations (unless those may be left out).
    """
    sizes = {layer.name: layer.n for layer in layers}
    samples = block.samples
    held = Grams(block.device) if samples.held else None
    grams = Grams(block.device, held)
    local = threading.local()
    passes = _Passes(block, WatchedWeights(block.model, layers), local)
    until: str | None = None

    def both(sample: int) -> tuple[_Observed, _Observed | None]:
        dense = None
        if moved and samples.dense is not None:
            dense = passes.observe(sample, samples.dense, True)
        return passes.observe(sample, samples.states, advance, until), dense

    shown = experts_see_all(block.module, f"{block.name}.", layers, local)
    with shown if all_experts else nullcontext():
        for wave in block.threads.waves(list(samples.active)):
            observed = block.threads.run([lambda s=s: both(s) for s in wave])  # type: ignore[misc]
            for sample, (seen, dense) in zip(wave, observed, strict=True):
                bad = seen.bad or (None if dense is None else dense.bad)
                if bad is not None:
                    samples.leave_out(sample, bad)
                    continue
                mine = held if held is not None and sample in samples.held else grams
                counts = None if weights is None else weights(sample)
                block.threads.run(mine.tasks(seen.watch, sizes, dense and dense.watch, counts))
                if samples.dense is not None and dense is not None:
                    assert dense.output is not None
                    samples.dense[sample] = dense.output
                if seen.output is not None:
                    samples.states[sample] = seen.output
                elif until is None:
                    until = _last_input(layers, seen.watch)
            tick(len(wave))
    return grams


def pass_on(
    block: OpenBlock, states: Activations, tick: Callable[[int], None] = lambda _: None
) -> None:
    """Replace every sample's state in `states` by the block's output."""
    samples = block.samples
    for wave in block.threads.waves(list(samples.active)):
        outputs = block.threads.run([lambda s=s: block.run(s, states) for s in wave])  # type: ignore[misc]
        for sample, output in zip(wave, outputs, strict=True):
            if not bool(torch.isfinite(output).all()):
                samples.leave_out(sample, block.name)
            else:
                states[sample] = output
        tick(len(wave))


def _last_input(layers: Sequence[Layer], watch: Watch) -> str | None:
    """The layer whose input is the last that a pass records: what comes after it need not be computed.

    None where other samples might call the layers otherwise: experts, and layers in a list.
    """
    once = all(len(watch.inputs.get(layer.name, ())) == 1 for layer in layers)
    fixed = all(layer.expert is None and "*" not in layer.kind for layer in layers)
    return next(reversed(watch.inputs), None) if once and fixed else None


def _first_bad(watch: Watch, output: Tensor | None, block: str) -> str | None:
    for layer, tensors in watch.inputs.items():
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            return layer
    good = output is None or bool(torch.isfinite(output).all())
    return None if good else block

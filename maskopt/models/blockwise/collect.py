"""Gram matrices of the layers of one block, from the samples that pass through it. Of several processes each
runs samples of its own, sends the layers' inputs to the others, and sums tiles of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from maskopt.core.gram import Gram
from maskopt.core.inputs import all_finite
from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Layer
from maskopt.models.blockwise.activations import Activations
from maskopt.models.blockwise.distributed import ALONE, Ranks
from maskopt.models.blockwise.forward import Call, Threads, forwards
from maskopt.models.blockwise.watch import Seen, Watch, WatchedWeights, experts_see_all


@dataclass(frozen=True)
class BadSample:
    """A calibration sample that gave NaN or infinite values, and the first layer that saw them."""

    sample: int
    layer: str


@dataclass(eq=False)
class Samples:
    """The windows on their way through the model.

    Attributes:
        states, dense: hidden states in the pruned and in the dense model (None: it does not run).
        active: indices still in use, ascending.
        source: of the text, in words.
        skip_bad: whether bad ones may be left out; None: not, and no option allows it.
        held: held-out windows, whose inputs are summed separately.
    """

    states: Activations
    dense: Activations | None
    active: list[int]
    source: str
    skip_bad: bool | None
    held: Set[int]
    bad: list[BadSample] = field(default_factory=list)

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


@dataclass(frozen=True)
class Given:
    """The inputs of layers in one pass of one sample.

    Attributes:
        inputs: [tokens, n] each.
        of: by layer, the place of its input; layers with the very same tensors have the same place.
        counts: at most one tensor [tokens], the weights of the tokens; none: 1.
        bad: the first layer with NaN or infinite values; its sample has no inputs.
    """

    inputs: list[Tensor]
    of: dict[str, int]
    counts: list[Tensor]
    bad: str | None = None

    @classmethod
    def seen(cls, watch: Watch, counts: list[Tensor]) -> Given:
        """By a watch of the pass."""
        places: dict[Any, int] = {}
        inputs, of = [], {}
        for layer, parts in watch.inputs.items():
            key = tuple((x.data_ptr(), tuple(x.shape), x.stride()) for x in parts)
            if key not in places:
                places[key] = len(places)
                inputs.append(parts[0] if len(parts) == 1 else torch.cat(parts))
            of[layer] = places[key]
        return cls(inputs, of, counts)

    def empty(self, device: torch.device | str) -> Given:
        """The same shapes without data."""

        def like(tensors: list[Tensor]) -> list[Tensor]:
            return [torch.empty(x.shape, dtype=x.dtype, device=device) for x in tensors]

        return replace(self, inputs=like(self.inputs), counts=like(self.counts))


class Grams:
    """Gram matrices by layer name; layers with the same inputs share one.

    Attributes:
        held: those of the held-out samples, None where there are none.
        leaders: by layer, in the order of the passes, the layer that has its Gram matrix.
    """

    def __init__(
        self, device: torch.device, held: Grams | None = None, ranks: Ranks = ALONE
    ) -> None:
        self.device, self.held, self.ranks = device, held, ranks
        self.leaders: dict[str, str] = {}
        self._grams: dict[str, Gram] = {}
        self._load = [0] * ranks.size
        self._tiles: dict[str, dict[int, int]] = {}

    @classmethod
    def restored(
        cls,
        device: torch.device,
        leaders: Mapping[str, str],
        grams: Mapping[str, Gram],
        held: Grams | None = None,
    ) -> Grams:
        """From `leaders` and the Gram matrices of an earlier walk, by those leaders."""
        found = cls(device, held)
        found.leaders, found._grams = dict(leaders), dict(grams)
        return found

    def of(self, layer: str) -> Gram | None:
        """None where the layer never saw a token."""
        return self._grams.get(self.leader(layer))

    def leader(self, layer: str) -> str:
        return self.leaders.get(layer, layer)

    def first_round(self, layers: Sequence[Layer]) -> tuple[list[Layer], list[Layer]]:
        """The layers that are called first with the same inputs, and the rest."""
        by_name = {layer.name: layer for layer in layers}
        called = [by_name[name] for name in self.leaders if name in by_name]
        if not called:
            return list(layers), []
        leader = self.leader(called[0].name)
        kinds = {layer.kind for layer in called if self.leader(layer.name) == leader}
        first = [layer for layer in layers if layer.kind in kinds]
        return first, [layer for layer in layers if layer.kind not in kinds]

    def tasks(self, given: Given, sizes: dict[str, int]) -> list[Callable[[], None]]:
        """Pieces of work that add one sample's inputs to the tiles that are summed here."""
        by_inputs: dict[int, str] = {}
        pieces: list[Callable[[], None]] = []
        known = set(self.leaders)
        for layer, key in given.of.items():
            first = by_inputs.setdefault(key, layer)
            if layer not in known:
                # a Gram that already holds earlier samples cannot be shared by a newcomer
                leads = self.leaders.get(first) == first and first not in known
                self.leaders[layer] = first if leads else layer
                if self.leaders[layer] == layer:
                    self._grams[layer] = Gram(sizes[layer], self.device)
                    self._tiles[layer] = self._share_out(self._grams[layer])
            leader = self.leaders[layer]
            if leader == layer:
                x, counts = given.inputs[key], next(iter(given.counts), None)
                rank = self.ranks.rank
                mine = {tile for tile, owner in self._tiles[layer].items() if owner == rank}
                pieces.extend(self._grams[layer].tasks(x, counts, mine))
            elif given.of.get(leader) != key:
                raise ModelError(
                    f"layers {leader!r} and {layer!r} shared their inputs in one sample "
                    "and not in another"
                )
        return pieces

    def _share_out(self, gram: Gram) -> dict[int, int]:
        """The rank that sums each tile: the next largest goes to the one with the least work."""
        chosen = {}
        for tile in gram.tiles():  # the largest first: those of a triangle
            chosen[tile] = rank = self._load.index(min(self._load))
            self._load[rank] += gram.tile(tile)[0].numel()
        return chosen

    def complete(self) -> None:
        """Receive the tiles that the other processes have summed."""
        for leader, tiles in self._tiles.items():
            for tile, rank in tiles.items():
                for part in self._grams[leader].tile(tile):
                    self.ranks.send(part, rank)
        if self.held is not None:
            self.held.complete()


class OpenBlock:
    """A block (`module`, called `name`) whose weights are in memory, and the arguments of its `calls` by
    sample."""

    model: nn.Module
    module: nn.Module
    name: str
    device: torch.device
    calls: Mapping[int, Call]
    samples: Samples
    threads: Threads
    ranks: Ranks

    def run(self, sample: int, states: Activations, first: int = 0) -> Tensor:
        """The block's output for one sample; `states` holds those of all from the place `first` on."""
        return self.calls[sample](self.module, states.on(self.device, first + sample))


def collect(
    block: OpenBlock,
    layers: Sequence[Layer],
    *,
    advance: bool = False,
    all_experts: bool = False,
    weights: Callable[[int], Tensor] | None = None,
    tick: Callable[[int], None] = lambda _: None,
) -> Grams:
    """Send all samples through a block and sum the Gram matrix of every layer's inputs; ModelError for a
    sample with NaN or infinite activations.

    Args:
        advance: store the block's outputs as new states; else passes end where the last layer has its inputs.
        all_experts: observe experts on all tokens; the block's output does not change.
        weights: of a sample's tokens [length], called before its state has passed; None: all 1.
    """
    sizes = {layer.name: layer.n for layer in layers}
    samples, ranks = block.samples, block.ranks
    held = Grams(block.device, ranks=ranks) if samples.held else None
    grams = Grams(block.device, held, ranks)
    local, watched = threading.local(), WatchedWeights(block.model, layers)
    until: str | None = None

    def one(sample: int) -> tuple[Given, Tensor | None, str | None]:
        """Inputs of layers, the output where that is wanted, and the layer whose input came last."""
        output = None
        for copy in (False, True):
            watch = local.watch = Watch(watched, copy=copy, until=until)
            with suppress(Seen), watch:
                output = block.run(sample, samples.states)
            if not watch.overwritten:
                break
        output = output if advance else None
        bad = _first_bad(watch, output, block.name)
        if bad is not None:
            return Given([], {}, [], bad), None, None
        counts = [] if weights is None else [weights(sample)]
        return Given.seen(watch, counts), output, None if advance else _last_input(layers, watch)

    shown = experts_see_all(block.module, f"{block.name}.", layers, local)
    with forwards(shown if all_experts else ()):
        for wave in ranks.waves(samples.active, block.threads.count):
            mine = ranks.own(wave)
            found = block.threads.run([partial(one, sample) for sample in mine])
            passed = dict(zip(mine, found, strict=True))
            for sample, given in _gathered(block, wave, {s: x[0] for s, x in passed.items()}):
                if given.bad is not None:
                    samples.leave_out(sample, given.bad)
                    continue
                ours = held if held is not None and sample in samples.held else grams
                block.threads.run(ours.tasks(given, sizes))
                if sample in passed:
                    _, output, last = passed[sample]
                    until = until or last
                    if output is not None:
                        samples.states[sample] = output
            tick(len(wave))
    grams.complete()
    return grams


def _gathered(
    block: OpenBlock, wave: Sequence[int], own: Mapping[int, Given]
) -> Iterator[tuple[int, Given]]:
    """Every sample of a wave with the inputs of its layers; `own`: of the samples of this process."""
    ranks = block.ranks
    everybody = ranks.gathered({sample: given.empty("meta") for sample, given in own.items()})
    for sample in wave:
        rank = ranks.owner(sample)
        given = own.get(sample) or everybody[rank][sample].empty(block.device)
        for tensor in (*given.inputs, *given.counts):
            ranks.send(tensor, rank)
        yield sample, given


def pass_on(
    block: OpenBlock,
    states: Activations,
    tick: Callable[[int], None] = lambda _: None,
    *,
    first: int = 0,
    where: str = "",
) -> None:
    """Replace every sample's state in `states`, from the place `first` on, by the block's output. `where`: in
    errors, in place of the block's name."""
    samples = block.samples
    bad: list[int] = []
    mine = block.ranks.own(samples.active)
    for sample, output in block.threads.each(lambda s: block.run(s, states, first), mine):
        if all_finite(output):
            states[first + sample] = output
        else:
            bad.append(sample)
        tick(block.ranks.size)
    for sample in sorted(sample for theirs in block.ranks.gathered(bad) for sample in theirs):
        samples.leave_out(sample, where or block.name)


def _last_input(layers: Sequence[Layer], watch: Watch) -> str | None:
    """The layer whose input a pass records last; None where samples may differ in that."""
    once = all(len(watch.inputs.get(layer.name, ())) == 1 for layer in layers)
    fixed = all(layer.expert is None and "*" not in layer.kind for layer in layers)
    return next(reversed(watch.inputs), None) if once and fixed else None


def _first_bad(watch: Watch, output: Tensor | None, block: str) -> str | None:
    for layer, tensors in watch.inputs.items():
        if not all(map(all_finite, tensors)):
            return layer
    good = output is None or all_finite(output)
    return None if good else block

"""Gram matrices of the layers of one block, from the samples that pass through it."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maskopt.errors import ModelError
from maskopt.gram import Gram
from maskopt.model.activations import Activations
from maskopt.model.blocks import Layer, is_experts
from maskopt.model.forward import Call, Workers
from maskopt.model.watch import Seen, Watch, WatchedWeights


@dataclass(frozen=True)
class BadSample:
    """A calibration sample that gave NaN or infinite values, and the first layer that saw them."""

    sample: int
    layer: str


class Samples:
    """The calibration samples on their way through the model.

    Attributes:
        active: indices still in use, ascending.
        bad: those that were left out, if that is allowed.
    """

    def __init__(self, states: Activations, count: int, *, skip_bad: bool = False) -> None:
        self.states = states
        self.active = list(range(count))
        self.bad: list[BadSample] = []
        self.skip_bad = skip_bad

    def leave_out(self, sample: int, layer: str) -> None:
        if not self.skip_bad:
            raise ModelError(
                f"layer {layer!r}: sample {sample} has NaN or infinite activations; "
                "try --dtype float32, or leave such samples out with --skip-bad-samples"
            )
        self.bad.append(BadSample(sample, layer))
        self.active.remove(sample)
        if not self.active:
            raise ModelError(
                f"layer {layer!r}: no calibration sample without NaN or infinity is left"
            )


class Grams:
    """Gram matrices by layer name; layers that are given the same inputs share one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.order: list[str] = []
        self._leader: dict[str, str] = {}
        self._grams: dict[str, Gram] = {}

    def of(self, layer: str) -> Gram | None:
        """None where the layer never saw a token."""
        leader = self._leader.get(layer)
        return None if leader is None else self._grams[leader]

    def leader(self, layer: str) -> str:
        return self._leader.get(layer, layer)

    def tasks(self, watch: Watch, sizes: dict[str, int]) -> list[Callable[[], None]]:
        """Pieces of work that add one sample's inputs."""
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
                self.order.append(layer)
            leader = self._leader[layer]
            if leader == layer:
                inputs = watch.inputs[layer]
                joined = inputs[0] if len(inputs) == 1 else torch.cat(inputs)
                pieces.extend(self._grams[layer].tasks(joined))
            elif sharing.get(leader) != key:
                raise ModelError(
                    f"layers {leader!r} and {layer!r} shared their inputs in one sample "
                    "and not in another"
                )
        return pieces


def collect(
    model: nn.Module,
    block: nn.Module,
    prefix: str,
    layers: Sequence[Layer],
    calls: Sequence[Call],
    samples: Samples,
    workers: Workers,
    device: torch.device,
    *,
    advance: bool = False,
    all_experts: bool = False,
    tick: Callable[[int], None] = lambda _: None,
) -> Grams:
    """Send all samples through a block and sum the Gram matrix of every layer's inputs.

    Args:
        advance: store the block's outputs as the samples' new states; else passes end where the last
            layer has its inputs.
        all_experts: experts are observed on all tokens, not only on those routed to them; what
            the block computes stays as it is.

    Raises:
        ModelError: a sample with NaN or infinite activations (unless those may be left out).
    """
    weights = WatchedWeights(model, layers)
    sizes = {layer.name: layer.n for layer in layers}
    grams = Grams(device)
    local = threading.local()
    until: str | None = None

    def observe(sample: int) -> tuple[Watch, Tensor | None, str | None]:
        state, output = samples.states[sample].to(device), None
        for copy in (False, True):
            local.watch = Watch(weights, copy=copy, until=until)
            with suppress(Seen), local.watch:
                output = calls[sample](block, state)
            if not local.watch.overwritten:
                break
        output = output if advance else None
        return local.watch, output, _first_bad(local.watch, output, prefix)

    with _experts_see_all(block, prefix, layers, local) if all_experts else _nothing():
        for wave in workers.waves(list(samples.active)):
            observed = workers.run([lambda s=s: observe(s) for s in wave])  # type: ignore[misc]
            for sample, (watch, output, bad) in zip(wave, observed, strict=True):
                if bad is not None:
                    samples.leave_out(sample, bad)
                    continue
                workers.run(grams.tasks(watch, sizes))
                if output is not None:
                    samples.states[sample] = output
                elif until is None:
                    until = _last_input(layers, watch)
            tick(len(wave))
    return grams


def forward(
    block: nn.Module,
    prefix: str,
    calls: Sequence[Call],
    samples: Samples,
    workers: Workers,
    device: torch.device,
    tick: Callable[[int], None] = lambda _: None,
) -> None:
    """Replace every sample's state by the block's output."""
    for wave in workers.waves(list(samples.active)):
        outputs = workers.run(
            [lambda s=s: calls[s](block, samples.states[s].to(device)) for s in wave]  # type: ignore[misc]
        )
        for sample, output in zip(wave, outputs, strict=True):
            if not bool(torch.isfinite(output).all()):
                samples.leave_out(sample, prefix.rstrip("."))
            else:
                samples.states[sample] = output
        tick(len(wave))


def _last_input(layers: Sequence[Layer], watch: Watch) -> str | None:
    """The layer whose input is the last that a pass records: what comes after it need not be computed.

    None where other samples might call the layers otherwise: experts, and layers in a list.
    """
    once = all(len(watch.inputs.get(layer.name, ())) == 1 for layer in layers)
    fixed = all(layer.expert is None and layer.stage.count("*") == 1 for layer in layers)
    return next(reversed(watch.inputs)) if once and fixed else None


def _first_bad(watch: Watch, output: Tensor | None, prefix: str) -> str | None:
    for layer, tensors in watch.inputs.items():
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            return layer
    good = output is None or bool(torch.isfinite(output).all())
    return None if good else prefix.rstrip(".")


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _experts_see_all(
    block: nn.Module, prefix: str, layers: Sequence[Layer], local: threading.local
) -> Iterator[None]:
    """Before experts run as routed, run all of them on all tokens; observe only that."""
    handles = []

    def names(path: str) -> frozenset[str]:
        return frozenset(layer.name for layer in layers if layer.name.startswith(path))

    def hooks(path: str, everything: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]):  # type: ignore[no-untyped-def]
        inside = names(path)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if getattr(local, "busy", False) or not hasattr(local, "watch"):
                return
            local.busy = True
            try:
                everything(module, args, kwargs)
            finally:
                local.busy = False
            local.watch.muted = local.watch.muted | inside

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not getattr(local, "busy", False) and hasattr(local, "watch"):
                local.watch.muted = local.watch.muted - inside

        return before, after

    for name, module in block.named_modules():
        path = prefix + (f"{name}." if name else "")
        if is_experts(module) and names(path):
            if not _takes_routing(module):
                raise ModelError(
                    f"{path}: {type(module).__name__} is not given a routing that could be replaced; "
                    "leave out --all-experts"
                )
            before, after = hooks(path, _run_fused)
        elif (lists := _expert_lists(module)) and names(path + lists[0]):
            before, after = hooks(path + lists[0] + ".", _run_listed)
        else:
            continue
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _takes_routing(module: nn.Module) -> bool:
    """Is the module called with hidden states, chosen experts, and their weights?"""
    try:
        inspect.signature(module.forward).bind(None, None, None)
    except TypeError:
        return False
    return True


def _run_fused(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call fused experts as if every token were routed to all of them."""
    hidden = args[0] if args else kwargs["hidden_states"]
    count = next(p.shape[0] for _, p in module.named_parameters(recurse=False) if p.ndim == 3)
    flat = hidden.reshape(-1, hidden.shape[-1])
    index = torch.arange(count, device=flat.device).expand(flat.shape[0], count)
    module(flat, index, torch.full_like(index, 1.0 / count, dtype=flat.dtype))


def _run_listed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call every expert of a module list on all tokens."""
    hidden = args[0] if args else next(iter(kwargs.values()))
    flat = hidden.reshape(-1, hidden.shape[-1])
    for expert in getattr(module, _expert_lists(module)[0]):
        expert(flat)


def _expert_lists(module: nn.Module) -> list[str]:
    """Children that are lists of alike modules called experts."""
    return [
        name
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and "expert" in name and len(child) > 1
    ]

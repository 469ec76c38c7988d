"""Which layers of a block belong into one round, seen from the inputs that they were given."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Layer
from maskopt.models.blockwise.collect import Grams


def first_round(layers: Sequence[Layer], grams: Grams) -> tuple[list[Layer], list[Layer]]:
    """The layers that are called first and share their inputs, all experts of a kind together;
    and the rest. Layers that were never called come last."""
    by_name = {layer.name: layer for layer in layers}
    called = [by_name[name] for name in grams.order if name in by_name]
    if not called:
        return list(layers), []
    leader = grams.leader(called[0].name)
    kinds = {layer.kind for layer in called if grams.leader(layer.name) == leader}
    first = [layer for layer in layers if layer.kind in kinds]
    return first, [layer for layer in layers if layer.kind not in kinds]


def check_multiplied(model: nn.Module, layers: Sequence[Layer], grams: Grams) -> None:
    """Raise ModelError for a 3-D parameter of which no part was multiplied with any token: some expert
    always is, so it holds something else."""
    unseen: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.expert is not None:
            unseen.setdefault(layer.parameter, []).append(layer)
    for layer in layers:
        if grams.of(layer.name) is not None:
            unseen.pop(layer.parameter, None)
    for name, parts in unseen.items():
        if len(parts) == model.get_parameter(name).shape[0]:
            raise ModelError(
                f"parameter {name!r} looks like experts, but no token was multiplied with any of them; "
                f"leave it out with `exclude` {parts[0].kind!r}"
            )

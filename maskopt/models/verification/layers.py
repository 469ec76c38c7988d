"""The layers and trained parts of a manifest: whether they agree with each other, the options and the masks.

That training gave the stated losses is nothing that a folder shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maskopt.models.options.prune import LEAST_SQUARES, NONE
from maskopt.models.verification.manifest import Key, Manifest, key_of, numbers, pruned_of

#: a bound may lie above its error by so much: both are sums, rounded on their own
BOUND_ROUNDING = 1e-6
#: relative difference at which the stated error of a layer pruned by magnitude is wrong
SUM_TOLERANCE = 1e-9


@dataclass
class Slice:
    """A matrix of a masked tensor: all of it, or one expert's part.

    Attributes:
        key: its place, which is that of its layer.
        square: Σ of the pruned weights' squares in the original, or None.
        least_first: every row prunes its smallest weights, or None.
    """

    tensor: str
    key: Key
    rows: int
    n: int
    pruned: int
    expert: bool
    square: float | None = None
    least_first: bool | None = None


def check_layers(manifest: Manifest) -> None:
    """Raise VerificationError where two places of the manifest contradict each other."""
    layers, options = manifest.layers, manifest.options
    if not layers:
        raise manifest.wrong("knows no layer: nothing is pruned")
    names = [layer["name"] for layer in layers]
    if len(set(names)) != len(names):
        raise manifest.wrong(f"names a layer twice: {max(names, key=names.count)!r}")
    _check_budget(manifest)
    for layer in layers:
        updated = options.least_squares is not None and not layer["fallback"]
        bounded = "error_kept" if updated and layer["objective"] == "kept" else "error"
        wrong = {
            "has another pattern than the options": layer["pattern"] != str(manifest.pattern(layer)),
            "counts other pruned weights than its pattern": layer["pruned"] != manifest.pruned(layer),
            "has another sparsity than its counts":
                layer["sparsity"] != layer["pruned"] / (layer["rows"] * layer["n"]),
            "has another fallback than its tokens say":
                layer["fallback"] != (layer["tokens"] < options.min_tokens),
            "is updated, or not, otherwise than the options say":
                any((layer[key] is not None) != updated for key in ("damping", "error_kept")),
            "has statuses of updated weights, and keeps its own":
                layer["objective"] != "kept" and not updated,
            "has statuses of another number of rows": sum(layer["statuses"].values()) != layer["rows"],
            "has a lower bound above its error":
                layer["lower_bound"] > (layer[bounded] or 0.0) * (1 + BOUND_ROUNDING),
        }  # fmt: skip
        for what, holds in wrong.items():
            if holds:
                raise manifest.wrong(f"layer {layer['name']!r} {what}")


def _check_budget(manifest: Manifest) -> None:
    """Layers with counts of their own prune as many weights in all as at the same sparsity in each."""
    counts, layers = manifest.options.counts, manifest.layers
    if not counts:
        return
    if set(counts) != {layer["name"] for layer in layers}:
        raise manifest.wrong("has counts of other layers than it names")
    if not all(counts[x["name"]] < x["n"] for x in layers):
        raise manifest.wrong("has counts that leave nothing of a row")
    uniform = sum(pruned_of(manifest.options.pattern, x["rows"], x["n"]) for x in layers)
    if sum(map(manifest.pruned, layers)) != uniform:
        raise manifest.wrong("prunes another number of weights in all than its pattern")


def check_distillation(manifest: Manifest) -> None:
    """The epoch is one that can be, and what the losses say."""
    losses, how = manifest.record["distillation"], manifest.options.distilled
    if how is None:
        return
    if losses["epoch"] > how.epochs:
        raise manifest.wrong("was distilled longer than the options say")
    better = losses["after"]["held"] < losses["before"]["held"]
    if not (better if losses["epoch"] else losses["after"] == losses["before"]):
        raise manifest.wrong("was distilled to another epoch than its losses say")


def check_trained(manifest: Manifest) -> None:
    """Every block with a layer that was trained is listed once, no other is, and its epoch is one that can
    be."""
    trained, how = manifest.record["trained"], manifest.options.reconstruction
    if how is None:
        return
    for one in trained:
        of = f"block {one['block']}"
        if one["epoch"] > how.epochs:
            raise manifest.wrong(f"{of}: was trained longer than the options say")
        same = all(one[f"{text}_before"] == one[f"{text}_after"] for text in ("fitted", "held"))
        if not (one["held_after"] < one["held_before"] if one["epoch"] else same):
            raise manifest.wrong(f"{of}: its epoch is not what its losses say")
    blocks = {layer["block"] for layer in manifest.layers if not layer["fallback"]}
    if sorted(one["block"] for one in trained) != sorted(blocks):
        raise manifest.wrong("lists other trained blocks than those of its layers, or one twice")


def updated_layers(manifest: Manifest) -> set[Key]:
    """Layers whose kept weights may differ from the original's: updated, or of a block that became better."""
    options = manifest.options
    if options.update == NONE:
        return set()
    layers = [layer for layer in manifest.layers if not layer["fallback"]]
    every = LEAST_SQUARES in (options.update, options.training.get("begin"))
    better = {one["block"] for one in manifest.record["trained"] if one["epoch"]}
    return {key_of(x) for x in layers if every or x["block"] in better}


def updated_vectors(manifest: Manifest, tensors: Mapping[str, Any]) -> tuple[str, ...]:
    """Beginnings of the names of norms and biases that may have been trained.

    Args:
        tensors: with masks. Their names are those of the blocks up to the first number. (Another part of the
            model may number blocks of its own.)
    """
    if manifest.options.training.get("train") != "all":
        return ()
    number_of = {layer["block"]: _split(layer["name"])[1] for layer in manifest.layers}
    better = {number_of[one["block"]] for one in manifest.record["trained"] if one["epoch"]}
    split = map(_split, tensors)
    return tuple({f"{before}{number}." for before, number in split if number in better})


def check_masks(manifest: Manifest, slices: Sequence[Slice]) -> tuple[int, float]:
    """Compare the layers with the masks; the rows and the sparsity that the masks give.

    A layer's parameter may be stored in other pieces (fused experts one by one, say), so rows and pruned
    weights are compared over all matrices of the same block, expert and number of inputs; a tensor called
    like its layer is compared with it alone. Experts that were left out have masks that keep all.
    """
    by_tensor = {part.tensor: part for part in slices}
    for layer in manifest.layers:
        part = by_tensor.get(called_like(layer["name"], by_tensor) or "")
        if part is not None and (part.rows, part.n) != (layer["rows"], layer["n"]):
            raise manifest.wrong(
                f"layer {layer['name']!r} is said to have {layer['rows']} rows of {layer['n']}; its "
                f"mask has {part.rows} of {part.n}"
            )
        # of experts that were left out nothing is pruned
        if part is not None and part.pruned not in (0, layer["pruned"]):
            raise manifest.wrong(
                f"layer {layer['name']!r} is said to have {layer['pruned']} weights pruned; its mask has "
                f"{part.pruned}"
            )
    rows = elements = pruned = 0
    said, found = _grouped(manifest.layers, key_of), _grouped(slices, lambda x: x.key)
    for key in sorted({*said, *found}):
        layers, parts = said.get(key, []), found.get(key, [])
        # a piece in which nothing is pruned is all of an expert that was left out, unless its rows may prune
        # nothing
        exact = all(least for _, least, _ in manifest.limits_at.get(key, ()))
        count = sum(x["rows"] for x in layers)
        total = sum(x.pruned for x in parts)
        seen = sum(x.rows for x in parts if x.pruned)
        # only experts that were left out may have masks and belong to no layer
        own = sum(x.rows for x in parts if x.pruned or (layers and not x.expert))
        same = own <= count <= sum(x.rows for x in parts) and (count == seen or not exact)
        if not same or total != sum(x["pruned"] for x in layers):
            name = layers[0]["name"] if layers else parts[0].tensor
            raise manifest.wrong(f"counts other rows or pruned weights than the masks at {name!r}")
        rows, elements, pruned = rows + count, elements + count * key[1], pruned + total
    if not pruned:
        raise manifest.wrong("nothing is pruned: the weights are the dense model's")
    if manifest.record["sparsity"] != pruned / elements:
        raise manifest.wrong("has another sparsity than the masks")
    return rows, pruned / elements


def check_fallbacks(manifest: Manifest, slices: Sequence[Slice]) -> list[str]:
    """Names of the layers pruned by magnitude whose errors were compared with the original's weights."""
    checked: list[str] = []
    found = _grouped(slices, lambda x: x.key)
    for key, layers in _grouped(manifest.layers, key_of).items():
        parts = found[key]
        if not all(x["fallback"] for x in layers) or any(x.square is None for x in parts):
            continue
        name, said = layers[0]["name"], sum(x["error"] for x in layers)
        true = sum(x.square or 0.0 for x in parts)
        if not math.isclose(said, true, rel_tol=SUM_TOLERANCE):
            raise manifest.wrong(
                f"layer {name!r}, pruned by magnitude, states an error of {said:.9g}; the squares "
                f"of its pruned weights add up to {true:.9g}"
            )
        if not all(x.least_first for x in parts):
            raise manifest.wrong(f"layer {name!r} is not pruned by magnitude as it says")
        checked += [x["name"] for x in layers]
    return checked


def called_like(layer: str, tensors: Mapping[str, Any]) -> str | None:
    """The tensor `LAYER.weight`, where the checkpoint may lack the first parts of the name."""
    parts = layer.split(".")
    ends = (".".join(parts[i:]) for i in range(len(parts)))
    return next((f"{x}.weight" for x in ends if numbers(x) and f"{x}.weight" in tensors), None)


def _split(name: str) -> tuple[str, str]:
    """Before and at the first number of a name; all of it is before where there is none."""
    words = name.split(".")
    for place, word in enumerate(words):
        if word.isdecimal():
            return ".".join([*words[:place], ""]), word
    return name, ""


def _grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups

"""Checks of a manifest: its layers and trained parts agree with each other, the options and the masks.

Options and patterns have the schema that `PruneOptions` and `parse_sparsity` declare. How much a pattern
prunes is computed here. That training gave the stated losses is nothing that a folder shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from maskopt.core.pattern import NM, Pattern, Unstructured, parse_sparsity
from maskopt.errors import MaskoptError, VerificationError
from maskopt.models.architecture.blocks import Blocks, choose
from maskopt.models.checkpoints.schema import MANIFEST, check_link, read_manifest
from maskopt.models.options.prune import (
    BLOCKWISE,
    BOTH,
    LAYERS,
    LEAST_SQUARES,
    NONE,
    ROWS,
    UNIFORM,
    PruneOptions,
)
from maskopt.models.verification.folder import Loading, refusing

#: a bound may lie above its error by so much: both are sums, rounded on their own
BOUND_ROUNDING = 1e-6
#: relative difference at which the stated error of a layer pruned by magnitude is wrong
SUM_TOLERANCE = 1e-9
#: options of the solver, which nothing here depends on and which may be of a solver that is not installed
OF_SOLVER = ("solver", "start", "solver_options")

#: options that hold options of their own, of which a result stores those of its version
NESTED = ("training", "distillation")

#: the numbers in a layer's name (block, expert), and its inputs
Key = tuple[tuple[int, ...], int]


def read_record(folder: Path) -> dict[str, Any]:
    """Read a manifest of any kind; VerificationError where it is missing, of an unknown kind, or damaged."""
    with refusing():
        check_link(folder / MANIFEST)
        return read_manifest(folder / MANIFEST, smaller=True)


def numbers(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdecimal())


def key_of(layer: Mapping[str, Any]) -> Key:
    """Return a layer's place, the same for the matrices of tensors that its parameter is stored in."""
    return numbers(layer["name"]), layer["n"]


class Manifest:
    """Manifest whose digest and schema are right; whether it is true is another matter.

    `options` are all but those of the solver. Raises VerificationError where `PruneOptions` makes other ones
    of them.
    """

    def __init__(self, folder: Path, record: Mapping[str, Any]) -> None:
        self.path, self.record = folder / MANIFEST, record
        self.layers: Sequence[Mapping[str, Any]] = record["layers"]
        self.options = _options(self.path, record)

    @property
    def distilled(self) -> bool:
        """Whether kept weights of all layers may have changed after their errors were measured."""
        return bool(self.record["distillation"]) and self.record["distillation"]["epoch"] > 0

    @property
    def unlimited(self) -> bool:
        """Whether the rows of a layer have only its budget, and no limits of their own."""
        return self.options.rows_differ and self.options.max_deviation == 1

    def pattern(self, layer: Mapping[str, Any]) -> Pattern:
        return self.options.pattern_of(layer["name"], layer["n"])

    def pruned(self, layer: Mapping[str, Any]) -> int:
        """Return the number of pruned entries of a layer."""
        return pruned_of(self.pattern(layer), layer["rows"], layer["n"])

    @cached_property
    def layers_at(self) -> dict[Key, list[Mapping[str, Any]]]:
        """Layers by their place."""
        return _grouped(self.layers, key_of)

    def limits_at(self, key: Key) -> set[tuple[int, int, int]]:
        """Return the limits of the layers of a place, as of `_limits`."""
        layers = self.layers_at.get(key, [])
        return {_limits(self.pattern(layer), layer["rows"], layer["n"]) for layer in layers}

    def wrong(self, fault: str) -> VerificationError:
        return VerificationError(f"{self.path}: {fault}")


def _options(path: Path, record: Mapping[str, Any]) -> PruneOptions:
    stored = dict(record["fingerprint"]["options"])
    for name in OF_SOLVER:
        stored.pop(name, None)
    allocation, training = stored.get("allocation", UNIFORM), stored.get("training")
    pattern = parse_sparsity(stored["sparsity"])
    if (allocation in (LAYERS, BOTH)) != bool(stored.get("counts")):
        fault = "has counts of its layers, or none, otherwise than its allocation says"
    elif (allocation == ROWS) != pattern.shared_budget:
        fault = "has an allocation that is not its pattern's"
    elif stored.get("update") != BLOCKWISE and (training or record["trained"]):
        fault = "has trained parts, and its options train none"
    elif bool(stored.get("distillation")) != bool(record["distillation"]):
        fault = "has losses of a distillation, or none, otherwise than its options say"
    elif stored.get("update") == BLOCKWISE and not training:
        fault = "does not say how its weights were trained"
    else:
        if allocation != UNIFORM and stored.get("max_deviation") is None:
            stored["max_deviation"] = 1.0  # limits that are not named are none
        try:
            options = PruneOptions(**{**stored, "sparsity": pattern}, solver="magnitude")
            if _agrees(options.record(), stored):
                return options
        except (MaskoptError, ValueError, TypeError, AttributeError, OverflowError):
            pass
        fault = "the manifest is damaged or was changed"
    raise VerificationError(f"{path}: {fault}")


def _agrees(made: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
    """Return whether every stored option has the value that `PruneOptions` makes of it.

    Options of a later version are not stored, and have their defaults.
    """
    for name, value in stored.items():
        if name not in made:
            return False
        if name in NESTED:
            if not _agrees(made[name], value):
                return False
        elif made[name] != value:
            return False
    return True


def groups(pattern: Pattern, n: int) -> tuple[int, int]:
    """Return the size of a group of a row's inputs, and how many of them every row prunes."""
    if isinstance(pattern, NM):
        if n % pattern.of:
            raise VerificationError(f"{n} inputs do not divide into groups of {pattern.of}")
        return pattern.of, pattern.of - pattern.keep
    return n, _part_of(pattern, n) if pattern.keep is None else n - pattern.keep


def pruned_of(pattern: Pattern, rows: int, n: int) -> int:
    """Return the number of pruned entries of a layer."""
    if isinstance(pattern, Unstructured) and pattern.shared_budget and pattern.keep is None:
        return _part_of(pattern, rows * n)
    group, pruned = groups(pattern, n)
    return rows * (n // group) * pruned


def _part_of(pattern: Unstructured, entries: int) -> int:
    return math.floor(Fraction(repr(pattern.sparsity)) * entries)


def _limits(pattern: Pattern, rows: int, n: int) -> tuple[int, int, int]:
    """Return the size of a group of inputs, and the least and the most that a row prunes of it.

    With a shared budget these are whole numbers no further from the mean than `max_deviation`, and those next
    to the mean in any case.
    """
    if not pattern.shared_budget:
        group, pruned = groups(pattern, n)
        return group, pruned, pruned
    if pattern.max_deviation is None:
        return n, 0, n
    mean = Fraction(pruned_of(pattern, rows, n), rows)
    reach = Fraction(repr(float(pattern.max_deviation))) * n
    least = min(math.ceil(mean - reach), math.floor(mean))
    most = max(math.floor(mean + reach), math.ceil(mean))
    return n, max(0, least), min(n, most)


# --- layers and trained parts


@dataclass
class Slice:
    """Matrix of a masked tensor: all of it, or one expert's part.

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
        for fault, holds in wrong.items():
            if holds:
                raise manifest.wrong(f"layer {layer['name']!r} {fault}")


def _check_budget(manifest: Manifest) -> None:
    """Require that layers with counts of their own prune as many weights in all as at uniform sparsity."""
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


def check_trained(manifest: Manifest) -> None:
    """Require that each block with a trained layer is listed once, and no other block.

    Epochs, also of a distillation, are within those of the options.
    """
    trained, training = manifest.record["trained"], manifest.options.reconstruction
    losses, distilled = manifest.record["distillation"], manifest.options.distilled
    if distilled is not None:
        check_epoch(manifest.wrong, "distillation", losses, distilled.epochs)
    if training is None:
        return
    for block in trained:
        losses = {"epoch": block["epoch"]}
        for at in ("before", "after"):
            losses[at] = {"fitted": block[f"fitted_{at}"], "held": block[f"held_{at}"]}
        check_epoch(manifest.wrong, f"block {block['block']}", losses, training.epochs)
    blocks = {layer["block"] for layer in manifest.layers if not layer["fallback"]}
    if sorted(block["block"] for block in trained) != sorted(blocks):
        raise manifest.wrong("lists other trained blocks than those of its layers, or one twice")


def check_epoch(
    wrong: Callable[[str], VerificationError], of: str, losses: Mapping[str, Any], epochs: int
) -> None:
    """Raise VerificationError where the best epoch does not fit the options or the losses."""
    before, after, epoch = (losses[x] for x in ("before", "after", "epoch"))
    if epoch > epochs:
        raise wrong(f"{of}: was trained longer than the options say")
    if not (after["held"] < before["held"] if epoch else after == before):
        raise wrong(f"{of}: its epoch is not what its losses say")


def updated_layers(manifest: Manifest) -> set[Key]:
    """Return the layers that were updated, or whose block was improved by training."""
    options = manifest.options
    if options.update == NONE:
        return set()
    layers = [layer for layer in manifest.layers if not layer["fallback"]]
    every = LEAST_SQUARES in (options.update, options.training.get("begin"))
    better = {block["block"] for block in manifest.record["trained"] if block["epoch"]}
    return {key_of(x) for x in layers if every or x["block"] in better}


def updated_vectors(manifest: Manifest, tensors: Mapping[str, Any]) -> tuple[str, ...]:
    """Return beginnings of the names of norms and biases that may have been trained.

    Args:
        tensors: with masks. Their names are those of the blocks up to the first number. (Another part of the
            model may number blocks of its own.)
    """
    if manifest.options.training.get("train") != "all":
        return ()
    number_of = {layer["block"]: _split(layer["name"])[1] for layer in manifest.layers}
    blocks = manifest.record["trained"]
    better = {number_of[block["block"]] for block in blocks if block["epoch"]}
    split = map(_split, tensors)
    return tuple({f"{before}{number}." for before, number in split if number in better})


def check_masks(manifest: Manifest, slices: Sequence[Slice]) -> tuple[int, float]:
    """Compare the layers with the masks; return the number of rows and the sparsity of the masks.

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
    slices_at = _grouped(slices, lambda part: part.key)
    for key in sorted({*manifest.layers_at, *slices_at}):
        layers, parts = manifest.layers_at.get(key, []), slices_at.get(key, [])
        # A piece in which nothing is pruned is all of an expert that was left out, unless its rows may prune
        # nothing.
        exact = all(least for _, least, _ in manifest.limits_at(key))
        count = sum(x["rows"] for x in layers)
        total = sum(x.pruned for x in parts)
        seen = sum(x.rows for x in parts if x.pruned)
        # Only experts that were left out may have masks and belong to no layer.
        least = sum(x.rows for x in parts if x.pruned or (layers and not x.expert))
        same = least <= count <= sum(x.rows for x in parts) and (count == seen or not exact)
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
    """Compare errors of layers pruned by magnitude with the original's weights; return their names."""
    checked: list[str] = []
    slices_at = _grouped(slices, lambda part: part.key)
    for key, layers in manifest.layers_at.items():
        parts = slices_at[key]
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
    """Return the tensor `LAYER.weight`, where the checkpoint may lack the first parts of the name."""
    parts = layer.split(".")
    ends = (".".join(parts[i:]) for i in range(len(parts)))
    return next((f"{x}.weight" for x in ends if numbers(x) and f"{x}.weight" in tensors), None)


def _grouped(items: Iterable[Any], key: Callable[[Any], Key]) -> dict[Key, list[Any]]:
    groups: dict[Key, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _split(name: str) -> tuple[str, str]:
    """Split a name before and at its first number; all of it is before where there is none."""
    words = name.split(".")
    for place, word in enumerate(words):
        if word.isdecimal():
            return ".".join([*words[:place], ""]), word
    return name, ""


def check_names(manifest: Manifest, loading: Loading) -> None:
    """Compare the manifest's layers with those of the model that `include` and `exclude` choose."""
    options, said = manifest.options, {layer["name"]: layer for layer in manifest.layers}
    chosen = choose(Blocks(loading.model).all_layers(), options.include, options.exclude)
    layers = {layer.name: layer for layer in chosen}
    if odd := said.keys() ^ layers.keys():
        where = "in the manifest" if min(odd) in said else "in the model"
        raise manifest.wrong(f"layer {min(odd)[:200]!r} is only {where}")
    if list(said) != list(layers):
        raise manifest.wrong("names the layers in another order than the model has them")
    for name, layer in layers.items():
        if (said[name]["rows"], said[name]["n"]) != (layer.rows, layer.n):
            raise manifest.wrong(f"layer {name!r} has another shape than in the model")
        if (said[name]["block"], said[name]["kind"]) != (layer.block, layer.kind):
            raise manifest.wrong(f"layer {name!r} has another block or kind than its name")

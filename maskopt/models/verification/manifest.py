"""What a manifest says, and whether weights, masks and the model's structure say the same.

Shares no code with what writes manifests.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from maskopt.errors import VerificationError
from maskopt.models.verification.folder import CONFIG, MANIFEST, check_regular
from maskopt.models.verification.rule import Rule, row_limits
from maskopt.models.verification.shape import has_shape, no_number

#: a bound may lie above its error by so much: both are sums, rounded on their own
BOUND_ROUNDING = 1e-6


@dataclass(frozen=True)
class Manifest:
    """A manifest whose digest and types are right; whether it is true is another matter."""

    path: Path
    record: Mapping[str, Any]
    rule: Rule

    @property
    def layers(self) -> list[dict[str, Any]]:
        return list(self.record["layers"])

    @property
    def tensors(self) -> dict[str, Any]:
        return dict(self.record["tensors"])

    @property
    def files(self) -> dict[str, str]:
        return dict(self.record["files"])

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.record["fingerprint"]["options"])

    @cached_property
    def counts(self) -> dict[str, int]:
        """Of layers that trade, how many inputs each row of them prunes, by name; empty where none do."""
        return dict(self.options.get("counts") or {})

    @cached_property
    def counts_at(self) -> dict[tuple[tuple[int, ...], int], set[int]]:
        """Those counts by the numbers in the layers' names and their inputs, as `Slice` has them."""
        found: dict[tuple[tuple[int, ...], int], set[int]] = {}
        for layer in self.layers:
            key = numbers(layer["name"]), layer["n"]
            found.setdefault(key, set()).add(self.counts[layer["name"]])
        return found

    @property
    def rows_trade(self) -> bool:
        return self.rule.pooled or self.options.get("allocation") == "both"

    @property
    def max_deviation(self) -> float | None:
        """Of rows that trade, how far the sparsity of one may be from its layer's; None: any."""
        max_deviation = (
            self.rule.max_deviation if self.rule.pooled else self.options.get("max_deviation")
        )
        return None if max_deviation == 1 else max_deviation

    @cached_property
    def limits_at(self) -> dict[tuple[tuple[int, ...], int], set[tuple[int, int]]]:
        """Of rows that trade, the least and the most that one prunes, keyed as `counts_at`."""
        found: dict[tuple[tuple[int, ...], int], set[tuple[int, int]]] = {}
        for layer in self.layers:
            limits = row_limits(self.pruned(layer), layer["rows"], layer["n"], self.max_deviation)
            found.setdefault((numbers(layer["name"]), layer["n"]), set()).add(limits)
        return found

    def pattern(self, layer: Mapping[str, Any]) -> str:
        """As its record names it."""
        if not self.counts:
            return str(self.rule)
        kept = layer["n"] - self.counts[layer["name"]]
        trades = {"per": "layer", "max_deviation": self.max_deviation} if self.rows_trade else {}
        return str(Rule({**self.rule.record, **trades, "keep": kept}))

    def pruned(self, layer: Mapping[str, Any]) -> int:
        """Pruned entries of a layer."""
        if self.counts:
            return int(layer["rows"] * self.counts[layer["name"]])
        return self.rule.pruned(layer["rows"], layer["n"])

    @property
    def model(self) -> str | None:
        """The digest of the model folder; a model in memory has none."""
        return self.record["fingerprint"].get("model")

    def wrong(self, what: str) -> VerificationError:
        return VerificationError(f"{self.path}: {what}")


@dataclass
class Slice:
    """A matrix of a masked tensor: all of it, or one expert's part.

    Attributes:
        numbers: those in its name, block and expert: layers whose parameter is stored in other pieces
            have the same.
        expert: it is one of several matrices of its tensor.
        square: Σ of the pruned weights' squares in the original; None where it was not asked for.
        least_first: every row prunes its smallest weights; None likewise.
    """

    tensor: str
    numbers: tuple[int, ...]
    rows: int
    n: int
    pruned: int
    expert: bool
    square: float | None = None
    least_first: bool | None = None


def read_manifest(folder: Path) -> Manifest:
    """Raises VerificationError where it is missing, damaged, or its digest is another one."""
    path = folder / MANIFEST
    if not path.is_symlink() and not path.exists():
        raise VerificationError(
            f"{folder}: no manifest; the folder was not written by maskopt prune"
        )
    manifest = sound_record(path, has_shape)
    return Manifest(path, manifest, Rule(manifest["fingerprint"]["options"]["sparsity"]))


def sound_record(path: Path, fits: Callable[[Any], bool]) -> dict[str, Any]:
    """A manifest without its digest, which is right, and whose values are of the kinds that `fits` asks for.

    Raises:
        VerificationError: not so.
    """
    check_regular(path)
    try:
        manifest = json.loads(path.read_bytes().decode("utf-8"), parse_constant=no_number)
        claimed = manifest.pop("sha256")
        text = json.dumps(manifest, sort_keys=True).encode()
        sound = hashlib.sha256(text).hexdigest() == claimed and fits(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        sound = False
    if not sound:
        raise VerificationError(f"{path}: the manifest is damaged or was changed")
    return dict(manifest)


def check_layers(manifest: Manifest) -> None:
    """Compare what the manifest says in several places, and the kinds of values that it can hold.

    Raises:
        VerificationError: with the first contradiction.
    """
    layers, options = manifest.layers, manifest.options
    if not layers:
        raise manifest.wrong("knows no layer: nothing is pruned")
    names = [layer["name"] for layer in layers]
    if len(set(names)) != len(names):
        raise manifest.wrong(f"names a layer twice: {max(names, key=names.count)!r}")
    _check_allocation(manifest)
    for name, info in manifest.tensors.items():
        if info["pattern"] != manifest.rule.record:
            raise manifest.wrong(f"tensor {name!r} has another pattern than the options")
    for layer in layers:
        name = layer["name"]
        if layer["pattern"] != manifest.pattern(layer):
            raise manifest.wrong(f"layer {name!r} has another pattern than the options")
        if layer["pruned"] != manifest.pruned(layer):
            raise manifest.wrong(f"layer {name!r} counts other pruned weights than its pattern")
        if layer["sparsity"] != layer["pruned"] / (layer["rows"] * layer["n"]):
            raise manifest.wrong(f"layer {name!r} has another sparsity than its counts")
        if layer["fallback"] != (layer["tokens"] < options["min_tokens"]):
            raise manifest.wrong(f"layer {name!r}: fallback is not what its tokens say")
        refitted = _refitted(options) and not layer["fallback"]
        if any((layer[key] is not None) != refitted for key in ("damping", "error_kept")):
            raise manifest.wrong(
                f"layer {name!r} is refitted, or not, otherwise than the options say"
            )
        if layer["objective"] != "kept" and not refitted:
            raise manifest.wrong(
                f"layer {name!r} has statuses of refitted weights, and keeps its own"
            )
        if sum(layer["statuses"].values()) != layer["rows"]:
            raise manifest.wrong(f"layer {name!r} has statuses of another number of rows")
        bounded = "error_kept" if refitted and layer["objective"] == "kept" else "error"
        if layer["lower_bound"] > layer[bounded] * (1 + BOUND_ROUNDING):
            raise manifest.wrong(f"layer {name!r} has a lower bound above its error")
    if manifest.record["fallbacks"] != [x["name"] for x in layers if x["fallback"]]:
        raise manifest.wrong("lists other fallbacks than its layers")


def _check_allocation(manifest: Manifest) -> None:
    """Who trades: as the pattern says; and where layers do, that they prune as many in all as if alike.

    Raises:
        VerificationError: not so.
    """
    allocation, counts, rule = (
        manifest.options.get("allocation", "uniform"),
        manifest.counts,
        manifest.rule,
    )
    if (allocation == "rows") != rule.pooled or allocation not in (
        "uniform",
        "rows",
        "layers",
        "both",
    ):
        raise manifest.wrong("has an allocation that is not its pattern's")
    if (allocation in ("layers", "both")) != bool(counts):
        raise manifest.wrong(
            "has counts of its layers, or none, otherwise than its allocation says"
        )
    if not counts:
        return
    if set(counts) != {layer["name"] for layer in manifest.layers}:
        raise manifest.wrong("has counts of other layers than it names")
    if not all(counts[x["name"]] < x["n"] for x in manifest.layers):
        raise manifest.wrong("has counts that leave nothing of a row")
    alike = sum(rule.pruned(x["rows"], x["n"]) for x in manifest.layers)
    if sum(map(manifest.pruned, manifest.layers)) != alike:
        raise manifest.wrong("prunes another number of weights in all than its pattern")


def _refitted(options: Mapping[str, Any]) -> bool:
    """Whether kept weights were set anew by least squares, if only to be trained from there on."""
    begin = options.get("training", {}).get("begin")
    return options.get("update") == "least-squares" or begin == "least-squares"


def check_counts(manifest: Manifest, slices: Sequence[Slice]) -> tuple[int, float]:
    """Compare the layers with the masks; the rows and the sparsity that the masks give.

    A layer's parameter may be stored in other pieces (fused experts one by one, say). What is the same
    in both is block, expert and number of inputs, so rows and pruned weights are compared over all
    matrices that share those; a tensor called like its layer is compared with it alone. Experts that
    were left out have masks that keep all.

    Raises:
        VerificationError: the manifest counts otherwise, or nothing is pruned.
    """
    by_tensor = {part.tensor: part for part in slices}
    for layer in manifest.layers:
        name = called_like(layer["name"], by_tensor)
        part = None if name is None else by_tensor[name]
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
    said = _grouped(manifest.layers, lambda x: (numbers(x["name"]), x["n"]))
    found = _grouped(slices, lambda x: (x.numbers, x.n))
    for key in sorted({*said, *found}):
        layers, parts = said.get(key, []), found.get(key, [])
        count = sum(x["rows"] for x in layers)
        if manifest.counts:
            exact = not manifest.rows_trade and all(x["pruned"] for x in layers)
            least = sum(x.rows for x in parts if x.pruned)
        else:
            least = sum(x.rows for x in parts if x.pruned or not manifest.rule.pruned(x.rows, x.n))
            # of a layer whose rows trade, a piece may by chance have nothing that is pruned
            exact = bool(not manifest.rows_trade and manifest.rule.pruned(1, key[1]))
        most = sum(x.rows for x in parts)
        # experts alone may have masks and belong to no layer: those that were left out
        own = sum(x.rows for x in parts if x.pruned or (layers and not x.expert))
        same = own <= count <= most and (count == least or not exact)
        total = sum(x.pruned for x in parts)
        if not same or total != sum(x["pruned"] for x in layers):
            name = layers[0]["name"] if layers else parts[0].tensor
            raise manifest.wrong(f"counts other rows or pruned weights than the masks at {name!r}")
        rows, elements, pruned = rows + count, elements + count * key[1], pruned + total
    if not pruned:
        raise manifest.wrong("nothing is pruned: the weights are the dense model's")
    if manifest.record["sparsity"] != pruned / elements:
        raise manifest.wrong("has another sparsity than the masks")
    return rows, pruned / elements


def check_fallbacks(manifest: Manifest, slices: Sequence[Slice], tolerance: float) -> list[str]:
    """Names of the layers pruned by magnitude whose errors were compared with the original's weights."""
    checked: list[str] = []
    found = _grouped(slices, lambda x: (x.numbers, x.n))
    for key, layers in _grouped(manifest.layers, lambda x: (numbers(x["name"]), x["n"])).items():
        parts = found[key]
        if not all(x["fallback"] for x in layers) or any(x.square is None for x in parts):
            continue
        name, said = layers[0]["name"], sum(x["error"] for x in layers)
        true = sum(x.square or 0.0 for x in parts)
        if not math.isclose(said, true, rel_tol=tolerance):
            raise manifest.wrong(
                f"layer {name!r}, pruned by magnitude, states an error of {said:.9g}; the squares "
                f"of its pruned weights add up to {true:.9g}"
            )
        if not all(x.least_first for x in parts):
            raise manifest.wrong(f"layer {name!r} is not pruned by magnitude as it says")
        checked += [x["name"] for x in layers]
    return checked


def check_names(manifest: Manifest, model: nn.Module) -> None:
    """Compare the layers with those of the model that transformers builds from the configuration, as
    the manifest's include and exclude choose them, in the order of the model.

    Raises:
        VerificationError: a layer that is not there, is left out, has another shape or another place.
    """
    options, (blocks, all_maps) = manifest.options, linear_maps(model)
    include, exclude = options["include"], options["exclude"]
    expected = {
        name: shape
        for name, shape in all_maps.items()
        if (not include or _any_matches(name, include)) and not _any_matches(name, exclude)
    }
    said = [layer["name"] for layer in manifest.layers]
    if odd := set(said) ^ set(expected):
        where = "in the manifest" if min(odd) in said else "in the model"
        raise manifest.wrong(f"layer {min(odd)[:200]!r} is only {where}")
    if said != list(expected):
        raise manifest.wrong("names the layers in another order than the model has them")
    for layer in manifest.layers:
        if {layer["rows"], layer["n"]} != set(expected[layer["name"]]):
            raise manifest.wrong(f"layer {layer['name']!r} has another shape than in the model")
        block, *rest = layer["name"].removeprefix(f"{blocks}.").split(".")
        kind = ".".join("*" if part.isdecimal() else part for part in rest) or "*"
        if (layer["block"], layer["kind"]) != (int(block), kind):
            raise manifest.wrong(f"layer {layer['name']!r} has another block or kind than its name")


def linear_maps(model: nn.Module) -> tuple[str, dict[str, tuple[int, int]]]:
    """The name of the list of decoder blocks, and the matrices in it that multiply activations, by name, in
    the model's order.

    The blocks are the outermost module list that holds the most of them. A matrix is the weight of a
    linear module, or one part of a 3-D parameter of a module that holds several experts.
    """
    lists: dict[str, dict[str, tuple[int, int]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(_below(path, name) for name in lists):
            lists[path] = {}
        home = next((maps for name, maps in lists.items() if _below(path, name)), None)
        if home is None:
            continue
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            first, second = module.weight.shape
            home[path] = (int(first), int(second))
            continue
        own = dict(module.named_parameters(recurse=False))
        counts = [p.shape[0] for p in own.values() if p.ndim == 3]
        if isinstance(module, _ConvNd) or min(counts, default=1) == 1:
            continue
        for key, parameter in own.items():
            if parameter.ndim == 3 and min(parameter.shape[1:]) > 1:
                for expert in range(parameter.shape[0]):
                    home[f"{path}.{expert}.{key}"] = parameter.shape[1], parameter.shape[2]
    return max(lists.items(), key=lambda x: sum(a * b for a, b in x[1].values()), default=("", {}))


def numbers(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdecimal())


def empty_model(folder: Path, *, trust_remote_code: bool) -> nn.Module:
    """The model without any weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        with torch.device("meta"):
            # a configuration may name another attention, a kernel that would be fetched and run
            model: nn.Module = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code, attn_implementation="eager"
            )
    except Exception as error:  # configurations fail in as many ways as there are models
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise VerificationError(f"{folder / CONFIG}: makes no model: {line}") from error
    return model


def called_like(layer: str, tensors: Mapping[str, Any]) -> str | None:
    """The tensor `LAYER.weight`, where the checkpoint may lack the first parts of the name."""
    parts = layer.split(".")
    for start in range(len(parts)):
        if not any(part.isdecimal() for part in parts[start:]):
            return None
        if (name := ".".join([*parts[start:], "weight"])) in tensors:
            return name
    return None


def _below(path: str, name: str) -> bool:
    return path.startswith(name + ".")


def _any_matches(name: str, patterns: Iterable[str]) -> bool:
    """Does a shell pattern match the name or a run of its dotted parts?"""
    return any(
        fnmatchcase(name, wide) for p in patterns for wide in (p, f"*.{p}", f"{p}.*", f"*.{p}.*")
    )


def _grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups

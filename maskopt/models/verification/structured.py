"""Check what `maskopt prune-structured` wrote against its manifest and the original: every tensor is the
original's, in its place, cut as the choice of what stays asks, and the configuration is the original's except
for the sizes that follow. How good the choice is, is claimed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskopt.models.architecture.structures import (
    BLOCK_INDICES,
    DEPTHS,
    EXPERT_COUNTS,
    ROUTERS,
    WIDTHS,
)
from maskopt.models.checkpoints.schema import BLOCKS, EXPERTS
from maskopt.models.verification.folder import (
    CONFIG,
    Weights,
    bytes_of,
    check_configuration,
    check_entries,
    check_finite,
    read_object,
    read_weights,
    same_files,
)
from maskopt.models.verification.loading import Loading, check_loads
from maskopt.models.verification.manifest import damaged
from maskopt.models.verification.tensors import OnTensor

#: what takes the channels of an MLP → what gives them
_MLPS = {
    "down_proj": ("gate_proj", "up_proj", "gate_up_proj"),
    "fc2": ("fc1",),
    "dense_4h_to_h": ("dense_h_to_4h",),
}
#: what takes the heads of an attention, and what gives them
_ATTENTIONS = ("o_proj", "out_proj", "dense")
_GIVERS = ("q_proj", "k_proj", "v_proj", "qkv_proj")
#: a tensor of one expert: the part of the name that those of all experts share
_HOME = re.compile(r"(.*\bexperts)\.\d+\.")
#: the new name of a tensor of the original; None: it is gone
Rename = Callable[[str], str | None]


def verify_smaller(
    folder: Path, record: Mapping[str, Any], original: Path | None, on_progress: OnTensor
) -> dict[str, Any]:
    """Re-read a folder that `maskopt prune-structured` wrote; the fields of `Verified`."""
    kind, files = record["kind"], record["files"]
    shrunk = {"names": {}, "gone": [], **record["shrunk"]}
    asked = record["fingerprint"]["options"].get("removed", [])
    if not _fits_together(shrunk) or shrunk.get("blocks", []) != asked:
        raise damaged(folder)
    weights = read_weights(folder)
    check_entries(weights, files, needed=(CONFIG,))
    if kind != BLOCKS:
        _check_names(shrunk, weights, without_experts(shrunk))
    dense, theirs, same = None, None, set[str]()
    if original is not None:
        dense = read_weights(original)
        before = [shrunk["names"].get(name, name) for name in weights.where]
        same = same_files(record, weights, dense, [*before, *shrunk["gone"]])
    check_configuration(folder, files, compared=same)
    ours = Loading(weights)
    for key, size in shrunk["settings"].items():
        if ours.setting(key) != size:
            raise ours.wrong(f"{key} is not the {size} of the manifest")
    if dense is not None:
        theirs = Loading(dense)
        removal = _check_settings(kind, shrunk, ours, theirs)
        if removal.rename is not None:
            _check_names(shrunk, weights, removal.rename)
    check_loads(ours, theirs)
    count = 0
    for done, name in enumerate(sorted(weights.where), 1):
        count += _check_tensor(name, weights, dense, shrunk)
        on_progress(done, len(weights.where))
    if odd := set(shrunk["tensors"]) - set(weights.where):
        raise weights.wrong(f"tensor {min(odd)!r} of the manifest is not there")
    if dense is not None:
        _check_cuts(weights, shrunk, removal)
    claimed = ["updated weights"] if shrunk["updated"] else []
    claimed += [] if dense else ["weights"]
    claimed += ["effects of blocks"] if kind == BLOCKS else ["errors", "bounds and statuses"]
    compared = ("kept weights", "other tensors", "configuration")
    return {
        "tensors": len(weights.where),
        "cut": len(shrunk["tensors"]),
        "updated": len(shrunk["updated"]),
        "files": len(files),
        "weights": count,
        "checked": ("files", "sizes", *(compared if dense else ())),
        "claimed": (*claimed, "calibration"),
    }


def _check_names(shrunk: Mapping[str, Any], weights: Weights, rename: Rename) -> None:
    """Tensors have their names in the original, except that kept blocks and experts are numbered in order."""
    names, gone = shrunk["names"], shrunk["gone"]
    for name in gone:
        if rename(name) == name:
            raise weights.wrong(
                f"tensor {name!r} is gone, and is of no removed block or expert; it stays "
                "where the kept ones put it"
            )
    for name in (*(names.get(name, name) for name in weights.where), *gone):
        new = rename(name)
        if (new is None) != (name in gone) or (new is not None and names.get(new, new) != name):
            raise weights.wrong(
                f"tensor {name!r} of the original is not where the kept blocks and experts put it"
            )


def _check_settings(
    kind: str, shrunk: Mapping[str, Any], ours: Loading, theirs: Loading
) -> Removal:
    """The configuration is the original's except for the sizes that the removal leaves, which is returned."""
    said, before = shrunk["settings"], read_object(theirs.config)
    nested = before.get("text_config")
    of_text = isinstance(nested, dict) and not any(key in before for key in said)
    (before["text_config"] if of_text else before).update(said)
    if before != read_object(ours.config):
        raise ours.wrong("differs from the original in more than the sizes")
    removal = Removal(kind, shrunk, theirs)
    if odd := set(said) - set(removal.settings):
        raise ours.wrong(f"{min(odd)} is no size of what was removed, and must be the original's")
    for key, size in removal.settings.items():
        if ours.setting(key) != size:
            raise ours.wrong(
                f"{key} is not the original's without what was removed, which is {size}"
            )
    return removal


def _check_tensor(
    name: str, weights: Weights, dense: Weights | None, shrunk: Mapping[str, Any]
) -> int:
    """One tensor of the folder; how many numbers it holds."""
    found, steps = weights.read(name), shrunk["tensors"].get(name, [])
    for step in steps:
        left = len(_inside(step, shrunk["kept"]))
        if step["axis"] >= found.ndim or found.shape[step["axis"]] != left:
            raise weights.wrong(
                f"tensor {name!r} is {list(found.shape)}, and the manifest leaves {left} of "
                f"axis {step['axis']}"
            )
    if dense is not None:
        theirs = dense.read(shrunk["names"].get(name, name))
        for step in steps:
            if theirs.shape[step["axis"]] != sum(length for length, _ in step["parts"]):
                raise weights.wrong(
                    f"tensor {name!r} is cut otherwise than it is long in the original"
                )
            theirs = theirs.index_select(step["axis"], _inside(step, shrunk["kept"]))
        if found.dtype != theirs.dtype or found.shape != theirs.shape:
            raise weights.wrong(f"tensor {name!r} has another shape or type")
        same = name in shrunk["updated"] or torch.equal(bytes_of(found), bytes_of(theirs))
        if not same:
            raise weights.wrong(f"tensor {name!r} is not the original's, cut as the manifest says")
    check_finite(weights, name, found)
    return found.numel()


def _check_cuts(weights: Weights, shrunk: Mapping[str, Any], removal: Removal) -> None:
    """Every tensor is cut as the removal asks, and updated in all layers that may be, or in none."""
    for name in sorted({*removal.cuts, *shrunk["tensors"]}):
        if removal.cuts.get(name) != shrunk["tensors"].get(name):
            raise weights.wrong(
                f"tensor {name!r} is not cut as what was removed asks; all that a block's "
                "channels, heads or experts run through loses the same of them"
            )
    said = set(shrunk["updated"])
    if odd := said - removal.updatable or (removal.updatable - said if said else set()):
        raise weights.wrong(
            f"tensor {min(odd)!r} is updated, or not, unlike a least-squares update of all "
            "layers that take channels or heads"
        )


def _inside(step: Mapping[str, Any], kept: Mapping[str, Sequence[int]]) -> Tensor:
    """The indices along an axis that a cut leaves."""
    stays, found, start = set(kept[step["by"]]), [], 0
    for length, width in step["parts"]:
        inside = torch.arange(length)
        if width:
            chosen = torch.zeros(length // width, dtype=torch.bool)
            chosen[sorted(stays)] = True
            inside = inside[chosen.repeat_interleave(width)]
        found.append(inside + start)
        start += length
    return torch.cat(found)


def _fits_together(shrunk: Mapping[str, Any]) -> bool:
    """Do kept structures, cuts and updates fit one another?"""
    kept, blocks = shrunk["kept"], shrunk.get("blocks", [])
    return (
        len(set(blocks)) == len(blocks)
        and set(shrunk.get("experts", {}).values()) <= set(kept)
        and all(stays and stays == sorted(set(stays)) for stays in kept.values())
        and all(steps for steps in shrunk["tensors"].values())
        # the kept structures are within the parts of a cut
        and all(
            not width or (length % width == 0 and kept[step["by"]][-1] < length // width)
            for steps in shrunk["tensors"].values()
            for step in steps
            for length, width in step["parts"]
        )
        and set(shrunk["updated"]) <= set(shrunk["tensors"])
    )


# What a removal leaves of the original: derived from it and from the choice of what stays ----------------


class Removal:
    """What is left: sizes in the configuration, cuts by tensor, tensors whose kept weights may be updated,
    and new names (`rename` None: tensors keep them, except for experts that are stored one by one)."""

    def __init__(self, kind: str, shrunk: Mapping[str, Any], theirs: Loading) -> None:
        self.settings: dict[str, Any] = {}
        self.cuts: dict[str, list[dict[str, Any]]] = {}
        self.updatable: set[str] = set()
        self.rename: Rename | None = None
        if kind == BLOCKS:
            self._blocks(shrunk, theirs)
        elif kind == EXPERTS:
            self._experts(shrunk, theirs)
        else:
            for consumer in shrunk["kept"]:
                self._structures(consumer, shrunk, theirs)

    def _structures(self, consumer: str, shrunk: Mapping[str, Any], theirs: Loading) -> None:
        """Channels or heads that a layer takes."""
        home, _, last = consumer.rpartition(".")
        shape = theirs.shapes.get(f"{consumer}.weight", ())
        if last not in (*_MLPS, *_ATTENTIONS) or len(shape) != 2:
            raise theirs.wrong(
                f"{consumer!r} of the manifest is not a layer that takes channels or heads"
            )
        size, kept = shape[1], shrunk["kept"][consumer]
        weight = _stored(theirs, f"{consumer}.weight")
        if last in _MLPS:
            own = (size, 1)
            givers = {x: [own] * (2 if x == "gate_up_proj" else 1) for x in _MLPS[last]}
            # where several words stand for the width, the first is what the family reads
            words = [key for key in WIDTHS if theirs.setting(key) == size]
            self.settings |= dict.fromkeys(words[:1], len(kept))
        else:
            heads = int(theirs.setting("num_attention_heads") or 1)
            groups = int(theirs.setting("num_key_value_heads") or heads)
            width, each = int(theirs.setting("head_dim") or size // heads), heads // groups
            if heads * width != size or heads % groups:
                raise theirs.wrong(
                    f"{consumer!r} of the manifest has {size} inputs, which are no {heads} heads of {width}"
                )
            # whole groups go, each with all its heads; or as many heads of every group
            whole = shrunk["tensors"].get(weight) == [_step(1, [(size, each * width)], consumer)]
            if not whole and len({sum(k // each == g for k in kept) for g in range(groups)}) > 1:
                raise theirs.wrong(
                    f"{consumer!r} of the manifest loses more heads of one key–value group than of another"
                )
            own = (size, width * (each if whole else 1))
            key = (groups * width, width if whole else 0)
            givers = {x: [key] * whole for x in _GIVERS}
            givers |= {"q_proj": [own], "qkv_proj": [own, key, key]}
            self.settings |= {
                "num_attention_heads": len(kept) * each if whole else len(kept),
                "head_dim": width,
            }
            if theirs.setting("num_key_value_heads") is not None:
                self.settings["num_key_value_heads"] = len(kept) if whole else groups
        self.updatable.add(weight)
        self.cuts[weight] = [_step(1, [own], consumer)]
        for giver, parts in givers.items():
            for name in (f"{home}.{giver}.weight", f"{home}.{giver}.bias"):
                if parts and name in theirs.shapes:
                    self.cuts[_stored(theirs, name)] = [_step(0, parts, consumer)]

    def _experts(self, shrunk: Mapping[str, Any], theirs: Loading) -> None:
        homes: dict[str, str] = {}
        for mixture, kept in shrunk["kept"].items():
            begin = f"{mixture}."
            own = [shape for name, shape in theirs.shapes.items() if name.startswith(begin)]
            counts = {shape[0] for shape in own if len(shape) == 3}
            if len(counts) != 1:
                raise theirs.wrong(
                    f"{mixture!r} of the manifest holds no experts that tokens are routed to"
                )
            (count,) = counts
            parent = mixture.rpartition(".")[0]
            begins = (begin, *(f"{parent}.{router}." for router in ROUTERS))
            for name, shape in theirs.shapes.items():
                if not name.startswith(begins) or shape[:1] != (count,):
                    continue
                if stored := theirs.stored(name):
                    self.cuts[stored] = [_step(0, [(count, 1)], mixture)]
                    continue
                for part in theirs.parts(name):
                    found = _HOME.match(part)
                    homes[found[1] if found else part] = mixture
            words = [
                k for k in EXPERT_COUNTS if k in shrunk["settings"] and theirs.setting(k) == count
            ]
            self.settings |= dict.fromkeys(words, len(kept))
        if homes != shrunk["experts"]:
            raise theirs.weights.wrong(
                "the manifest says otherwise than the model where experts lie that "
                "are stored one by one"
            )

    def _blocks(self, shrunk: Mapping[str, Any], theirs: Loading) -> None:
        """The number of blocks, settings with an entry for each or with their numbers, and names."""
        removed = shrunk["blocks"]
        words = [key for key in DEPTHS if key in shrunk["settings"]]
        count = theirs.setting(words[0]) if len(words) == 1 else None
        if type(count) is not int:
            raise theirs.wrong("the manifest does not say how many blocks are left of it")
        self.settings[words[0]] = count - len(removed)
        for key, listed in theirs.settings.to_dict().items():
            if key in BLOCK_INDICES and isinstance(listed, list):
                self.settings[key] = _renumbered(listed, removed)
            elif isinstance(listed, list) and len(listed) == count and not key.endswith("token_id"):
                self.settings[key] = [x for index, x in enumerate(listed) if index not in removed]
        parts = min(shrunk["gone"], default="").split(".")
        home = ".".join(itertools.takewhile(lambda part: not part.isdecimal(), parts))

        def rename(name: str) -> str | None:
            number, _, rest = name.removeprefix(f"{home}.").partition(".")
            inside = name.startswith(f"{home}.") and number.isdecimal()
            if not inside or name in theirs.unused or int(number) >= count:
                return name
            new = _renumbered([int(number)], removed)
            return f"{home}.{new[0]}.{rest}" if new else None

        self.rename = rename


def without_experts(shrunk: Mapping[str, Any]) -> Rename:
    """Experts that are stored one by one are numbered as the kept ones follow each other."""

    def rename(name: str) -> str | None:
        for home, mixture in shrunk.get("experts", {}).items():
            number, _, rest = name.removeprefix(f"{home}.").partition(".")
            if name.startswith(f"{home}.") and number.isdecimal():
                kept = shrunk["kept"][mixture]
                return f"{home}.{kept.index(int(number))}.{rest}" if int(number) in kept else None
        return name

    return rename


def _renumbered(numbers: Sequence[int], removed: Collection[int]) -> list[int]:
    """Blocks by their numbers, without the removed ones, which change those behind them."""
    left = [number for number in numbers if number not in removed]
    return [number - len([gone for gone in removed if gone < number]) for number in left]


def _stored(theirs: Loading, parameter: str) -> str:
    """The tensor that a parameter is."""
    stored = theirs.stored(parameter)
    if stored is None:
        raise theirs.wrong(
            f"{parameter!r} of the manifest is not stored unchanged, and cannot be cut"
        )
    return stored


def _step(axis: int, parts: Sequence[tuple[int, int]], by: str) -> dict[str, Any]:
    return {"axis": axis, "parts": [list(part) for part in parts], "by": by}

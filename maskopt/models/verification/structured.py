"""Check what `maskopt prune-structured` wrote against its manifest and the original.

The manifest says which channels, heads, experts or blocks stay. What that leaves of the original, in its
configuration and of its tensors, is derived here and compared. How good the choice is, is claimed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskopt.models.architecture.blocks import Blocks
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
#: an axis, the (length, width) of its parts, and whose structures they are
Cut = tuple[int, Sequence[tuple[int, int]], str]
_TEXT = "text_config"


def verify_smaller(
    folder: Path, record: Mapping[str, Any], original: Path | None, on_progress: OnTensor
) -> dict[str, Any]:
    """Re-read a folder that `maskopt prune-structured` wrote; the fields of `Verified`."""
    kind, files, shrunk = record["kind"], record["files"], record["shrunk"]
    removed = record["fingerprint"]["options"].get("removed", [])
    if not all(x and x == sorted(set(x)) for x in (*shrunk["kept"].values(), removed or [0])):
        raise damaged(folder)
    weights = read_weights(folder)
    check_entries(weights, files, needed=(CONFIG,))
    dense = None if original is None else read_weights(original)
    same = set[str]() if dense is None else same_files(record, weights, dense)
    check_configuration(folder, files, compared=same)
    ours, theirs = Loading(weights), None
    if dense is not None:
        theirs = Loading(dense)
        removal = Removal(record, ours, theirs)
        before = removal.names(weights, dense)
        _check_settings(removal.settings, ours, theirs)
    check_loads(ours, theirs)
    _check_kept(ours, shrunk["kept"])
    count, updated = 0, set(shrunk["updated"])
    for done, name in enumerate(sorted(weights.where), 1):
        found = weights.read(name)
        if dense is not None:
            expected = removal.left(before[name], dense.read(before[name]))
            if found.dtype != expected.dtype or found.shape != expected.shape:
                raise weights.wrong(f"tensor {name!r} has another shape or type")
            if name not in updated and not torch.equal(bytes_of(found), bytes_of(expected)):
                raise weights.wrong(
                    f"tensor {name!r} is not the original's, cut as the manifest says"
                )
        check_finite(weights, name, found)
        count += found.numel()
        on_progress(done, len(weights.where))
    may = set(weights.where) if dense is None else removal.updatable
    if odd := updated - may or (may - updated if dense and updated else set()):
        raise weights.wrong(
            f"tensor {min(odd)!r} is updated, or not, unlike a least-squares update of all "
            "layers that take channels or heads"
        )
    claimed = ["updated weights"] if updated else []
    claimed += [] if dense else ["weights"]
    claimed += ["effects of blocks"] if kind == BLOCKS else ["errors", "bounds and statuses"]
    compared = ("kept weights", "other tensors", "configuration")
    return {
        "tensors": len(weights.where),
        "cut": len(removal.cuts) if dense else 0,
        "updated": len(updated),
        "files": len(files),
        "weights": count,
        "checked": ("files", "sizes", *(compared if dense else ())),
        "claimed": (*claimed, "calibration"),
    }


def _check_kept(ours: Loading, kept: Mapping[str, Sequence[int]]) -> None:
    """The model has as many channels, heads or experts as are kept."""
    for name, stays in kept.items():
        own = [shape for key, shape in ours.shapes.items() if key.startswith(f"{name}.")]
        counts = {x[0] for x in own if len(x) == 3} or {x[1] for x in own if len(x) == 2}
        width, rest = divmod(max(counts, default=0), len(stays))
        one = width == 1 or name.rpartition(".")[2] in _ATTENTIONS
        if len(counts) != 1 or rest or not one:
            raise ours.wrong(f"the model does not have the {len(stays)} kept parts of {name!r}")


def _check_settings(settings: Mapping[str, Any], ours: Loading, theirs: Loading) -> None:
    """The configuration is the original's except for the sizes that the removal leaves."""
    expected, found = _by_key(theirs), _by_key(ours)
    nested = _TEXT in expected and not any(key in expected for key in settings)
    sizes = {(_TEXT, key) if nested else key: size for key, size in settings.items()}
    expected |= sizes
    odd = (x for x in {**sizes, **expected, **found} if expected.get(x, ...) != found.get(x, ...))
    for place in odd:
        key = place if isinstance(place, str) else place[1]
        if key not in settings:
            raise ours.wrong(f"{key} is no size of what was removed, and must be the original's")
        raise ours.wrong(
            f"{key} is not the original's without what was removed, which is {settings[key]}"
        )


def _by_key(loading: Loading) -> dict[Any, Any]:
    """The configuration; a part of it that is about the text model by pairs of keys."""
    config = read_object(loading.config)
    nested = config.get(_TEXT)
    inside = (
        {(_TEXT, key): value for key, value in nested.items()} if isinstance(nested, dict) else {}
    )
    return {**config, **inside, **({_TEXT: None} if isinstance(nested, dict) else {})}


class Removal:
    """What the choice of what stays leaves of the original.

    Attributes:
        settings: sizes in the configuration.
        cuts: by tensor of the original.
        updatable: tensors whose kept weights may be updated.
    """

    def __init__(self, record: Mapping[str, Any], ours: Loading, theirs: Loading) -> None:
        self.ours, self.theirs = ours, theirs
        self.kept: Mapping[str, Sequence[int]] = record["shrunk"]["kept"]
        self.settings: dict[str, Any] = {}
        self.cuts: dict[str, Cut] = {}
        self.updatable: set[str] = set()
        #: what the configuration says, of the text model as of all
        self._stored = {k if isinstance(k, str) else k[1]: v for k, v in _by_key(theirs).items()}
        #: beginnings of the names of tensors that are numbered, and the numbers that stay
        self._numbered: dict[str, Sequence[int]] = {}
        if record["kind"] == BLOCKS:
            self._blocks(record["fingerprint"]["options"]["removed"])
        elif record["kind"] == EXPERTS:
            for mixture in self.kept:
                self._experts(mixture)
        else:
            for consumer in self.kept:
                self._structures(consumer)

    def names(self, weights: Weights, dense: Weights) -> dict[str, str]:
        """The name in the original of every tensor of the folder: kept blocks and experts are numbered in
        order."""
        names = {new: old for old in dense.where if (new := self._renamed(old)) is not None}
        if odd := names.keys() ^ weights.where.keys():
            raise weights.wrong(
                f"tensor {min(odd)!r} is only in the folder, or only in what the kept blocks and experts "
                "leave of the original"
            )
        return names

    def _renamed(self, name: str) -> str | None:
        for home, kept in self._numbered.items():
            number, _, rest = name.removeprefix(f"{home}.").partition(".")
            if (
                name.startswith(f"{home}.")
                and number.isdecimal()
                and name not in self.theirs.unused
            ):
                return f"{home}.{kept.index(int(number))}.{rest}" if int(number) in kept else None
        return name

    def left(self, name: str, tensor: Tensor) -> Tensor:
        """What is left of a tensor of the original."""
        if name not in self.cuts:
            return tensor
        axis, parts, by = self.cuts[name]
        if tensor.shape[axis] != sum(length for length, _ in parts):
            raise self.theirs.weights.wrong(f"tensor {name!r} is not as long as its structures")
        found, start = [], 0
        for length, width in parts:
            inside = torch.arange(length)
            if width:
                chosen = torch.zeros(length // width, dtype=torch.bool)
                chosen[list(self.kept[by])] = True
                inside = inside[chosen.repeat_interleave(width)]
            found.append(inside + start)
            start += length
        return tensor.index_select(axis, torch.cat(found))

    def _cut(self, tensor: str, axis: int, parts: Sequence[tuple[int, int]], by: str) -> None:
        for length, width in parts:
            if width and self.kept[by][-1] >= length // width:
                raise self.theirs.wrong(
                    f"{by!r} of the manifest keeps number {self.kept[by][-1]} of {length // width}"
                )
        self.cuts[tensor] = axis, parts, by

    def _structures(self, consumer: str) -> None:
        """Channels or heads that a layer takes."""
        theirs, kept = self.theirs, self.kept[consumer]
        home, _, last = consumer.rpartition(".")
        shape = theirs.shapes.get(f"{consumer}.weight", ())
        if last not in (*_MLPS, *_ATTENTIONS) or len(shape) != 2:
            raise theirs.wrong(
                f"{consumer!r} of the manifest is not a layer that takes channels or heads"
            )
        size = shape[1]
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
            whole = each == 1 or self.ours.setting("num_key_value_heads") != groups
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
        weight = _stored(theirs, f"{consumer}.weight")
        self.updatable.add(weight)
        self._cut(weight, 1, [own], consumer)
        for giver, parts in givers.items():
            for name in (f"{home}.{giver}.weight", f"{home}.{giver}.bias"):
                if parts and name in theirs.shapes:
                    self._cut(_stored(theirs, name), 0, parts, consumer)

    def _experts(self, mixture: str) -> None:
        theirs, kept, begin = self.theirs, self.kept[mixture], f"{mixture}."
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
                self._cut(stored, 0, [(count, 1)], mixture)
                continue
            for part in theirs.parts(name):
                if (found := _HOME.match(part)) is None:
                    raise theirs.wrong(
                        f"{part!r} is not stored expert by expert, and cannot be cut"
                    )
                self._numbered[found[1]] = kept
        words = [key for key in EXPERT_COUNTS if theirs.setting(key) == count]
        self.settings |= dict.fromkeys([x for x in words if x in self._stored] or words, len(kept))

    def _blocks(self, removed: Sequence[int]) -> None:
        """The number of blocks, settings with an entry for each or with their numbers, and names."""
        theirs, blocks = self.theirs, Blocks(self.theirs.model)
        count = len(blocks)
        stays = [index for index in range(count) if index not in removed]
        words = [key for key in DEPTHS if self._stored.get(key) == count]
        self.settings[(words or DEPTHS)[0]] = len(stays)
        for key, listed in theirs.settings.to_dict().items():
            if key in BLOCK_INDICES and isinstance(listed, list):
                self.settings[key] = [stays.index(x) for x in listed if x in stays]
            elif isinstance(listed, list) and len(listed) == count and not key.endswith("token_id"):
                self.settings[key] = [listed[index] for index in stays]
        inside = (name for name in theirs.shapes if name.startswith(blocks.prefix(0)))
        parts = next(part for name in inside for part in theirs.parts(name)).split(".")
        home = ".".join(itertools.takewhile(lambda part: not part.isdecimal(), parts))
        self._numbered[home] = stays


def _stored(theirs: Loading, parameter: str) -> str:
    """The tensor that a parameter is."""
    stored = theirs.stored(parameter)
    if stored is None:
        raise theirs.wrong(
            f"{parameter!r} of the manifest is not stored unchanged, and cannot be cut"
        )
    return stored

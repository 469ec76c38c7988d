"""Check what `maskopt prune-structured` wrote against its manifest and the original.

Shares no code with what writes models. What it shows: every tensor is the
original's, in its place, cut as the manifest's choice of what stays asks, and the configuration is the
original's but for the sizes that follow from this choice. What it cannot show, and calls claimed, is how good
the choice is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskopt.errors import VerificationError
from maskopt.models.verification.folder import (
    CONFIG,
    INDEX,
    MANIFEST,
    Weights,
    check_configuration,
    check_entries,
    is_copied,
    read_weights,
    same_bits,
    sha256,
    tensor,
)
from maskopt.models.verification.loading import Loading, check_loads
from maskopt.models.verification.manifest import sound_record
from maskopt.models.verification.original import copied_files
from maskopt.models.verification.structured_config import check_settings
from maskopt.models.verification.structured_cuts import check_cuts
from maskopt.models.verification.structured_names import Blocks, Names, check_names

FORMAT = "maskopt-smaller-1"


@dataclass(frozen=True)
class VerifiedSmaller:
    """What holds.

    Attributes:
        tensors, cut: how many there are, and how many of them are smaller than the original's.
        set_anew: how many of those hold weights of their own.
        files: whose digests were compared.
        weights: numbers in the folder.
        checked: what was computed from weights and original.
        claimed: what the manifest says and nothing here shows.
    """

    tensors: int
    cut: int
    set_anew: int
    files: int
    weights: int
    checked: tuple[str, ...]
    claimed: tuple[str, ...]


def is_smaller(folder: Path) -> bool:
    """Does a manifest say that `maskopt prune-structured` wrote the folder? Nothing else is read."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def verify_smaller(
    output: str | Path,
    original: str | Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> VerifiedSmaller:
    """Re-read a folder that `shrink_model` wrote.

    Args:
        original: the original model folder: every weight is its bits, but those that were set anew.
        on_progress: called with tensors done and their number.

    Raises:
        VerificationError: with the first thing that does not hold.
    """
    folder = Path(output)
    manifest = sound_record(folder / MANIFEST, _has_shape)
    weights = read_weights(folder)
    check_entries(folder, manifest["files"], weights, needed=(CONFIG,))
    shrunk = manifest["shrunk"]
    names = Names(shrunk.get("names", {}), shrunk.get("gone", []))
    if "blocks" not in shrunk:
        check_names(shrunk, names, weights)
    dense = None if original is None else read_weights(Path(original))
    same: set[str] = set()
    if dense is not None:
        same = _same_files(manifest, weights, dense, names)
    check_configuration(folder, manifest["files"], compared=same)
    ours, theirs = Loading(weights), None if dense is None else Loading(dense)
    check_settings(shrunk, ours, theirs)
    if theirs is not None and "blocks" in shrunk:
        check_names(shrunk, names, weights, Blocks.of(shrunk, names, theirs))
    check_loads(ours, theirs)
    count = 0
    for done, name in enumerate(sorted(weights.where), 1):
        count += _check_tensor(name, weights, dense, shrunk, names)
        on_progress(done, len(weights.where))
    if odd := set(shrunk["tensors"]) - set(weights.where):
        raise VerificationError(f"{folder}: tensor {min(odd)!r} of the manifest is not there")
    if theirs is not None:
        check_cuts(folder, shrunk, theirs)
    checked = ["files", "sizes"]
    claimed = ["errors", "bounds and statuses", "calibration"]
    if shrunk.get("blocks"):
        claimed = ["effects of blocks", "calibration"]
    if dense is None:
        claimed = ["weights", *claimed]
    else:
        checked += ["kept weights", "other tensors", "configuration"]
    if shrunk["set_anew"]:
        claimed = ["updated weights", *claimed]
    return VerifiedSmaller(
        tensors=len(weights.where),
        cut=len(shrunk["tensors"]),
        set_anew=len(shrunk["set_anew"]),
        files=len(manifest["files"]),
        weights=count,
        checked=tuple(checked),
        claimed=tuple(claimed),
    )


def _check_tensor(
    name: str,
    weights: Weights,
    dense: Weights | None,
    shrunk: Mapping[str, Any],
    names: Names,
) -> int:
    """One tensor of the folder; how many numbers it holds."""
    ours = tensor(weights.where[name], name)
    steps = shrunk["tensors"].get(name, [])
    for step in steps:
        left = len(_inside(step, shrunk["kept"]))
        if step["axis"] >= ours.ndim or ours.shape[step["axis"]] != left:
            raise VerificationError(
                f"{weights.folder}: tensor {name!r} is {list(ours.shape)}, and the manifest leaves {left} of "
                f"axis {step['axis']}"
            )
    if dense is not None:
        before = names.before(name)
        theirs = tensor(dense.where[before], before)
        for step in steps:
            if theirs.shape[step["axis"]] != sum(length for length, _ in step["parts"]):
                raise VerificationError(
                    f"{weights.folder}: tensor {name!r} is cut otherwise than it is long in the original"
                )
            theirs = theirs.index_select(step["axis"], _inside(step, shrunk["kept"]))
        anew = name in shrunk["set_anew"]
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            raise VerificationError(f"{weights.folder}: tensor {name!r} has another shape or type")
        if not anew and not same_bits(ours, theirs):
            raise VerificationError(
                f"{weights.folder}: tensor {name!r} is not the original's, cut as the manifest says"
            )
    if ours.is_floating_point() and not bool(torch.isfinite(ours).all()):
        raise VerificationError(f"{weights.folder}: tensor {name!r} holds NaN or infinite weights")
    return ours.numel()


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


def _same_files(
    manifest: Mapping[str, Any], weights: Weights, dense: Weights, names: Names
) -> set[str]:
    """Names of the files beside the weights that are those of the original.

    Raises:
        VerificationError: another model, other tensors, a file that is another one.
    """
    folder, home = weights.folder, dense.folder
    known = [names.before(name) for name in weights.where] + list(names.gone)
    if odd := set(known) ^ set(dense.where):
        raise VerificationError(f"{folder}: tensor {min(odd)!r} is in only one of the two models")
    if len(known) != len(set(known)):
        raise VerificationError(f"{folder}: the manifest names a tensor of the original twice")
    shards = [name for name in dense.files if name != INDEX]
    digests = {name: sha256(home / name) for name in (CONFIG, *shards)}
    whole = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    if whole != manifest["fingerprint"].get("model"):
        raise VerificationError(
            f"{folder}: the manifest holds the digest of another model than {home}"
        )
    theirs = copied_files(home)
    ours = set(filter(is_copied, manifest["files"]))
    for name in sorted((ours | theirs) - {CONFIG}):
        if name not in ours & theirs or sha256(folder / name) != sha256(home / name):
            raise VerificationError(
                f"{folder / name}: is not the original's; tokenizer and the like are copied"
            )
    return (ours & theirs) - {CONFIG}


def _has_shape(manifest: Any) -> bool:
    """All keys, with values of the right kinds that fit one another."""
    shrunk, files = manifest["shrunk"], manifest["files"]
    kept, tensors = shrunk["kept"], shrunk["tensors"]
    return (
        manifest["format"] == FORMAT
        and isinstance(manifest["fingerprint"], dict)
        and isinstance(shrunk["settings"], dict)
        and all(_count(v) or isinstance(v, list) for v in shrunk["settings"].values())
        and not {"blocks", "experts"} <= set(shrunk)
        and all(_count(index) for index in shrunk.get("blocks", []))
        and len(set(shrunk.get("blocks", []))) == len(shrunk.get("blocks", []))
        and all(isinstance(name, str) for name in shrunk.get("gone", []))
        and all(isinstance(name, str) for name in shrunk.get("names", {}).values())
        and all(mixture in kept for mixture in shrunk.get("experts", {}).values())
        and all(isinstance(digest, str) for digest in files.values())
        and all(_count(i) for numbers in kept.values() for i in numbers)
        and all(numbers == sorted(set(numbers)) and numbers for numbers in kept.values())
        and all(_is_step(step, kept) for steps in tensors.values() for step in steps)
        and all(steps for steps in tensors.values())
        and set(shrunk["set_anew"]) <= set(tensors)
    )


def _is_step(step: Mapping[str, Any], kept: Mapping[str, Sequence[int]]) -> bool:
    highest = kept[step["by"]][-1]
    return _count(step["axis"]) and all(
        _count(length)
        and _count(width)
        and (not width or (length % width == 0 and highest < length // width))
        for length, width in step["parts"]
    )


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48

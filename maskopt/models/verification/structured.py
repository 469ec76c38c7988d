"""Check what `maskopt prune-structured` wrote against its manifest and the original.

The manifest says which channels, heads, experts or blocks stay. What that leaves of the original's
configuration, and of the names and shapes of its tensors, is derived as for the run. That the folder holds
it, bit for bit, is checked here. How good the choice is, is claimed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskopt.core.pattern import NM
from maskopt.models.architecture.blocks import Blocks, mixtures_of
from maskopt.models.architecture.structures import (
    Change,
    Kept,
    block_settings,
    changed,
    expert_settings,
    experts_left,
    renumbered,
    structure_cuts,
    structure_settings,
    structures_of,
    without_blocks,
    without_experts,
)
from maskopt.models.checkpoints.schema import BLOCKS, EXPERTS, STRUCTURES
from maskopt.models.verification.folder import (
    CONFIG,
    Loading,
    Weights,
    bytes_of,
    check_configuration,
    check_entries,
    check_finite,
    check_loads,
    read_object,
    read_weights,
    refusing,
    same_files,
)
from maskopt.models.verification.manifest import check_epoch
from maskopt.models.verification.tensors import OnTensor

#: what takes the heads of an attention
_ATTENTIONS = ("o_proj", "out_proj", "dense")
_TEXT = "text_config"


def verify_smaller(
    folder: Path, record: Mapping[str, Any], original: Path | None, on_progress: OnTensor
) -> dict[str, Any]:
    """Re-read a folder that `maskopt prune-structured` wrote; the fields of `Verified`."""
    kind, files, shrunk = record["kind"], record["files"], record["shrunk"]
    weights = read_weights(folder)
    check_entries(weights, files, needed=(CONFIG,))
    dense = None if original is None else read_weights(original)
    same = set[str]() if dense is None else same_files(record, weights, dense)
    check_configuration(folder, files, compared=same)
    ours, theirs = Loading(weights), None
    if dense is not None:
        theirs = Loading(dense)
        change = _change(record, theirs)
        before = _names(change, weights, dense)
        _check_settings(change.settings, ours, theirs)
    check_loads(ours, theirs)
    removed = record["fingerprint"]["options"].get("removed", [])
    place = Blocks(ours.model).name
    kept = {str(renumbered(name, place, removed)): k for name, k in shrunk["kept"].items()}
    _check_kept(ours, kept)
    count, updated = 0, set(shrunk["updated"])
    for done, name in enumerate(sorted(weights.where), 1):
        found = weights.read(name)
        if dense is not None:
            expected = _left(change, dense, before[name])
            if found.dtype != expected.dtype or found.shape != expected.shape:
                raise weights.wrong(f"tensor {name!r} has another shape or type")
            if name not in updated and not torch.equal(bytes_of(found), bytes_of(expected)):
                raise weights.wrong(
                    f"tensor {name!r} is not the original's, cut as the manifest says"
                )
        check_finite(weights, name, found)
        count += found.numel()
        on_progress(done, len(weights.where))
    trained = _was_trained(record, weights)
    may = set[str]()
    if trained:
        may.update(ours.conversion.needed(Blocks(ours.model).inside()))
    elif theirs is None:
        may.update(weights.where)
    elif kind == STRUCTURES:
        needed = theirs.conversion.needed([f"{name}.weight" for name in change.kept])
        may.update(change.names.get(name) or name for name in needed)
    if odd := updated - may or (may - updated if (dense and updated) or trained else set()):
        how = "a least-squares update of all layers that take channels or heads"
        if trained:
            how = "a training of all weights of the blocks"
        raise weights.wrong(f"tensor {min(odd)!r} is updated, or not, unlike {how}")
    claimed = ["trained weights" if trained else "updated weights"] if updated else []
    claimed += [] if dense else ["weights"]
    claimed += ["effects of blocks"] if kind == BLOCKS else ["errors", "bounds and statuses"]
    compared = ("kept weights", "other tensors", "configuration")
    return {
        "tensors": len(weights.where),
        "cut": len(change.cuts) if dense else 0,
        "updated": len(updated),
        "files": len(files),
        "weights": count,
        "checked": ("files", "sizes", *(compared if dense else ())),
        "claimed": (*claimed, "calibration"),
    }


def _was_trained(record: Mapping[str, Any], weights: Weights) -> bool:
    """Return whether training after the removal may have changed all weights of the blocks."""
    losses, how = record["distillation"], record["fingerprint"].get("distillation")
    if (losses is None) != (how is None):
        raise weights.wrong("the manifest has losses of a distillation and no options, or reversed")
    if losses is None or how is None:
        return False
    check_epoch(weights.wrong, "distillation", losses, how["options"]["epochs"])
    return bool(losses["epoch"])


def _check_kept(ours: Loading, kept: Mapping[str, Sequence[int]]) -> None:
    """The model has as many channels, heads or experts as are kept."""
    for name, stays in kept.items():
        own = [shape for key, shape in ours.shapes.items() if key.startswith(f"{name}.")]
        counts = {x[0] for x in own if len(x) == 3} or {x[1] for x in own if len(x) == 2}
        width, rest = divmod(max(counts, default=0), len(stays))
        one = width == 1 or name.rpartition(".")[2] in _ATTENTIONS
        if len(counts) != 1 or rest or not one:
            raise ours.wrong(f"the model does not have the {len(stays)} kept parts of {name!r}")


def _change(record: Mapping[str, Any], theirs: Loading) -> Change:
    """What the options and the choice of what stays leave of the original."""
    options, chosen = record["fingerprint"]["options"], record["shrunk"]["kept"]
    config, blocks = read_object(theirs.config), Blocks(theirs.model)
    with refusing():
        if record["kind"] == BLOCKS:
            removed = options["removed"]
            settings = block_settings(blocks, config, removed)
            _kept(theirs, chosen, {})
            return without_blocks(theirs.conversion, blocks, settings, removed)
        if record["kind"] == EXPERTS:
            mixtures = [m for index in range(len(blocks)) for m in mixtures_of(blocks, index)]
            left = experts_left(mixtures, options["experts"])
            kept = _kept(theirs, chosen, {m.name: (m.count, m.count, left) for m in mixtures})
            settings = expert_settings(theirs.model, config, mixtures, left)
            return without_experts(theirs.conversion, settings, mixtures, kept)
        every = structures_of(blocks, options["channels"], options["heads"], options["round_to"])
        removed, sizes = options.get("removed", []), {}
        every = [one for one in every if one.consumer.block not in removed]
        for one in every:
            group = one.pattern.of if isinstance(one.pattern, NM) else one.count
            sizes[one.consumer.name] = one.count, group, one.kept * group // one.count
        kept, cuts = _kept(theirs, chosen, sizes), structure_cuts(theirs.conversion, every)
        sizes_left: dict[str, Any] = dict(structure_settings(theirs.model, every))
        names: Mapping[str, str | None] = {}
        if removed:
            sizes_left |= block_settings(blocks, config, removed)
            names = without_blocks(theirs.conversion, blocks, sizes_left, removed).names
        return Change(sizes_left, names, cuts, kept)


def _kept(
    theirs: Loading,
    chosen: Mapping[str, Sequence[int]],
    sizes: Mapping[str, tuple[int, int, int]],
) -> Kept:
    """The choice of what stays, by the name of a layer or mixture. `sizes`: how many structures it has, how
    many of them are a group, and how many of each group stay."""
    kept = {}
    for name in sorted(chosen.keys() | sizes.keys()):
        if name not in sizes:
            raise theirs.wrong(
                f"{name!r} of the manifest is no layer that takes channels or heads, and no mixture"
            )
        if name not in chosen:
            raise theirs.wrong(f"the manifest does not say what stays of {name!r}")
        (count, group, left), stays = sizes[name], chosen[name]
        if stays[-1] >= count:
            raise theirs.wrong(f"{name!r} of the manifest keeps number {stays[-1]} of {count}")
        kept[name] = torch.zeros(count, dtype=torch.bool)
        kept[name][stays] = True
        if not bool((kept[name].view(-1, group).sum(1) == left).all()):
            raise theirs.wrong(
                f"{name!r} of the manifest keeps other numbers than the options, {left} of every {group}"
            )
    return kept


def _names(change: Change, weights: Weights, dense: Weights) -> dict[str, str]:
    """The name in the original of every tensor of the folder."""
    names = {new: x for x in dense.where if (new := change.names.get(x, x)) is not None}
    if odd := names.keys() ^ weights.where.keys():
        raise weights.wrong(
            f"tensor {min(odd)!r} is only in the folder, or only in what the kept blocks and experts "
            "leave of the original"
        )
    return names


def _left(change: Change, dense: Weights, name: str) -> Tensor:
    """What is left of a tensor of the original."""
    tensor = dense.read(name)
    for by, cut in change.cuts.get(name, ()):
        if tensor.shape[cut.axis] != sum(length for length, _ in cut.parts):
            raise dense.wrong(f"tensor {name!r} is not as long as its structures")
        found, start = [], 0
        for length, width in cut.parts:
            inside = torch.arange(length)
            if width:
                inside = inside[change.kept[by].repeat_interleave(width)]
            found.append(inside + start)
            start += length
        tensor = tensor.index_select(cut.axis, torch.cat(found))
    return tensor


def _check_settings(settings: Mapping[str, Any], ours: Loading, theirs: Loading) -> None:
    """The configuration is the original's except for the sizes that the removal leaves."""
    expected = _by_key(changed(read_object(theirs.config), settings))
    found = _by_key(read_object(ours.config))
    odd = (x for x in {**expected, **found} if expected.get(x, ...) != found.get(x, ...))
    keys = [place if isinstance(place, str) else place[1] for place in odd]
    for key in [*(key for key in settings if key in keys), *keys]:
        if key in settings:
            raise ours.wrong(
                f"{key} is not the original's without what was removed, which is {settings[key]}"
            )
        raise ours.wrong(f"{key} is no size of what was removed, and must be the original's")


def _by_key(config: Mapping[str, Any]) -> dict[Any, Any]:
    """A configuration; a part of it that is about the text model by pairs of keys."""
    if not isinstance(nested := config.get(_TEXT), dict):
        return dict(config)
    return {**config, _TEXT: None, **{(_TEXT, key): value for key, value in nested.items()}}

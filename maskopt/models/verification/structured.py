"""Checks of a folder of `maskopt prune-structured` against its manifest and the original.

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

from maskopt.core.files import bytes_of
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
from maskopt.models.checkpoints.schema import BLOCKS, EXPERTS, differences
from maskopt.models.verification.folder import (
    CONFIG,
    Loading,
    Weights,
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


@refusing()
def verify_smaller(
    folder: Path, record: Mapping[str, Any], original: Path | None, on_progress: OnTensor
) -> dict[str, Any]:
    """Re-read a folder that `maskopt prune-structured` wrote; return the fields of `Verified`."""
    files, shrunk = record["files"], record["shrunk"]
    weights = read_weights(folder)
    check_entries(weights, files, needed=(CONFIG,))
    dense = None if original is None else read_weights(original)
    same = set[str]() if dense is None else same_files(record, weights, dense)
    check_configuration(folder, files, compared=same)
    ours, expected = Loading(weights), None
    if dense is not None:
        expected = _Expected(dense, record, weights)
        expected.check_settings(ours)
    check_loads(ours, None if expected is None else expected.original)
    removed = record["fingerprint"]["options"].get("removed", [])
    place = Blocks(ours.model).name
    kept = {str(renumbered(name, place, removed)): k for name, k in shrunk["kept"].items()}
    _check_kept(ours, kept)
    count, updated = 0, set(shrunk["updated"])
    for done, name in enumerate(sorted(weights.where), 1):
        tensor = weights.read(name)
        if expected is not None:
            expected.check(weights, name, tensor, updated=name in updated)
        check_finite(weights, name, tensor)
        count += tensor.numel()
        on_progress(done, len(weights.where))
    trained = _was_trained(record, weights)
    cause = "a least-squares update of all layers that take channels or heads"
    possible = updated & set(weights.where)
    if trained:
        cause = "a training of all weights of the blocks"
        possible = set(ours.conversion.needed(Blocks(ours.model).inside()))
    elif expected is not None and updated:
        possible = expected.updated()
    if odd := updated ^ possible:
        raise weights.wrong(f"tensor {min(odd)!r} is updated, or not, unlike {cause}")
    checked, claimed = ["files", "sizes"], ["errors", "bounds and statuses"]
    if record["kind"] == BLOCKS:
        claimed = ["effects of blocks"]
    if expected is None:
        claimed.insert(0, "weights")
    else:
        checked += ["kept weights", "other tensors", "configuration"]
    if updated:
        claimed.insert(0, "trained weights" if trained else "updated weights")
    return {
        "tensors": len(weights.where),
        "cut": 0 if expected is None else len(expected.change.cuts),
        "updated": len(updated),
        "files": len(files),
        "weights": count,
        "checked": tuple(checked),
        "claimed": (*claimed, "calibration"),
    }


class _Expected:
    """Smaller model that the manifest makes of the original.

    Attributes:
        names: the name in the original of every tensor of the folder.
    """

    def __init__(self, dense: Weights, record: Mapping[str, Any], weights: Weights) -> None:
        self.dense, self.original = dense, Loading(dense)
        self.change = _change(record, self.original)
        named = {name: self.change.names.get(name, name) for name in dense.where}
        self.names = {new: name for name, new in named.items() if new is not None}
        if odd := self.names.keys() ^ weights.where.keys():
            raise weights.wrong(
                f"tensor {min(odd)!r} is only in the folder, or only in what the kept blocks and experts "
                "leave of the original"
            )

    def check_settings(self, ours: Loading) -> None:
        """Require that the configuration is the original's except for sizes that the removal leaves."""
        expected = changed(read_object(self.original.config), self.change.settings)
        stored = read_object(ours.config)
        if expected != stored:
            raise ours.wrong(
                "is not the original's with the sizes that the removal leaves: "
                f"{differences(expected, stored)}"
            )

    def check(self, weights: Weights, name: str, tensor: Tensor, *, updated: bool) -> None:
        """Compare a tensor with the original's, cut; if it was `updated`, its form alone."""
        expected = self._cut(self.names[name])
        if tensor.dtype != expected.dtype or tensor.shape != expected.shape:
            raise weights.wrong(f"tensor {name!r} has another shape or type")
        if not updated and not torch.equal(bytes_of(tensor), bytes_of(expected)):
            raise weights.wrong(f"tensor {name!r} is not the original's, cut as the manifest says")

    def updated(self) -> set[str]:
        """Return the tensors of the layers that take channels or heads."""
        layers = [f"{name}.weight" for name in self.change.kept]
        needed = self.original.conversion.needed(layers)
        return {self.change.names.get(name) or name for name in needed}

    def _cut(self, name: str) -> Tensor:
        """Read a tensor of the original, cut as the manifest says, without `Cut.inside`."""
        tensor = self.dense.read(name)
        for by, cut in self.change.cuts.get(name, ()):
            if tensor.shape[cut.axis] != sum(length for length, _ in cut.parts):
                raise self.dense.wrong(f"tensor {name!r} is not as long as its structures")
            indices, start = [], 0
            for length, width in cut.parts:
                inside = torch.arange(length)
                if width:
                    inside = inside[self.change.kept[by].repeat_interleave(width)]
                indices.append(inside + start)
                start += length
            tensor = tensor.index_select(cut.axis, torch.cat(indices))
        return tensor


def _was_trained(record: Mapping[str, Any], weights: Weights) -> bool:
    """Return whether training after the removal may have changed all weights of the blocks."""
    losses, training = record["distillation"], record["fingerprint"].get("distillation")
    if (losses is None) != (training is None):
        raise weights.wrong("the manifest has losses of a distillation and no options, or reversed")
    if losses is None or training is None:
        return False
    check_epoch(weights.wrong, "distillation", losses, training["options"]["epochs"])
    return bool(losses["epoch"])


def _check_kept(ours: Loading, kept: Mapping[str, Sequence[int]]) -> None:
    """Require that the model has as many channels, heads or experts as are kept."""
    for name, stays in kept.items():
        shapes = [shape for key, shape in ours.shapes.items() if key.startswith(f"{name}.")]
        counts = {x[0] for x in shapes if len(x) == 3} or {x[1] for x in shapes if len(x) == 2}
        width, remainder = divmod(max(counts, default=0), len(stays))
        possible = width == 1 or name.rpartition(".")[2] in _ATTENTIONS
        if len(counts) != 1 or remainder or not possible:
            raise ours.wrong(f"the model does not have the {len(stays)} kept parts of {name!r}")


def _change(record: Mapping[str, Any], theirs: Loading) -> Change:
    """Return the change that the options and the kept structures make to the original."""
    options, chosen = record["fingerprint"]["options"], record["shrunk"]["kept"]
    config, blocks = read_object(theirs.config), Blocks(theirs.model)
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
    every = [structures for structures in every if structures.consumer.block not in removed]
    for structures in every:
        pattern, count = structures.pattern, structures.count
        group = pattern.of if isinstance(pattern, NM) else count
        sizes[structures.consumer.name] = count, group, structures.kept * group // count
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
    """Return the kept structures, True = stays, by the name of a layer or mixture.

    Args:
        sizes: the number of structures, the size of a group of them, and how many of each group stay.
    """
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

"""A model that was trained on after pruning, against the masks that it was pruned with.

Shares no code with what packs masks and writes models, as all of `maskopt.models.verification.verify`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from maskopt.errors import VerificationError
from maskopt.models.verification.folder import (
    MASKS,
    OWN,
    SAVED,
    Weights,
    check_beside,
    check_configuration,
    check_counts,
    is_copied,
    read_weights,
    same_bits,
    tensor,
)
from maskopt.models.verification.loading import Loading, check_loads
from maskopt.models.verification.tensors import Masks


@dataclass(frozen=True)
class Held:
    """Zeros that were held.

    Attributes:
        tensors: that have a mask.
        pruned: weights that the masks prune, all of them zero.
        sparsity: their part of all weights in those tensors.
        zeros: weights in them that are zero.
        others, changed: tensors of the pruned model without a mask that this one has, too (none where its
            weights are not there); and those of them that are not the same bits.
    """

    tensors: int
    pruned: int
    sparsity: float
    zeros: int
    others: int
    changed: int


def verify_masks(
    tuned: str | Path,
    pruned: str | Path,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    trust_remote_code: bool = False,
) -> Held:
    """Every weight of a model folder that the masks of another one prune is zero, and a loader takes nothing
    but these weights.

    Args:
        tuned: the folder of the model that was trained on, as `save_pretrained` writes it.
        pruned: what `maskopt prune` wrote.
        on_progress: called with tensors done and their number.
        trust_remote_code: run code that comes with the models to build them.

    Raises:
        VerificationError: weights that are not zero, how many of them; NaN or infinite weights; a masked
            tensor that is missing or of another shape; files, configuration or tensors by which a loader
            makes another model; a folder that holds no masks or no safetensors weights.
    """
    weights, masks = read_weights(Path(tuned)), Masks(Path(pruned) / MASKS)
    # a packed folder has no weights to compare
    packed = not any(Path(pruned).glob("*.safetensors"))
    before = None if packed else read_weights(Path(pruned))
    code = (".py",) if trust_remote_code else ()
    check_beside(weights, lambda name: _is_of_a_model(name, weights) or name.endswith(code))
    count = lost = total = zeros = 0
    first = ""
    called = _names(masks.layout, weights.where)
    for name in sorted(masks.layout):
        if called(name) not in weights.where:
            raise VerificationError(
                f"{tuned}: has no tensor {name!r}, which {pruned} prunes; merge adapters before saving"
            )
    _check_model(weights, Path(pruned), before, trust_remote_code)
    for done, name in enumerate(sorted(masks.layout)):
        found = _finite(weights, called(name))
        kept = masks.kept(name, found)
        gone = int((found[~kept] != 0).sum())
        first = first or (name if gone else "")
        lost += gone
        count += int((~kept).sum())
        zeros += int((found == 0).sum())
        total += found.numel()
        if on_progress is not None:
            on_progress(done + 1, len(masks.layout))
    if lost:
        raise VerificationError(
            f"{tuned}: {lost} of {count} pruned weights are not zero, the first ones in {first!r}; sparsity "
            f"is {zeros / total:.4f}, not {count / total:.4f}. Train under `maskopt.keep_masks`"
        )
    others = {called(name): name for name in {*(before.where if before else ())} - {*masks.layout}}
    others = {theirs: name for theirs, name in others.items() if theirs in weights.where}
    changed = 0
    for theirs in sorted({*weights.where} - {*map(called, masks.layout)}):
        found = _finite(weights, theirs)
        if before is not None and theirs in others:
            name = others[theirs]
            changed += not same_bits(found, tensor(before.where[name], name))
    return Held(len(masks.layout), count, count / total, zeros, len(others), changed)


def _is_of_a_model(name: str, weights: Weights) -> bool:
    """Is it a file of a model that was saved, or one that training leaves there?"""
    return name in (*weights.files, *OWN) or is_copied(name) or bool(SAVED.fullmatch(name))


def _finite(weights: Weights, name: str) -> Tensor:
    found = tensor(weights.where[name], name)
    if not bool(torch.isfinite(found.float()).all()):
        raise VerificationError(f"{weights.folder}: {name!r} holds NaN or infinite weights")
    return found


def _check_model(weights: Weights, pruned: Path, before: Weights | None, trust: bool) -> None:
    """Raise VerificationError where a loader would make another model of a folder than of the pruned one, but
    for the values of its weights."""
    stored = weights if before is None else before
    theirs_in = Weights(pruned, stored.where, (), frozenset())
    check_counts(pruned, theirs_in)
    for folder in (weights.folder, pruned):
        names = [file.name for file in folder.iterdir() if is_copied(file.name)]
        check_configuration(folder, names, names if trust else (), "`trust_remote_code` allows it")
    ours, theirs = (Loading(x, trust_remote_code=trust) for x in (weights, theirs_in))
    if odd := {*ours.shapes} ^ {*theirs.shapes}:
        raise VerificationError(
            f"{weights.folder}: parameter {min(odd)!r} is only in one of this model and that of {pruned}"
        )
    check_loads(ours, None if before is None else theirs)
    if before is None and ours.unused:
        raise VerificationError(
            f"{weights.folder}: the model takes no tensor {min(ours.unused)!r}; remove the tensor"
        )


def _names(masked: Collection[str], there: Collection[str]) -> Callable[[str], str]:
    """What tensors of the pruned model are called in the other one: `save_pretrained` puts the name of the
    base model first, which the original's checkpoint may have been without."""
    first = min(masked, default="")
    before = {name.removesuffix(first) for name in there if name.endswith(f".{first}")}
    for prefix in sorted(before):
        if first not in there and all(prefix + name in there for name in masked):
            return lambda name: prefix + name if prefix + name in there else name
    return lambda name: name

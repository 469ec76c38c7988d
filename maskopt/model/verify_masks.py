"""A model that was trained on after pruning, against the masks that it was pruned with.

Shares no code with what packs masks and writes models, as all of `maskopt.model.verify`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from maskopt.errors import VerificationError
from maskopt.model.verify_folder import MASKS, read_weights, same_bits, tensor
from maskopt.model.verify_tensors import Masks


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
) -> Held:
    """Every weight of a model folder that the masks of another one prune is zero.

    Args:
        tuned: the folder of the model that was trained on, as `save_pretrained` writes it.
        pruned: what `maskopt prune` wrote.
        on_progress: called with tensors done and their number.

    Raises:
        VerificationError: weights that are not zero, how many of them; a masked tensor that is missing or of
            another shape; a folder that holds no masks or no safetensors weights.
    """
    weights, masks = read_weights(Path(tuned)), Masks(Path(pruned) / MASKS)
    count = lost = total = zeros = 0
    first = ""
    called = _names(masks.layout, weights.where)
    for done, name in enumerate(sorted(masks.layout)):
        theirs = called(name)
        if theirs not in weights.where:
            raise VerificationError(
                f"{tuned}: has no tensor {name!r}, which {pruned} prunes; merge adapters before saving"
            )
        found = tensor(weights.where[theirs], theirs)
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
    # a packed folder, or one of masks alone, has no weights to compare
    alone = not any(Path(pruned).glob("*.safetensors"))
    before = {} if alone else read_weights(Path(pruned)).where
    others = {name: called(name) for name in {*before} - {*masks.layout}}
    others = {name: theirs for name, theirs in others.items() if theirs in weights.where}
    changed = sum(
        not same_bits(tensor(weights.where[theirs], theirs), tensor(before[name], name))
        for name, theirs in others.items()
    )
    return Held(len(masks.layout), count, count / total, zeros, len(others), changed)


def _names(masked: Collection[str], there: Collection[str]) -> Callable[[str], str]:
    """What tensors of the pruned model are called in the other one: `save_pretrained` puts the name of the
    base model first, which the original's checkpoint may have been without."""
    first = min(masked, default="")
    before = {name.removesuffix(first) for name in there if name.endswith(f".{first}")}
    for prefix in sorted(before):
        if first not in there and all(prefix + name in there for name in masked):
            return lambda name: prefix + name if prefix + name in there else name
    return lambda name: name

"""Check a model folder that `maskopt` pruned against its manifest, its masks and the original.

Files are read by the safetensors library; bits are unpacked, digests computed and weights counted here.
Anybody can write a manifest, so what it says is only compared with what weights and masks say. What they
cannot say (errors, bounds, statuses) is called claimed, unless it is computed again from calibration text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from maskopt.core.files import bytes_of
from maskopt.core.pattern import NM
from maskopt.errors import VerificationError
from maskopt.models.checkpoints.schema import BASES, IN_DENSE, PRUNE, WRITTEN, is_copied
from maskopt.models.options.prune import BLOCKWISE
from maskopt.models.verification.bases import InBases
from maskopt.models.verification.folder import (
    CONFIG,
    INDEX,
    MANIFEST,
    MASKS,
    Loading,
    Weights,
    check_beside,
    check_configuration,
    check_entries,
    check_finite,
    check_loads,
    first_line,
    read_object,
    read_weights,
    refusing,
    same_files,
)
from maskopt.models.verification.manifest import (
    SUM_TOLERANCE,
    Manifest,
    check_fallbacks,
    check_layers,
    check_masks,
    check_names,
    check_trained,
    read_record,
)
from maskopt.models.verification.recompute import recheck_layers
from maskopt.models.verification.structured import verify_smaller
from maskopt.models.verification.tensors import Masks, OnTensor, check_tensors

#: what `maskopt`, transformers' Trainer and tokenizers leave in a folder and no loader takes
SAVED = re.compile(
    rf"{re.escape(MASKS)}|{re.escape(BASES)}|{re.escape(WRITTEN)}|{re.escape(MANIFEST)}|maskopt-distill\.json|"
    r"training_args\.bin|(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth|checkpoint-\d+|runs|"
    r"additional_chat_templates"
)


@dataclass(frozen=True)
class Verified:
    """Facts about a folder, computed from weights and masks; what the folder does not have is 0 or empty.

    Attributes:
        tensors: with a mask; of a smaller model, all.
        files: whose digests were compared.
        layers, rows: pruned ones.
        two_four: tensors whose masks are 2:4.
        sparsity: pruned share: of the pruned layers; of a fine-tuned model, of the tensors with a mask.
        checked_layers: names of the layers whose errors and statuses were computed again.
        tolerance: relative difference up to which those errors had to agree; it depends on the precision
            that the manifest names. Statuses hold under the same change of the error.
        checked: what was computed from weights, masks and original.
        claimed: what the manifest says and nothing here shows.
        weights, cut, updated: of a smaller model: numbers in the folder, tensors that are smaller than the
            original's (0 without it), and those of them that hold weights of their own.
        pruned, zeros: of a fine-tuned model: weights that the masks prune, all of them zero, and weights
            of tensors with a mask that are zero.
        others, changed: tensors without a mask that the pruned model has, too, and those of them that do
            not have the same bits.
    """

    tensors: int
    files: int = 0
    layers: int = 0
    rows: int = 0
    two_four: int = 0
    sparsity: float = 0.0
    checked_layers: tuple[str, ...] = ()
    tolerance: float | None = None
    checked: tuple[str, ...] = ()
    claimed: tuple[str, ...] = ()
    weights: int = 0
    cut: int = 0
    updated: int = 0
    pruned: int = 0
    zeros: int = 0
    others: int = 0
    changed: int = 0


def verify_model(
    folder: str | Path,
    original: str | Path | None = None,
    on_progress: OnTensor = lambda done, total: None,
    *,
    masks: str | Path | None = None,
    calibration: Any = None,
    layers: Sequence[str] = (),
    text_field: str = "text",
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> Verified:
    """Re-read a folder that a prune wrote, or that was trained further after a prune.

    A folder of `prune_model`: it holds exactly what `from_pretrained` would load and nothing else that a
    loader could take for weights or code; every file has its digest; every row (or group) of every mask
    prunes exactly as many as the pattern says; every pruned weight is zero; names, counts, pattern and
    sparsity in the manifest are those of the masks and of the model's structure. A smaller model: every
    tensor is the original's, cut as the choice of what stays asks.

    Args:
        original: the original model folder. It must have the manifest's digest, the same tensors, and bit for
            bit the same kept weights (except updated ones), other tensors, configuration and tokenizer.
            Errors of layers pruned by magnitude are computed again.
        on_progress: called with tensors done and their number.
        masks: the folder of the prune, of a model that was trained further: every weight that its masks prune
            is zero, and a loader takes nothing but these weights. Needs no `original`.
        calibration: the text (or tokens) of the prune; needs `original`. Errors and statuses of the chosen
            layers are computed again.
        layers: name patterns that choose them; all by default.
        text_field: where JSON lines hold their text.
        threads: for the passes through the model, on the CPU.
        trust_remote_code: run code that comes with the original to build the model.

    Raises:
        VerificationError: with the first thing that does not hold.
    """
    folder, original = Path(folder), None if original is None else Path(original)
    if masks is not None:
        return _verify_fine_tuned(folder, Path(masks), on_progress, trust=trust_remote_code)
    if calibration is not None and original is None:
        raise VerificationError(
            "`calibration` needs `original`, the dense model that errors are computed with"
        )
    if layers and calibration is None:
        raise VerificationError("`layers` chooses what `calibration` computes again; give both")
    record = read_record(folder)
    if record["kind"] != PRUNE:
        return Verified(**verify_smaller(folder, record, original, on_progress))
    machine = {"text_field": text_field, "threads": threads, "trust_remote_code": trust_remote_code}
    manifest = Manifest(folder, record)
    return _verify_pruned(folder, manifest, original, on_progress, calibration, layers, machine)


def _verify_pruned(
    folder: Path,
    manifest: Manifest,
    original: Path | None,
    on_progress: OnTensor,
    calibration: Any,
    layers: Sequence[str],
    machine: dict[str, Any],
) -> Verified:
    """Re-read a folder of `prune_model`; `machine` holds other options of a walk."""
    with refusing():
        weights, files = read_weights(folder), manifest.record["files"]
        check_entries(weights, files)
        stored = Masks(folder / MASKS)
        stored.check_names(manifest, weights)
        dense = None if original is None else read_weights(original)
        if dense is None and weights.unnamed:
            raise VerificationError(
                f"{folder / INDEX}: the index does not name {min(weights.unnamed)!r}, which lies in a shard"
            )
        same = set() if dense is None else same_files(manifest.record, weights, dense)
        check_configuration(folder, files, compared=same)
        check_layers(manifest)
        check_trained(manifest)
        trust = machine["trust_remote_code"]
        names_known = trust or not read_object(folder / CONFIG).get("auto_map")
        loading = None
        if names_known:
            loading = Loading(dense or weights, trust_remote_code=trust)
            if dense is None:  # which has the same tensors and configuration
                check_loads(loading, None)
            check_names(manifest, loading)
        bases = InBases(manifest, weights, loading)
        slices = check_tensors(manifest, weights, stored, dense, bases, on_progress)
        rows, sparsity = check_masks(manifest, slices)
        known, tolerance = set[str](), None
        if original is not None:
            known = set(check_fallbacks(manifest, slices))
            tolerance = SUM_TOLERANCE if known else None
    if original is not None and calibration is not None:
        again, tolerance = recheck_layers(
            manifest, folder, original, calibration, tuple(layers), **machine
        )
        known.update(again)
    facts = _facts(manifest, len(known), original is not None, calibration is not None)
    facts["names"] = names_known
    if bases:
        facts["that bases leave the model's function as it is"] = False
    return Verified(
        layers=len(manifest.layers),
        tensors=len(stored.layout),
        two_four=len(stored.layout) if manifest.options.pattern == NM(2, 4) else 0,
        rows=rows,
        files=len(files),
        sparsity=sparsity,
        checked_layers=tuple(x["name"] for x in manifest.layers if x["name"] in known),
        tolerance=tolerance,
        checked=tuple(fact for fact, holds in facts.items() if holds),
        claimed=tuple(fact for fact, holds in facts.items() if not holds),
    )


@refusing()
def semi_structured(output: str | Path) -> list[tuple[str, Any]]:
    """Convert every 2:4 layer by PyTorch's `to_sparse_semi_structured`; needs a CUDA device.

    Returns the converted tensors, in half precision, by name.

    Raises:
        VerificationError: no CUDA device, no 2:4 layers, or PyTorch does not accept one of them.
    """
    from torch.sparse import to_sparse_semi_structured

    if not torch.cuda.is_available():
        raise VerificationError("to_sparse_semi_structured needs a CUDA device; there is none here")
    folder = Path(output)
    record, weights = read_record(folder), read_weights(folder)
    if record["kind"] != PRUNE or Manifest(folder, record).options.pattern != NM(2, 4):
        raise weights.wrong("holds no 2:4 layer")
    converted = []
    for name, (_, axis) in Masks(folder / MASKS).layout.items():
        if name not in weights.where:
            raise weights.wrong(f"tensor {name!r} has a mask and is not there")
        weight = weights.read(name).half().cuda()
        weight = weight.movedim(axis, -1).reshape(-1, weight.shape[axis])
        try:
            converted.append((name, to_sparse_semi_structured(weight.contiguous())))
        except (RuntimeError, ValueError, NotImplementedError) as error:
            line = first_line(error)
            raise VerificationError(f"{name!r} is not accepted as 2:4: {line}") from error
    return converted


def _facts(manifest: Manifest, recomputed: int, compared: bool, again: bool) -> dict[str, bool]:
    """List the facts about a result: True where one was checked, False where it is claimed.

    Args:
        recomputed: layers whose errors were computed again; `again`: from calibration text.
        compared: with the original.
    """
    layers = manifest.layers
    trained = manifest.options.update == BLOCKWISE or manifest.distilled
    updated = not trained and any(layer["damping"] is not None for layer in layers)
    every, bad = recomputed == len(layers), manifest.record["bad_samples"]
    # of a solver's own weights only the errors are checked
    solved = all(layer["objective"] != "updated" for layer in layers)
    facts = {
        **dict.fromkeys(("files", "counts", "pattern", "sparsity", "names"), True),
        "kept weights": compared and not updated and not trained,
        "updated weights": every and solved if updated else None,
        "trained weights": False if trained else None,
        "configuration and tokenizer": compared,
        "errors": every and (solved or not trained),
        "statuses": every,
        "Wanda's errors": every,
        "optima": False if again and any("optimal" in x["statuses"] for x in layers) else None,
        # whether the dense model, which runs along during training, gave NaN is not seen again
        "windows left out": False if any(x["layer"].endswith(IN_DENSE) for x in bad) else None,
        "bounds": False if not again or any(layer["lower_bound"] for layer in layers) else None,
        "options": False,
    }
    if facts["updated weights"]:
        del facts["kept weights"]  # there are none that were not solved for
    return {fact: holds for fact, holds in facts.items() if holds is not None}


@refusing()
def _verify_fine_tuned(
    tuned: Path, pruned: Path, on_progress: OnTensor, *, trust: bool
) -> Verified:
    """Check that every pruned weight of a fine-tuned folder is zero, and that loaders make the same model."""
    weights, masks = read_weights(tuned), Masks(pruned / MASKS)
    if not masks.layout:
        raise VerificationError(f"{masks.path}: holds no mask")
    before = read_weights(pruned)

    def is_known(name: str) -> bool:
        code = trust and name.endswith(".py")
        return name in weights.files or is_copied(name) or bool(SAVED.fullmatch(name)) or code

    check_beside(weights, is_known)
    prefix = _added_prefix(masks.layout, weights.where)

    def called(name: str) -> str:
        return prefix + name if prefix + name in weights.where else name

    for name in sorted(masks.layout):
        if called(name) not in weights.where:
            raise weights.wrong(
                f"has no tensor {name!r}, which {pruned} prunes; merge adapters before saving"
            )
    _check_model(weights, before, trust)
    count = lost = total = zeros = 0
    first = ""
    for done, name in enumerate(sorted(masks.layout), 1):
        tensor = weights.read(called(name))
        check_finite(weights, called(name), tensor)
        kept = masks.kept(name, tensor)
        gone = int((tensor[~kept] != 0).sum())
        if gone and not first:
            first = name
        lost += gone
        count += int((~kept).sum())
        zeros += int((tensor == 0).sum())
        total += tensor.numel()
        on_progress(done, len(masks.layout))
    if lost:
        raise weights.wrong(
            f"{lost} of {count} pruned weights are not zero, the first ones in {first!r}; sparsity "
            f"is {zeros / total:.4f}, not {count / total:.4f}. Train under `maskopt.keep_masks`"
        )
    names_before = {called(name): name for name in before.where}
    others = changed = 0
    for name in sorted({*weights.where} - {*map(called, masks.layout)}):
        tensor = weights.read(name)
        check_finite(weights, name, tensor)
        if name in names_before:
            others += 1
            changed += not torch.equal(bytes_of(tensor), bytes_of(before.read(names_before[name])))
    return Verified(
        len(masks.layout),
        sparsity=count / total,
        pruned=count,
        zeros=zeros,
        others=others,
        changed=changed,
    )


def _check_model(weights: Weights, before: Weights, trust: bool) -> None:
    """Raise VerificationError where a loader would make another model than of the pruned folder."""
    for folder in (weights.folder, before.folder):
        names = [file.name for file in folder.iterdir() if is_copied(file.name)]
        check_configuration(folder, names, names if trust else (), "`trust_remote_code` allows it")
    ours, theirs = (Loading(x, trust_remote_code=trust) for x in (weights, before))
    if odd := {*ours.shapes} ^ {*theirs.shapes}:
        raise weights.wrong(
            f"parameter {min(odd)!r} is only in one of this model and that of {before.folder}"
        )
    check_loads(ours, theirs)


def _added_prefix(masked: Collection[str], names: Collection[str]) -> str:
    """Return the name of the base model, where `save_pretrained` has put it before the other names."""
    first = min(masked)
    if first in names:
        return ""
    prefixes = {name.removesuffix(first) for name in names if name.endswith(f".{first}")}
    for prefix in sorted(prefixes):
        if all(prefix + name in names for name in masked):
            return prefix
    return ""

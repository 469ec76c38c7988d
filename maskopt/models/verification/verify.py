"""Check a pruned model folder against its manifest, its masks and the original.

Shares no code with what writes those: files are read by the safetensors library, bits unpacked, digests
computed and layers found here. The manifest's digest is not keyed, so anybody can write a manifest; what
it says is therefore only compared with what weights and masks say. What they cannot say (errors, bounds,
statuses) is called claimed, unless `recompute` computes it again from calibration text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from maskopt.errors import VerificationError
from maskopt.models.verification.folder import (
    INDEX,
    MASKS,
    Weights,
    asks_for_code,
    check_configuration,
    check_entries,
    is_copied,
    read_weights,
    tensor,
)
from maskopt.models.verification.loading import Loading, check_loads
from maskopt.models.verification.manifest import (
    Manifest,
    Slice,
    check_counts,
    check_fallbacks,
    check_layers,
    check_names,
    read_manifest,
)
from maskopt.models.verification.original import same_files
from maskopt.models.verification.parts import check_parts, seen_in_dense
from maskopt.models.verification.tensors import Masks, check_tensors

#: relative difference at which the stated error of a layer pruned by magnitude is wrong
SUM_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Verified:
    """What holds. Every number is computed from weights and masks.

    Attributes:
        layers, tensors: pruned layers, and the masked tensors that hold them.
        two_four: how many of the tensors are 2:4.
        rows, sparsity: of the pruned layers.
        files: whose digests were compared.
        original: the original that was compared with, if one was.
        checked_layers: names of the layers whose errors and statuses were computed again.
        tolerance: relative difference up to which those errors had to agree; it depends on the precision
            that the manifest names. Statuses hold under the same change of the error.
        checked: what was computed from weights, masks and original.
        claimed: what the manifest says and nothing here shows.
    """

    layers: int
    tensors: int
    two_four: int
    rows: int
    files: int
    sparsity: float
    original: Path | None
    checked_layers: tuple[str, ...] = ()
    tolerance: float | None = None
    checked: tuple[str, ...] = ()
    claimed: tuple[str, ...] = ()


def verify_output(
    output: str | Path,
    original: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    calibration: Any = None,
    layers: Sequence[str] = (),
    text_field: str = "text",
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> Verified:
    """Re-read a folder that `prune_model` wrote.

    Checks that it holds exactly what `from_pretrained` would load and nothing else that a loader could
    take for weights or code; that every file has its digest; that every row (or group) of every mask
    prunes exactly as many as the pattern says; that every pruned weight is zero; that names, counts,
    pattern and sparsity in the manifest are those of the masks and of the model's structure.

    Args:
        original: the original model folder. It must have the manifest's digest, the same tensors, and bit
            for bit the same kept weights (but those that were set anew), other tensors, configuration and
            tokenizer. Errors of layers pruned by magnitude are computed again.
        on_progress: called with tensors done and their number.
        calibration: the text (or tokens) that the prune was given, as for `prune_model`; needs
            `original`. Errors and statuses of the chosen layers are computed again.
        layers: name patterns that choose them; all by default.
        text_field: where JSON lines hold their text.
        threads: for the passes through the model, on the CPU.
        trust_remote_code: run code that comes with the original to build the model.

    Raises:
        VerificationError: with the first thing that does not hold.
    """
    folder = Path(output)
    if calibration is not None and original is None:
        raise VerificationError(
            "`calibration` needs `original`, the dense model that errors are computed with"
        )
    if layers and calibration is None:
        raise VerificationError("`layers` chooses what `calibration` computes again; give both")
    manifest = read_manifest(folder)
    weights = read_weights(folder)
    check_entries(folder, manifest.files, weights)
    masks = Masks(folder / MASKS)
    masks.check_names(manifest, weights)
    dense = None if original is None else read_weights(Path(original))
    same = _same_files(manifest, weights, dense)
    check_configuration(folder, manifest.files, compared=same)
    check_layers(manifest)
    check_parts(manifest)
    names_known = trust_remote_code or not asks_for_code(folder)
    if names_known:
        loading = Loading(dense or weights, trust_remote_code=trust_remote_code)
        if dense is None:  # which has the same tensors and configuration
            check_loads(loading, None)
        check_names(manifest, loading.model)
    slices = check_tensors(manifest, weights, masks, dense, on_progress)
    rows, sparsity = check_counts(manifest, slices)
    recomputed, tolerance = _recompute(
        manifest, slices, folder, original, calibration, layers=layers, text_field=text_field,
        threads=threads, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    checked, claimed = _told_apart(
        manifest, same, len(recomputed),
        compared=original is not None, names=names_known, again=calibration is not None,
    )  # fmt: skip
    return Verified(
        layers=len(manifest.layers),
        tensors=len(masks.layout),
        two_four=len(masks.layout) if manifest.rule.two_four else 0,
        rows=rows,
        files=len(manifest.files),
        sparsity=sparsity,
        original=None if original is None else Path(original),
        checked_layers=tuple(recomputed),
        tolerance=tolerance,
        checked=checked,
        claimed=claimed,
    )


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
    manifest, where = read_manifest(folder), read_weights(folder).where
    if not manifest.rule.two_four:
        raise VerificationError(f"{folder}: holds no 2:4 layer")
    converted = []
    for name, info in manifest.tensors.items():
        if name not in where:
            raise VerificationError(f"{folder}: tensor {name!r} has a mask and is not there")
        weight = tensor(where[name], name).half().cuda()
        axis = info["input_axis"]
        weight = weight.movedim(axis, -1).reshape(-1, weight.shape[axis])
        try:
            converted.append((name, to_sparse_semi_structured(weight.contiguous())))
        except (RuntimeError, ValueError, NotImplementedError) as error:
            line = str(error).splitlines()[0]
            raise VerificationError(f"{name!r} is not accepted as 2:4: {line}") from error
    return converted


def _same_files(manifest: Manifest, weights: Weights, dense: Weights | None) -> set[str]:
    """Names of the files beside the weights that are those of the original; none without one."""
    if dense is not None:
        return same_files(manifest, weights, dense)
    if weights.unnamed:
        raise VerificationError(
            f"{weights.folder / INDEX}: the index does not name {min(weights.unnamed)!r}, "
            "which lies in a shard"
        )
    return set()


def _recompute(
    manifest: Manifest,
    slices: Sequence[Slice],
    folder: Path,
    original: str | Path | None,
    calibration: Any,
    **passes: Any,
) -> tuple[list[str], float | None]:
    """Names of the layers whose errors were computed again, and how far those may differ."""
    if original is None:
        return [], None
    recomputed = check_fallbacks(manifest, slices, SUM_TOLERANCE)
    if calibration is None:
        return recomputed, SUM_TOLERANCE if recomputed else None
    from maskopt.models.verification.recompute import recheck_layers

    again, tolerance = recheck_layers(manifest, folder, Path(original), calibration, **passes)
    known = {*recomputed, *again}
    return [layer["name"] for layer in manifest.layers if layer["name"] in known], tolerance


def _told_apart(
    manifest: Manifest, same: set[str], recomputed: int, *, compared: bool, names: bool, again: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is checked, and what is claimed."""
    layers = manifest.layers
    every = recomputed == len(layers)
    trained = manifest.options.get("update") == "blockwise"
    refit = not trained and any(layer["damping"] is not None for layer in layers)
    solved = all(
        layer["objective"] != "updated" for layer in layers
    )  # else only their errors are checked
    again_solved = every and solved
    bounds = not again or any(layer["lower_bound"] for layer in layers)
    # whether the dense model gave NaN is not seen again
    unseen = seen_in_dense(manifest)
    optima = again and any("optimal" in layer["statuses"] for layer in layers)
    facts = {
        "files": True,
        "counts": True,
        "pattern": True,
        "sparsity": True,
        "names": names,
        # where those that were set anew are solved again, none is left that was kept
        **(
            {}
            if refit and again_solved
            else {"kept weights": compared and not refit and not trained}
        ),
        **({"refitted weights": again_solved} if refit else {}),
        **({"trained weights": False} if trained else {}),
        "configuration and tokenizer": compared and {*filter(is_copied, manifest.files)} <= same,
        "errors": every and (solved or not trained),
        "statuses": every,
        **({"optima": False} if optima else {}),
        **({"windows left out": False} if unseen else {}),
        **({"bounds": False} if bounds else {}),
        "start errors": False,
        "options": False,
    }
    checked = tuple(fact for fact, known in facts.items() if known)
    return checked, tuple(fact for fact, known in facts.items() if not known)

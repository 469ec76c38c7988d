"""Prunes of tiny models, interrupted ones too, and what they leave in their folders."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from strategies import slow
from tiny_models import tokens

from maskopt import prune_model, remove_blocks, remove_experts, shrink_model
from maskopt.models.blockwise.forward import BlockProgress
from maskopt.models.checkpoints.report import PruneReport
from maskopt.models.checkpoints.result import MaskFile, TensorMask
from maskopt.models.checkpoints.schema import MANIFEST, read_manifest
from maskopt.models.checkpoints.workspace import HIDDEN

WANDA: dict[str, Any] = {"sparsity": 0.5, "solver": "wanda", "min_tokens": 1}


def prune(model: Any, output: Path | None = None, data: Any = None, **options: Any) -> PruneReport:
    """By Wanda to 50% zeros, on the usual tokens, or as the options say."""
    if data is None and not {"grams", "calibration"} & options.keys():
        data = tokens()
    return prune_model(model, data, output=output, **WANDA | options)


def smaller(dense: Any, output: Path, data: Any = None, **what: Any) -> Any:
    """Without blocks (`count`), experts (a `share`), or channels and heads; on the usual tokens."""
    remove = (
        remove_blocks if "count" in what else remove_experts if "share" in what else shrink_model
    )
    return remove(dense, tokens() if data is None else data, output=output, **what)


def but_slow(first: Any, cases: Iterable[Any]) -> list[Any]:
    """All cases, of which all but the first ones run with --slow only."""
    given = ((each, each if isinstance(each, tuple) else (each,)) for each in cases)
    return [each if each in first else slow(*values) for each, values in given]


class Stop(Exception):
    """Interrupts a run."""


def interrupted(dense: Path, out: Path, block: int, stage: str, **options: Any) -> None:
    """A prune that ends with this stage of this block."""

    def stop(event: BlockProgress) -> None:
        if (event.block, event.stage) == (block, stage) and event.done:
            raise Stop

    with pytest.raises(Stop):
        prune(dense, out, on_progress=stop, **options)


def contents(folder: Path) -> dict[str, bytes]:
    """All files by name; the manifest without seconds, memory and its digest, which covers them."""
    assert not (folder / HIDDEN).exists()
    result = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
    manifest = json.loads(result[MANIFEST])
    for part in (manifest, *manifest["layers"], *manifest["trained"]):
        del part["seconds"]
    del manifest["sha256"], manifest["memory"]
    result[MANIFEST] = json.dumps(manifest, sort_keys=True).encode()
    return result


def files(folder: Path) -> dict[str, bytes]:
    """All files by their path in the folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def manifest_of(folder: Path) -> dict[str, Any]:
    return read_manifest(folder / MANIFEST)


def read_masks(path: Path) -> dict[str, TensorMask]:
    """All masks of a file, by the names of their tensors."""
    masks = MaskFile(path)
    return {name: masks.read(name) for name in masks.names}

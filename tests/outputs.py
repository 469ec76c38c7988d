"""What a prune left in its folder, to be compared."""

from __future__ import annotations

import json
from pathlib import Path

from maskopt.models.checkpoints.mask_file import MaskFile, TensorMask
from maskopt.models.checkpoints.workspace import HIDDEN, MANIFEST


def contents(folder: Path) -> dict[str, bytes]:
    """All files by name; the manifest without seconds, memory and its digest, which covers them."""
    assert not (folder / HIDDEN).exists()
    result = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
    manifest = json.loads(result[MANIFEST])
    for part in (manifest, *manifest["layers"], *manifest["parts"]):
        del part["seconds"]
    del manifest["sha256"], manifest["memory"]
    result[MANIFEST] = json.dumps(manifest, sort_keys=True).encode()
    return result


def files(folder: Path) -> dict[str, bytes]:
    """All files by their path in the folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def read_masks(path: Path) -> dict[str, TensorMask]:
    """All masks of a file, by the names of their tensors."""
    masks = MaskFile(path)
    return {name: masks.read(name) for name in masks.names}

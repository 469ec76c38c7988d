"""Hostile bytes for the loaders of masks, journals, manifests, indices, shards and instances."""

from __future__ import annotations

import json
import random
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forging import forged, signed
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from maskopt import LayerProblem, RowProblem, Unstructured
from maskopt.errors import MaskoptError
from maskopt.models.checkpoints.checkpoint import INDEX, open_checkpoint
from maskopt.models.checkpoints.journal import Journal
from maskopt.models.checkpoints.mask_file import MaskFile, TensorMask, write_masks
from maskopt.models.checkpoints.report import manifest_digest, read_layers, read_manifest
from maskopt.models.checkpoints.safefile import open_safe
from maskopt.models.checkpoints.workspace import MANIFEST
from maskopt.models.verification.verify import verify_model

TELLING = (b"-1", b"null", b"[]", b"{}", b"1e999", b'"../../x"', b"99999999999999999999")


def mutations(data: bytes, seed: int) -> bytes:
    """A few random edits: flips, cuts, repeats, insertions of telling values."""
    generator = random.Random(seed)
    value = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        place = generator.randrange(len(value) + 1)
        kind = generator.randrange(6)
        if kind == 0 and place < len(value):
            value[place] ^= 1 << generator.randrange(8)
        elif kind == 1:
            del value[place : place + generator.randint(1, 40)]
        elif kind == 2:
            value[place:place] = value[place : place + generator.randint(1, 40)]
        elif kind == 3:
            value[place:place] = generator.choice(TELLING)
        elif kind == 4:
            value = value[:place]
        else:
            value[place : place + 8] = struct.pack("<Q", generator.getrandbits(64))
    return bytes(value)


def hostile(kind: str, data: bytes, seed: int) -> bytes:
    """A few random edits; to forged files in what they say, with their digests made right."""
    if not kind.startswith("forged"):
        return mutations(data, seed)
    generator, records = random.Random(seed), [json.loads(line) for line in data.splitlines()]
    place = generator.randrange(len(records))
    records[place] = forged(records[place], generator)
    return b"".join(
        json.dumps(signed(record), sort_keys=True).encode() + b"\n" for record in records
    )


LOADERS: dict[str, Callable[[Path], object]] = {
    "masks": lambda path: [MaskFile(path).read(name) for name in MaskFile(path).names],
    "journal": Journal,
    "manifest": read_manifest,
    "forged journal": lambda path: [
        read_layers(record["layers"], path) for record in Journal(path).blocks.values()
    ],
    "forged manifest": lambda path: read_layers(read_manifest(path)["layers"], path),
    "shard": lambda path: [open_safe(path).read(name) for name in open_safe(path).entries],
    "layer": LayerProblem.load,
    "row": RowProblem.load,
}


def try_loaders(kind: str, data: bytes, folder: Path) -> str | None:
    """Load hostile bytes: what the MaskoptError says, or None where they are sound; any other
    exception goes through."""
    (folder / "input").write_bytes(data)
    try:
        if kind == "forged result":
            (folder / "result" / MANIFEST).write_bytes(data)
            verify_model(folder / "result")
        elif kind == "index":
            (folder / INDEX).write_bytes(data)
            (folder / "config.json").write_text("{}")
            open_checkpoint(folder)
        else:
            LOADERS[kind](folder / "input")
    except MaskoptError as error:
        return str(error)
    return None


def examples(pruned_folder: Path, folder: Path) -> dict[str, bytes]:
    """One sound file of each kind; in `folder` stays a result for the manifests."""
    made = Journal(folder / "journal")
    made.begin({"seed": 1})
    whole = json.loads((pruned_folder / MANIFEST).read_text())
    made.add_block(0, {"layers": whole["layers"][:2], "masks": "0", "bad": [{"sample": 1}]})
    made.add_shard("a.safetensors", "0")
    write_masks(folder / "masks", {"a": TensorMask(torch.ones(3, 5, dtype=torch.bool), 1)})
    save_file({"a": torch.ones(3, 2), "b": torch.ones(4)}, folder / "shard")
    problem = LayerProblem(torch.ones(2, 4), torch.eye(4), Unstructured(0.5))
    problem.save(folder / "layer.npz")
    problem.row(0).save(folder / "row.npz")
    (folder / "forged manifest").write_text(json.dumps(whole))
    manifest = whole | {part: type(whole[part])() for part in ("layers", "tensors", "files")}
    manifest["sha256"] = manifest_digest(manifest)
    (folder / "manifest").write_text(json.dumps(manifest))
    (folder / "index").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    result = {file.stem: file.read_bytes() for file in folder.iterdir()}
    for file in folder.iterdir():
        file.unlink()
    shutil.copytree(pruned_folder, folder / "result")
    forged_too = {"journal": "forged journal", "forged manifest": "forged result"}
    return result | {new: result[old] for old, new in forged_too.items()}


# tests/benchmarks/fuzz_loaders.py runs the same with 100,000 inputs and more
@pytest.mark.parametrize(
    "seeds", [range(30), pytest.param(range(30, 180), marks=pytest.mark.slow)], ids=str
)
def test_hostile_bytes_do_not_crash_the_loaders(
    seeds: range, pruned_folder: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    for kind, data in examples(pruned_folder, work).items():
        for seed in seeds[:90] if kind == "forged result" else seeds:  # a whole verification each
            said = try_loaders(kind, hostile(kind, data, seed), work)
            assert said is None or (said and "\n" not in said), (kind, seed)
    assert {entry.name for entry in tmp_path.iterdir()} == {"work"}
    assert {entry.name for entry in work.iterdir()} <= {"input", INDEX, "config.json", "result"}


@given(data=st.binary(max_size=200))
def test_any_bytes_at_all(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("masks", "journal", "manifest", "index", "shard", "layer", "row"):
            said = try_loaders(kind, data, Path(folder))
            assert said is None or (said and "\n" not in said), kind

"""Hostile bytes for the loaders of masks, journals, manifests, indices, shards and instances."""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
import tempfile
from pathlib import Path

import torch
from forging import forged, signed
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from maskopt import LayerProblem, RowProblem, Unstructured
from maskopt.errors import MaskoptError
from maskopt.model.checkpoint import INDEX, open_checkpoint
from maskopt.model.journal import Journal
from maskopt.model.maskfile import MaskFile, TensorMask, write_masks
from maskopt.model.report import manifest_digest, read_layers, read_manifest
from maskopt.model.safefile import open_safe
from maskopt.model.verify import verify_output
from maskopt.model.workspace import MANIFEST

#: tests/benchmarks/fuzz_loaders.py runs the same with 100,000 inputs and more
FUZZ = 300


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
            tokens_ = (
                b"-1",
                b"null",
                b"[]",
                b"{}",
                b"1e999",
                b'"../../x"',
                b"99999999999999999999",
            )
            value[place:place] = generator.choice(tokens_)
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


def try_loaders(kind: str, data: bytes, folder: Path) -> str | None:
    """Load hostile bytes: what the MaskoptError says, or None where they are sound; any other
    exception goes through."""
    path = folder / "input"
    path.write_bytes(data)
    try:
        if kind == "masks":
            masks = MaskFile(path)
            for name in masks.names:
                masks.read(name)
        elif kind == "journal":
            Journal(path)
        elif kind == "manifest":
            read_manifest(path)
        elif kind == "forged journal":
            for record in Journal(path).blocks.values():
                read_layers(record["layers"], path)
        elif kind == "forged manifest":
            read_layers(read_manifest(path)["layers"], path)
        elif kind == "forged result":
            (folder / "result" / MANIFEST).write_bytes(data)
            verify_output(folder / "result")
        elif kind == "index":
            (folder / INDEX).write_bytes(data)
            (folder / "config.json").write_text("{}")
            open_checkpoint(folder)
        elif kind == "shard":
            safe = open_safe(path)
            for name in safe.entries:
                safe.read(name)
        else:
            (RowProblem if kind == "row" else LayerProblem).load(path)
    except MaskoptError as error:
        return str(error)
    return None


def examples(pruned_folder: Path, folder: Path) -> dict[str, bytes]:
    """One sound file of each kind; in `folder` stays a result for the manifests."""
    journal = folder / "journal.jsonl"
    made = Journal(journal)
    made.begin({"seed": 1})
    whole = json.loads((pruned_folder / MANIFEST).read_text())
    made.add_block(0, {"layers": whole["layers"][:2], "masks": "0", "bad": [{"sample": 1}]})
    made.add_shard("a.safetensors", "0")
    masks = folder / "masks.safetensors"
    write_masks(masks, {"a": TensorMask(torch.ones(3, 5, dtype=torch.bool), 1)})
    shard = folder / "shard.safetensors"
    save_file({"a": torch.ones(3, 2), "b": torch.ones(4)}, shard)
    problem = LayerProblem(torch.ones(2, 4), torch.eye(4), Unstructured(0.5))
    problem.save(folder / "layer.npz")
    problem.row(0).save(folder / "row.npz")
    manifest = copy.deepcopy(whole)
    for part in ("layers", "tensors", "files"):
        manifest[part] = type(manifest[part])(list(manifest[part])[:0])
    manifest["sha256"] = manifest_digest(manifest)
    result = {
        "masks": masks.read_bytes(),
        "journal": journal.read_bytes(),
        "manifest": json.dumps(manifest).encode(),
        "index": json.dumps({"weight_map": {"a": "model.safetensors"}}).encode(),
        "forged journal": journal.read_bytes(),
        "forged manifest": json.dumps(whole).encode(),
        "forged result": json.dumps(whole).encode(),
        "shard": shard.read_bytes(),
        "layer": (folder / "layer.npz").read_bytes(),
        "row": (folder / "row.npz").read_bytes(),
    }
    for file in folder.iterdir():
        file.unlink()
    shutil.copytree(pruned_folder, folder / "result")
    return result


def test_hostile_bytes_do_not_crash_the_loaders(pruned_folder: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    sound = examples(pruned_folder, work)
    for kind, data in sound.items():
        for seed in range(FUZZ):
            said = try_loaders(kind, hostile(kind, data, seed), work)
            assert said is None or (said and "\n" not in said), (kind, seed)
    assert {entry.name for entry in tmp_path.iterdir()} == {"work"}
    assert {entry.name for entry in work.iterdir()} <= {"input", INDEX, "config.json", "result"}


@given(data=st.binary(max_size=200))
@settings(max_examples=100)
def test_any_bytes_at_all(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("masks", "journal", "manifest", "index", "shard", "layer", "row"):
            said = try_loaders(kind, data, Path(folder))
            assert said is None or (said and "\n" not in said), kind

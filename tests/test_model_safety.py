"""Files that should not be trusted: models, masks, journals, manifests; and what verify catches."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import save, tiny, tokens

from maskopt import NM, prune_model
from maskopt.errors import MaskoptError, ModelError, VerificationError
from maskopt.model.checkpoint import INDEX, open_checkpoint, plain_name
from maskopt.model.journal import Journal
from maskopt.model.maskfile import MaskFile, TensorMask, join_masks, read_masks, write_masks
from maskopt.model.output import apply_masks, extract_masks
from maskopt.model.report import manifest_digest, read_manifest
from maskopt.model.safefile import open_safe
from maskopt.model.verify import semi_structured, verify_output
from maskopt.model.workspace import MANIFEST, MASKS

OPTIONS: dict[str, Any] = {"sparsity": 0.5, "solver": "wanda", "min_tokens": 1}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny("llama"), tmp_path_factory.mktemp("dense") / "model", shard="30KB")


@pytest.fixture(scope="module")
def pruned(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "out"
    prune_model(dense, tokens(), output=out, **OPTIONS)
    return out


@pytest.fixture
def model(dense: Path, tmp_path: Path) -> Path:
    """A copy of the dense model that a test may damage."""
    return Path(shutil.copytree(dense, tmp_path / "model"))


@pytest.fixture
def result(pruned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pruned, tmp_path / "result"))


# Model folders --------------------------------------------------------------------------------


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def first_shard(model: Path) -> Path:
    return sorted(model.glob("*.safetensors"))[0]


def truncate(model: Path) -> None:
    path = first_shard(model)
    path.write_bytes(path.read_bytes()[:-1])


def disguised_pickle(model: Path) -> None:
    first_shard(model).write_bytes(pickle.dumps({"weight": [1.0] * 50}))


def disguised_zip(model: Path) -> None:
    torch.save({"weight": torch.ones(3)}, first_shard(model))


def only_pickles(model: Path) -> None:
    for path in (*model.glob("*.safetensors"), model / INDEX):
        path.unlink()
    torch.save({}, model / "pytorch_model.bin")


def outside(model: Path) -> None:
    name = first_shard(model).name
    shutil.move(model / name, model.parent / name)

    def lead_out(index: dict[str, Any]) -> None:
        for tensor, shard in index["weight_map"].items():
            if shard == name:
                index["weight_map"][tensor] = "../" + name

    edit_json(model / INDEX, lead_out)


def absolute(model: Path) -> None:
    edit_json(model / INDEX, lambda i: i["weight_map"].update(x="/etc/passwd.safetensors"))


def ghost(model: Path) -> None:
    edit_json(model / INDEX, lambda i: i["weight_map"].update(ghost=first_shard(model).name))


def drop_tensor(model: Path) -> None:
    path = first_shard(model)
    tensors = load_file(path)
    gone = sorted(tensors)[0]
    del tensors[gone]
    save_file(tensors, path)
    edit_json(model / INDEX, lambda i: i["weight_map"].pop(gone))


def header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        path = first_shard(model)
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        value = json.loads(data[8 : 8 + length])
        change(value)
        text = json.dumps(value).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return damage


def any_entry(value: dict[str, Any]) -> dict[str, Any]:
    return next(v for k, v in value.items() if k != "__metadata__")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "truncated"),
    "pickle": (disguised_pickle, "but a pickle"),
    "zip": (disguised_zip, "but a pickle"),
    "only pickles": (only_pickles, "pickled weights only"),
    "path outside": (outside, "not the name of a safetensors file in the folder"),
    "absolute path": (absolute, "not the name of a safetensors file in the folder"),
    "tensor that is not there": (ghost, "it is not"),
    "missing tensor": (drop_tensor, "no tensor for parameter"),
    "git lfs": (lambda m: first_shard(m).write_text("version https://git-lfs x"), "Git LFS"),
    "empty shard": (lambda m: first_shard(m).write_bytes(b""), "not a safetensors file"),
    "missing shard": (lambda m: first_shard(m).unlink(), "no such file"),
    "huge header": (
        lambda m: first_shard(m).write_bytes(struct.pack("<Q", 2**60) + b"{}"),
        "not a safetensors file",
    ),
    "overlap": (header(lambda h: any_entry(h).update(data_offsets=[0, 4])), "takes|overlaps"),
    "negative": (header(lambda h: any_entry(h).update(shape=[-1])), "whole numbers"),
    "unknown type": (header(lambda h: any_entry(h).update(dtype="OBJ")), "unknown element type"),
    "remote code": (
        lambda m: edit_json(m / "config.json", lambda c: c.update(auto_map={"AutoModel": "x.Y"})),
        "not run unless --trust-remote-code",
    ),
    "quantised": (
        lambda m: edit_json(m / "config.json", lambda c: c.update(quantization_config={"a": 1})),
        "quantised",
    ),
    "unknown architecture": (
        lambda m: edit_json(m / "config.json", lambda c: c.update(model_type="nonsense")),
        "config.json|model type|ValueError",
    ),
    "other shape": (
        lambda m: edit_json(m / "config.json", lambda c: c.update(intermediate_size=40)),
        "in the shards",
    ),
    "no config": (lambda m: (m / "config.json").unlink(), "no such file"),
    "broken config": (lambda m: (m / "config.json").write_text("{"), "not JSON"),
    "deep config": (lambda m: (m / "config.json").write_text("[" * 100_000), "not JSON"),
    "broken index": (lambda m: (m / INDEX).write_text('{"weight_map": 3}'), "no weight_map"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_refused_in_one_line(damage: str, model: Path, tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    change(model)
    with pytest.raises(MaskoptError, match=message) as caught:
        prune_model(model, tokens(), output=tmp_path / "out", **OPTIONS)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        prune_model(tmp_path / "none", tokens(), output=tmp_path / "out", **OPTIONS)


@pytest.mark.parametrize(
    "name", ["../a", "/a", "a/b", "a\\b", "..", ".", "", "C:a", "a\0b", "a\nb", 3, None, "x" * 300]
)
def test_names_that_lead_elsewhere(name: Any) -> None:
    assert not plain_name(name)


def test_code_and_links_out_of_the_folder_are_not_copied(model: Path, tmp_path: Path) -> None:
    (model / "modeling_x.py").write_text("print('hello')")
    (tmp_path / "secret.txt").write_text("secret")
    (model / "notes.txt").symlink_to(tmp_path / "secret.txt")
    (model / "vocab.txt").write_text("a")
    prune_model(model, tokens(), output=tmp_path / "out", **OPTIONS)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert "vocab.txt" in names
    assert not names & {"modeling_x.py", "notes.txt"}


# Masks ----------------------------------------------------------------------------------------


@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    seed=st.integers(0, 99),
    last=st.booleans(),
)
@settings(max_examples=40)
def test_masks_come_back(shape: list[int], seed: int, last: bool) -> None:
    import tempfile

    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=generator) < 0.5
    axis = len(shape) - (1 if last else 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        write_masks(path, {"a.weight": TensorMask(kept, axis), "b": TensorMask(~kept, axis)})
        back = dict(read_masks(path))
        assert torch.equal(back["a.weight"].kept, kept)
        assert torch.equal(back["b"].kept, ~kept)
        assert back["b"].input_axis == axis
        assert back["b"].rows().shape[1] == shape[axis]


def test_apply_makes_the_same_model(dense: Path, pruned: Path, tmp_path: Path) -> None:
    apply_masks(dense, pruned / MASKS, tmp_path / "out")
    for shard in pruned.glob("model*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()
    with pytest.raises(ModelError, match="not empty"):
        apply_masks(dense, pruned / MASKS, tmp_path / "out")


def test_masks_are_extracted_and_applied_again(dense: Path, pruned: Path, tmp_path: Path) -> None:
    sparsities = extract_masks(pruned, tmp_path / "masks.safetensors")
    assert len(sparsities) == 21
    ours, theirs = (
        dict(read_masks(pruned / MASKS)),
        dict(read_masks(tmp_path / "masks.safetensors")),
    )
    for name, mask in ours.items():
        assert torch.equal(mask.kept, theirs[name].kept)
        assert mask.input_axis == theirs[name].input_axis
    with pytest.raises(ModelError, match="--overwrite"):
        extract_masks(pruned, tmp_path / "masks.safetensors")


def test_masks_of_another_model_are_refused(pruned: Path, tmp_path: Path) -> None:
    for family, message in [("gpt2", "has no tensor"), ("qwen2", "x")]:
        other = save(tiny(family), tmp_path / family)
        if family == "qwen2":
            continue
        with pytest.raises(ModelError, match=message):
            apply_masks(other, pruned / MASKS, tmp_path / "out")
    write_masks(
        tmp_path / "m.safetensors",
        {"model.layers.0.mlp.up_proj.weight": TensorMask(torch.ones(2, 2, dtype=torch.bool), 1)},
    )
    with pytest.raises(ModelError, match=r"is \[2, 2\]"):
        apply_masks(save(tiny("llama"), tmp_path / "l"), tmp_path / "m.safetensors", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_flipped_bit_in_the_masks(dense: Path, result: Path, tmp_path: Path) -> None:
    data = bytearray((result / MASKS).read_bytes())
    data[-10] ^= 1
    (result / MASKS).write_bytes(bytes(data))
    with pytest.raises(ModelError, match="does not match its digest"):
        apply_masks(dense, result / MASKS, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(VerificationError, match="was changed"):
        verify_output(result)


def test_parts_with_the_same_mask_are_not_joined(tmp_path: Path) -> None:
    part = tmp_path / "a.safetensors"
    write_masks(part, {"x": TensorMask(torch.ones(2, 2, dtype=torch.bool), 1)})
    with pytest.raises(ModelError, match="another part"):
        join_masks(tmp_path / "b.safetensors", [part, part])


# Verify ---------------------------------------------------------------------------------------


def forge_manifest(result: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and make its digest right again."""
    manifest = json.loads((result / MANIFEST).read_text())
    change(manifest)
    for name in manifest["files"]:
        if (result / name).exists():
            import hashlib

            digest = hashlib.sha256((result / name).read_bytes()).hexdigest()
            manifest["files"][name] = digest
    manifest["sha256"] = manifest_digest(manifest)
    (result / MANIFEST).write_text(json.dumps(manifest))


def change_weight(result: Path, where: str, value: float) -> None:
    path = first_weight_shard(result)
    tensors = load_file(path)
    mask = dict(read_masks(result / MASKS))
    name = next(n for n in tensors if n in mask)
    place = (mask[name].kept if where == "kept" else ~mask[name].kept).nonzero()[0].tolist()
    tensors[name][tuple(place)] = value
    save_file(tensors, path, metadata={"format": "pt"})


def first_weight_shard(result: Path) -> Path:
    masks = MaskFile(result / MASKS)
    for path in sorted(result.glob("model*.safetensors")):
        if set(open_safe(path).entries) & set(masks.names):
            return path
    raise AssertionError


def nothing(_: dict[str, Any]) -> None:
    pass


def test_verify_catches_forgeries(dense: Path, pruned: Path, tmp_path: Path) -> None:
    def fresh() -> Path:
        shutil.rmtree(tmp_path / "r", ignore_errors=True)
        return Path(shutil.copytree(pruned, tmp_path / "r"))

    assert verify_output(fresh(), against=dense).rows == 3 * (32 * 2 + 16 * 2 + 48 * 2 + 32)
    folder = fresh()
    change_weight(folder, "kept", 1.25)
    with pytest.raises(VerificationError, match="was changed"):
        verify_output(folder)
    forge_manifest(folder, nothing)
    verify_output(folder)  # all of the folder agrees with itself
    with pytest.raises(VerificationError, match="kept weight differs"):
        verify_output(folder, against=dense)
    folder = fresh()
    change_weight(folder, "pruned", 1.25)
    forge_manifest(folder, nothing)
    with pytest.raises(VerificationError, match="that its mask prunes"):
        verify_output(folder)
    folder = fresh()
    masks = dict(read_masks(folder / MASKS))
    name = next(iter(masks))
    masks[name].kept[0, 0] = ~masks[name].kept[0, 0]
    write_masks(folder / MASKS, masks)
    forge_manifest(folder, nothing)
    with pytest.raises(VerificationError, match=r"row 0: 1[57] of 32 pruned"):
        verify_output(folder)
    for change, message in [
        (lambda m: m["tensors"].popitem(), "different tensors"),
        (lambda m: m["layers"].pop(), "other pruned weights"),
        (lambda m: m["files"].update(ghost="x"), "is not there"),
        (lambda m: m["files"].update({"../x": "x"}), "is not there"),
    ]:
        folder = fresh()
        forge_manifest(folder, change)  # type: ignore[arg-type]
        with pytest.raises(VerificationError, match=message):
            verify_output(folder)
    folder = fresh()
    edit_json(folder / MANIFEST, lambda m: m.update(sparsity=0.9))
    with pytest.raises(VerificationError, match="damaged or was changed"):
        verify_output(folder)
    with pytest.raises(VerificationError, match="no manifest"):
        verify_output(dense)
    other = save(tiny("qwen2"), tmp_path / "other")
    with pytest.raises(VerificationError, match="only one of the two"):
        verify_output(pruned, against=other)


def test_two_four_needs_a_gpu_to_be_converted(dense: Path, tmp_path: Path) -> None:
    prune_model(dense, tokens(), pattern=NM(keep=2, of=4), solver="wanda", output=tmp_path / "out")
    if not torch.cuda.is_available():
        with pytest.raises(VerificationError, match="CUDA"):
            semi_structured(tmp_path / "out")


@pytest.mark.cuda
def test_pytorch_accepts_two_four(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    dense = save(LlamaForCausalLM(config), tmp_path / "dense")
    prune_model(dense, tokens(), pattern=NM(keep=2, of=4), solver="wanda", output=tmp_path / "out")
    assert len(semi_structured(tmp_path / "out")) == 7


# Fuzzing --------------------------------------------------------------------------------------

#: tests/benchmarks/fuzz_loaders.py runs the same with 100,000 inputs and more
FUZZ = 300


def mutations(data: bytes, seed: int) -> bytes:
    """A few random edits: flips, cuts, repeats, insertions of telling values."""
    import random

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


def try_loaders(kind: str, data: bytes, folder: Path) -> None:
    """Load hostile bytes: a MaskoptError or a sound result, never another exception."""
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
        elif kind == "index":
            (folder / INDEX).write_bytes(data)
            (folder / "config.json").write_text("{}")
            open_checkpoint(folder)
        elif kind == "shard":
            safe = open_safe(path)
            for name in safe.entries:
                safe.read(name)
        else:
            from maskopt import LayerProblem, RowProblem

            (RowProblem if kind == "row" else LayerProblem).load(path)
    except MaskoptError as error:
        if not str(error):
            raise


def examples(pruned: Path, folder: Path) -> dict[str, bytes]:
    """One sound file of each kind."""
    from maskopt import LayerProblem, Unstructured

    journal = folder / "journal.jsonl"
    made = Journal(journal)
    made.begin({"seed": 1})
    made.add_block(0, {"layers": [], "masks": "0", "bad": []})
    masks = folder / "masks.safetensors"
    write_masks(masks, {"a": TensorMask(torch.ones(3, 5, dtype=torch.bool), 1)})
    shard = folder / "shard.safetensors"
    save_file({"a": torch.ones(3, 2), "b": torch.ones(4)}, shard)
    problem = LayerProblem(torch.ones(2, 4), torch.eye(4), Unstructured(0.5))
    problem.save(folder / "layer.npz")
    problem.row(0).save(folder / "row.npz")
    manifest = json.loads((pruned / MANIFEST).read_text())
    for part in ("layers", "tensors", "files"):
        manifest[part] = type(manifest[part])(list(manifest[part])[:0])
    manifest["sha256"] = manifest_digest(manifest)
    result = {
        "masks": masks.read_bytes(),
        "journal": journal.read_bytes(),
        "manifest": json.dumps(manifest).encode(),
        "index": json.dumps({"weight_map": {"a": "model.safetensors"}}).encode(),
        "shard": shard.read_bytes(),
        "layer": (folder / "layer.npz").read_bytes(),
        "row": (folder / "row.npz").read_bytes(),
    }
    for file in folder.iterdir():
        file.unlink()
    return result


def test_hostile_bytes_do_not_crash_the_loaders(pruned: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    sound = examples(pruned, work)
    for kind, data in sound.items():
        for seed in range(FUZZ):
            try_loaders(kind, mutations(data, seed), work)
    assert {entry.name for entry in tmp_path.iterdir()} == {"work"}
    assert {entry.name for entry in work.iterdir()} <= {"input", INDEX, "config.json"}


@given(data=st.binary(max_size=200))
@settings(max_examples=100)
def test_any_bytes_at_all(data: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for kind in ("masks", "journal", "manifest", "index", "shard", "layer", "row"):
            try_loaders(kind, data, Path(folder))

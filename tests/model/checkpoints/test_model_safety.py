"""Model folders that should not be trusted are refused, in one line, before anything is written."""

import errno
import json
import os
import pickle
import random
import re
import shutil
import struct
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from commands import run
from forging import change_tensors, config, edit, fails, forged, shards, signed
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given, strategies as st
from prunes import prune, slow, smaller
from safetensors.torch import load_file, save_file
from tiny_models import chat_tokenizer, edit_json, save, save_with_own_code, tiny

import maskopt
from maskopt import LayerProblem, Unstructured, load_problem
from maskopt.errors import DataError, MaskoptError, ModelError, VerificationError
from maskopt.models.architecture.source import load_tokenizer, open_source
from maskopt.models.blockwise.activations import Activations
from maskopt.models.checkpoints.checkpoint import open_checkpoint, open_safe
from maskopt.models.checkpoints.report import LayerReport, read_reports
from maskopt.models.checkpoints.result import MaskFile, TensorMask, write_masks
from maskopt.models.checkpoints.schema import (
    INDEX,
    MANIFEST,
    MASKS,
    MAX_JSON,
    manifest_digest,
    plain_name,
    read_manifest,
)
from maskopt.models.checkpoints.workspace import Journal, check_output
from maskopt.models.pruning.output import apply_masks
from maskopt.models.verification.tensors import Masks
from maskopt.models.verification.verify import verify_model


@pytest.fixture
def model(dense_folder, tmp_path):
    return Path(shutil.copytree(dense_folder, tmp_path / "model"))


def only_pickles(model):
    for path in (*model.glob("*.safetensors"), model / INDEX):
        path.unlink()
    torch.save({}, model / "pytorch_model.bin")


def outside(model):
    name = shards(model)[0].name
    shutil.move(model / name, model.parent / name)
    there = lambda where: {t: f"../{x}" if x == name else x for t, x in where.items()}  # noqa: E731
    edit_json(model / INDEX, edit("weight_map", to=there))


def lead_out(name):
    """The file moves out of the folder, and a link leads there; "" is the first shard."""

    def damage(model):
        file = model / name if name else shards(model)[0]
        file.symlink_to(shutil.move(file, model.parent / f"elsewhere-{file.name}"))

    return damage


def in_place(make):
    return lambda model: (path := shards(model)[0], path.unlink(), make(path))


def data(change):
    return lambda model: shards(model)[0].write_bytes(change(shards(model)[0].read_bytes()))


def headers(change):
    """Another header of the first shard; a value that is returned takes its place."""

    def changed(data):
        (length,) = struct.unpack("<Q", data[:8])
        value = json.loads(data[8 : 8 + length])
        text = json.dumps(change(value) or value).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return data(changed)


def header(**given):
    return headers(lambda h: next(v for k, v in h.items() if k != "__metadata__").update(given))


def first_dropped(head):
    """Of the first tensor the bytes alone are left."""
    del head[next(k for k, v in head.items() if v.get("data_offsets", [1])[0] == 0)]


def written(name, text):
    return lambda model: (model / name).write_text(text)


def weight_map(change):
    return lambda m: edit_json(m / INDEX, lambda i: change(i["weight_map"], shards(m)[0].name))


def drop_tensor(model):
    gone = min(load_file(shards(model)[0]))
    change_tensors(shards(model)[0], lambda tensors: tensors.pop(gone))
    weight_map(lambda places, _: places.pop(gone))(model)


def twice(model):
    """A tensor, and the same parameter without the name of the base model."""
    name = next(n for n in load_file(shards(model)[0]) if n.startswith("model.layers."))
    change_tensors(shards(model)[0], lambda t: t.update({name[6:]: t[name] + 1}))
    weight_map(lambda places, first: places.update({name[6:]: first}))(model)


BLOCKS = config(num_hidden_layers=10**12, layer_types=None)
NOT_A_NAME = "not the name of a safetensors file in the folder"
DAMAGES = {
    "truncated": (data(lambda d: d[:-1]), "or incomplete: .* file not fully covered"),
    "pickle": (data(lambda _: pickle.dumps({"weight": [1.0] * 50})), "but a pickle"),
    "zip": (lambda m: torch.save({"weight": torch.ones(3)}, shards(m)[0]), "but a pickle"),
    "only pickles": (only_pickles, "pickled weights only"),
    "path outside": (outside, NOT_A_NAME),
    "absolute path": (weight_map(lambda w, _: w.update(x="/etc/passwd.safetensors")), NOT_A_NAME),
    "tensor that is not there": (weight_map(lambda w, first: w.update(ghost=first)), "it is not"),
    "missing tensor": (drop_tensor, "no tensor for parameter"),
    "shard by a link out": (lead_out(""), "link out of the model folder, to .*elsewhere-model"),
    "config by a link out": (lead_out("config.json"), "link out of the model folder"),
    "index by a link out": (lead_out(INDEX), "link out of the model folder"),
    "link in a circle": (in_place(lambda path: path.symlink_to(path.name)), "cannot be read"),
    "pipe": (in_place(os.mkfifo), "not a regular file"),
    "folder": (in_place(Path.mkdir), "not a regular file"),
    "git lfs": (data(lambda _: b"version https://git-lfs x"), "Git LFS"),
    "empty shard": (data(lambda _: b""), "not a safetensors file"),
    "missing shard": (in_place(lambda _: None), "no such file"),
    "huge header": (data(lambda _: struct.pack("<Q", 2**60) + b"{}"), "not a safetensors file"),
    "overlap": (header(data_offsets=[0, 4]), "not a safetensors file, or incomplete"),
    "gap": (headers(first_dropped), "invalid offset for tensor"),
    "bytes at the end": (data(lambda d: d + b"0"), "file not fully covered"),
    "list for a header": (headers(lambda _: [1]), "invalid type: sequence"),
    "metadata": (headers(lambda h: h.update(__metadata__={"format": 1})), "expected a string"),
    "bare entry": (headers(lambda h: h.update(x={})), "missing field `dtype`"),
    "negative": (header(shape=[-1]), "integer `-1`, expected usize"),
    "unknown type": (header(dtype="OBJ"), "unknown variant `OBJ`"),
    "remote code": (config(auto_map={"AutoModel": "x.Y"}), "not run unless `trust_remote_code`"),
    "other weights by config": (config(transformers_weights="x.st"), "transformers_weights"),
    "adapter": (written("adapter_config.json", "{}"), "holds an adapter"),
    "quantised": (config(quantization_config={"a": 1}), "quantised"),
    "quantised in a part": (config(text_config={"quantization_config": {"a": 1}}), "quantised"),
    "kernel": (config(_attn_implementation="owner/kernel"), "_attn_implementation.*`trust_remote"),
    "blocks": (BLOCKS, "config.json: `num_hidden_layers` is 10{12}, .* tensors have 3 blocks"),
    "blocks of a part": (config(vision_config={"depth": 10**5}), "`depth` is 100000"),
    "experts": (config(num_local_experts=10**5), "is 100000, .* stored tensors have 0 experts"),
    "tensor twice": (twice, "are the same parameter; remove one of them"),
    "unknown architecture": (config(model_type="nonsense"), "config.json|model type|ValueError"),
    "other shape": (config(intermediate_size=40), "in the shards"),
    "no config": (lambda m: (m / "config.json").unlink(), "no such file"),
    "broken config": (written("config.json", "{"), "not JSON"),
    "huge config": (lambda m: os.truncate(m / "config.json", MAX_JSON + 1), "larger than 256 MiB"),
    "list for a config": (written("config.json", "[1]"), "not a JSON object"),
    "no weights": (lambda m: [x.unlink() for x in (*shards(m), m / INDEX)], "neither .* is there"),
    "deep config": (written("config.json", "[" * 100_000), "not JSON"),
    "broken index": (written(INDEX, '{"weight_map": 3}'), "no weight_map"),
    "no folder": (shutil.rmtree, "no such model folder"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_refused_in_one_line(damage, model, tmp_path):
    change, message = DAMAGES[damage]
    change(model)
    fails(MaskoptError, rf"\A.*({message}).*\Z", prune, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def layout(**given):
    def change(metadata, _):
        metadata["tensors"] = json.dumps({"a": json.loads(metadata["tensors"])["a"] | given})

    return change


MASK_DAMAGES = {
    "format": (lambda m, _: m.update(format="maskopt-masks-0"), "not a mask file of format"),
    "no layout": (lambda m, _: m.pop("tensors"), "the header of the masks is damaged"),
    "another tensor": (
        lambda _, t: t.update(b=t["a"].clone()),
        "names other tensors than the file holds",
    ),
    "axis": (layout(input_axis=2), "the header of mask 'a' is damaged"),
    "axis before": (layout(input_axis=-1), "the header of mask 'a' is damaged"),
    "a further key": (layout(more=1), "the header of mask 'a' is damaged"),
    "type": (lambda _, t: t.update(a=t["a"].to(torch.int8)), "header of mask 'a'|number of bits"),
    "bits": (lambda _, t: t.update(a=t["a"][:1].clone()), "has the wrong number of bits"),
    "shape": (layout(shape=[5, 3]), "digest|another shape"),
    "digest": (layout(sha256="0" * 64), "digest"),
}


@pytest.mark.parametrize("damage", MASK_DAMAGES)
def test_a_damaged_mask_file_is_refused_by_both_readers(damage, tmp_path):
    change, said = MASK_DAMAGES[damage]
    whole = torch.ones(3, 5, dtype=torch.bool)
    write_masks(path := tmp_path / "masks", {"a": TensorMask(whole, 1)})
    change(metadata := dict(open_safe(path).metadata), tensors := load_file(path))
    save_file(tensors, path, metadata)
    fails(ModelError, said, lambda: MaskFile(path).read("a"))
    fails((ModelError, VerificationError), said, lambda: Masks(path).kept("a", whole))


def test_links_of_the_hubs_cache(dense, tmp_path):
    """snapshots/REVISION/… are links into blobs/, and are copied, as are links to files of the folder."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    shutil.copytree(dense, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    (snapshot / "vocab.json").symlink_to("tokenizer_config.json")
    (snapshot / "modeling_x.py").write_text("print('hello')")  # code is not copied
    (tmp_path / "secret.txt").write_text("secret")
    (snapshot / "notes.pdf").symlink_to(tmp_path / "secret.txt")  # of no kind that is copied
    prune(snapshot, out := tmp_path / "out")
    verify_model(out, original=snapshot)
    assert not any(file.is_symlink() for file in out.iterdir())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (dense / name).read_bytes()
    assert (out / "vocab.json").is_file()
    assert not [name for name in ("modeling_x.py", "notes.pdf") if (out / name).exists()]
    assert load_tokenizer(out) is not None


COMMANDS = {
    "prune": lambda model, out, _: prune(model, out),
    "apply": lambda model, out, pruned: apply_masks(model, pruned / MASKS, out),
    "prune-structured": lambda model, out, _: smaller(model, out, channels=0.5, solver="wanda"),
    "remove": lambda model, out, _: smaller(model, out, count=1, windows=2),
}
LINKS = {
    "../secret.json": "link out of the model folder, to .*secret.json; put the file itself",
    "gone.json": "link to .*gone.json, which is no file; put the file itself there",
    "folder": "link to .*folder, which is no file; put the file itself there",
}


@pytest.mark.parametrize(("target", "said"), LINKS.items())
@pytest.mark.parametrize("command", COMMANDS)
def test_a_link_of_a_tokenizer_is_refused(command, target, said, dense, pruned_folder, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    name = "tokenizer.json"
    model, out = Path(shutil.copytree(dense, tmp_path / "model")), tmp_path / "out"
    (model / "folder").mkdir()
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(target)
    fails(ModelError, f"{name}: .*{said}", COMMANDS[command], model, out, pruned_folder)
    assert not out.exists()


def test_names_that_lead_elsewhere_and_options_that_errors_name(tmp_path, monkeypatch):
    outside = ["../a", "/a", "a/b", "a\\b", "..", ".", "", "C:a", "a\0b", "a\nb", 3, None]
    outside.append("x" * 300)
    assert not [name for name in outside if plain_name(name)]
    (tmp_path / "maskopt-apply.json").write_text('{"files": []}')
    for resume, message in (
        (False, "exists and is not empty; `overwrite` replaces it"),
        (True, "nothing to resume there; start without `resume`"),
    ):
        said = rf"\A{re.escape(f'{tmp_path}: {message}')}\Z"
        fails(ModelError, said, check_output, tmp_path, overwrite=False, resume=resume)
    fails(ModelError, "`dtype` is for model folders", open_source, tiny("llama"), dtype="float32")
    for file in (Path(maskopt.__file__).parent / "models").rglob("*.py"):
        assert not re.search(r"--(overwrite|resume|dtype)", file.read_text()), file
    # a file of hidden states that cannot be
    states = (range(2), torch.Size((1, 3, 4)), torch.float32, tmp_path)
    numbers = {errno.ENOSPC: r"no room for 0\.00 GiB", errno.EACCES: "cannot be written"}
    for number, why in numbers.items():
        monkeypatch.setattr(
            "tempfile.TemporaryFile", Mock(side_effect=OSError(number, "because of x"))
        )
        said = rf"\A{re.escape(str(tmp_path))}: (?=.*because of x)(?=.*`activation_memory`).*{why}"
        fails(ModelError, said, Activations, *states)


@pytest.mark.parametrize("chat", [False, True, None])
def test_a_tokenizer_that_panics_is_one_error(chat, model, tmp_path):
    """When it is loaded, or used: its library is written in Rust, and raises what is no Exception."""

    def panic(tokenizer):
        if chat is None:
            tokenizer["post_processor"].update(special_tokens={})
        else:
            tokenizer.update(normalizer={"type": "Precompiled", "precompiled_charsmap": ""})

    chat_tokenizer().save_pretrained(model)
    edit_json(model / "tokenizer.json", panic)
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "some words", "messages": [{"role": "user", "content": "words"}]}')
    how = {"calibration": text, "chat": bool(chat), "seq_len": 4}
    said = r"model/tokenizer\.json: the tokenizer's library stopped"
    fails(DataError, said, prune, model, tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


# --- code that comes with a model runs only when asked for
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).write_text("yes")
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
OWN = "modeling_own.Own"
CLASSES = {"AutoConfig": f"{OWN}Config", "AutoModelForCausalLM": f"{OWN}ForCausalLM"}


def test_remote_code(tmp_path, monkeypatch):
    cache = "transformers.dynamic_module_utils.HF_MODULES_CACHE"
    monkeypatch.setattr(cache, str(tmp_path / "modules"))
    dense, marker = save(tiny("llama"), tmp_path / "dense"), tmp_path / "ran"
    (dense / "modeling_own.py").write_text(CODE.format(marker=str(marker)))
    edit_json(dense / "config.json", lambda c: c.update(model_type="own_llama", auto_map=CLASSES))
    out = tmp_path / "out"
    fails(ModelError, "not run unless `trust_remote_code`", prune, dense, out)
    assert not marker.exists()
    prune(dense, out, trust_remote_code=True)
    assert marker.exists()
    verify_model(out, original=dense)
    # of a model on the hub it is fetched only when asked for
    stored, fetched = save_with_own_code(tmp_path / "stored"), tmp_path / "fetched"
    (stored / "fp16").mkdir()
    for name in ("consolidated.safetensors", "fp16/model.safetensors"):
        (stored / name).write_bytes(b"the same weights")
    (stored / "qwen.tiktoken").write_text("IQ== 0")
    (stored / "weights.bin").write_bytes(b"pickled")

    def snapshot_download(name, **patterns):
        assert name == "owner/own"
        names = (str(f.relative_to(stored)) for f in stored.rglob("*") if f.is_file())
        for file in filter_repo_objects(names, **patterns):
            (fetched / file).parent.mkdir(exist_ok=True)
            shutil.copy(stored / file, fetched / file)
        return str(fetched)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    out = tmp_path / "of-hub"
    fails(ModelError, "not run unless `trust_remote_code`", prune, "owner/own", out)
    found = {file.name for file in fetched.rglob("*")}
    assert {"config.json", "model.safetensors", "qwen.tiktoken"} <= found
    assert not found & {"modeling_own.py", "weights.bin", "consolidated.safetensors", "fp16"}
    prune("owner/own", out, trust_remote_code=True)
    assert (fetched / "modeling_own.py").exists()
    shutil.rmtree(fetched)
    said = run("verify", out, "--original", "owner/own", "--trust-remote-code")
    assert "every kept weight is that of owner/own" in " ".join(said.split())


# --- hostile bytes
TELLING = (b"-1", b"null", b"[]", b"{}", b"1e999", b'"../../x"', b"99999999999999999999")


def mutations(data: bytes, seed: int) -> bytes:
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
    lines = [json.dumps(signed(record), sort_keys=True) + "\n" for record in records]
    return "".join(lines).encode()


layers = partial(read_reports, LayerReport)
LOADERS: dict[str, Callable[[Path], object]] = {
    "masks": lambda path: [MaskFile(path).read(name) for name in MaskFile(path).names],
    "journal": Journal,
    "manifest": read_manifest,
    "forged journal": lambda path: [layers(x["layers"]) for x in Journal(path).blocks.values()],
    "forged manifest": lambda path: layers(read_manifest(path)["layers"]),
    "shard": lambda path: [open_safe(path).read(name) for name in open_safe(path).entries],
    "layer": load_problem,
    "row": load_problem,
}


def try_loaders(kind: str, data: bytes, folder: Path) -> str | None:
    """Load hostile bytes: what the MaskoptError says, or None where they are sound."""
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
    made.add("header", header={"seed": 1})
    whole = json.loads((pruned_folder / MANIFEST).read_text())
    made.add("block", index=0, layers=whole["layers"][:2], masks="0", bad=[{"sample": 1}])
    made.add("shard", name="a.safetensors", digest="0")
    write_masks(folder / "masks", {"a": TensorMask(torch.ones(3, 5, dtype=torch.bool), 1)})
    save_file({"a": torch.ones(3, 2), "b": torch.ones(4)}, folder / "shard")
    problem = LayerProblem(torch.ones(2, 4), torch.eye(4), Unstructured(0.5))
    problem.save(folder / "layer.npz")
    problem.row(0).save(folder / "row.npz")
    (folder / "forged manifest").write_text(json.dumps(whole))
    manifest = whole | {part: type(whole[part])() for part in ("layers", "files")}
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
@pytest.mark.parametrize("seeds", [range(30), slow(range(30, 180))], ids=str)
def test_hostile_bytes_do_not_crash_the_loaders(seeds, pruned_folder, tmp_path):
    (work := tmp_path / "work").mkdir()
    for kind, data in examples(pruned_folder, work).items():
        for seed in seeds[:90] if kind == "forged result" else seeds:  # a whole verification each
            said = try_loaders(kind, hostile(kind, data, seed), work)
            assert said is None or (said and "\n" not in said), (kind, seed)
    assert {entry.name for entry in tmp_path.iterdir()} == {"work"}
    assert {entry.name for entry in work.iterdir()} <= {"input", INDEX, "config.json", "result"}


@given(data=st.binary(max_size=200))
def test_any_bytes_at_all(data):
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("masks", "journal", "manifest", "index", "shard", "layer", "row"):
            said = try_loaders(kind, data, Path(folder))
            assert said is None or (said and "\n" not in said), kind

"""Model folders that should not be trusted are refused, in one line, before anything is written."""

import errno
import json
import os
import pickle
import re
import shutil
import struct
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from commands import run
from forging import change_tensors
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from tiny_models import chat_tokenizer, edit_json, save, save_with_own_code, tiny, tokens

import maskopt
from maskopt import prune_model, shrink_model
from maskopt.errors import DataError, MaskoptError, ModelError
from maskopt.models.architecture.source import load_tokenizer, open_source
from maskopt.models.blockwise.activations import Activations
from maskopt.models.checkpoints.checkpoint import INDEX, plain_name
from maskopt.models.checkpoints.pack import pack
from maskopt.models.checkpoints.workspace import MASKS, check_output
from maskopt.models.pruning.output import apply_masks
from maskopt.models.structured.blocks import remove_blocks
from maskopt.models.verification.verify import verify_model

OPTIONS = {"sparsity": 0.5, "solver": "wanda", "min_tokens": 1}


@pytest.fixture
def model(dense_folder, tmp_path):
    """A copy of the dense model that a test may damage."""
    return Path(shutil.copytree(dense_folder, tmp_path / "model"))


def shard(model):
    return min(model.glob("*.safetensors"))


def only_pickles(model):
    for path in (*model.glob("*.safetensors"), model / INDEX):
        path.unlink()
    torch.save({}, model / "pytorch_model.bin")


def outside(model):
    name = shard(model).name
    shutil.move(model / name, model.parent / name)

    def lead_out(places, _):
        places.update({t: "../" + name for t, where in places.items() if where == name})

    weight_map(lead_out)(model)


def lead_out(name):
    """The file moves out of the folder, and a link leads there; "" is the first shard."""

    def damage(model):
        file = model / name if name else shard(model)
        elsewhere = shutil.move(file, model.parent / f"elsewhere-{file.name}")
        file.symlink_to(elsewhere)

    return damage


def in_place(make):
    """Something else in the place of the first shard."""
    return lambda model: (path := shard(model), path.unlink(), make(path))


def data(change):
    """Other bytes in the first shard."""
    return lambda model: shard(model).write_bytes(change(shard(model).read_bytes()))


def header(**given):
    """Another entry of the first tensor."""

    def change(data):
        (length,) = struct.unpack("<Q", data[:8])
        value = json.loads(data[8 : 8 + length])
        next(v for k, v in value.items() if k != "__metadata__").update(given)
        text = json.dumps(value).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return data(change)


def config(**given):
    return lambda model: edit_json(model / "config.json", lambda c: c.update(given))


def written(name, text):
    return lambda model: (model / name).write_text(text)


def weight_map(change):
    return lambda m: edit_json(m / INDEX, lambda i: change(i["weight_map"], shard(m).name))


def drop_tensor(model):
    gone = min(load_file(shard(model)))
    change_tensors(shard(model), lambda tensors: tensors.pop(gone))
    weight_map(lambda places, _: places.pop(gone))(model)


def twice(model):
    """A tensor, and the same parameter without the name of the base model."""
    name = next(n for n in load_file(shard(model)) if n.startswith("model.layers."))
    change_tensors(shard(model), lambda t: t.update({name[6:]: t[name] + 1}))
    weight_map(lambda places, first: places.update({name[6:]: first}))(model)


BLOCKS = config(num_hidden_layers=10**12, layer_types=None)
NOT_A_NAME = "not the name of a safetensors file in the folder"
DAMAGES = {
    "truncated": (data(lambda d: d[:-1]), "truncated"),
    "pickle": (data(lambda _: pickle.dumps({"weight": [1.0] * 50})), "but a pickle"),
    "zip": (lambda m: torch.save({"weight": torch.ones(3)}, shard(m)), "but a pickle"),
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
    "overlap": (header(data_offsets=[0, 4]), "takes|overlaps"),
    "negative": (header(shape=[-1]), "whole numbers"),
    "unknown type": (header(dtype="OBJ"), "unknown element type"),
    "remote code": (config(auto_map={"AutoModel": "x.Y"}), "not run unless `trust_remote_code`"),
    "other weights by config": (config(transformers_weights="x.st"), "transformers_weights"),
    "adapter": (written("adapter_config.json", "{}"), "holds an adapter"),
    "quantised": (config(quantization_config={"a": 1}), "quantised"),
    "quantised in a part": (config(text_config={"quantization_config": {"a": 1}}), "quantised"),
    "kernel": (config(_attn_implementation="owner/kernel"), "kernel from the hub .*`trust_remote"),
    "blocks": (
        BLOCKS,
        "config.json: `num_hidden_layers` is 10{12}, .* stored tensors have 3 blocks",
    ),
    "blocks of a part": (config(vision_config={"depth": 10**5}), "`depth` is 100000"),
    "experts": (config(num_local_experts=10**5), "is 100000, .* stored tensors have 0 experts"),
    "tensor twice": (twice, "are the same parameter; remove one of them"),
    "unknown architecture": (config(model_type="nonsense"), "config.json|model type|ValueError"),
    "other shape": (config(intermediate_size=40), "in the shards"),
    "no config": (lambda m: (m / "config.json").unlink(), "no such file"),
    "broken config": (written("config.json", "{"), "not JSON"),
    "deep config": (written("config.json", "[" * 100_000), "not JSON"),
    "broken index": (written(INDEX, '{"weight_map": 3}'), "no weight_map"),
    "no folder": (shutil.rmtree, "no such model folder"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_refused_in_one_line(damage, model, tmp_path):
    change, message = DAMAGES[damage]
    change(model)
    with pytest.raises(MaskoptError, match=message) as caught:
        prune_model(model, tokens(), output=tmp_path / "out", **OPTIONS)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_links_of_the_hubs_cache(dense, tmp_path):
    """snapshots/REVISION/… are links into blobs/ in the same folder, and are followed and copied, as are
    links to other files of the folder."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    shutil.copytree(dense, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    (snapshot / "vocab.json").symlink_to("tokenizer_config.json")
    (snapshot / "modeling_x.py").write_text("print('hello')")  # code is not copied
    (tmp_path / "secret.txt").write_text("secret")
    (snapshot / "notes.pdf").symlink_to(tmp_path / "secret.txt")  # of no kind that is copied
    out = tmp_path / "out"
    prune_model(snapshot, tokens(), output=out, **OPTIONS)
    verify_model(out, original=snapshot)
    assert not any(file.is_symlink() for file in out.iterdir())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (dense / name).read_bytes()
    assert (out / "vocab.json").is_file()
    assert not (out / "modeling_x.py").exists()
    assert not (out / "notes.pdf").exists()
    assert load_tokenizer(out) is not None


COMMANDS = {
    "prune": lambda model, out, _: prune_model(model, tokens(), output=out, **OPTIONS),
    "apply": lambda model, out, pruned: apply_masks(model, pruned / MASKS, out),
    "prune-structured": lambda model, out, _: shrink_model(
        model, tokens(), output=out, channels=0.5, solver="wanda"
    ),
    "remove": lambda model, out, _: remove_blocks(model, tokens(), output=out, count=1, windows=2),
    "pack": lambda model, out, _: pack(model, out),
}


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("../secret.json", "link out of the model folder, to .*secret.json; put the file itself"),
        ("gone.json", "link to .*gone.json, which is no file; put the file itself there"),
        ("folder", "link to .*folder, which is no file; put the file itself there"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_tokenizer_that_cannot_be_copied_is_refused(
    command, target, said, dense, pruned_folder, tmp_path
):
    (tmp_path / "secret.json").write_text("{}")
    source, name = dense, "tokenizer.json"
    if command == "pack":
        source, name = pruned_folder, "vocab.json"
    model, out = Path(shutil.copytree(source, tmp_path / "model")), tmp_path / "out"
    (model / "folder").mkdir()
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(target)
    with pytest.raises(ModelError, match=f"{name}: .*{said}"):
        COMMANDS[command](model, out, pruned_folder)
    assert not out.exists()


def test_names_that_lead_elsewhere():
    outside = ["../a", "/a", "a/b", "a\\b", "..", ".", "", "C:a", "a\0b", "a\nb", 3, None]
    outside.append("x" * 300)
    assert not [name for name in outside if plain_name(name)]


def test_library_errors_name_options_and_commands_their_flags(tmp_path):
    (tmp_path / "maskopt-apply.json").write_text('{"files": []}')
    for resume, message in (
        (False, "exists and is not empty; `overwrite` replaces it"),
        (True, "nothing to resume there; start without `resume`"),
    ):
        with pytest.raises(ModelError) as caught:
            check_output(tmp_path, overwrite=False, resume=resume)
        assert str(caught.value) == f"{tmp_path}: {message}"
    with pytest.raises(ModelError, match="`dtype` is for model folders"):
        open_source(tiny("llama"), dtype="float32")
    for file in (Path(maskopt.__file__).parent / "models").rglob("*.py"):
        assert not re.search(r"--(overwrite|resume|dtype)", file.read_text()), file


def test_a_file_of_hidden_states_that_cannot_be(tmp_path, monkeypatch):
    for number, said in (
        (errno.ENOSPC, "no room for 0.00 GiB"),
        (errno.EACCES, "cannot be written"),
    ):
        monkeypatch.setattr("tempfile.mkstemp", Mock(side_effect=OSError(number, "because of x")))
        with pytest.raises(ModelError, match=said) as caught:
            Activations(range(2), torch.Size((1, 3, 4)), torch.float32, tmp_path)
        assert str(caught.value).startswith(f"{tmp_path}: ")
        assert "because of x" in str(caught.value)
        assert "`activation_memory`" in str(caught.value)


NORMALIZER = {"type": "Precompiled", "precompiled_charsmap": ""}


@pytest.mark.parametrize("chat", [False, True, None])
def test_a_tokenizer_that_panics_is_one_error(chat, model, tmp_path):
    """When it is loaded, or used: its library is written in Rust, and raises what is no Exception."""

    def panic(tokenizer):
        if chat is None:
            tokenizer["post_processor"].update(special_tokens={})
        else:
            tokenizer.update(normalizer=NORMALIZER)

    chat_tokenizer().save_pretrained(model)
    edit_json(model / "tokenizer.json", panic)
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "some words", "messages": [{"role": "user", "content": "words"}]}')
    how = {"calibration": text, "chat": bool(chat), "seq_len": 4, **OPTIONS}
    with pytest.raises(DataError, match=r"model/tokenizer\.json: the tokenizer's library stopped"):
        prune_model(model, output=tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


# Code that comes with a model runs only when asked for

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).write_text("yes")


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
CLASSES = {
    "AutoConfig": "modeling_own.OwnConfig",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}


def test_remote_code(tmp_path, monkeypatch):
    cache = "transformers.dynamic_module_utils.HF_MODULES_CACHE"
    monkeypatch.setattr(cache, str(tmp_path / "modules"))
    dense, marker = save(tiny("llama"), tmp_path / "dense"), tmp_path / "ran"
    (dense / "modeling_own.py").write_text(CODE.format(marker=str(marker)))
    edit_json(dense / "config.json", lambda c: c.update(model_type="own_llama", auto_map=CLASSES))
    with pytest.raises(ModelError, match="not run unless `trust_remote_code`"):
        prune_model(dense, tokens(), output=tmp_path / "out", **OPTIONS)
    assert not marker.exists()
    prune_model(dense, tokens(), output=tmp_path / "out", trust_remote_code=True, **OPTIONS)
    assert marker.exists()
    verify_model(tmp_path / "out", original=dense)


def test_of_a_model_on_the_hub_code_is_fetched_only_when_asked_for(tmp_path, monkeypatch):
    """A fetch from the hub copies what it asks for of the model `owner/own`."""
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
    out = tmp_path / "out"
    with pytest.raises(ModelError, match="not run unless `trust_remote_code`"):
        prune_model("owner/own", tokens(), output=out, **OPTIONS)
    found = {file.name for file in fetched.rglob("*")}
    assert {"config.json", "model.safetensors", "qwen.tiktoken"} <= found
    assert not found & {"modeling_own.py", "weights.bin", "consolidated.safetensors", "fp16"}
    prune_model("owner/own", tokens(), output=out, trust_remote_code=True, **OPTIONS)
    assert (fetched / "modeling_own.py").exists()
    shutil.rmtree(fetched)
    said = run("verify", out, "--original", "owner/own", "--trust-remote-code")
    assert "every kept weight is that of owner/own" in " ".join(said.split())

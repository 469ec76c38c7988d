"""Model folders that should not be trusted are refused, in one line, before anything is written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import chat_tokenizer, edit_json, save, tiny, tokens

import maskopt
from maskopt import prune_model, shrink_model
from maskopt.errors import DataError, MaskoptError, ModelError
from maskopt.model.activations import Activations
from maskopt.model.checkpoint import INDEX, plain_name
from maskopt.model.opening import load_tokenizer, open_source
from maskopt.model.output import apply_masks
from maskopt.model.pack import pack
from maskopt.model.remove_blocks import remove_blocks
from maskopt.model.verify import verify_output
from maskopt.model.workspace import MASKS, check_output

OPTIONS: dict[str, Any] = {"sparsity": 0.5, "solver": "wanda", "min_tokens": 1}


@pytest.fixture
def model(dense_folder: Path, tmp_path: Path) -> Path:
    """A copy of the dense model that a test may damage."""
    return Path(shutil.copytree(dense_folder, tmp_path / "model"))


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


def lead_out(name: str) -> Callable[[Path], None]:
    """The file moves out of the folder, and a link leads there; "" is the first shard."""

    def damage(model: Path) -> None:
        file = model / name if name else first_shard(model)
        elsewhere = model.parent / f"elsewhere-{file.name}"
        shutil.move(file, elsewhere)
        file.symlink_to(elsewhere)

    return damage


def pipe(model: Path) -> None:
    path = first_shard(model)
    path.unlink()
    os.mkfifo(path)


def folder(model: Path) -> None:
    path = first_shard(model)
    path.unlink()
    path.mkdir()


def circle(model: Path) -> None:
    path = first_shard(model)
    path.unlink()
    path.symlink_to(path.name)


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


def entries(**given: Any) -> Callable[[Path], None]:
    return lambda model: edit_json(model / "config.json", lambda c: c.update(given))


def twice(model: Path) -> None:
    """A tensor, and the same parameter without the name of the base model."""
    path = first_shard(model)
    tensors = load_file(path)
    name = next(n for n in tensors if n.startswith("model.layers."))
    tensors[name.removeprefix("model.")] = tensors[name] + 1
    save_file(tensors, path)
    edit_json(model / INDEX, lambda i: i["weight_map"].update({name[6:]: path.name}))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "truncated"),
    "pickle": (disguised_pickle, "but a pickle"),
    "zip": (disguised_zip, "but a pickle"),
    "only pickles": (only_pickles, "pickled weights only"),
    "path outside": (outside, "not the name of a safetensors file in the folder"),
    "absolute path": (absolute, "not the name of a safetensors file in the folder"),
    "tensor that is not there": (ghost, "it is not"),
    "missing tensor": (drop_tensor, "no tensor for parameter"),
    "shard by a link out": (lead_out(""), "link out of the model folder, to .*elsewhere-model"),
    "config by a link out": (lead_out("config.json"), "link out of the model folder"),
    "index by a link out": (lead_out(INDEX), "link out of the model folder"),
    "link in a circle": (circle, "cannot be read"),
    "pipe": (pipe, "not a regular file"),
    "folder": (folder, "not a regular file"),
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
        "not run unless `trust_remote_code`",
    ),
    "other weights by config": (
        lambda m: edit_json(m / "config.json", lambda c: c.update(transformers_weights="x.st")),
        "transformers_weights",
    ),
    "adapter": (lambda m: (m / "adapter_config.json").write_text("{}"), "holds an adapter"),
    "quantised": (
        lambda m: edit_json(m / "config.json", lambda c: c.update(quantization_config={"a": 1})),
        "quantised",
    ),
    "quantised in a part": (entries(text_config={"quantization_config": {"a": 1}}), "quantised"),
    "kernel": (entries(_attn_implementation="owner/kernel"), "kernel from the hub .*`trust_remote"),
    "blocks without end": (
        entries(num_hidden_layers=10**12, layer_types=None),
        "config.json: `num_hidden_layers` is 1000000000000, and the stored tensors have 3 blocks",
    ),
    "blocks of a part": (entries(vision_config={"depth": 10**5}), "`depth` is 100000"),
    "experts without end": (
        entries(num_local_experts=10**5),
        "`num_local_experts` is 100000, and the stored tensors have 0 experts",
    ),
    "tensor twice": (twice, "are the same parameter; remove one of them"),
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


def test_links_of_the_hubs_cache(dense: Path, tmp_path: Path) -> None:
    """snapshots/REVISION/… are links into blobs/ beside it, and are followed and copied, as are links to
    other files of the folder."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    shutil.copytree(dense, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    (snapshot / "vocab.json").symlink_to("tokenizer_config.json")
    prune_model(snapshot, tokens(), output=tmp_path / "out", **OPTIONS)
    verify_output(tmp_path / "out", against=snapshot)
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (dense / name).read_bytes()
    assert (tmp_path / "out" / "vocab.json").is_file()
    assert load_tokenizer(tmp_path / "out") is not None


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("../secret.json", "link out of the model folder, to .*secret.json; put the file itself"),
        ("gone.json", "link to .*gone.json, which is no file; put the file itself there"),
        ("folder", "link to .*folder, which is no file; put the file itself there"),
    ],
)
@pytest.mark.parametrize("command", ["prune", "apply", "shrink", "remove", "pack"])
def test_a_tokenizer_that_cannot_be_copied_is_refused(
    command: str, target: str, said: str, dense: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret.json").write_text("{}")
    model = Path(shutil.copytree(dense, tmp_path / "model"))
    (model / "folder").mkdir()
    if command in ("apply", "pack"):
        prune_model(dense, tokens(), output=tmp_path / "pruned", **OPTIONS)
    if command == "pack":
        model = tmp_path / "pruned"
        (model / "folder").mkdir()
    name = "vocab.json" if command == "pack" else "tokenizer.json"
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(target)
    out = tmp_path / "out"
    data: Any = (model, tokens())
    with pytest.raises(ModelError, match=f"{name}: .*{said}"):
        {
            "prune": lambda: prune_model(*data, output=out, **OPTIONS),
            "apply": lambda: apply_masks(model, tmp_path / "pruned" / MASKS, out),
            "shrink": lambda: shrink_model(*data, output=out, channels=0.5, solver="wanda"),
            "remove": lambda: remove_blocks(*data, output=out, count=1, windows=2),
            "pack": lambda: pack(model, out),
        }[command]()
    assert not out.exists()


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        prune_model(tmp_path / "none", tokens(), output=tmp_path / "out", **OPTIONS)


@pytest.mark.parametrize(
    "name", ["../a", "/a", "a/b", "a\\b", "..", ".", "", "C:a", "a\0b", "a\nb", 3, None, "x" * 300]
)
def test_names_that_lead_elsewhere(name: Any) -> None:
    assert not plain_name(name)


def test_code_is_not_copied(model: Path, tmp_path: Path) -> None:
    (model / "modeling_x.py").write_text("print('hello')")
    (tmp_path / "secret.txt").write_text("secret")
    (model / "notes.pdf").symlink_to(tmp_path / "secret.txt")  # of no kind that is copied
    (model / "vocab.txt").write_text("a")
    prune_model(model, tokens(), output=tmp_path / "out", **OPTIONS)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert "vocab.txt" in names
    assert not names & {"modeling_x.py", "notes.pdf"}


def test_library_errors_name_options_and_commands_their_flags(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "maskopt-apply.json").write_text('{"files": []}')
    for overwrite, resume, message in (
        (False, False, "exists and is not empty; `overwrite` replaces it"),
        (False, True, "nothing to resume there; start without `resume`"),
    ):
        with pytest.raises(ModelError) as caught:
            check_output(tmp_path / "full", overwrite=overwrite, resume=resume)
        assert str(caught.value) == f"{tmp_path / 'full'}: {message}"
    with pytest.raises(ModelError, match="`dtype` is for model folders"):
        open_source(tiny("llama"), dtype="float32")
    for file in (Path(maskopt.__file__).parent / "model").glob("*.py"):
        assert not re.search(r"--(overwrite|resume|dtype)", file.read_text()), file


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "no room for 0.00 GiB"), (errno.EACCES, "cannot be written")],
)
def test_a_file_of_hidden_states_that_cannot_be(
    number: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(ModelError, match=said) as caught:
        Activations(range(2), torch.Size((1, 3, 4)), torch.float32, tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert os.strerror(number) in str(caught.value)
    assert "`activation_memory`" in str(caught.value)


PANICS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "when it is loaded": lambda t: t.update(
        normalizer={"type": "Precompiled", "precompiled_charsmap": ""}
    ),
    "when it is used": lambda t: t["post_processor"].update(special_tokens={}),
}


@pytest.mark.parametrize(
    ("when", "chat"),
    [("when it is loaded", False), ("when it is loaded", True), ("when it is used", False)],
)
def test_a_tokenizer_that_panics_is_one_error(when: str, chat: bool, tmp_path: Path) -> None:
    """Its library is written in Rust, and raises what is no Exception."""
    model = save(tiny("llama"), tmp_path / "model")
    chat_tokenizer().save_pretrained(model)
    edit_json(model / "tokenizer.json", PANICS[when])
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "some words", "messages": [{"role": "user", "content": "words"}]}')
    with pytest.raises(DataError, match=r"model/tokenizer\.json: the tokenizer's library stopped"):
        prune_model(
            model, calibration=text, output=tmp_path / "out", chat=chat, seq_len=4, **OPTIONS
        )
    assert not (tmp_path / "out").exists()

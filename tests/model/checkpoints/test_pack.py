"""A pruned folder without its zeros, and back: every byte as it was."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from commands import run
from forging import change_tensors, forge_manifest, shard_of
from outputs import contents
from safetensors.torch import load_file
from tiny_models import save, tiny, tokens
from transformers import AutoModelForCausalLM

from maskopt import load_packed, prune_model
from maskopt.errors import ModelError
from maskopt.model import pack as packing
from maskopt.model.pack import pack, unpack_folder
from maskopt.model.safefile import DTYPES, open_safe, write_safe
from maskopt.model.verify import verify_output


def pruned(family, home, *, dtype=torch.float32, sparsity=0.5):
    dense = save(tiny(family, dtype=dtype), home / "dense", shard="30KB")
    (dense / "LICENSE").write_text("yours")
    how = {"sparsity": sparsity, "solver": "wanda", "min_tokens": 1}
    prune_model(dense, tokens(), output=home / "out", **how)
    return home / "out"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    home = tmp_path_factory.mktemp("made")
    pack(pruned("llama", home), home / "packed")
    return home


@pytest.fixture
def out(made, tmp_path):
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


@pytest.fixture
def packed(made, tmp_path):
    return Path(shutil.copytree(made / "packed", tmp_path / "packed"))


def case(family, dtype, *marks):
    return pytest.param(family, dtype, marks=marks)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        case("llama", torch.bfloat16),
        case("gpt2", torch.float32),
        case("gemma3", torch.float32),
        case("gpt_oss", torch.bfloat16),
        case("llama", torch.float32, pytest.mark.slow),
        case("gemma3", torch.bfloat16, pytest.mark.slow),
        case("gpt2", torch.bfloat16, pytest.mark.slow),
        case("mixtral", torch.float32, pytest.mark.slow),
        case("mixtral", torch.bfloat16, pytest.mark.slow),
        case("gpt_oss", torch.float32, pytest.mark.slow),
    ],
)
def test_there_and_back_every_byte_is_the_same(family, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_STEP", 64)  # tensors are cut in many places
    out, packed = pruned(family, tmp_path, dtype=dtype), tmp_path / "packed"
    pack(out, packed)
    assert not list(packed.glob("*.safetensors"))
    found = load_packed(packed).state_dict()
    whole = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in whole.items())
    unpack_folder(packed, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(out)
    verify_output(tmp_path / "again", tmp_path / "dense")


def test_it_takes_what_is_kept_and_a_bit_a_weight(tmp_path):
    out, packed = pruned("llama", tmp_path, dtype=torch.bfloat16, sparsity=0.75), tmp_path / "p"
    assert "MB of" in run("pack", out, "--output", packed)
    shards = [*out.glob("model*.safetensors")]
    stored = [(n, t.numel()) for f in shards for n, t in load_file(f).items()]
    masked = sum(size for name, size in stored if "proj" in name)
    saved = sum(f.stat().st_size for f in shards)
    saved -= sum(f.stat().st_size for f in packed.glob("*.packed"))
    # headers are kept twice; the masks' bits lie in both folders
    assert saved == pytest.approx(2 * masked * 0.75, rel=0.25)
    assert "unpacked" in run("unpack", packed, "--output", tmp_path / "again")


def test_what_is_not_zero_is_not_dropped(out, tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    change_tensors(shard_of(out, name), lambda tensors: tensors[name].fill_(1.0))
    message = "was changed since the prune, and could not be packed and unpacked"
    with pytest.raises(ModelError, match=message):
        pack(out, tmp_path / "packed")
    forge_manifest(out)
    with pytest.raises(ModelError, match="holds weights that its mask prunes"):
        pack(out, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def forge(file, change):
    """Tensors in the order in which they are."""
    there = open_safe(file)
    tensors = {name: there.read(name) for name in there.entries}
    change(tensors)
    names = {dtype: name for name, dtype in DTYPES.items()}
    with file.open("wb") as target:
        shapes = {name: (names[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
        write_safe(target, shapes, {"format": "maskopt-packed-1"})
        for tensor in tensors.values():
            target.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())


UNKNOWN = "is not what `maskopt pack` writes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, name: t.update({name: t[name][:-1].clone()}), "ends too early"),
        (
            lambda t, name: t.update({name: t[name].repeat(2)}),
            "holds another number of values than its mask",
        ),
        (lambda t, name: t.update({"~nothing": t.pop(name)}), "'nothing' has no mask"),
        (lambda t, name: t.update({"?other": t.pop(name)}), UNKNOWN),
        (lambda t, name: t.clear(), UNKNOWN),
        (None, "does not give the file of the manifest"),
    ],
)
def test_files_that_were_not_packed_are_refused(change, message, packed, tmp_path):
    file = next(f for f in packed.glob("*.packed") if any("~" in n for n in load_file(f)))
    if change:
        forge(file, lambda t: change(t, next(n for n in t if n.startswith("~"))))
    else:
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ModelError, match=message):
        unpack_folder(packed, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_folders_that_are_none(made, packed, tmp_path):
    with pytest.raises(ModelError, match="no file that `maskopt pack` wrote"):
        unpack_folder(made / "out", tmp_path / "again")
    with pytest.raises(ModelError, match="no such file"):
        pack(made / "dense", tmp_path / "again")
    with pytest.raises(ModelError, match="is not empty"):
        pack(made / "out", packed)
    (packed / "config.json").unlink()
    with pytest.raises(ModelError, match="is missing"):
        unpack_folder(packed, tmp_path / "again")


def test_what_was_added_since_comes_back_and_what_was_changed_is_refused(out, tmp_path):
    (out / "NOTICE").write_text("ours")
    (out / "chat_template.jinja").write_text("{{ messages }}")
    packed = pack(out, tmp_path / "packed")
    unpack_folder(packed, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(out)
    for name in ("generation_config.json", "maskopt-masks.bits"):
        for source, write in ((out, pack), (packed, unpack_folder)):
            data = (source / name).read_bytes()
            (source / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            with pytest.raises(ModelError, match=rf"{name}: was changed since"):
                write(source, tmp_path / "none")
            (source / name).write_bytes(data)
    assert not (tmp_path / "none").exists()


def list_file(folder, name, text):
    """Enter a file into the manifest as if the prune had written it."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / name).write_text(text)
    forge_manifest(folder, lambda manifest: manifest["files"].update({name: digest}))


def test_every_file_of_the_manifest_is_packed(out, tmp_path):
    list_file(out, "vocab.bpe", "a b")
    unpack_folder(pack(out, tmp_path / "packed"), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(out)
    (out / "vocab.bpe").unlink()
    with pytest.raises(ModelError, match=r"vocab\.bpe: is missing"):
        pack(out, tmp_path / "none")


@pytest.mark.parametrize(
    "name", [".bashrc", "evil.py", ".x.json", ".x.safetensors", "x.so", "Makefile", "autoexec.bat"]
)
def test_hidden_files_and_code_are_not_packed_and_not_unpacked(name, out, packed, tmp_path):
    (packed / name.replace(".safetensors", ".packed")).write_text("evil")
    for folder, write in ((packed, unpack_folder), (out, pack)):
        list_file(folder, name, "evil")
        with pytest.raises(ModelError, match=f"lists '{name}', and packed folders hold no hidden"):
            write(folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "name",
    ["../victim/model.safetensors", "C:x.json", "a\\b.json", "/victim/model.safetensors", ".."],
)
def test_nothing_is_written_outside_the_output(name, packed, tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "model.safetensors").write_text("of somebody")
    (shard, *_) = packed.glob("*.packed")
    (tmp_path / "victim" / "model.packed").write_bytes(shard.read_bytes())

    def lead_out(manifest):
        files = manifest["files"]
        files[name] = files.pop(next(n for n in files if n.endswith(".safetensors")))

    for change in (lead_out, lambda manifest: manifest.update(files=["model.safetensors"])):
        forge_manifest(packed, change)
        with pytest.raises(ModelError, match="`files` must have names without a path"):
            unpack_folder(packed, tmp_path / "again")
    assert (tmp_path / "victim" / "model.safetensors").read_text() == "of somebody"

"""A pruned folder without its zeros, and back: every byte as it was."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from forging import change_tensors, copied, forge_manifest
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

OPTIONS: dict[str, Any] = {"solver": "wanda", "min_tokens": 1}


def pruned(family: str, home: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    dense = save(tiny(family, dtype=dtype), home / "dense", shard="30KB")
    (dense / "LICENSE").write_text("yours")
    prune_model(dense, tokens(6), output=home / "out", **{"sparsity": 0.5, **OPTIONS, **options})
    return home / "out"


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_every_byte_is_the_same(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_STEP", 64)  # tensors are cut in many places
    out = pruned(family, tmp_path, dtype=dtype)
    pack(out, tmp_path / "packed")
    assert not list((tmp_path / "packed").glob("*.safetensors"))
    unpack_folder(tmp_path / "packed", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(out)
    verify_output(tmp_path / "again", tmp_path / "dense")


@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_it_takes_what_is_kept_and_a_bit_a_weight(sparsity: float, tmp_path: Path) -> None:
    out = pruned("llama", tmp_path, dtype=torch.bfloat16, sparsity=sparsity)
    said = run("pack", out, "--output", tmp_path / "packed")
    masked = sum(
        t.numel()
        for f in out.glob("model*.safetensors")
        for n, t in load_file(f).items()
        if "proj" in n
    )
    saved = sum(f.stat().st_size for f in out.glob("model*.safetensors")) - sum(
        f.stat().st_size for f in (tmp_path / "packed").glob("*.packed")
    )
    # headers are kept twice; the masks' bits lie in both folders
    assert saved == pytest.approx(2 * masked * sparsity, rel=0.25)
    assert "MB of" in said
    assert "unpacked" in run("unpack", tmp_path / "packed", "--output", tmp_path / "again")


def test_it_is_loaded_as_it_was(tmp_path: Path) -> None:
    out = pruned("gemma3", tmp_path)
    pack(out, tmp_path / "packed")
    found = load_packed(tmp_path / "packed")
    whole = AutoModelForCausalLM.from_pretrained(out)
    after = found.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in whole.state_dict().items())


def test_what_is_not_zero_is_not_dropped(tmp_path: Path) -> None:
    out = pruned("llama", tmp_path)
    shard = next(
        f for f in out.glob("model*.safetensors") if any("q_proj" in n for n in load_file(f))
    )
    name = next(n for n in load_file(shard) if "q_proj" in n)
    change_tensors(shard, lambda tensors: tensors[name].fill_(1.0))
    with pytest.raises(
        ModelError, match="was changed since the prune, and could not be packed and unpacked"
    ):
        pack(out, tmp_path / "packed")
    forge_manifest(out)
    with pytest.raises(ModelError, match="holds weights that its mask prunes"):
        pack(out, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return pack(pruned("llama", tmp_path), tmp_path / "packed")


def test_what_was_changed_is_refused(packed: Path, tmp_path: Path) -> None:
    file = sorted(packed.glob("*.packed"))[-1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ModelError, match="does not give the file of the manifest"):
        unpack_folder(packed, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def forged(file: Path, change: Any) -> None:
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("shorter", "ends too early"),
        ("longer", "holds another number of values than its mask"),
        ("renamed", "'nothing' has no mask"),
        ("unknown", "is not what `maskopt pack` writes"),
        ("nothing", "is not what `maskopt pack` writes"),
    ],
)
def test_files_that_were_not_packed_are_refused(
    change: str, message: str, packed: Path, tmp_path: Path
) -> None:
    file = next(f for f in packed.glob("*.packed") if any("~" in n for n in load_file(f)))

    def alter(tensors: dict[str, torch.Tensor]) -> None:
        name = next(n for n in tensors if n.startswith("~"))
        values = tensors[name]
        if change == "shorter":
            tensors[name] = values[:-1].clone()
        elif change == "longer":
            tensors[name] = torch.cat([values, values])
        elif change == "nothing":
            tensors.clear()
        else:
            tensors[{"renamed": "~nothing", "unknown": "?other"}[change]] = tensors.pop(name)

    forged(file, alter)
    with pytest.raises(ModelError, match=message):
        unpack_folder(packed, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_folders_that_are_none(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no file that `maskopt pack` wrote"):
        unpack_folder(tmp_path / "out", tmp_path / "again")
    with pytest.raises(ModelError, match="no such file"):
        pack(tmp_path / "dense", tmp_path / "again")
    with pytest.raises(ModelError, match="is not empty"):
        pack(tmp_path / "out", packed)
    again = copied(packed, tmp_path / "copy")
    (again / "config.json").unlink()
    with pytest.raises(ModelError, match="is missing"):
        unpack_folder(again, tmp_path / "again")


def test_what_was_added_since_comes_back_and_what_was_changed_is_refused(tmp_path: Path) -> None:
    out = pruned("llama", tmp_path)
    (out / "NOTICE").write_text("ours")
    (out / "chat_template.jinja").write_text("{{ messages }}")
    packed = pack(out, tmp_path / "packed")
    unpack_folder(packed, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(out)
    for name in ("generation_config.json", "maskopt-masks.bits"):
        for source, write in ((out, pack), (packed, unpack_folder)):
            other = copied(source, tmp_path / f"{source.name}-{name}")
            data = (other / name).read_bytes()
            (other / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            with pytest.raises(ModelError, match=rf"{name}: was changed since"):
                write(other, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_every_file_of_the_manifest_is_packed(tmp_path: Path) -> None:
    out = pruned("llama", tmp_path)
    (out / "vocab.bpe").write_text("a b")
    forge_manifest(out, lambda manifest: manifest["files"].update({"vocab.bpe": digest("a b")}))
    unpack_folder(pack(out, tmp_path / "packed"), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(out)
    (out / "vocab.bpe").unlink()
    with pytest.raises(ModelError, match=r"vocab\.bpe: is missing"):
        pack(out, tmp_path / "none")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "name", [".bashrc", "evil.py", ".x.json", ".x.safetensors", "x.so", "Makefile", "autoexec.bat"]
)
def test_hidden_files_and_code_are_not_unpacked(name: str, packed: Path, tmp_path: Path) -> None:
    for file in (name, name.replace(".safetensors", ".packed")):
        (packed / file).write_text("evil")
    forge_manifest(packed, lambda manifest: manifest["files"].update({name: digest("evil")}))
    with pytest.raises(ModelError, match=f"lists '{name}', and packed folders hold no hidden"):
        unpack_folder(packed, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    out = tmp_path / "out"
    (out / name).write_text("evil")
    forge_manifest(out, lambda manifest: manifest["files"].update({name: digest("evil")}))
    with pytest.raises(ModelError, match=f"lists '{name}', and packed folders hold no hidden"):
        pack(out, tmp_path / "other")


@pytest.mark.parametrize(
    "name",
    ["../victim/model.safetensors", "C:x.json", "a\\b.json", "/victim/model.safetensors", ".."],
)
def test_nothing_is_written_outside_the_output(name: str, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "model.safetensors").write_text("of somebody")
    (shard, *_) = packed.glob("*.packed")
    (tmp_path / "victim" / "model.packed").write_bytes(shard.read_bytes())

    def lead_out(manifest: dict[str, Any]) -> None:
        files = manifest["files"]
        files[name] = files.pop(next(n for n in files if n.endswith(".safetensors")))

    forge_manifest(packed, lead_out)
    with pytest.raises(ModelError, match="`files` must have names without a path"):
        unpack_folder(packed, tmp_path / "again")
    forge_manifest(packed, lambda manifest: manifest.update(files=["model.safetensors"]))
    with pytest.raises(ModelError, match="`files` must have names without a path"):
        unpack_folder(packed, tmp_path / "again")
    assert (tmp_path / "victim" / "model.safetensors").read_text() == "of somebody"

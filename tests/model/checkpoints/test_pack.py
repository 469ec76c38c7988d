"""A pruned folder without its zeros, and back: every byte as it was. Mask files: read back, applied,
extracted; damaged ones and those of other models refused."""

import hashlib
import shutil
import tempfile
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from commands import run
from forging import change_tensors, copied, flip, forge_manifest, shard_of
from hypothesis import given
from hypothesis import strategies as st
from outputs import contents, read_masks
from safetensors.torch import load_file
from tiny_models import save, tiny, tokens
from transformers import AutoModelForCausalLM

from maskopt import load_packed, prune_model
from maskopt.errors import ModelError, OptionError, VerificationError
from maskopt.models.checkpoints import pack as packing
from maskopt.models.checkpoints.mask_file import TensorMask, join_masks, write_masks
from maskopt.models.checkpoints.pack import pack, unpack_folder
from maskopt.models.checkpoints.safefile import open_safe, write_tensors
from maskopt.models.checkpoints.workspace import MASKS
from maskopt.models.pruning.output import apply_masks, extract_masks
from maskopt.models.verification.verify import verify_model


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
    return copied(made / "out", tmp_path)


@pytest.fixture
def packed(made, tmp_path):
    return Path(shutil.copytree(made / "packed", tmp_path / "packed"))


def slow(*each):
    return pytest.param(*each, marks=pytest.mark.slow)


HALF, WHOLE = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *(("llama", HALF), ("gpt2", WHOLE), ("gemma3", WHOLE), ("gpt_oss", HALF)),
        *(slow("llama", WHOLE), slow("gemma3", HALF), slow("gpt2", HALF), slow("gpt_oss", WHOLE)),
        *(slow("mixtral", WHOLE), slow("mixtral", HALF)),
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
    verify_model(tmp_path / "again", tmp_path / "dense")


def test_it_takes_what_is_kept_and_a_bit_a_weight(tmp_path):
    out, packed = pruned("llama", tmp_path, dtype=torch.bfloat16, sparsity=0.75), tmp_path / "p"
    assert "MB of" in run("masks", "pack", out, "--output", packed)
    shards = [*out.glob("model*.safetensors")]
    stored = [(n, t.numel()) for f in shards for n, t in load_file(f).items()]
    masked = sum(size for name, size in stored if "proj" in name)
    saved = sum(f.stat().st_size for f in shards)
    saved -= sum(f.stat().st_size for f in packed.glob("*.packed"))
    # headers are kept twice; the masks' bits lie in both folders
    assert saved == pytest.approx(2 * masked * 0.75, rel=0.25)
    assert "unpacked" in run("masks", "unpack", packed, "--output", tmp_path / "again")


def test_what_is_not_zero_is_not_dropped(out, tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    change_tensors(shard_of(out, name), lambda tensors: tensors[name].fill_(1.0))
    for message in ("was changed since the prune, and could not be packed", "its mask prunes"):
        with pytest.raises(ModelError, match=message):
            pack(out, tmp_path / "packed")
        forge_manifest(out)
    assert not (tmp_path / "packed").exists()


def forge(file, change):
    there = open_safe(file)
    tensors = {name: there.read(name) for name in there.entries}
    change(tensors)
    write_tensors(file, tensors, {"format": "maskopt-packed-1"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, name: t.update({name: t[name][:-1].clone()}), "ends too early"),
        (lambda t, name: t.update({name: t[name].repeat(2)}), "holds another number of values"),
        (lambda t, name: t.update({"~nothing": t.pop(name)}), "'nothing' has no mask"),
        (
            lambda t, name: t.update({"?other": t.pop(name)}),
            "is not what `maskopt masks pack` writes",
        ),
        (lambda t, name: t.clear(), "is not what `maskopt masks pack` writes"),
        (None, "does not give the file of the manifest"),
    ],
)
def test_files_that_were_not_packed_are_refused(change, message, packed, tmp_path):
    file = next(f for f in packed.glob("*.packed") if any("~" in n for n in load_file(f)))
    if change:
        forge(file, lambda t: change(t, next(n for n in t if n.startswith("~"))))
    else:
        flip(file)
    with pytest.raises(ModelError, match=message):
        unpack_folder(packed, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_folders_that_are_none(made, packed, tmp_path):
    again = tmp_path / "again"
    (packed / "config.json").unlink()
    for write, folder, to, message in (
        (unpack_folder, made / "out", again, "no file that `maskopt masks pack` wrote"),
        (pack, made / "dense", again, "no such file"),
        (pack, made / "out", packed, "is not empty"),
        (unpack_folder, packed, again, "is missing"),
    ):
        with pytest.raises(ModelError, match=message):
            write(folder, to)


def list_file(folder, name, text):
    """Enter a file into the manifest as if the prune had written it."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / name).write_text(text)
    forge_manifest(folder, lambda manifest: manifest["files"].update({name: digest}))


def test_what_was_added_since_comes_back_and_what_was_changed_is_refused(out, tmp_path):
    (out / "NOTICE").write_text("ours")
    (out / "chat_template.jinja").write_text("{{ messages }}")
    list_file(out, "vocab.bpe", "a b")  # every file of the manifest is packed
    packed = pack(out, tmp_path / "packed")
    unpack_folder(packed, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(out)
    for name in ("generation_config.json", "maskopt-masks.bits"):
        for source, write in ((out, pack), (packed, unpack_folder)):
            flip(source / name)
            with pytest.raises(ModelError, match=rf"{name}: was changed since"):
                write(source, tmp_path / "none")
            flip(source / name)
    (out / "vocab.bpe").unlink()
    with pytest.raises(ModelError, match=r"vocab\.bpe: is missing"):
        pack(out, tmp_path / "none")
    assert not (tmp_path / "none").exists()


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
    shutil.copy(next(packed.glob("*.packed")), tmp_path / "victim" / "model.packed")

    def lead_out(manifest):
        files = manifest["files"]
        files[name] = files.pop(next(n for n in files if n.endswith(".safetensors")))

    for change in (lead_out, lambda manifest: manifest.update(files=["model.safetensors"])):
        forge_manifest(packed, change)
        with pytest.raises(ModelError, match="`files` must have names without a path"):
            unpack_folder(packed, tmp_path / "again")
    assert (tmp_path / "victim" / "model.safetensors").read_text() == "of somebody"


# Mask files

SMALL = TensorMask(torch.ones(2, 2, dtype=torch.bool), 1)


@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    seed=st.integers(0, 99),
    last=st.booleans(),
)
def test_masks_come_back(shape, seed, last):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=generator) < 0.5
    axis = len(shape) - (1 if last else 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        write_masks(path, {"a.weight": TensorMask(kept, axis), "b": TensorMask(~kept, axis)})
        back = read_masks(path)
    assert torch.equal(back["a.weight"].kept, kept)
    assert torch.equal(back["b"].kept, ~kept)
    assert back["b"].input_axis == axis
    assert back["b"].rows().shape[1] == shape[axis]


def test_masks_are_applied_and_extracted(dense_folder, pruned_folder, tmp_path, monkeypatch):
    apply_masks(dense_folder, pruned_folder / MASKS, tmp_path / "out")
    for shard in pruned_folder.glob("model*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()
    with pytest.raises(ModelError, match="not empty"):
        apply_masks(dense_folder, pruned_folder / MASKS, tmp_path / "out")
    path = tmp_path / "masks.bits"
    assert len(extract_masks(pruned_folder, path)) == 21
    theirs = read_masks(path)
    for name, mask in read_masks(pruned_folder / MASKS).items():
        assert torch.equal(mask.kept, theirs[name].kept)
        assert mask.input_axis == theirs[name].input_axis
    with pytest.raises(OptionError, match="`overwrite`"):
        extract_masks(pruned_folder, path)
    extract_masks(pruned_folder, path, overwrite=True)
    refuse = Mock(side_effect=OSError(30, "Read-only file system"))
    monkeypatch.setattr("maskopt.core.files.tempfile.mkstemp", refuse)
    with pytest.raises(ModelError, match="cannot be written: Read-only file system"):
        extract_masks(pruned_folder, tmp_path / "masks.safetensors")


def test_masks_that_do_not_belong_to_the_model_are_refused(dense_folder, pruned_folder, tmp_path):
    other, small = save(tiny("gpt2"), tmp_path / "gpt2"), tmp_path / "m.safetensors"
    write_masks(small, {"model.layers.0.mlp.up_proj.weight": SMALL})
    result = copied(pruned_folder, tmp_path)
    flip(result / MASKS, -10)
    for model, masks, message in (
        (other, pruned_folder / MASKS, "has no tensor"),
        (dense_folder, small, r"is \[2, 2\]"),
        (dense_folder, result / MASKS, "does not match its digest"),
    ):
        with pytest.raises(ModelError, match=message):
            apply_masks(model, masks, tmp_path / "applied")
    assert not (tmp_path / "applied").exists()
    with pytest.raises(VerificationError, match="was changed"):
        verify_model(result)
    write_masks(small, {"x": SMALL})
    with pytest.raises(ModelError, match="another part"):
        join_masks(tmp_path / "b.safetensors", [small, small])

"""Mask files: read back, applied, extracted; damaged ones and those of other models refused."""

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from outputs import read_masks
from tiny_models import save, tiny

from maskopt.errors import ModelError, OptionError, VerificationError
from maskopt.model.maskfile import TensorMask, join_masks, write_masks
from maskopt.model.output import apply_masks, extract_masks
from maskopt.model.verify import verify_output
from maskopt.model.workspace import MASKS

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


def test_apply_makes_the_same_model(dense_folder, pruned_folder, tmp_path):
    apply_masks(dense_folder, pruned_folder / MASKS, tmp_path / "out")
    for shard in pruned_folder.glob("model*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()
    with pytest.raises(ModelError, match="not empty"):
        apply_masks(dense_folder, pruned_folder / MASKS, tmp_path / "out")


def test_masks_are_extracted(pruned_folder, tmp_path, monkeypatch):
    path = tmp_path / "masks.bits"
    assert len(extract_masks(pruned_folder, path)) == 21
    theirs = read_masks(path)
    for name, mask in read_masks(pruned_folder / MASKS).items():
        assert torch.equal(mask.kept, theirs[name].kept)
        assert mask.input_axis == theirs[name].input_axis
    with pytest.raises(OptionError, match="`overwrite`"):
        extract_masks(pruned_folder, path)
    extract_masks(pruned_folder, path, overwrite=True)

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("maskopt.files.tempfile.mkstemp", refuse)
    with pytest.raises(ModelError, match="cannot be written: Read-only file system"):
        extract_masks(pruned_folder, tmp_path / "masks.safetensors")


def test_masks_of_another_model_are_refused(dense_folder, pruned_folder, tmp_path):
    other = save(tiny("gpt2"), tmp_path / "gpt2")
    with pytest.raises(ModelError, match="has no tensor"):
        apply_masks(other, pruned_folder / MASKS, tmp_path / "out")
    write_masks(tmp_path / "m.safetensors", {"model.layers.0.mlp.up_proj.weight": SMALL})
    with pytest.raises(ModelError, match=r"is \[2, 2\]"):
        apply_masks(dense_folder, tmp_path / "m.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_in_the_masks(dense_folder, pruned_folder, tmp_path):
    result = Path(shutil.copytree(pruned_folder, tmp_path / "result"))
    data = bytearray((result / MASKS).read_bytes())
    data[-10] ^= 1
    (result / MASKS).write_bytes(bytes(data))
    with pytest.raises(ModelError, match="does not match its digest"):
        apply_masks(dense_folder, result / MASKS, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(VerificationError, match="was changed"):
        verify_output(result)


def test_parts_with_the_same_mask_are_not_joined(tmp_path):
    part = tmp_path / "a.safetensors"
    write_masks(part, {"x": SMALL})
    with pytest.raises(ModelError, match="another part"):
        join_masks(tmp_path / "b.safetensors", [part, part])

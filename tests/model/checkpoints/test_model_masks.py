"""Mask files: read back, applied, extracted; damaged ones and those of other models refused."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from outputs import read_masks
from tiny_models import save, tiny

from maskopt.errors import ModelError, OptionError, VerificationError
from maskopt.model.maskfile import TensorMask, join_masks, write_masks
from maskopt.model.output import apply_masks, extract_masks
from maskopt.model.verify import verify_output
from maskopt.model.workspace import MASKS


@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    seed=st.integers(0, 99),
    last=st.booleans(),
)
@settings(max_examples=40)
def test_masks_come_back(shape: list[int], seed: int, last: bool) -> None:
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


def test_apply_makes_the_same_model(
    dense_folder: Path, pruned_folder: Path, tmp_path: Path
) -> None:
    apply_masks(dense_folder, pruned_folder / MASKS, tmp_path / "out")
    for shard in pruned_folder.glob("model*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()
    with pytest.raises(ModelError, match="not empty"):
        apply_masks(dense_folder, pruned_folder / MASKS, tmp_path / "out")


def test_masks_are_extracted_and_applied_again(
    dense_folder: Path, pruned_folder: Path, tmp_path: Path
) -> None:
    sparsities = extract_masks(pruned_folder, tmp_path / "masks.bits")
    assert len(sparsities) == 21
    ours, theirs = (
        read_masks(pruned_folder / MASKS),
        read_masks(tmp_path / "masks.bits"),
    )
    for name, mask in ours.items():
        assert torch.equal(mask.kept, theirs[name].kept)
        assert mask.input_axis == theirs[name].input_axis
    with pytest.raises(OptionError, match="`overwrite`"):
        extract_masks(pruned_folder, tmp_path / "masks.bits")
    extract_masks(pruned_folder, tmp_path / "masks.bits", overwrite=True)


def test_masks_to_where_nothing_can_be_written(
    pruned_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("maskopt.files.tempfile.mkstemp", refuse)
    with pytest.raises(ModelError, match="cannot be written: Read-only file system"):
        extract_masks(pruned_folder, tmp_path / "masks.safetensors")


def test_masks_of_another_model_are_refused(pruned_folder: Path, tmp_path: Path) -> None:
    other = save(tiny("gpt2"), tmp_path / "gpt2")
    with pytest.raises(ModelError, match="has no tensor"):
        apply_masks(other, pruned_folder / MASKS, tmp_path / "out")
    write_masks(
        tmp_path / "m.safetensors",
        {"model.layers.0.mlp.up_proj.weight": TensorMask(torch.ones(2, 2, dtype=torch.bool), 1)},
    )
    with pytest.raises(ModelError, match=r"is \[2, 2\]"):
        apply_masks(save(tiny("llama"), tmp_path / "l"), tmp_path / "m.safetensors", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_flipped_bit_in_the_masks(
    dense_folder: Path, pruned_folder: Path, tmp_path: Path
) -> None:
    result = Path(shutil.copytree(pruned_folder, tmp_path / "result"))
    data = bytearray((result / MASKS).read_bytes())
    data[-10] ^= 1
    (result / MASKS).write_bytes(bytes(data))
    with pytest.raises(ModelError, match="does not match its digest"):
        apply_masks(dense_folder, result / MASKS, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(VerificationError, match="was changed"):
        verify_output(result)


def test_parts_with_the_same_mask_are_not_joined(tmp_path: Path) -> None:
    part = tmp_path / "a.safetensors"
    write_masks(part, {"x": TensorMask(torch.ones(2, 2, dtype=torch.bool), 1)})
    with pytest.raises(ModelError, match="another part"):
        join_masks(tmp_path / "b.safetensors", [part, part])

"""What `maskopt verify` catches: changed weights, masks and manifests, forged with right digests."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from forging import change_weight, first_weight_shard, forge_manifest
from outputs import read_masks
from tiny_models import edit_json, save, tiny, tokens

from maskopt import NM, prune_model
from maskopt.errors import VerificationError
from maskopt.model.maskfile import write_masks
from maskopt.model.verify import semi_structured, verify_output
from maskopt.model.workspace import MANIFEST, MASKS


def of_seven(manifest: dict[str, Any]) -> None:
    pattern = {"kind": "nm", "keep": 1, "of": 7}
    manifest["fingerprint"]["options"]["pattern"] = pattern
    for tensor in manifest["tensors"].values():
        tensor["pattern"] = pattern
    for layer in manifest["layers"]:
        layer["pattern"] = "1:7"


def test_verify_catches_forgeries(dense_folder: Path, pruned_folder: Path, tmp_path: Path) -> None:
    def fresh() -> Path:
        shutil.rmtree(tmp_path / "r", ignore_errors=True)
        return Path(shutil.copytree(pruned_folder, tmp_path / "r"))

    assert verify_output(fresh(), against=dense_folder).rows == 3 * (32 * 2 + 16 * 2 + 48 * 2 + 32)
    folder = fresh()
    change_weight(folder, "kept", 1.25)
    with pytest.raises(VerificationError, match="was changed"):
        verify_output(folder)
    forge_manifest(folder)
    verify_output(folder)  # all of the folder agrees with itself
    with pytest.raises(VerificationError, match="kept weight differs"):
        verify_output(folder, against=dense_folder)
    folder = fresh()
    change_weight(folder, "pruned", 1.25)
    forge_manifest(folder)
    with pytest.raises(VerificationError, match="that its mask prunes"):
        verify_output(folder)
    folder = fresh()
    change_weight(folder, "pruned", -0.0)
    forge_manifest(folder)
    with pytest.raises(VerificationError, match="that its mask prunes"):
        verify_output(folder)
    folder = fresh()
    shutil.copy(first_weight_shard(folder), folder / "model.safetensors")  # is loaded first
    with pytest.raises(VerificationError, match=r"either model\.safetensors or the shards"):
        verify_output(folder)
    folder = fresh()
    masks = read_masks(folder / MASKS)
    name = next(iter(masks))
    masks[name].kept[0, 0] = ~masks[name].kept[0, 0]
    write_masks(folder / MASKS, masks)
    forge_manifest(folder)
    with pytest.raises(VerificationError, match=r"row 0: 1[57] of 32 pruned"):
        verify_output(folder)
    for change, message in [
        (lambda m: m["tensors"].popitem(), "different tensors"),
        (lambda m: m["layers"].pop(), "down_proj' is only in the model"),
        (lambda m: m["files"].update(ghost="x"), "is not there"),
        (lambda m: m["files"].update({"../x": "x"}), "is not there"),
        (lambda m: m["layers"][0].pop("pruned"), "damaged or was changed"),
        (lambda m: next(iter(m["tensors"].values())).update(pattern={}), "damaged or was changed"),
        (lambda m: next(iter(m["tensors"].values())).update(input_axis=0), "differ in the axis"),
        (of_seven, "do not divide into groups of 7"),
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
        verify_output(dense_folder)
    other = save(tiny("qwen2"), tmp_path / "other")
    with pytest.raises(VerificationError, match="only one of the two"):
        verify_output(pruned_folder, against=other)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_two_four_needs_a_gpu_to_be_converted(dense_folder: Path, tmp_path: Path) -> None:
    prune_model(
        dense_folder, tokens(), pattern=NM(keep=2, of=4), solver="wanda", output=tmp_path / "out"
    )
    with pytest.raises(VerificationError, match="CUDA"):
        semi_structured(tmp_path / "out")
    assert "skipped, there is no CUDA device" in run("verify", tmp_path / "out")
    assert "skipped" not in run("verify", tmp_path / "out", "--no-semi-structured")
    run("verify", tmp_path / "out", "--semi-structured", fails=VerificationError)


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


def test_what_lies_beside_a_model_never_fails_its_prune(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Names that not every system takes, and what a loader could take for weights: not copied."""
    dense = save(tiny("llama"), tmp_path / "dense")
    odd = ["notes 10:30.txt", "what?.json", "shot\u202fAM.md"]
    more = ["LICENSE.docx", "LICENSE.safetensors", "adapter_notes.txt"]
    for name in (*odd, *more, "LICENSE", "NOTICE.md"):
        (dense / name).write_text("{}")
    prune_model(dense, tokens(), output=tmp_path / "out", sparsity=0.5, solver="wanda")
    verify_output(tmp_path / "out", dense)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "NOTICE.md"} < names
    assert not names & {*odd, *more}
    assert all(f"{name}: is not copied" in caplog.text for name in odd)

"""Folders whose kept weights were set anew: what else may not differ from the original, and what may."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forging import change_masks, change_tensors, forge_manifest
from tiny_models import save, tiny, tokens
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from maskopt import prune_model
from maskopt.errors import VerificationError
from maskopt.model.maskfile import TensorMask
from maskopt.model.safefile import open_safe
from maskopt.model.verify import verify_output

GIVEN: dict[str, Any] = {"sparsity": 0.5, "min_tokens": 1}
TRAINED: dict[str, Any] = {
    "weights": "reconstruct", "holdout": 0.34, "reconstruct": {"epochs": 1, "train": "all"},
}  # fmt: skip


def noise(result: Path, *names: str) -> None:
    change_tensors(
        result / "model.safetensors",
        lambda tensors: tensors.update({n: torch.randn_like(tensors[n]) for n in names}),
    )


@pytest.fixture(scope="module")
def refitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder in which the matrices that give the values are refitted, and its original."""
    home = tmp_path_factory.mktemp("refitted")
    dense = save(tiny("llama"), home / "dense")
    more = {"solver": "wanda", "weights": "refit", "include": ["v_proj"]}
    prune_model(dense, tokens(), output=home / "out", **GIVEN, **more)
    return home / "out", dense


@pytest.mark.parametrize("name", ["q_proj", "k_proj"])
def test_a_mask_that_keeps_all_excuses_no_other_weights(
    name: str, refitted: tuple[Path, Path], tmp_path: Path
) -> None:
    out, dense = shutil.copytree(refitted[0], tmp_path / "out"), refitted[1]
    tensor = f"model.layers.2.self_attn.{name}.weight"
    noise(out, tensor)
    kept = torch.ones_like(tiny("llama").get_parameter(tensor), dtype=torch.bool)
    change_masks(out, lambda masks: masks.update({tensor: TensorMask(kept, 1)}))
    forge_manifest(
        out, lambda m: m["tensors"].update({tensor: dict(next(iter(m["tensors"].values())))})
    )
    with pytest.raises(VerificationError, match="counts other rows"):
        verify_output(out, dense)


def test_a_mask_of_another_tensor_than_that_of_the_layer(
    refitted: tuple[Path, Path], tmp_path: Path
) -> None:
    """As many rows of as many inputs, in the same block."""
    out = shutil.copytree(refitted[0], tmp_path / "out")
    of, other = (f"model.layers.2.self_attn.{x}_proj.weight" for x in "vk")
    masks = change_masks(out, lambda masks: masks.update({other: masks.pop(of)}))
    change_tensors(
        out / "model.safetensors",
        lambda tensors: tensors[other].masked_fill_(~masks[other].kept, 0),
    )
    forge_manifest(out, lambda m: m["tensors"].update({other: m["tensors"].pop(of)}))
    with pytest.raises(VerificationError, match=r"2\.self_attn\.v_proj' has no mask"):
        verify_output(out)


def test_another_part_of_the_model_numbers_blocks_of_its_own(tmp_path: Path) -> None:
    """Norms and biases of the text's blocks are trained, and none of what looks at pictures."""
    text = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "sliding_window": 8,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=95,
        boi_token_index=94, eoi_token_index=93,
    )  # fmt: skip
    dense = save(Gemma3ForConditionalGeneration(config).eval(), tmp_path / "dense")
    out = tmp_path / "out"
    prune_model(dense, tokens(), output=out, solver="wanda", **GIVEN, **TRAINED)
    verify_output(out, dense)
    names = open_safe(out / "model.safetensors").entries
    noise(out, next(x for x in names if "vision" in x and ".0.layer_norm1.weight" in x))
    forge_manifest(out)
    with pytest.raises(VerificationError, match=r"layer_norm1.* differs from the original"):
        verify_output(out, dense)


@pytest.mark.parametrize("weights", ["refit", "reconstruct"])
def test_bounds_of_masks_that_were_found_for_kept_weights(weights: str, tmp_path: Path) -> None:
    """New weights cost less than any mask could whose weights are kept."""
    dense = save(tiny("llama"), tmp_path / "dense")
    trained = {"holdout": 0.34, "reconstruct": {"epochs": 1, "begin": "refit"}}
    more = trained if weights == "reconstruct" else {}
    report = prune_model(
        dense, tokens(), output=tmp_path / "out", solver="sdp", weights=weights, **GIVEN, **more
    )
    assert any(layer.lower_bound > layer.error for layer in report.layers)
    verify_output(tmp_path / "out", dense)
    forge_manifest(
        tmp_path / "out",
        lambda m: m["layers"][0].update(lower_bound=1.1 * m["layers"][0]["error_kept"]),
    )
    with pytest.raises(VerificationError, match="lower bound above its error"):
        verify_output(tmp_path / "out", dense)


def test_no_bound_is_told_of_refitted_weights(tmp_path: Path) -> None:
    """It would be of the damped error, and what is told is without the damping."""
    dense = save(tiny("llama"), tmp_path / "dense")
    report = prune_model(
        dense, tokens(), output=tmp_path / "out", solver="branch", weights="refit", damping=1.0,
        include=["layers.0.self_attn.k_proj"], solver_options={"node_limit": 3}, **GIVEN,
    )  # fmt: skip
    assert {layer.chosen_for for layer in report.layers} == {"refitted"}
    assert {layer.lower_bound for layer in report.layers} == {0.0}
    verify_output(tmp_path / "out", dense)

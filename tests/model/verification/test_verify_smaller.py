"""Folders of smaller models that say of themselves what is not so, every digest being right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forging import change_tensors, copied, forge_manifest
from safetensors.torch import load_file
from tiny_models import edit_json, save, tiny, tokens

from maskopt import remove_blocks, remove_experts, shrink_model
from maskopt.errors import ModelError, VerificationError
from maskopt.model import remove_blocks as removal
from maskopt.model.verify_smaller import verify_smaller
from maskopt.model.workspace import MANIFEST


def test_a_link_out_of_the_original_is_no_file_of_it(tmp_path: Path) -> None:
    """No run copies it, and none begins with it there."""
    dense = save(tiny("llama"), tmp_path / "dense")
    (tmp_path / "vocab.txt").write_text("elsewhere")
    options = {"output": tmp_path / "out", "channels": 0.25, "solver": "wanda"}
    (dense / "vocab.txt").symlink_to(tmp_path / "vocab.txt")
    with pytest.raises(ModelError, match=r"vocab\.txt: is a link out of the model folder"):
        shrink_model(dense, tokens(6), **options)
    assert not (tmp_path / "out").exists()
    (dense / "vocab.txt").unlink()
    shrink_model(dense, tokens(6), **options)
    (dense / "vocab.txt").symlink_to(tmp_path / "vocab.txt")
    assert "other tensors" in verify_smaller(tmp_path / "out", dense).checked


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and the same with fewer channels and heads."""
    home = tmp_path_factory.mktemp("mistral")
    dense = save(tiny("mistral"), home / "dense")
    options = {"channels": 0.25, "heads": 0.5, "solver": "wanda", "weights": "keep"}
    shrink_model(dense, tokens(6), output=home / "out", **options)
    return dense, home / "out"


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with two kinds of blocks, and the same without its first."""
    home = tmp_path_factory.mktemp("shallow")
    dense = save(tiny("gemma3"), home / "dense")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(removal, "choose", lambda *_: {frozenset({0}): 0.0})
        remove_blocks(dense, tokens(2), count=1, output=home / "out", windows=1)
    return dense, home / "out"


def forged(
    models: tuple[Path, Path], to: Path, *, settings: Any = None, change: Any = None
) -> Path:
    """A copy of what holds, whose configuration and manifest have other settings, and which was changed."""
    dense, out = models[0], copied(models[1], to)
    verify_smaller(out, dense)
    for key, value in (settings or {}).items():
        edit_json(out / "config.json", lambda c, k=key, v=value: c.update({k: v}))
    forge_manifest(out, lambda m: m["shrunk"]["settings"].update(settings or {}))
    if change is not None:
        change(out)
    return out


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sliding_window": 1}, "sliding_window is no size of what was removed"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers is no size"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is no size"),
        ({"rms_norm_eps": 100}, "rms_norm_eps"),
        ({"intermediate_size": 20}, "intermediate_size is not the original's .* 36"),
        # as many columns in all, of other heads
        ({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}, "is not the original's"),
    ],
)  # fmt: skip
def test_settings_that_follow_from_nothing_removed(
    settings: dict[str, Any], said: str, mistral: tuple[Path, Path], tmp_path: Path
) -> None:
    out = forged(mistral, tmp_path, settings=settings)
    with pytest.raises(VerificationError, match=said):
        verify_smaller(out, mistral[0])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sliding_window": 1}, "sliding_window is no size"),
        (
            {"layer_types": ["sliding_attention", "full_attention"]},
            "layer_types is not the original's",
        ),
        (
            {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
            "num_hidden_layers is not the original's",
        ),
    ],
)
def test_settings_of_blocks_that_follow_from_nothing_removed(
    settings: dict[str, Any], said: str, shallow: tuple[Path, Path], tmp_path: Path
) -> None:
    out = forged(shallow, tmp_path, settings=settings)
    with pytest.raises(VerificationError, match=said):
        verify_smaller(out, shallow[0])


def test_a_configuration_of_other_shapes_is_refused_without_the_original(
    mistral: tuple[Path, Path], tmp_path: Path
) -> None:
    out = copied(mistral[1], tmp_path)
    edit_json(out / "config.json", lambda c: c.update(intermediate_size=20))
    forge_manifest(out, lambda m: m["shrunk"]["settings"].update(intermediate_size=20))
    with pytest.raises(VerificationError, match=r"in the shards, .* by config\.json"):
        verify_smaller(out)


def test_lists_that_the_original_leaves_to_transformers_are_compared_too(tmp_path: Path) -> None:
    dense = save(tiny("gemma3"), tmp_path / "dense")
    config = {"layer_types": None, "sliding_window_pattern": 2}
    edit_json(dense / "config.json", lambda c: c.update(config))
    edit_json(dense / "config.json", lambda c: c.pop("layer_types"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(removal, "choose", lambda *_: {frozenset({0}): 0.0})
        remove_blocks(dense, tokens(2), count=1, output=tmp_path / "out", windows=1)
    settings = {"layer_types": ["sliding_attention", "full_attention"]}
    out = forged((dense, tmp_path / "out"), tmp_path / "to", settings=settings)
    with pytest.raises(VerificationError, match="layer_types is not"):
        verify_smaller(out, dense)


K, V = "model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight"
UP, GATE = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"


def exchange(out: Path) -> None:
    """Two tensors of one shape, and what the manifest says that they were called."""

    def both(tensors: dict[str, torch.Tensor]) -> None:
        tensors[K], tensors[V] = tensors[V], tensors[K]

    def rename(manifest: dict[str, Any]) -> None:
        names = manifest["shrunk"].setdefault("names", {})
        names[K], names[V] = names.get(V, V), names.get(K, K)

    change_tensors(out / "model.safetensors", both)
    forge_manifest(out, rename)


def test_tensors_in_each_others_place(mistral: Any, shallow: Any, tmp_path: Path) -> None:
    for index, models in enumerate((mistral, shallow)):
        out = forged(models, tmp_path / str(index), change=exchange)
        with pytest.raises(VerificationError, match="is not where the kept blocks"):
            verify_smaller(out, models[0])


def test_channels_of_another_block(mistral: tuple[Path, Path], tmp_path: Path) -> None:
    """One layer of an MLP cut by other channels than the next takes."""
    whole = load_file(mistral[0] / "model.safetensors")[UP]
    by = "model.layers.1.mlp.down_proj"

    def change(out: Path) -> None:
        kept = json.loads((out / MANIFEST).read_text())["shrunk"]["kept"][by]
        change_tensors(out / "model.safetensors", lambda t: t.update({UP: whole[kept]}))
        forge_manifest(out, lambda m: m["shrunk"]["tensors"][UP][0].update(by=by))

    out = forged(mistral, tmp_path, change=change)
    with pytest.raises(VerificationError, match=r"up_proj.* is not cut as what was removed asks"):
        verify_smaller(out, mistral[0])


@pytest.mark.parametrize("home", ["self_attn.dense", "self_attn.q_proj", "mlp.up_proj"])
def test_channels_and_heads_of_layers_that_take_none(
    home: str, mistral: tuple[Path, Path], tmp_path: Path
) -> None:
    def change(out: Path) -> None:
        more = {f"model.layers.0.{home}": [0]}
        forge_manifest(out, lambda m: m["shrunk"]["kept"].update(more))

    out = forged(mistral, tmp_path, change=change)
    with pytest.raises(VerificationError, match="is not a layer that takes channels or heads"):
        verify_smaller(out, mistral[0])


@pytest.mark.parametrize("anew", [[GATE], ["model.layers.0.mlp.down_proj.weight"]])
def test_weights_set_anew_that_refitting_leaves(
    anew: list[str], mistral: tuple[Path, Path], tmp_path: Path
) -> None:
    """Refitting sets those of all blocks, and of what takes the channels alone."""

    def change(out: Path) -> None:
        redraw = {name: lambda t, n=name: t[n].normal_() for name in anew}
        for name in anew:
            change_tensors(out / "model.safetensors", redraw[name])
        forge_manifest(out, lambda m: m["shrunk"].update(set_anew=anew))

    out = forged(mistral, tmp_path, change=change)
    with pytest.raises(VerificationError, match="is set anew, or not, otherwise than refitting"):
        verify_smaller(out, mistral[0])


def test_experts_by_the_choice_of_another_block(tmp_path: Path) -> None:
    """The experts of a block and the rows of its router, cut by what two different blocks keep."""
    dense = save(tiny("gpt_oss"), tmp_path / "dense")
    remove_experts(dense, tokens(6), share=0.25, output=tmp_path / "out")
    router = "model.layers.0.mlp.router.weight"
    whole = load_file(dense / "model.safetensors")[router]
    by = "model.layers.1.mlp.experts"

    def change(out: Path) -> None:
        kept = json.loads((out / MANIFEST).read_text())["shrunk"]["kept"][by]
        change_tensors(out / "model.safetensors", lambda t: t.update({router: whole[kept]}))
        forge_manifest(out, lambda m: m["shrunk"]["tensors"][router][0].update(by=by))

    out = forged((dense, tmp_path / "out"), tmp_path / "to", change=change)
    with pytest.raises(VerificationError, match=r"router.* is not cut as what was removed"):
        verify_smaller(out, dense)

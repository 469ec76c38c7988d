"""What a folder says of parts that were trained: that it can be so, and that nothing else differs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forging import change_tensors, forge_manifest
from tiny_models import FAMILIES, loud, save, tiny, tokens

from maskopt import prune_model
from maskopt.errors import VerificationError
from maskopt.model import reconstruct
from maskopt.model.report import read_manifest
from maskopt.model.verify import verify_output
from maskopt.model.workspace import MANIFEST

OPTIONS: dict[str, Any] = {
    "sparsity": 0.5, "solver": "wanda", "min_tokens": 1, "holdout": 0.25, "weights": "reconstruct",
}  # fmt: skip
HOW: dict[str, Any] = {"epochs": 2, "learning_rate": 0.003, "train": "all"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder whose attention was trained, with its norms, and whose MLPs stayed; and its original."""
    home, real = tmp_path_factory.mktemp("trained"), reconstruct.train
    dense = save(loud("qwen3"), home / "dense")

    def train(task: Any, *rest: Any) -> Any:
        how = replace(task.how, learning_rate=0.0) if task.name == "mlp" else task.how
        return real(replace(task, how=how), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruct, "train", train)
        more = {"reconstruct": {**HOW, "granularity": "part"}}
        report = prune_model(dense, tokens(8), output=home / "out", **OPTIONS, **more)
    assert [bool(part.epoch) for part in report.parts] == [True, False] * 3
    verify_output(home / "out", dense)
    return home / "out", dense


def parts(change: Callable[[dict[str, Any]], Any], *which: int) -> Callable[[dict[str, Any]], None]:
    """Of a manifest some parts are changed."""
    return lambda m: [change(m["parts"][index]) for index in which] and None


def stay(part: dict[str, Any]) -> None:
    part.update(epoch=0, held_after=part["held_before"], fitted_after=part["fitted_before"])


FORGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no part": (lambda m: m.update(parts=[]), "in no part"),
    "a part twice": (lambda m: m["parts"].append(m["parts"][0]), "or in two"),
    "a part of another block": (
        lambda m: m["parts"].append({**m["parts"][0], "block": 77}),
        "holds no layer",
    ),
    "a whole block": (parts(lambda p: p.update(part=""), 0), "the options train others"),
    "an epoch that there was not": (parts(lambda p: p.update(epoch=3), 0), "longer than"),
    "a loss that rose": (
        parts(lambda p: p.update(held_after=p["held_before"] * 2), 0),
        "not what its losses say",
    ),
    "a loss that fell by itself": (
        parts(lambda p: p.update(fitted_after=p["fitted_before"] / 2), 1),
        "not what its losses say",
    ),
    "nothing that became better": (
        parts(stay, 0, 2, 4),
        "differs from the original",
    ),
    "no way of training": (
        lambda m: m["fingerprint"]["options"].update(reconstruct={}),
        "how its weights were trained",
    ),
    "options of no kind": (
        lambda m: m["fingerprint"]["options"].update(reconstruct=None),
        "damaged or was changed",
    ),
    "a dtype of no kind": (lambda m: m["fingerprint"].update(dtype=[]), "damaged or was changed"),
    "weights that were kept": (
        lambda m: m["fingerprint"]["options"].update(weights="keep"),
        "its options train none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_parts_that_cannot_be_are_refused(
    name: str, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    out = shutil.copytree(trained[0], tmp_path / "out")
    change, message = FORGED[name]
    forge_manifest(out, change)
    with pytest.raises(VerificationError, match=message):
        verify_output(out, trained[1])


@pytest.mark.parametrize(
    "tensor",
    [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.2.post_attention_layernorm.weight",
        "model.norm.weight",
    ],
)
def test_what_was_not_trained_is_the_originals(
    tensor: str, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    """The MLP stayed, and norms outside attention are in no part."""
    out = shutil.copytree(trained[0], tmp_path / "out")
    change_tensors(out / "model.safetensors", lambda tensors: tensors[tensor].mul_(2))
    forge_manifest(out)
    with pytest.raises(VerificationError, match=rf"{tensor}.*differs from the original"):
        verify_output(out, trained[1])


#: LongCat's blocks have two attentions in one child
PAIRS = [(f, g) for f in FAMILIES for g in ("block", "part") if (f, g) != ("longcat_flash", "part")]


@pytest.mark.parametrize(("family", "granularity"), PAIRS)
def test_honest_folders_of_every_family_hold(family: str, granularity: str, tmp_path: Path) -> None:
    dense = save(tiny(family), tmp_path / "dense")
    more = {"reconstruct": {**HOW, "granularity": granularity}, "min_tokens": 8}
    prune_model(dense, tokens(8), output=tmp_path / "out", **{**OPTIONS, **more})
    assert any(part["epoch"] for part in read_manifest(tmp_path / "out" / MANIFEST)["parts"])
    verify_output(tmp_path / "out", dense)

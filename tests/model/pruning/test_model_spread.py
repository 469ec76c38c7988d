"""Rows that trade within limits, and `budget` both: layers trade, then their rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from forging import change_masks, check_forgery, copied, forge_manifest
from outputs import contents
from resuming import interrupted
from tiny_models import FAMILIES, save, tiny, tokens

from maskopt import Unstructured, collect_problems, prune_model
from maskopt.certify import certify_model
from maskopt.errors import ModelError, VerificationError
from maskopt.model import plan as planning
from maskopt.model.again import options_again
from maskopt.model.plan import plan_prune
from maskopt.model.report import read_manifest
from maskopt.model.verify import verify_output
from maskopt.model.workspace import MANIFEST

LAYER: dict[str, Any] = {
    "sparsity": 0.5,
    "min_tokens": 1,
    "budget": "layer",
    "importance": "alike",
    "spread": 0.1,
}
BOTH: dict[str, Any] = {**LAYER, "budget": "both"}


def row_counts(mask: torch.Tensor) -> list[int]:
    return (~mask).sum(1).tolist()


@pytest.mark.parametrize("weights", ["keep", "refit"])
def test_no_row_is_further_from_its_layer(weights: str) -> None:
    given = {**LAYER, "weights": weights, "one_pass": True}
    report = prune_model(tiny("llama"), tokens(10), **given)
    free = prune_model(tiny("llama"), tokens(10), **{**given, "spread": 1})
    felt = []
    for layer, other in zip(report.layers, free.layers, strict=True):
        assert layer.pattern == "0.5 per layer ± 0.1"
        counts = row_counts(report.masks[layer.name])
        assert sum(counts) == layer.pruned == other.pruned
        least, most = -(-4 * layer.n // 10), 6 * layer.n // 10
        assert least <= min(counts)
        assert max(counts) <= most
        felt.append((min(counts), max(counts)) == (least, most))
        assert set(layer.statuses) == {"swap-optimal"}
    assert any(felt)
    none = {**given, "spread": None, "budget": "row", "importance": "loss"}
    alike = prune_model(tiny("llama"), tokens(10), **none)
    one, two, three = (sum(x.relative for x in r.layers) for r in (free, report, alike))
    assert one < two < three


@pytest.mark.parametrize("weights", ["keep", "refit"])
def test_layers_trade_and_then_their_rows(weights: str) -> None:
    given = {**BOTH, "importance": "relative", "weights": weights, "one_pass": True}
    report = prune_model(tiny("llama"), tokens(10), **given)
    alike = prune_model(tiny("llama"), tokens(10), **{**given, "budget": "model"})
    for layer, other in zip(report.layers, alike.layers, strict=True):
        assert layer.pruned == other.pruned
        mean = layer.pruned // layer.rows
        assert other.pattern == f"keep {layer.n - mean}"
        assert layer.pattern == f"keep {layer.n - mean} per layer ± 0.1"
        counts = row_counts(report.masks[layer.name])
        assert all(abs(count - mean) <= 0.1 * layer.n for count in counts)
        assert layer.error_alike == pytest.approx(other.error_start, rel=1e-9)
    assert len({layer.pattern for layer in report.layers}) > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_written_and_verified(family: str, tmp_path: Path) -> None:
    folder = save(tiny(family), tmp_path / "model")
    more = {**BOTH, "min_tokens": 8, "solver": "wanda"}
    prune_model(folder, tokens(), output=tmp_path / "out", **more)
    assert verify_output(tmp_path / "out", folder, calibration=tokens()).checked_layers


@pytest.mark.parametrize("budget", ["layer", "both"])
def test_resumed_runs_write_the_same_bytes(tmp_path: Path, budget: str) -> None:
    dense = save(tiny("llama"), tmp_path / "model", shard="20KB")
    more = {**LAYER, "budget": budget, "importance": "loss", "solver": "swap"}
    prune_model(dense, tokens(), output=tmp_path / "whole", **more)
    interrupted(dense, tmp_path / "out", 2, "solve", **{"warm_start": None, **more})
    prune_model(dense, tokens(), output=tmp_path / "out", resume=True, **more)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(verify_output(tmp_path / "out", dense, calibration=tokens()).checked_layers) == 21


def test_layers_that_saw_too_few_tokens_trade_by_magnitude_within_limits(tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "model")
    report = prune_model(dense, tokens(), output=tmp_path / "out", **{**LAYER, "min_tokens": 10**6})
    assert all(layer.fallback for layer in report.layers)
    verify_output(tmp_path / "out", dense)


def test_problems_have_the_patterns_of_their_layers() -> None:
    problems = dict(collect_problems(tiny("llama"), tokens(), **LAYER))
    counts = {name: problem.n // 2 for name, problem in problems.items()}
    both = dict(collect_problems(tiny("llama"), tokens(), **{**BOTH, "counts": counts}))
    for name, problem in both.items():
        assert problem.pattern == Unstructured(
            keep=problem.n - counts[name], per="layer", spread=0.1
        )
        assert problem.pruned == problems[name].pruned
        assert problem.row_limits == problems[name].row_limits


def test_the_plan_counts_what_is_pruned_and_the_pass_before(
    dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_speed", lambda *_: 1e9)  # operations, not this machine
    plan, alike = plan_prune(dense, **BOTH), plan_prune(dense, **LAYER)
    assert sum(plan.pruned.values()) == sum(alike.pruned.values())
    assert plan.forward_seconds > alike.forward_seconds


def test_the_command_takes_a_spread(dense: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("Pack my box with five dozen liquor jugs. " * 40)
    run(
        "prune", dense, "--sparsity", 0.5, "--budget", "both", "--spread", 0.05,
        "--calibration", text, "--samples", 4, "--seq-len", 32, "--output", out, "--min-tokens", 8,
    )  # fmt: skip
    options = read_manifest(out / MANIFEST)["fingerprint"]["options"]
    assert (options["budget"], options["spread"]) == ("both", 0.05)
    run("verify", out, "--against", dense)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("spread")
    dense = save(tiny("llama"), home / "model")
    prune_model(dense, tokens(), output=home / "out", **BOTH)
    return dense, home / "out"


def test_gaps_of_rows_that_trade_are_not_claimed(result: tuple[Path, Path]) -> None:
    with pytest.raises(ModelError, match="its rows trade, and bounds are of rows that prune alike"):
        certify_model(result[0], result[1], calibration=tokens(), rows_per_layer=1)


@pytest.mark.parametrize("budget", ["layer", "both"])
def test_limits_that_a_manifest_does_not_name_are_none(budget: str, tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "model")
    free = {**LAYER, "budget": budget, "spread": 1}
    prune_model(dense, tokens(), output=tmp_path / "out", **free)
    masks = prune_model(tiny("llama"), tokens(), **free).masks
    assert any(max(row_counts(mask)) > 0.7 * mask.shape[1] for mask in masks.values())
    out = tmp_path / "out"
    forge_manifest(out, lambda m: m["fingerprint"]["options"].update(spread=None))
    assert verify_output(out, dense, calibration=tokens()).checked_layers
    again = options_again(read_manifest(out / MANIFEST)["fingerprint"], out)
    assert again["spread"] == 1
    forge_manifest(out, lambda m: m["fingerprint"]["options"].pop("spread"))
    assert options_again(read_manifest(out / MANIFEST)["fingerprint"], out)["spread"] == 1


NAME = "model.layers.1.mlp.up_proj"


def test_a_row_beyond_its_limits_is_found(result: tuple[Path, Path], tmp_path: Path) -> None:
    out = copied(result[1], tmp_path)

    def whole(masks: dict[str, Any]) -> None:
        masks[f"{NAME}.weight"].kept[0] = True

    change_masks(out, whole)
    forge_manifest(out)
    with pytest.raises(VerificationError, match=r"row 0: 0 of .* beyond the spread of its layer"):
        verify_output(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m["fingerprint"]["options"].update(spread=0.2),
            "has another pattern than the options",
        ),
        (lambda m: m["fingerprint"]["options"].update(spread=2), "damaged or was changed"),
        (
            lambda m: m["fingerprint"]["options"].update(budget="model"),
            "has another pattern than the options",
        ),
        (lambda m: m["fingerprint"]["options"].update(counts={}), "otherwise than its budget says"),
    ],
)
def test_manifests_that_say_otherwise_are_found(
    result: tuple[Path, Path], tmp_path: Path, change: Any, message: str
) -> None:
    check_forgery(result[1], tmp_path, change, message, result[0])


@pytest.mark.parametrize(
    "options",
    [{}, {"budget": "layer", "spread": 1 / 7}, {"budget": "model", "importance": "relative"}],
)
def test_patterns_of_many_digits_are_those_of_the_manifest(
    options: dict[str, Any], dense_folder: Path, tmp_path: Path
) -> None:
    """Two thirds are not 0.6667, to whoever prunes and to whoever checks."""
    how = {"sparsity": 2 / 3, "solver": "swap", "min_tokens": 1, **options}
    prune_model(dense_folder, tokens(6), output=tmp_path / "out", **how)
    assert verify_output(tmp_path / "out", dense_folder).layers == 21

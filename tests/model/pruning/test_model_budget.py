"""`budget` layer: one count for a layer whose rows trade, in the model, its folder, and what checks both."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from forging import change_masks, check_forgery, copied, forge_manifest
from outputs import contents
from pooled_layers import pool
from resuming import interrupted
from test_model_allocate import refusal, squares
from tiny_models import FAMILIES, loud, save, tiny, tokens

from maskopt import NM, Unstructured, collect_problems, prune_model
from maskopt.certify import certify_model
from maskopt.errors import MaskoptError, ModelError, OptionError, VerificationError
from maskopt.model.plan import plan_prune
from maskopt.model.report import read_manifest
from maskopt.model.verify import verify_output
from maskopt.model.workspace import MANIFEST

OPTIONS: dict[str, Any] = {
    "sparsity": 0.5,
    "min_tokens": 1,
    "budget": "layer",
    "importance": "alike",
    "spread": 1,
}
#: none trades
ROWS: dict[str, Any] = {"sparsity": 0.5, "min_tokens": 1}


@pytest.mark.parametrize("weights", ["keep", "refit"])
def test_rows_trade_and_the_layer_keeps_its_count(weights: str) -> None:
    report = prune_model(tiny("llama"), tokens(10), weights=weights, one_pass=True, **OPTIONS)
    alike = prune_model(tiny("llama"), tokens(10), weights=weights, one_pass=True, **ROWS)
    for layer, other in zip(report.layers, alike.layers, strict=True):
        counts = (~report.masks[layer.name]).sum(1)
        assert int(counts.sum()) == layer.pruned == layer.rows * layer.n // 2
        assert int(counts.max()) > int(counts.min())
        assert set(layer.statuses) == {"swap-optimal"}
        assert layer.pattern == "0.5 per layer"
        assert layer.error_alike == pytest.approx(other.error_start, rel=1e-9)
        assert layer.error_start != layer.error_alike
        assert other.error_alike is None
        if weights == "keep":  # else it is the damped error that trading lowers
            assert layer.error < other.error * (1 + 1e-6)
    assert sum(x.relative for x in report.layers) < 0.98 * sum(x.relative for x in alike.layers)


@pytest.mark.parametrize("budget", ["layer", "both"])
@pytest.mark.parametrize("importance", ["loss", "relative"])
def test_layers_of_few_tokens_are_ranked_by_magnitude_alone(
    budget: str, importance: str, tmp_path: Path
) -> None:
    """What a row counts is not in the folder: `verify` could not tell whether the least were pruned."""
    folder = save(loud("mixtral"), tmp_path / "model")
    more = {"budget": budget, "importance": importance, "solver": "wanda", "min_tokens": 60}
    report = prune_model(folder, tokens(8), output=tmp_path / "out", **{**OPTIONS, **more})
    assert 0 < len(report.fallbacks) < len(report.layers)
    verified = verify_output(tmp_path / "out", folder, calibration=tokens(8))
    assert set(report.fallbacks) <= set(verified.checked_layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_written_and_verified(family: str, tmp_path: Path) -> None:
    folder = save(tiny(family), tmp_path / "model")
    more = {**OPTIONS, "min_tokens": 8, "solver": "wanda"}
    prune_model(folder, tokens(), output=tmp_path / "out", **more)
    verified = verify_output(tmp_path / "out", folder, calibration=tokens())
    assert verified.checked_layers


@pytest.mark.parametrize("weights", ["keep", "refit"])
def test_resumed_runs_write_the_same_bytes(tmp_path: Path, weights: str) -> None:
    dense = save(tiny("llama"), tmp_path / "model", shard="20KB")
    more = {**OPTIONS, "weights": weights, "solver": "swap", "warm_start": None}
    prune_model(dense, tokens(), output=tmp_path / "whole", **more)
    interrupted(dense, tmp_path / "out", 2, "solve", **more)
    prune_model(dense, tokens(), output=tmp_path / "out", resume=True, **more)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    verified = verify_output(tmp_path / "out", dense, calibration=tokens())
    assert len(verified.checked_layers) == 21


def test_pattern_and_budget_say_the_same() -> None:
    problems = [
        dict(collect_problems(tiny("llama"), calibration=tokens(), layers="layers.0.*", **given))
        for given in (
            {"pattern": pool(0.5)},
            {"sparsity": 0.5, "budget": "layer", "spread": 1},
            {"pattern": pool(0.5, 0.1)},
            {"sparsity": 0.5, "budget": "layer"},
        )
    ]
    for one, two, within, usual in zip(*(found.values() for found in problems), strict=True):
        assert one.pattern == two.pattern == pool(0.5)
        assert within.pattern == usual.pattern == pool(0.5, 0.1)


@pytest.mark.parametrize("importance", ["relative", "loss"])
def test_rows_count_as_the_importance_says(importance: str) -> None:
    given = {**OPTIONS, "importance": importance}
    found = dict(collect_problems(tiny("llama"), tokens(), **given))
    expected = squares("llama", tokens())
    for name, problem in found.items():
        assert problem.omega is not None
        size = expected[name] if importance == "loss" else 1 / problem.output_energy()
        omega = (size / size.mean()).clamp(min=1e-3)
        torch.testing.assert_close(problem.omega, omega, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_rows_that_count_differently_are_proven_together(family: str, tmp_path: Path) -> None:
    dense = save(tiny(family), tmp_path / "model")
    given = {**OPTIONS, "importance": "loss"}
    report = prune_model(dense, tokens(), output=tmp_path / "out", **given)
    alike = prune_model(tiny(family), tokens(), **OPTIONS)
    assert [x.error for x in report.layers] != [x.error for x in alike.layers]
    verify_output(tmp_path / "out", dense, calibration=tokens())
    said = lambda m: m["fingerprint"]["options"].update(importance="alike")  # noqa: E731
    forge_manifest(tmp_path / "out", said)
    with pytest.raises(VerificationError, match=r"its rows are swap-optimal together; keeping"):
        verify_output(tmp_path / "out", dense, calibration=tokens())


def test_windows_cannot_be_left_out_where_the_loss_counts() -> None:
    with pytest.raises(OptionError, match="`importance` loss needs every window's loss"):
        prune_model(
            tiny("llama"), tokens(), skip_bad_samples=True, **{**OPTIONS, "importance": "loss"}
        )


def test_the_plan_counts_what_the_layers_prune(dense: Path) -> None:
    plan = plan_prune(dense, **{**OPTIONS, "sparsity": 0.37})
    report = prune_model(
        tiny("llama"), tokens(), **{**OPTIONS, "sparsity": 0.37, "solver": "wanda"}
    )
    assert sum(plan.pruned.values()) == sum(x.pruned for x in report.layers)


def test_the_command_takes_a_budget(dense: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("Pack my box with five dozen liquor jugs. " * 40)
    run(
        "prune", dense, "--sparsity", 0.5, "--budget", "layer", "--calibration", text,
        "--samples", 4, "--seq-len", 32, "--output", out, "--min-tokens", 8,
    )  # fmt: skip
    options = read_manifest(out / MANIFEST)["fingerprint"]["options"]
    assert options["budget"] == "layer"
    assert options["pattern"]["per"] == "layer"
    run("verify", out, "--against", dense)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("budget")
    dense = save(tiny("llama"), home / "model")
    prune_model(dense, tokens(), output=home / "out", **OPTIONS)
    return dense, home / "out"


def test_gaps_of_rows_that_trade_are_not_claimed(result: tuple[Path, Path]) -> None:
    with pytest.raises(ModelError, match="its rows trade, and bounds are of rows that prune alike"):
        certify_model(result[0], result[1], calibration=tokens(), rows_per_layer=1)


NAME = "model.layers.1.mlp.up_proj.weight"


def test_a_mask_of_another_count_is_found(result: tuple[Path, Path], tmp_path: Path) -> None:
    out = copied(result[1], tmp_path)

    def more(masks: dict[str, Any]) -> None:
        masks[NAME].kept[0] = True

    change_masks(out, more)
    forge_manifest(out)
    with pytest.raises(VerificationError, match="is said to have 768 weights pruned; its mask has"):
        verify_output(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pruned": 1023}, "counts other pruned weights than its pattern"),
        ({"pattern": "0.5"}, "has another pattern than the options"),
    ],
)
def test_manifests_that_say_otherwise_are_found(
    result: tuple[Path, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    check_forgery(result[1], tmp_path, lambda m: m["layers"][9].update(change), message, result[0])


def test_another_budget_than_the_patterns_is_found(
    result: tuple[Path, Path], tmp_path: Path
) -> None:
    row = lambda m: m["fingerprint"]["options"].update(budget="row")  # noqa: E731
    check_forgery(result[1], tmp_path, row, "has a budget that is not its pattern's")


def test_a_trade_that_was_left_out_is_found(tmp_path: Path) -> None:
    """Rows that prune alike, each of them optimal, said to be optimal together."""
    dense = save(tiny("llama"), tmp_path / "model")
    prune_model(dense, tokens(), output=tmp_path / "out", **ROWS)

    def together(manifest: dict[str, Any]) -> None:
        options = manifest["fingerprint"]["options"]
        options.update(budget="layer", importance="alike")
        options["pattern"]["per"] = "layer"
        for tensor in manifest["tensors"].values():
            tensor["pattern"]["per"] = "layer"
        for layer in manifest["layers"]:
            layer["pattern"] = "0.5 per layer"

    forge_manifest(tmp_path / "out", together)
    verify_output(tmp_path / "out", dense)
    with pytest.raises(
        VerificationError, match=r"its rows are swap-optimal together; keeping input"
    ):
        verify_output(tmp_path / "out", dense, calibration=tokens())


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"budget": "all"},
            OptionError,
            "`budget` must be text row or layer or model or both, not 'all'",
        ),
        (
            {"solver": "tabu"},
            MaskoptError,
            "solver 'tabu' prunes as much of every row; where rows trade take one that does: swap",
        ),
        ({"sparsity": None, "pattern": NM(2, 4)}, OptionError, "2:4 has a count in every group"),
        (
            {"sparsity": None, "pattern": Unstructured(keep=3), "budget": "both"},
            OptionError,
            "`budget` both is of a plain sparsity, such as 0.5, not of keep 3",
        ),
        ({"budget": "row", "spread": 0.1}, OptionError, "`spread` is of what trades"),
        (
            {"budget": "row", "importance": "alike", "spread": None},
            OptionError,
            "`importance` is of what trades",
        ),
        (
            {"sparsity": None, "pattern": pool(0.5, 0.2), "spread": 0.1},
            OptionError,
            "`spread` 0.1 is not that of the pattern",
        ),
        (
            {"spread": 0.1, "solver": "sparsegpt"},
            MaskoptError,
            "'sparsegpt' holds no `spread` of rows; where rows trade take one that does: swap",
        ),
    ],
)
def test_bad_input_gets_one_line(
    options: dict[str, Any], kind: type[MaskoptError], message: str
) -> None:
    assert re.search(message, refusal({**OPTIONS, **options}, kind))


def test_half_precision_trades_too() -> None:
    report = prune_model(tiny("llama", dtype=torch.bfloat16), tokens(), **OPTIONS)
    assert all(set(layer.statuses) == {"swap-optimal"} for layer in report.layers)

"""The demo's tables from hand-made records; the whole demo is a measurement, not a test."""

import math
from dataclasses import replace

import pytest
from tiny_models import save, save_tokenizer, tiny

from maskopt.compare import Record
from maskopt.demo import error_table, perplexity_table, run_demo, toy_table
from maskopt.errors import ModelError
from maskopt.model.report import LayerReport, PruneReport


def test_toy_table_names_a_row_once():
    name = "model.layers.0.self_attn.q_proj[3]"
    wanda = Record(
        name, 48, "0.5", "wanda", 3.0, 0.0, 3.0, 0.0, 0.0, 0.5, "feasible", 0, 0.1, 0, "wanda"
    )
    scip = replace(
        wanda, solver="scip", objective=2.0, excess=0.0, status="optimal", lower_bound=2.0
    )
    labels = {name: "0 q_proj[3]"}
    table = toy_table([wanda, replace(scip, value=2.0, value_bound=2.0)], labels, 0.5)
    assert [row[0] for row in table.rows] == ["0 q_proj[3]", ""]
    assert [row[4] for row in table.rows] == ["50.00%", "0.00%"]
    nothing = dict.fromkeys(("objective", "value", "excess"), math.nan)
    unknown = toy_table([replace(wanda, status="failed", **nothing)], labels, 0.5)
    assert unknown.rows[0][2] == "–"


def test_errors_are_summed_per_kind_and_compared_with_the_start():
    layers = [
        LayerReport(
            f"model.layers.{block}.mlp.up_proj", block, "mlp.up_proj", 4, 8, "0.5", 16, before, after,
            0.0, {"swap-optimal": 3, "feasible": 1}, 100, False, 0.1,
        )
        for block, before, after in ((0, 4.0, 1.0), (1, 6.0, 4.0))
    ]  # fmt: skip
    report = PruneReport(layers, {}, seconds=3.0)
    table = error_table(report, 0.5, 2)
    assert table.rows == [("up_proj", "10", "5", "0.500", "8", "75%")]
    shown = perplexity_table({"dense": 10.0, "swap": 12.5}, {"swap": report}, 8, 512)
    assert shown.rows == [("dense", "10.00", "–", "–"), ("Wanda → 1-swap", "12.50", "50.0%", "3")]


def test_the_demo_from_end_to_end_on_a_tiny_model(tmp_path, monkeypatch):
    model = save(tiny("llama"), tmp_path / "model")
    save_tokenizer(model)
    monkeypatch.setattr("maskopt.demo.demo_model", lambda name: model)
    names = ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj")
    monkeypatch.setattr("maskopt.demo.TOY_LAYERS", names)
    stages, size = [], {"samples": 2, "seq_len": 32, "windows": 2, "columns": 8}
    result = run_demo(tmp_path / "out", **size, on_stage=lambda *stage: stages.append(stage[0]))
    toy, errors, values = result.tables
    shown = [row[0] for row in toy.rows if row[0]]
    assert [label.split("[")[0] for label in shown] == ["0 q_proj", "2 down_proj"]
    assert {row[0] for row in errors.rows} >= {"q_proj", "down_proj"}
    assert [row[0] for row in values.rows] == ["dense", "Wanda", "Wanda → 1-swap"]
    page = result.report.read_text()
    assert "in 21 layers of 3 blocks" in page
    assert all(title in page for title in ("Toy rows", "Errors along the model", "A mask"))
    assert "toy rows: block 3/3, calibrate" in stages
    # an output that is not empty is refused before anything starts
    stages.clear()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ModelError, match="is not empty"):
        run_demo(tmp_path, on_stage=lambda *stage: stages.append(stage))
    assert stages == []
    assert (tmp_path / "file").read_text() == "mine"

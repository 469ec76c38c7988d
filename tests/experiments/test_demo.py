"""The demo's tables from hand-made records; the whole demo is a measurement, not a test."""

import math

import pytest
from tiny_models import save, save_tokenizer, tiny

from maskopt.compare import Record
from maskopt.demo import error_table, perplexity_table, run_demo, toy_table
from maskopt.errors import ModelError
from maskopt.model.report import LayerReport, PruneReport


def record(solver, objective, status, bound=0.0):
    name = "model.layers.0.self_attn.q_proj[3]"
    return Record(
        name, 48, "0.5", solver, objective, bound, objective, bound, 0.0, objective / 2 - 1, status, 0, 0.1,
        0, solver,
    )  # fmt: skip


def layer(block, kind, before, after):
    statuses = {"swap-optimal": 3, "feasible": 1}
    name = f"model.layers.{block}.{kind}"
    return LayerReport(
        name, block, kind, 4, 8, "0.5", 16, before, after, 0.0, statuses, 100, False, 0.1
    )


def test_toy_table_names_a_row_once():
    solved = [record("wanda", 3.0, "feasible"), record("scip", 2.0, "optimal", 2.0)]
    labels = {solved[0].instance: "0 q_proj[3]"}
    table = toy_table(solved, labels, 0.5)
    assert [row[0] for row in table.rows] == ["0 q_proj[3]", ""]
    assert [row[4] for row in table.rows] == ["50.00%", "0.00%"]
    unknown = toy_table([record("wanda", math.nan, "failed")], labels, 0.5)
    assert unknown.rows[0][2] == "–"


def test_errors_are_summed_per_kind_and_compared_with_the_start():
    layers = [layer(0, "mlp.up_proj", 4.0, 1.0), layer(1, "mlp.up_proj", 6.0, 4.0)]
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
    stages = []
    result = run_demo(
        tmp_path / "out", samples=2, seq_len=32, windows=2, columns=8,
        on_stage=lambda *stage: stages.append(stage[0]),
    )  # fmt: skip
    toy, errors, values = result.tables
    shown = [row[0] for row in toy.rows if row[0]]
    assert [label.split("[")[0] for label in shown] == ["0 q_proj", "2 down_proj"]
    assert {row[0] for row in errors.rows} >= {"q_proj", "down_proj"}
    assert [row[0] for row in values.rows] == ["dense", "Wanda", "Wanda → 1-swap"]
    page = result.report.read_text()
    assert "in 21 layers of 3 blocks" in page
    assert all(title in page for title in ("Toy rows", "Errors along the model", "A mask"))
    assert "toy rows: block 3/3, calibrate" in stages


def test_an_output_that_is_not_empty_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "file").write_text("mine")
    stages = []
    with pytest.raises(ModelError, match="is not empty"):
        run_demo(tmp_path, on_stage=lambda *stage: stages.append(stage))
    assert stages == []
    assert (tmp_path / "file").read_text() == "mine"

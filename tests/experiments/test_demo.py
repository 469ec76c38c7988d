"""Tables of the demo, from hand-made records and end to end, and of the paper's script."""

import json
import math
from dataclasses import replace

import pytest
from tiny_models import save, save_tokenizer, tiny

from maskopt import prune_model
from maskopt.demo.run import error_table, perplexity_table, run_demo, toy_table
from maskopt.errors import ModelError
from maskopt.experiments.compare import Record
from maskopt.models.checkpoints.report import LayerReport, PruneReport


def test_tables_name_a_row_once_and_sum_errors_per_kind():
    name, nothing = "model.layers.0.self_attn.q_proj[3]", ("objective", "value", "excess")
    wanda = Record(
        *(name, 48, "0.5", "wanda", 3.0, 0.0, 3.0, 0.0, 0.0, 0.5, "feasible", 0, 0.1, 0, "wanda")
    )
    best = {"objective": 2.0, "lower_bound": 2.0, "value": 2.0, "value_bound": 2.0}
    scip = replace(wanda, solver="scip", excess=0.0, status="optimal", **best)
    labels = {name: "0 q_proj[3]"}
    table = toy_table([wanda, scip], labels, 0.5)
    assert [row[0] for row in table.rows] == ["0 q_proj[3]", ""]
    assert [row[4] for row in table.rows] == ["50.00%", "0.00%"]
    failed = replace(wanda, status="failed", **dict.fromkeys(nothing, math.nan))
    assert toy_table([failed], labels, 0.5).rows[0][2] == "–"
    layers = [
        LayerReport(
            f"model.layers.{block}.mlp.up_proj", block, "mlp.up_proj", 4, 8, "0.5", 16, after, 0.0,
            {"swap-optimal": 3, "feasible": 1}, 100, False, 0.1, error_wanda=before,
        )
        for block, before, after in ((0, 4.0, 1.0), (1, 6.0, 4.0))
    ]  # fmt: skip
    report = PruneReport(layers, {}, seconds=3.0)
    table = error_table(report, 0.5, 2)
    assert table.rows == [("up_proj", "10", "5", "0.500", "8", "75%")]
    # and errors and perplexities are compared with the start's
    shown = perplexity_table({"dense": 10.0, "swap": 12.5}, {"swap": report}, 8, 512)
    assert shown.rows == [("dense", "10.00", "–", "–"), ("Wanda → 1-swap", "12.50", "50.0%", "3")]


def test_the_demo_from_end_to_end_on_a_tiny_model(tmp_path, monkeypatch):
    model = save(tiny("llama"), tmp_path / "model")
    save_tokenizer(model)
    monkeypatch.setattr("maskopt.demo.run.demo_model", lambda name: model)
    names = ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj")
    monkeypatch.setattr("maskopt.demo.run.TOY_LAYERS", names)
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


def test_the_papers_table_holds_every_cell_and_goes_on(benchmarks, tmp_path, monkeypatch):
    import paper_table

    model = save(tiny("llama", layers=2), tmp_path / "llama")
    save_tokenizer(model)
    text, data, page = (tmp_path / name for name in ("text.txt", "table.jsonl", "table.md"))
    text.write_text("Pack my box with five dozen liquor jugs. " * 20)
    command = [
        "paper_table.py", model, "--calibration", text, "--text", text, "--patterns", "50%", "2:4",
        "--methods", "Wanda", "1-swap, T = 2", "--samples", 4, "--seq-len", 16, "--windows", 3,
        "--bos", "never", "--data", data, "--page", page,
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", list(map(str, command)))
    pruned = []

    def counted(*given, **options):
        pruned.append((options["solver"], str(options["sparsity"])))
        return prune_model(*given, **options, min_tokens=1)

    monkeypatch.setattr(paper_table, "prune_model", counted)
    paper_table.main()
    assert pruned == [(solver, p) for p in ("0.5", "2:4") for solver in ("wanda", "swap")]
    lines = data.read_text().splitlines(keepends=True)
    cells = [f"{model}/{p}/{m}" for p in ("50%", "2:4") for m in ("Wanda", "1-swap, T = 2")]
    assert [json.loads(line)["key"] for line in lines[1:]] == [str(model), *cells]
    assert len(json.loads(lines[3])["below"]) == 14
    made = page.read_text()
    assert "| method        | 50%" in made
    assert made.count("| all layers") == 4
    # an interrupted run has less: the rest is made again, to the same page
    data.write_text("".join(lines[:-1]))
    paper_table.main()
    assert len(pruned) == 5
    assert page.read_text() == made
    assert {path.name for path in tmp_path.iterdir()} == {p.name for p in (model, text, data, page)}

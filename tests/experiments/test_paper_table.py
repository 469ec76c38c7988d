"""The script of the paper's tables, on a tiny model."""

import json

from tiny_models import save, save_tokenizer, tiny

from maskopt import prune_model


def test_the_table_holds_every_cell_and_goes_on(benchmarks, tmp_path, monkeypatch):
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
        pruned.append((options["solver"], str(options["pattern"])))
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

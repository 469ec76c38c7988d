"""Tables and the page of `maskopt report`: its numbers are the manifest's, and nothing breaks out of it."""

import base64
import html
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run, shows
from forging import copied, fails, forge_manifest
from PIL import Image
from prunes import prune
from safetensors.torch import load_file
from tiny_models import save, save_tokenizer, tiny, tokens

from maskopt import prune_model
from maskopt.core.table import Table, number
from maskopt.demo import run_demo
from maskopt.errors import DataError, ModelError, OptionError
from maskopt.experiments.compare import Record, comparison_table
from maskopt.models.checkpoints.report import LayerReport, PruneReport
from maskopt.report.page import MaskPicture, write_page
from maskopt.report.prune_page import DENSE, WANDA, comparison, open_reports, runs

OPTIONS = {"sparsity": 0.5, "min_tokens": 1, "holdout": 0.25}
TRAINED = {"update": "blockwise", "training": {"epochs": 1, "begin": "least-squares"}}


def test_numbers_are_short_and_cells_are_escaped(tmp_path):
    values = 12.3456, 0.00402134, 123456.0, 1.2e9, 0.0, 1e-7, 999.96, None, math.nan
    expected = ["12.35", "0.004021", "123,456", "1.2e+09", "0", "1e-07", "1000", "–", "–"]
    assert [number(value) for value in values] == expected
    table = Table("A [bold]title[/bold] <b>", ("solver", "objective"), note="see <here>")
    table.add("swap", "1.5")
    assert table.lines() == ["solver  objective", "swap          1.5"]
    fails(ValueError, "1 cells for 2", table.add, "swap")
    write_page(tmp_path / "r.html", "T & U", ["a < b", table])
    found = (tmp_path / "r.html").read_text()
    shows(found, "a &lt; b", "T &amp; U", "[bold]title[/bold]", ">objective<")
    shows(found, '<td class="figure">1.5</td>', "see &lt;here&gt;")
    assert "<b>" not in found
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A dense model, two pruned ones and what `eval` and `bound` say of them; nobody may change them."""
    folder = tmp_path_factory.mktemp("report")
    dense = save(tiny("llama", layers=2), folder / "dense")
    prune_model(dense, tokens(8), output=folder / "OUT", **OPTIONS)
    prune_model(dense, tokens(8), output=folder / "TRAINED", **OPTIONS, **TRAINED)
    np.save(folder / "tokens.npy", tokens(4).numpy())
    both = ["--calibration", folder / "tokens.npy", "--output", folder / "gaps.jsonl"]
    run("bound", folder / "OUT", "--original", dense, *both)
    text = ["--text", folder / "tokens.npy", "--json", folder / "eval.json"]
    run("eval", dense, folder / "OUT", *text)
    (folder / "half.json").write_text(r'[{"model": "\ud800"}]')
    return folder


def page(out, *arguments):
    run("report", *arguments, "--output", out / "page.html", "--overwrite")
    return (out / "page.html").read_text()


def test_everything_is_on_one_page(home, tmp_path):
    more = ["--evaluation", home / "eval.json", "--gaps", home / "gaps.jsonl"]
    found = page(tmp_path, home / "OUT", *more, "--figures", tmp_path / "figures")
    manifest = json.loads((home / "OUT" / "maskopt-manifest.json").read_text())
    layers = manifest["layers"]
    mean = sum(layer["error"] / layer["energy"] for layer in layers) / len(layers)
    up = [x for x in layers if x["kind"] == "mlp.up_proj"]
    error, wanda = (sum(x[field] for x in up) for field in ("error", "error_wanda"))
    perplexity = json.loads((home / "eval.json").read_text())[1]["perplexity"]["value"]
    peak = manifest["memory"]["process"]
    assert (peak is None) == (not Path("/proc/self/status").exists())
    taken = "–" if peak is None else f"{peak / 2**30:.2f} GiB"
    shows(found, "swap from relax pruned 50.0% of 15,360 weights in 14 layers of 2 blocks")
    shows(found, f'<td class="figure">{mean:.4g}</td>', f">{error / wanda:.3f}</td>")
    shows(found, "As gaps.jsonl states of sampled rows", f"{perplexity:.2f} (", f">{taken}</td>")
    shows(found, "maskopt prune MODEL --config")
    assert len(re.findall(r"<img [^>]*alt=\"Mask of [^\"]+\"", found)) == 1
    names = sorted(file.name for file in (tmp_path / "figures").iterdir())
    assert names == ["errors.png", "errors.svg", "improvements-1.png", "improvements-1.svg"]
    # where the system has no /proc the memory is not known
    forge_manifest(old := copied(home / "OUT", tmp_path), lambda m: m.update(memory={}))
    assert runs(open_reports([old])).rows[0][-1] == "–"
    # the verdict comes first, with the perplexity of the same folder
    first, table = found[found.index("</h1>") :].split("<p>", 2)[1:]
    shows(first, "OUT: 50.0% of the weights in 14 layers are zero; perplexity is ", "of Wanda")
    assert f"perplexity is {perplexity:.2f}, " in first
    shows(first, "<h2>In short</h2>", ">dense<", "Wanda&#x27;s masks", f">{perplexity:.2f}</td>")
    assert "are zero" not in table
    assert "perplexity" not in page(tmp_path, home / "OUT")


def unique_ids(found):
    ids = re.findall(r' id="([^"]*)"', found)
    assert len(ids) == len(set(ids))
    return set(ids)


def test_nothing_is_asked_for_elsewhere_and_all_pictures_are_in_words_too(home, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    words = home / "OUT", home / "TRAINED", "--picture", name
    found = page(tmp_path, *words)
    assert page(tmp_path, *words) == found
    links = re.findall(r'(?:src|href|xlink:href)="([^"]*)"', found)
    assert set() < {link[1:] for link in links if link.startswith("#")} <= unique_ids(found)
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert found.count('role="img" aria-label=') == found.count("<svg") == 3
    assert found.count("<summary>The numbers</summary>") == 3
    # as wide as the screen, and no wider
    assert '<meta name="viewport" content="width=device-width' in found
    for selector, rule in (("figure svg", "width: 100%"), ("table", "overflow-x: auto")):
        assert re.search(rf"^{selector} {{[^}}]*{rule}", found, re.M)
    assert not any(word in found for word in ("#0a0b0c", "<script"))
    shows(found, "currentColor", "TRAINED: trained: loss ")
    # 46rem: the widest figure; its text is no larger than the page's 16 px
    sizes = [float(x) for x in re.findall(r"font-size: ([\d.]+)px", found)]
    widths = {float(x) for x in re.findall(r'viewBox="0 0 ([\d.]+) ', found)}
    assert max(sizes) * 46 * 16 / min(widths) <= 16
    shows(found, "decoder block", "relative squared error", "held-out text")
    data = re.search(r"data:image/png;base64,([^\"]*)", found)
    image = np.array(Image.open(io.BytesIO(base64.b64decode(data[1]))))
    kept = load_file(home / "OUT" / "model.safetensors")[name].numpy() != 0
    assert np.array_equal(image == 0, kept)
    assert f"Mask of {name}: {kept.shape[0]} outputs (down) by {kept.shape[1]} inputs" in found


def test_names_cannot_break_out_of_the_page_and_do_not_mix(home, tmp_path):
    bad = '<script>alert("$x$")</script>'

    def change(manifest):
        manifest["fingerprint"]["calibration"]["source"] = bad
        manifest["fingerprint"]["options"]["solver"] = bad
        for layer in manifest["layers"]:
            layer["kind"] = bad

    forge_manifest(folder := copied(home / "OUT", tmp_path), change)
    found = page(tmp_path, folder)
    assert ("<script" in found, html.escape(bad) in found) == (False, True)
    other = copied(home / "TRAINED", tmp_path / '<b>"x"')
    other = other.rename(other.with_name("OUT"))
    records = json.loads((home / "eval.json").read_text())
    for place, record in enumerate(records):
        record["model"] = f"folder{place}/OUT"
    (tmp_path / "eval.json").write_text(json.dumps(records))
    found = page(tmp_path, home / "OUT", other, "--evaluation", tmp_path / "eval.json")
    rows = [f"Improvement of the rows, {html.escape(str(x))}" for x in (home / "OUT", other)]
    shows(found, *rows, "folder0/OUT", "folder1/OUT")
    assert "<b>" not in found
    unique_ids(found)


def test_what_has_no_start_or_too_few_tokens_is_left_out(home, tmp_path):
    out, few = tmp_path / "out", tmp_path / "few"
    prune(home / "dense", out, tokens(2))
    prune(home / "dense", few, tokens(2), solver="swap", min_tokens=999)
    assert "Improvement of the rows, out" not in page(tmp_path, out)
    assert "In short" in page(tmp_path, few)
    assert comparison(open_reports([out]), {}).rows[-1][3] == "1"
    assert comparison(reports := open_reports([few]), {}).rows[-1][2:4] == ("–",) * 2
    assert runs(reports).rows[0][2] == "–"


def test_a_picture_shows_all_rows_of_a_large_mask():
    kept = torch.ones(2100, 8, dtype=torch.bool)
    kept[-1] = False
    picture = MaskPicture("w", kept)
    image = np.array(Image.open(io.BytesIO(picture.png())))
    assert image.shape == (700, 3)
    assert (image[:-1] == 0).all()
    assert (image[-1] == 85).all()  # a third of three rows
    shows(picture.html(), "2100 outputs (down) by 8 inputs", "a dot is 3 × 3 weights")


REFUSED = {
    "dense": (ModelError, "the folder was not written by maskopt prune"),
    "OUT --picture nothing": (OptionError, "has no mask of such a tensor"),
    "OUT --evaluation gaps.jsonl": (OptionError, "is not what `maskopt eval"),
    "OUT --gaps eval.json": (DataError, "line 1 is not JSON"),
    "OUT --gaps missing": (OptionError, "holds no records"),
    "OUT --evaluation missing": (OptionError, "cannot be read"),
    "OUT --evaluation half.json": (OptionError, "is not what `maskopt eval"),
    "OUT --output no/page.html": (OptionError, "no such folder"),
    "OUT --figures eval.json/figures": (ModelError, "Not a directory"),
    "TRAINED OUT --gaps gaps.jsonl": (OptionError, "is of another model than TRAINED"),
    "OUT --output OUT/README.md --overwrite": (OptionError, "is a file of a model folder"),
    "OUT --output OUT/model.safetensors --overwrite": (OptionError, "is a file of a model"),
    "OUT --evaluation eval.json --output eval.json --overwrite": (OptionError, "evaluation itself"),
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_is_none_is_refused(arguments, home, monkeypatch):
    monkeypatch.chdir(home)
    error, message = REFUSED[arguments]
    before = (home / "eval.json").read_bytes()
    assert message in run("report", *arguments.split(), fails=error)
    assert not (home / "report.html").exists()
    assert (home / "eval.json").read_bytes() == before


def test_files_are_replaced_where_that_is_said(home, tmp_path):
    figures, found = tmp_path / "figures", tmp_path / "page.html"
    words = ["report", home / "OUT", "--output", found, "--figures", figures]
    figures.mkdir()
    both = figures / "errors.svg", found
    for file in both:
        file.write_text("mine")
        assert f"{file.name} exists; pass --overwrite" in run(*words, fails=OptionError)
        assert [file.name for file in figures.iterdir()] == ["errors.svg"] * (file != found)
        file.unlink()
    for file in both:
        file.write_text("mine")
    run(*words, "--overwrite")
    assert "mine" not in [file.read_text() for file in both]


@pytest.mark.parametrize("bad", [{"error": "much"}, {"rows": None}, {"statuses": 3}, {"n": 1.5}])
def test_layers_that_are_none_are_refused(bad, home, tmp_path):
    folder = copied(home / "OUT", tmp_path)
    forge_manifest(folder, lambda manifest: manifest["layers"][0].update(bad))
    assert "the manifest is damaged or was changed" in run("report", folder, fails=ModelError)


# --- the demo
def test_tables_name_a_row_once_and_sum_errors_per_kind():
    name, nothing = "model.layers.0.self_attn.q_proj[3]", ("objective", "value", "excess")
    given = 48, "0.5", "wanda", 3.0, 0.0, 3.0, 0.0, 0.0, 0.5, "feasible", 0, 0.1, 0, "wanda"
    best = dict.fromkeys(("objective", "lower_bound", "value", "value_bound"), 2.0)
    wanda = Record(name, *given)
    scip = replace(wanda, solver="scip", excess=0.0, status="optimal", **best)
    labels = {name: "0 q_proj[3]"}
    cells = [(row[0], row[6]) for row in comparison_table([wanda, scip], labels).rows]
    assert cells == [("0 q_proj[3]", "50.00%"), ("", "0.00%")]
    failed = replace(wanda, status="failed", **dict.fromkeys(nothing, math.nan))
    assert comparison_table([failed], labels).rows[0][3] == "–"
    layers = []
    for block, before, after in ((0, 4.0, 1.0), (1, 6.0, 4.0)):
        given = f"model.layers.{block}.mlp.up_proj", block, "mlp.up_proj", 4, 8, "0.5", 16, after
        counts = {"swap-optimal": 3, "feasible": 1}
        layers.append(LayerReport(*given, 0.0, counts, 100, False, 0.1, error_wanda=before))
    layers = [replace(layer, energy=10.0) for layer in layers]
    cells = ("2", "0.5000", "0.2500", "0.500", "75.0%", "0.2")
    table = PruneReport(layers, {}, seconds=3.0).table()
    assert table.rows == [("mlp.up_proj", *cells), ("all", *cells)]
    # and errors and perplexities are compared with the start's
    one = "1-swap", PruneReport(layers, {"options": {"sparsity": {}}}, output=Path("o"))
    values = {DENSE: 10.0, WANDA: 15.0, Path("o"): 12.5}
    assert [row[:5] for row in comparison([one], values).rows] == [
        ("dense", "10.00", "0.0%", "0", "0"), ("Wanda's masks", "15.00", "50.0%", "0.5", "1"),
        ("1-swap", "12.50", "50.0%", "0.25", "0.5"),
    ]  # fmt: skip


def test_the_demo_from_end_to_end_on_a_tiny_model(tmp_path, monkeypatch):
    model = save(tiny("llama"), tmp_path / "model")
    save_tokenizer(model)
    monkeypatch.setattr("maskopt.demo.demo_model", lambda name: model)
    names = ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj")
    monkeypatch.setattr("maskopt.demo.TOY_LAYERS", names)
    monkeypatch.setattr("maskopt.demo.TOY_COLUMNS", 8)
    how = {"model": "gemma3", "sparsity": "50%", "samples": 2, "windows": 2, "seq_len": 32}
    stages = []
    result = run_demo(tmp_path / "out", **how, on_stage=lambda *stage: stages.append(stage[0]))
    toy, errors, values = result.tables
    assert [row[0].split("[")[0] for row in toy.rows if row[0]] == ["0 q_proj", "2 down_proj"]
    assert {row[0] for row in errors.rows} >= {"self_attn.q_proj", "mlp.down_proj", "all"}
    assert [row[0] for row in values.rows] == ["dense", "Wanda's masks", "Wanda → 1-swap"]
    assert all(row[1] != "–" for row in values.rows)
    assert result.dense == model
    # the second model is gone
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model", "report.html"}
    page, titles = result.report.read_text(), ("Toy rows", "Errors along the model", "A mask")
    shows(page, "in 21 layers of 3 blocks", *titles)
    assert "toy rows: block 3/3, calibrate" in stages
    (tmp_path / "file").write_text("mine")
    listen = {"on_stage": lambda *stage: pytest.fail("it started")}
    fails(ModelError, "is not empty", run_demo, tmp_path, **how, **listen)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
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
    assert ("| method        | 50%" in made, made.count("| all layers")) == (True, 4)
    # an interrupted run has less: the rest is made again, to the same page
    data.write_text("".join(lines[:-1]))
    paper_table.main()
    assert len(pruned) == 5
    assert page.read_text() == made
    assert {path.name for path in tmp_path.iterdir()} == {p.name for p in (model, text, data, page)}

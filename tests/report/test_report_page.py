"""Tables and the page of `maskopt report`: its numbers are the manifest's, it needs nothing but itself, and
nothing that is shown can break out of it."""

import base64
import html
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from commands import run
from forging import copied, forge_manifest
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from tiny_models import save, tiny, tokens

from maskopt import prune_model
from maskopt.errors import ModelError, OptionError
from maskopt.report import Table, number, write_page
from maskopt.report.prune_page import Pruned, summary

OPTIONS = {"sparsity": 0.5, "min_tokens": 1, "holdout": 0.25}
TRAINED = {"update": "blockwise", "training": {"epochs": 1, "begin": "least-squares"}}


def test_numbers_are_short_and_cells_the_same_in_terminal_and_page(tmp_path):
    cases = {
        12.3456: "12.35", 0.00402134: "0.004021", 123456.0: "123,456", 1.2e9: "1.2e+09", 0.0: "0",
        1e-7: "1e-07", 999.96: "1000", None: "–", math.nan: "–",
    }  # fmt: skip
    assert [number(value) for value in cases] == list(cases.values())
    table = Table("A [bold]title[/bold] <b>", ("solver", "objective"), note="see <here>")
    table.add("swap", "1.5")
    with pytest.raises(ValueError, match="1 cells for 2"):
        table.add("swap")
    stream = io.StringIO()
    Console(file=stream, width=60).print(table.rich())
    for shown in ("[bold]title[/bold]", "swap", "1.5", "objective", "see <here>"):
        assert shown in stream.getvalue()
    write_page(tmp_path / "r.html", "T & U", ["a < b", table])
    found = (tmp_path / "r.html").read_text()
    for shown in ("a &lt; b", "T &amp; U", '<td class="figure">1.5</td>', "see &lt;here&gt;"):
        assert shown in found
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
    swaps, rows = (sum(x[field] for x in up) for field in ("swaps", "rows"))
    perplexity = json.loads((home / "eval.json").read_text())[1]["perplexity"]["value"]
    peak = manifest["memory"]["process"]
    assert (peak is None) == (not Path("/proc/self/status").exists())
    for shown in (
        f'<td class="figure">{mean:.4g}</td>',
        f">{swaps / rows:.4g}</td>",
        "swap from relax pruned 50.0% of 15,360 weights in 14 layers of 2 blocks",
        f"{perplexity:.2f} (",
        "As gaps.jsonl states of sampled rows",
        "maskopt prune MODEL --config",
        f">{'–' if peak is None else f'{peak / 2**30:.2f} GiB'}</td>",
    ):
        assert shown in found
    assert len(re.findall(r"<img [^>]*alt=\"Mask of [^\"]+\"", found)) == 1
    names = sorted(file.name for file in (tmp_path / "figures").iterdir())
    assert names == ["errors.png", "errors.svg", "improvements-1.png", "improvements-1.svg"]
    # of folders of earlier versions the memory is not known
    forge_manifest(old := copied(home / "OUT", tmp_path), lambda manifest: manifest.pop("memory"))
    assert summary(Pruned.open_all([old])).rows[0][-1] == "–"


def unique_ids(found):
    """Drawings do not mix."""
    ids = re.findall(r' id="([^"]*)"', found)
    assert len(ids) == len(set(ids))
    return set(ids)


def test_nothing_is_asked_for_elsewhere_and_all_pictures_are_in_words_too(home, tmp_path):
    """Its picture is the mask; the same bytes every time."""
    name = "model.layers.1.mlp.down_proj.weight"
    words = home / "OUT", home / "TRAINED", "--picture", name
    found = page(tmp_path, *words)
    assert page(tmp_path, *words) == found
    assert "<script" not in found
    links = re.findall(r'(?:src|href|xlink:href)="([^"]*)"', found)
    inner = {link[1:] for link in links if link.startswith("#")}
    assert inner
    assert inner <= unique_ids(found)
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert found.count('role="img" aria-label=') == found.count("<svg") == 3
    assert found.count("<summary>The numbers</summary>") == 3
    # as wide as the screen, and no wider
    assert '<meta name="viewport" content="width=device-width' in found
    for selector, rule in (("figure svg", "width: 100%"), ("table", "overflow-x: auto")):
        assert re.search(rf"^{selector} {{[^}}]*{rule}", found, re.M)
    assert "currentColor" in found
    assert "#0a0b0c" not in found
    assert "Trained weights, TRAINED" in found
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
    assert "<script" not in found
    assert html.escape(bad) in found
    # folders and evaluated models of the same name
    other = copied(home / "TRAINED", tmp_path / '<b>"x"')
    other = other.rename(other.with_name("OUT"))
    records = json.loads((home / "eval.json").read_text())
    for place, record in enumerate(records):
        record["model"] = f"folder{place}/OUT"
    (tmp_path / "eval.json").write_text(json.dumps(records))
    found = page(tmp_path, home / "OUT", other, "--evaluation", tmp_path / "eval.json")
    rows = [f"Rows, {html.escape(str(folder))}" for folder in (home / "OUT", other)]
    for shown in (*rows, "folder0/OUT", "folder1/OUT"):
        assert shown in found
    assert "<b>" not in found
    unique_ids(found)


def test_what_has_no_start_or_too_few_tokens_is_left_out(home, tmp_path):
    options = {**OPTIONS, "solver": "wanda", "holdout": 0.0}
    prune_model(home / "dense", tokens(2), output=tmp_path / "out", **options)
    assert "Rows, out" not in page(tmp_path, tmp_path / "out")
    assert summary([Pruned.open(tmp_path / "out", "out")]).rows[0][4] == "1"
    prune_model(home / "dense", tokens(2), output=tmp_path / "few", sparsity=0.5, min_tokens=999)
    assert "In short" in page(tmp_path, tmp_path / "few")
    assert summary([Pruned.open(tmp_path / "few", "few")]).rows[0][3:6] == ("–",) * 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ("dense", ModelError, "the folder was not written by maskopt prune"),
        ("OUT --picture nothing", OptionError, "has no mask of such a tensor"),
        ("OUT --evaluation gaps.jsonl", OptionError, "holds no records"),
        ("OUT --gaps eval.json", OptionError, "holds no records"),
        ("OUT --evaluation missing", OptionError, "cannot be read"),
        ("OUT --evaluation half.json", OptionError, "holds no records"),
        ("OUT --output no/page.html", OptionError, "no such folder"),
        ("OUT --figures eval.json/figures", ModelError, "Not a directory"),
        ("TRAINED OUT --gaps gaps.jsonl", OptionError, "is of another model than TRAINED"),
        ("OUT --output OUT/README.md --overwrite", OptionError, "is a file of a model folder"),
        ("OUT --output OUT/model.safetensors --overwrite", OptionError, "is a file of a model"),
        (
            "OUT --evaluation eval.json --output eval.json --overwrite",
            OptionError,
            "evaluation itself",
        ),
    ],
)
def test_what_is_none_is_refused(arguments, error, message, home, monkeypatch):
    monkeypatch.chdir(home)
    before = (home / "eval.json").read_bytes()
    assert message in run("report", *arguments.split(), fails=error)
    assert not (home / "report.html").exists()
    assert (home / "eval.json").read_bytes() == before


def test_files_are_replaced_where_that_is_said(home, tmp_path):
    figures, found = tmp_path / "figures", tmp_path / "page.html"
    words = ["report", home / "OUT", "--output", found, "--figures", figures]
    figures.mkdir()
    for file in (figures / "errors.svg", found):
        file.write_text("mine")
        assert f"{file.name} exists; pass --overwrite" in run(*words, fails=OptionError)
        assert [file.name for file in figures.iterdir()] == ["errors.svg"] * (file != found)
        file.unlink()
    for file in (figures / "errors.svg", found):
        file.write_text("mine")
    run(*words, "--overwrite")
    assert "mine" not in (found.read_text(), (figures / "errors.svg").read_text())


@pytest.mark.parametrize("bad", [{"error": "much"}, {"rows": None}, {"statuses": 3}, {"n": 1.5}])
def test_layers_that_are_none_are_refused(bad, home, tmp_path):
    folder = copied(home / "OUT", tmp_path)
    forge_manifest(folder, lambda manifest: manifest["layers"][0].update(bad))
    assert "its layers are not those of a prune" in run("report", folder, fails=ModelError)

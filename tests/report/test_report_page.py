"""The page of `maskopt report`: its numbers are the manifest's, and it needs nothing but itself."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run
from forging import copied, forge_manifest
from tiny_models import save, tiny, tokens

from maskopt import prune_model
from maskopt.errors import MaskoptError, ModelError, OptionError
from maskopt.report.prune_page import Pruned, summary

OPTIONS: dict[str, Any] = {"sparsity": 0.5, "min_tokens": 1, "holdout": 0.25}
TRAINED = {"weights": "reconstruct", "reconstruct": {"epochs": 1, "begin": "refit"}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, two pruned ones and what `eval` and `certify` say of them; nobody may change them."""
    folder = tmp_path_factory.mktemp("report")
    dense = save(tiny("llama"), folder / "dense")
    prune_model(dense, tokens(8), output=folder / "OUT", **OPTIONS)
    prune_model(dense, tokens(8), output=folder / "TRAINED", **OPTIONS, **TRAINED)
    np.save(folder / "tokens.npy", tokens(4).numpy())
    both = ["--calibration", folder / "tokens.npy", "--output", folder / "gaps.jsonl"]
    run("certify", dense, folder / "OUT", *both)
    text = ["--text", folder / "tokens.npy", "--json", folder / "eval.json"]
    run("eval", dense, folder / "OUT", *text)
    (folder / "half.json").write_text(r'[{"model": "\ud800"}]')
    return folder


def page(home: Path, out: Path, *arguments: object) -> str:
    run("report", *arguments, "--output", out / "page.html", "--overwrite")
    return (out / "page.html").read_text()


def test_everything_is_on_one_page(home: Path, tmp_path: Path) -> None:
    more = ["--eval", home / "eval.json", "--gaps", home / "gaps.jsonl"]
    found = page(home, tmp_path, home / "OUT", *more, "--figures", tmp_path / "figures")
    manifest = json.loads((home / "OUT" / "maskopt-manifest.json").read_text())
    layers = manifest["layers"]
    mean = sum(layer["error"] / layer["energy"] for layer in layers) / len(layers)
    assert f'<td class="figure">{mean:.4g}</td>' in found
    swaps = sum(x["swaps"] for x in layers if x["kind"] == "mlp.up_proj")
    rows = sum(x["rows"] for x in layers if x["kind"] == "mlp.up_proj")
    assert f">{swaps / rows:.4g}</td>" in found
    assert "swap from relax pruned 50.0% of 23,040 weights in 21 layers of 3 blocks" in found
    perplexity = json.loads((home / "eval.json").read_text())[1]["perplexity"]["value"]
    assert f"{perplexity:.2f} (" in found
    assert "As gaps.jsonl states of sampled rows" in found
    assert "maskopt prune MODEL --config" in found
    peak = manifest["memory"]["process"]
    assert (peak is None) == (not Path("/proc/self/status").exists())
    assert f">{'–' if peak is None else f'{peak / 2**30:.2f} GiB'}</td>" in found
    names = sorted(file.name for file in (tmp_path / "figures").iterdir())
    assert names == ["errors.png", "errors.svg", "improvements-1.png", "improvements-1.svg"]


def test_of_folders_of_earlier_versions_the_memory_is_not_known(home: Path, tmp_path: Path) -> None:
    old = copied(home / "OUT", tmp_path / "old")
    forge_manifest(old, lambda manifest: manifest.pop("memory"))
    assert summary(Pruned.open_all([old])).rows[0][-1] == "–"


def test_nothing_is_asked_for_elsewhere_and_all_pictures_are_told_in_words(
    home: Path, tmp_path: Path
) -> None:
    found = page(home, tmp_path, home / "OUT", home / "TRAINED")
    assert "<script" not in found
    links = re.findall(r'(?:src|href|xlink:href)="([^"]*)"', found)
    assert links
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    ids = re.findall(r' id="([^"]*)"', found)
    assert len(ids) == len(set(ids))  # drawings do not mix
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert found.count('role="img" aria-label=') == found.count("<svg") == 3
    assert len(re.findall(r"<img [^>]*alt=\"Mask of [^\"]+\"", found)) == 1
    assert found.count("<summary>The numbers</summary>") == 3
    assert "currentColor" in found
    assert "#0a0b0c" not in found
    assert "Trained weights, TRAINED" in found


def test_the_same_bytes_every_time(home: Path, tmp_path: Path) -> None:
    assert page(home, tmp_path, home / "OUT") == page(home, tmp_path, home / "OUT")


def test_the_picture_is_the_mask(home: Path, tmp_path: Path) -> None:
    import base64
    import io

    from PIL import Image
    from safetensors.torch import load_file

    name = "model.layers.1.mlp.down_proj.weight"
    found = page(home, tmp_path, home / "OUT", "--picture", name)
    data = re.search(r"data:image/png;base64,([^\"]*)", found)
    assert data is not None
    image = np.array(Image.open(io.BytesIO(base64.b64decode(data[1]))))
    kept = load_file(home / "OUT" / "model.safetensors")[name].numpy() != 0
    assert np.array_equal(image == 0, kept)
    assert f"Mask of {name}: {kept.shape[0]} outputs (down) by {kept.shape[1]} inputs" in found


def test_names_cannot_break_out_of_the_page(home: Path, tmp_path: Path) -> None:
    bad = '<script>alert("$x$")</script>'
    folder = copied(home / "OUT", tmp_path)

    def change(manifest: dict[str, Any]) -> None:
        manifest["fingerprint"]["calibration"]["source"] = bad
        manifest["fingerprint"]["options"]["solver"] = bad
        for layer in manifest["layers"]:
            layer["kind"] = bad

    forge_manifest(folder, change)
    found = page(home, tmp_path, folder)
    assert "<script" not in found
    assert html.escape(bad) in found


def test_folders_of_the_same_name_do_not_mix(home: Path, tmp_path: Path) -> None:
    other = copied(home / "TRAINED", tmp_path / '<b>"x"')
    other = other.rename(other.with_name("OUT"))
    found = page(home, tmp_path, home / "OUT", other)
    for folder in (home / "OUT", other):
        assert f"Rows, {html.escape(str(folder))}" in found
    assert "<b>" not in found
    ids = re.findall(r' id="([^"]*)"', found)
    assert len(ids) == len(set(ids))


def test_evaluated_models_of_the_same_name_are_told_apart(home: Path, tmp_path: Path) -> None:
    records = json.loads((home / "eval.json").read_text())
    for number, record in enumerate(records):
        record["model"] = f"folder{number}/OUT"
    (tmp_path / "eval.json").write_text(json.dumps(records))
    found = page(home, tmp_path, home / "OUT", "--eval", tmp_path / "eval.json")
    assert "folder0/OUT" in found
    assert "folder1/OUT" in found


def test_what_has_no_start_or_too_few_tokens_is_left_out(home: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "solver": "wanda", "holdout": 0.0}
    prune_model(home / "dense", tokens(2), output=tmp_path / "out", **options)
    found = page(home, tmp_path, tmp_path / "out")
    assert "Rows, out" not in found
    assert summary([Pruned.open(tmp_path / "out", "out")]).rows[0][4] == "–"
    prune_model(home / "dense", tokens(2), output=tmp_path / "few", sparsity=0.5, min_tokens=999)
    assert "In short" in page(home, tmp_path, tmp_path / "few")
    assert summary([Pruned.open(tmp_path / "few", "few")]).rows[0][3:6] == ("–",) * 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["{home}/dense"], ModelError, "the folder was not written by maskopt prune"),
        (["{home}/OUT", "--picture", "nothing"], OptionError, "has no mask of such a tensor"),
        (["{home}/OUT", "--eval", "{home}/gaps.jsonl"], OptionError, "holds no records"),
        (["{home}/OUT", "--gaps", "{home}/eval.json"], OptionError, "holds no records"),
        (["{home}/OUT", "--eval", "{home}/missing"], OptionError, "cannot be read"),
        (["{home}/OUT", "--eval", "{home}/half.json"], OptionError, "holds no records"),
        (["{home}/OUT", "--output", "{home}/no/page.html"], OptionError, "no such folder"),
        (["{home}/OUT", "--figures", "{home}/eval.json/figures"], ModelError, "Not a directory"),
    ],
)
def test_what_is_none_is_refused(
    arguments: list[str], error: type[MaskoptError], message: str, home: Path
) -> None:
    assert message in run("report", *(a.format(home=home) for a in arguments), fails=error)
    assert not (home / "report.html").exists()


def test_files_are_replaced_where_that_is_said(home: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures"
    words = ["report", home / "OUT", "--output", tmp_path / "page.html", "--figures", figures]
    figures.mkdir()
    (figures / "errors.svg").write_text("mine")
    said = run(*words, fails=OptionError)
    assert "errors.svg exists; pass --overwrite" in said
    assert [file.name for file in figures.iterdir()] == ["errors.svg"]
    (figures / "errors.svg").unlink()
    run(*words)
    assert "page.html exists; pass --overwrite" in run(*words, fails=OptionError)
    run(*words, "--overwrite")
    for name in ("model.safetensors", "README.md"):
        words = ["report", home / "OUT", "--output", home / "OUT" / name, "--overwrite"]
        assert "is a file of a model folder" in run(*words, fails=OptionError)
    read = json.loads((home / "eval.json").read_text())
    words = ["report", home / "OUT", "--eval", home / "eval.json", "--output", home / "eval.json"]
    assert "is the evaluation itself" in run(*words, "--overwrite", fails=OptionError)
    assert json.loads((home / "eval.json").read_text()) == read


def test_gaps_of_another_model_are_refused(home: Path, tmp_path: Path) -> None:
    wrong = ["--gaps", home / "gaps.jsonl", "--output", tmp_path / "page.html"]
    said = run("report", home / "TRAINED", home / "OUT", *wrong, fails=OptionError)
    assert f"is of another model than {home / 'TRAINED'}" in said
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("bad", [{"error": "much"}, {"rows": None}, {"statuses": 3}, {"n": 1.5}])
def test_layers_that_are_none_are_refused(bad: dict[str, Any], home: Path, tmp_path: Path) -> None:
    folder = copied(home / "OUT", tmp_path)
    forge_manifest(folder, lambda manifest: manifest["layers"][0].update(bad))
    said = run("report", folder, fails=ModelError)
    assert "its layers are not those of a prune" in said


BROWSER = """
import sys
from PySide6.QtCore import QTimer, QUrl
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication
app = QApplication(sys.argv[:1])
view = QWebEngineView()
view.resize(int(sys.argv[2]), 4000)
def look():
    print(view.page().contentsSize().width(), view.grab().toImage().allGray())
    app.quit()
view.loadFinished.connect(lambda _: QTimer.singleShot(2000, look))
view.load(QUrl.fromLocalFile(sys.argv[1]))
view.show()
QTimer.singleShot(60000, app.quit)
app.exec()
"""


@pytest.mark.skipif(find_spec("PySide6") is None, reason="no Chromium: pip install PySide6")
@pytest.mark.parametrize("width", [390, 1200])
def test_in_chromium_the_page_is_as_wide_as_the_screen(
    width: int, home: Path, tmp_path: Path
) -> None:
    page(home, tmp_path, home / "OUT", home / "TRAINED")
    surroundings = {
        "QT_QPA_PLATFORM": "offscreen",
        "QTWEBENGINE_CHROMIUM_FLAGS": "--no-sandbox --disable-gpu",
        "QT_QUICK_BACKEND": "software",
    }
    command = [sys.executable, "-c", BROWSER, str(tmp_path / "page.html"), str(width)]
    said = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **surroundings}
    )
    wide, grey = said.stdout.split()[-2:]
    assert width - 20 <= float(wide) <= width, said.stderr
    assert grey == "False"  # something was drawn

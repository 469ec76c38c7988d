"""The paper's table on tiny models: its cells, what an interrupt leaves, the page, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save, save_tokenizer, tiny
from typer.testing import CliRunner

from maskopt import prune_model
from maskopt.cli import app
from maskopt.errors import (
    DataError,
    MaskoptError,
    ModelError,
    OptionError,
    PatternError,
    SolverError,
)
from maskopt.model import table
from maskopt.model.perplexity import perplexity
from maskopt.model.table import (
    METHODS,
    PATTERNS,
    Cell,
    Method,
    make_table,
    read_cells,
    read_pattern,
)
from maskopt.pattern import NM, Unstructured
from maskopt.report.paper import perplexity_tables, reduction_tables, write_paper_page

OPTIONS: dict[str, Any] = {"samples": 4, "seq_len": 16, "min_tokens": 1, "bos": "never"}
CHOSEN: dict[str, Any] = {
    "patterns": ["50%", "2:4"],
    "methods": ["magnitude", "wanda", "swap:2", "swap", "swap@ria"],
    "windows": 3,
    **OPTIONS,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    folders = [save(tiny(name, layers=2), root / name) for name in ("llama", "mistral")]
    for folder in folders:
        save_tokenizer(folder)
    return folders


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """For the masks, and for the perplexity."""
    folder = tmp_path_factory.mktemp("texts")
    one, two = folder / "one.txt", folder / "two.txt"
    one.write_text("Pack my box with five dozen liquor jugs. " * 20)
    two.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return one, two


@pytest.fixture(scope="module")
def whole(
    models: list[Path], texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Cell], Path]:
    """The table made in one go, and its file."""
    output = tmp_path_factory.mktemp("whole") / "table.jsonl"
    return make_table(models, *texts, output, **CHOSEN), output


def figures(cells: list[Cell]) -> list[Any]:
    """All but what differs between two runs."""
    return [
        (
            c.key,
            c.model,
            c.pattern,
            c.method,
            c.perplexity,
            [replace(x, seconds=0) for x in c.layers],
        )
        for c in cells
    ]


def no_prune(*_: Any, **__: Any) -> Any:
    raise AssertionError("something heavy began")


def test_a_cell_for_every_model_pattern_and_method(
    models: list[Path], whole: tuple[list[Cell], Path]
) -> None:
    cells, output = whole
    of_a_model = [("", "dense"), *((p, m) for p in CHOSEN["patterns"] for m in CHOSEN["methods"])]
    expected = [(str(model), *names) for model in models for names in of_a_model]
    assert [(c.model, c.pattern, c.method) for c in cells] == expected
    assert figures(list(read_cells(output).values())) == figures(cells)
    assert [file.name for file in output.parent.iterdir()] == ["table.jsonl"]


def test_a_cell_is_that_prune_and_that_perplexity(
    models: list[Path], texts: tuple[Path, Path], whole: tuple[list[Cell], Path], tmp_path: Path
) -> None:
    (cell,) = (
        c for c in whole[0] if (c.model, c.pattern, c.method) == (str(models[1]), "2:4", "swap:2")
    )
    report = prune_model(
        models[1], calibration=texts[0], output=tmp_path / "out", pattern=NM(2, 4), solver="swap",
        warm_start="wanda", solver_options={"max_swaps": 2}, **OPTIONS,
    )  # fmt: skip
    value = perplexity(tmp_path / "out", text=str(texts[1]), windows=3, seq_len=16, bos="never")
    assert cell.perplexity == value
    assert [x.error for x in cell.layers] == [x.error for x in report.layers]
    dense = perplexity(models[1], text=str(texts[1]), windows=3, seq_len=16, bos="never")
    assert next(c.perplexity for c in whole[0] if c.model == str(models[1])) == dense


def test_reductions_are_below_the_start(whole: tuple[list[Cell], Path]) -> None:
    cells = {(c.pattern, c.method): c for c in whole[0]}
    assert cells["50%", "wanda"].reductions(lambda x: x.kind) == {}
    assert cells["", "dense"].reductions(lambda x: x.kind) == {}
    first = {m: cells["50%", m].layers[0] for m in CHOSEN["methods"]}
    # the first layers see the same inputs in every cell: the starts are the same masks
    assert first["magnitude"].error_start == first["swap"].error_start == first["wanda"].error
    assert first["swap@ria"].error_start != first["swap"].error_start
    assert first["swap"].error <= first["swap:2"].error < first["wanda"].error
    swap = cells["50%", "swap"]
    by_kind = swap.reductions(lambda x: x.kind)
    q_proj = [1 - x.error / x.error_start for x in swap.layers if x.kind == "self_attn.q_proj"]
    assert len(q_proj) == 2
    assert by_kind["self_attn.q_proj"] == pytest.approx(sum(q_proj) / 2)
    assert all(0 <= share < 1 for share in by_kind.values())


def test_an_interrupt_keeps_finished_cells_and_blocks(
    models: list[Path],
    texts: tuple[Path, Path],
    whole: tuple[list[Cell], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "table.jsonl"

    def interrupt(done: int, cells: int, stage: str, step: int, steps: int) -> None:
        if done == 4 and "block 2 of 2: solve" in stage and step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_table(models, *texts, output, on_progress=interrupt, **CHOSEN)
    assert len(read_cells(output)) == 4
    (left,) = (file for file in tmp_path.iterdir() if file != output)
    assert left.name.startswith(".table.jsonl.")

    pruned = []

    def counted(model: Any, calibration: Any, options: Any, **given: Any) -> Any:
        pruned.append((options.solver, given["resume"]))
        return prune_model(model, calibration, options, **given)

    monkeypatch.setattr(table, "prune_model", counted)
    again = make_table(models, *texts, output, **CHOSEN)
    assert figures(again) == figures(whole[0])
    assert pruned[:2] == [("swap", True), ("swap", False)]
    assert len(pruned) == 20 - 3  # the dense cell is no prune
    assert list(tmp_path.iterdir()) == [output]
    monkeypatch.setattr(table, "prune_model", no_prune)
    assert figures(make_table(models, *texts, output, **CHOSEN)) == figures(whole[0])


def test_an_interrupt_after_a_prune_keeps_it(
    models: list[Path], texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "table.jsonl"
    one: dict[str, Any] = {**CHOSEN, "patterns": ["50%"], "methods": ["wanda"]}

    def interrupt(done: int, cells: int, stage: str, step: int, steps: int) -> None:
        if done == 1 and stage.endswith("perplexity"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_table(models[:1], *texts, output, on_progress=interrupt, **one)
    monkeypatch.setattr("maskopt.model.prune._prune_blocks", no_prune)
    _, cell = make_table(models[:1], *texts, output, **one)
    assert cell.method == "wanda"
    assert len(cell.layers) == 14
    assert list(tmp_path.iterdir()) == [output]


def test_an_error_names_its_cell_and_keeps_the_others(
    models: list[Path], texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "table.jsonl"
    one: dict[str, Any] = {**CHOSEN, "patterns": ["2:4"], "methods": ["wanda"]}

    def full(*_: Any, **__: Any) -> Any:
        raise ModelError("no space left on the disk; free some and go on with `resume`")

    monkeypatch.setattr(table, "prune_model", full)
    words = "^llama 2:4 wanda: no space .* free some and run the same command again$"
    with pytest.raises(ModelError, match=words):
        make_table(models[:1], *texts, output, **one)
    assert [cell.method for cell in read_cells(output).values()] == ["dense"]


def test_other_options_text_or_model_are_other_cells(
    models: list[Path], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    output = tmp_path / "table.jsonl"
    one: dict[str, Any] = {**CHOSEN, "patterns": ["50%"], "methods": ["magnitude"]}
    make_table(models[:1], *texts, output, **one)
    make_table(models[:1], *texts, output, **{**one, "windows": 2})
    make_table(models[:1], *texts, output, **{**one, "patterns": ["60%"]})
    make_table(models[:1], *texts, output, **{**one, "exclude": ("q_proj",)})
    make_table(models[1:], *texts, output, **one)
    made = [
        (Path(c.model).name, c.pattern, c.perplexity.windows) for c in read_cells(output).values()
    ]
    assert made == [
        ("llama", "", 3), ("llama", "50%", 3), ("llama", "", 2), ("llama", "50%", 2),
        ("llama", "60%", 3), ("llama", "50%", 3), ("mistral", "", 3), ("mistral", "50%", 3),
    ]  # fmt: skip


def test_a_line_that_was_cut_off_is_made_again(
    models: list[Path], texts: tuple[Path, Path], whole: tuple[list[Cell], Path], tmp_path: Path
) -> None:
    output = tmp_path / "table.jsonl"
    lines = whole[1].read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:-1]) + lines[-1][:100])
    assert figures(make_table(models, *texts, output, **CHOSEN)) == figures(whole[0])
    assert len(read_cells(output)) == len(lines)


def test_foreign_and_edited_files_are_refused_and_left_alone(
    models: list[Path],
    texts: tuple[Path, Path],
    whole: tuple[list[Cell], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(table, "prune_model", no_prune)
    monkeypatch.setattr(table, "perplexity", no_prune)
    output = tmp_path / "table.jsonl"
    line = whole[1].read_bytes().splitlines(keepends=True)[1]
    edited = line.replace(b'"pattern": "50%"', b'"pattern": "60%"')
    assert edited != line
    foreign = (
        b'{"a": 1}\n',
        b"a letter\n",
        b"a letter",
        b"\xff\xfe\n",
        b"[1]\n",
        edited,
        line + edited,
    )
    for content in foreign:
        output.write_bytes(content)
        with pytest.raises(
            DataError, match=r"table\.jsonl.*no cell of a table.*choose another file"
        ):
            make_table(models, *texts, output, **CHOSEN)
        assert output.read_bytes() == content
    output.unlink()
    table.append_line(output, {"cell": {"format": "maskopt-table-0"}})
    with pytest.raises(DataError, match="line 1: no cell of a table that this version reads"):
        make_table(models, *texts, output, **CHOSEN)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"patterns": ["50 percent"]}, PatternError, "no pattern"),
        ({"patterns": ["150%"]}, PatternError, "outside"),
        ({"patterns": ["3:7"]}, PatternError, "do not divide into groups of 7"),
        ({"patterns": []}, OptionError, "at least one of `patterns`"),
        ({"methods": ["swop"]}, SolverError, "did you mean 'swap'"),
        ({"methods": ["wanda:3"]}, OptionError, "goes with swap"),
        ({"methods": ["swap:few"]}, OptionError, "goes with swap"),
        ({"methods": ["swap@"]}, OptionError, "SOLVER@START"),
        ({"methods": ["swap@rio"]}, SolverError, "did you mean 'ria'"),
        ({"methods": ["frank_wolfe+alpha"]}, OptionError, r"\+NAME=VALUE"),
        ({"methods": ["frank_wolfe+alfa=0.5"]}, OptionError, "alpha"),
        ({"solver": "wanda"}, OptionError, "`solver` is what a cell decides"),
        ({"sample": 3}, OptionError, "did you mean 'samples'"),
        ({"bos": "perhaps"}, DataError, "`bos` must be"),
        ({"windows": 0}, MaskoptError, "`windows` must be"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_heavy(
    changed: dict[str, Any],
    error: type[Exception],
    words: str,
    models: list[Path],
    texts: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(table, "prune_model", no_prune)
    monkeypatch.setattr(table, "perplexity", no_prune)
    with pytest.raises(error, match=words):
        make_table(models, *texts, tmp_path / "table.jsonl", **{**CHOSEN, **changed})
    assert not list(tmp_path.iterdir())


def test_places_and_models_that_are_not_there(
    models: list[Path], texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "prune_model", no_prune)
    monkeypatch.setattr(table, "perplexity", no_prune)
    with pytest.raises(OptionError, match="no such folder"):
        make_table(models, *texts, tmp_path / "none" / "table.jsonl", **CHOSEN)
    with pytest.raises(OptionError, match="is a folder"):
        make_table(models, *texts, tmp_path, **CHOSEN)
    with pytest.raises(OptionError, match="at least one model"):
        make_table([], *texts, tmp_path / "table.jsonl", **CHOSEN)
    with pytest.raises(ModelError, match="no such model folder"):
        make_table([models[0], tmp_path / "none"], *texts, tmp_path / "table.jsonl", **CHOSEN)
    with pytest.raises(DataError, match=r"none\.txt"):
        make_table(models, texts[0], tmp_path / "none.txt", tmp_path / "table.jsonl", **CHOSEN)


def test_the_tables_of_the_page(whole: tuple[list[Cell], Path], tmp_path: Path) -> None:
    cells = whole[0]
    one, two = perplexity_tables(cells)
    assert one.headings == ["method", "50%", "2:4"]
    titles = [
        "dense",
        "magnitude",
        "Wanda",
        "1-swap, T = 2",
        "1-swap, T = ∞",
        "1-swap, T = ∞, from RIA",
    ]
    assert [row[0] for row in one.rows] == [row[0] for row in two.rows] == titles
    assert one.rows[0][1:] == (f"{cells[0].perplexity.value:.2f}",) * 2
    assert "3 windows of 16 tokens" in one.note
    tables = reduction_tables(cells)
    assert len(tables) == 2 * 2 * 2
    kinds, blocks = tables[:2]
    assert list(kinds.headings) == ["layer kind", *(t for t in titles[1:] if t != "Wanda")]
    assert [row[0] for row in blocks.rows] == ["0", "1", "all layers"]
    (swap,) = (c for c in cells[:11] if (c.pattern, c.method) == ("50%", "swap"))
    share = swap.reductions(lambda x: x.block)[1]
    assert blocks.rows[1][blocks.headings.index("1-swap, T = ∞")] == f"{100 * share:.1f}"
    write_paper_page(tmp_path / "page.md", cells)
    page = (tmp_path / "page.md").read_text()
    assert page.count("\n## ") + page.startswith("## ") == 10
    assert "| method | 50% | 2:4 |\n| --- | ---: | ---: |\n| dense |" in page


def test_the_command(models: list[Path], texts: tuple[Path, Path], tmp_path: Path) -> None:
    output, page = tmp_path / "table.jsonl", tmp_path / "table.md"
    command = [
        "table", models[0], "--calibration", texts[0], "--text", texts[1], "--output", output,
        "--patterns", "50%", "--methods", "wanda,swap:1", "--samples", 4, "--seq-len", 16,
        "--min-tokens", 1, "--bos", "never", "--windows", 2, "--page", page,
    ]  # fmt: skip
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exception is None, (result.output, result.exception)
    assert "1-swap, T = 1" in result.output
    assert "Error below the start's in %, by block" in page.read_text()
    assert len(output.read_text().splitlines()) == 3
    refused = CliRunner().invoke(app, [*map(str, command), "--page", str(tmp_path / "no" / "x.md")])
    assert isinstance(refused.exception, OptionError)
    there = CliRunner().invoke(app, list(map(str, command)))
    assert "table.md exists; pass --overwrite" in str(there.exception)
    command.append("--overwrite")
    missing = CliRunner().invoke(app, [*map(str, command), "--methods", ""])
    assert "one of --patterns and one of --methods" in str(missing.exception)


def test_patterns_and_methods_as_they_are_written() -> None:
    assert [read_pattern(p) for p in PATTERNS] == [
        Unstructured(sparsity=0.5), Unstructured(sparsity=0.6), NM(keep=2, of=4),
    ]  # fmt: skip
    assert read_pattern("29%").pruned_per_group(100) == 29
    assert [Method.parse(m).title for m in METHODS] == [
        "magnitude", "Wanda", "RIA", "SparseFW",
        *(f"1-swap, T = {t}" for t in (1, 2, 5, 10, 25, 50, 100, "∞")), "relax",
    ]  # fmt: skip
    method = Method.parse("frank_wolfe+alpha=0.25+iterations=9@ria")
    assert method == Method("frank_wolfe", {"alpha": 0.25, "iterations": 9}, "ria")
    assert method.title == "SparseFW, alpha = 0.25, iterations = 9, from RIA"
    assert json.loads(json.dumps(method.options)) == method.options


def test_of_two_spellings_there_is_one_column(
    models: list[Path], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    chosen = {**CHOSEN, "patterns": ["50%", "0.5", "2:4"], "methods": ["wanda", "wanda@wanda"]}
    cells = make_table(models[:1], *texts, tmp_path / "table.jsonl", **chosen)
    (found,) = perplexity_tables(cells)
    assert found.headings == ["method", "50%", "2:4"]
    assert [row[0] for row in found.rows] == ["dense", "Wanda"]

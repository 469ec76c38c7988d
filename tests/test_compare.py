"""The comparison: records, resumption, formats, and its commands."""

import csv
import json
import math
import sys

import pytest
from strategies import random_gram, random_weight
from typer.testing import CliRunner

from maskopt import NM, LayerProblem, RowProblem, Unstructured
from maskopt.cli import app
from maskopt.compare import compare, read_records, sample_rows
from maskopt.errors import DataError, OptionError


@pytest.fixture
def layer():
    return LayerProblem(
        random_weight(6, 24, 1), random_gram(24, "full", 2), Unstructured(0.5), name="q"
    )


def test_records_tell_the_distance_to_the_proven_optimum(layer):
    rows = sample_rows([layer], 3, columns=12, seed=4)
    assert [row.n for row in rows] == [12] * 3
    records = compare(rows, ["worst", "exhaustive"])
    assert [r.solver for r in records] == ["worst", "exhaustive"] * 3
    for poor, best in zip(records[::2], records[1::2], strict=True):
        assert best.status == "optimal"
        assert best.excess == 0
        assert poor.excess == pytest.approx(poor.objective / best.objective - 1)
        assert poor.excess > 0
    alone = compare(rows[:1], ["worst"])
    assert math.isnan(alone[0].excess)


def test_samples_depend_on_the_seed_alone(layer):
    once, again = sample_rows([layer], 2, columns=8), sample_rows([layer], 2, columns=8)
    assert all((a.weight == b.weight).all() for a, b in zip(once, again, strict=True))
    other = sample_rows([layer], 2, columns=8, seed=1)
    assert any((a.weight != b.weight).any() for a, b in zip(once, other, strict=True))
    patterned = sample_rows([layer], 1, columns=8, pattern=NM(2, 4))
    assert patterned[0].pattern == NM(2, 4)


def test_an_interrupted_run_keeps_its_rows_and_goes_on(layer, tmp_path):
    rows = sample_rows([layer], 3, columns=10)
    path = tmp_path / "out.jsonl"

    def stop(done, total):
        assert total == 6
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(rows, ["wanda", "exhaustive"], output=path, on_progress=stop)
    kept = path.read_text().splitlines()
    assert len(kept) == 4
    path.write_text("\n".join(kept) + "\n" + kept[0][:30])  # a line cut off by the interrupt
    finished = []
    records = compare(
        rows, ["wanda", "exhaustive"], output=path, on_progress=lambda d, _: finished.append(d)
    )
    assert finished == [5, 6]
    assert len(read_records(path)) == 6
    seconds = {json.loads(line)["key"]: json.loads(line)["seconds"] for line in kept}
    assert all(r.seconds == seconds[r.key] for r in records if r.key in seconds)


def test_a_failed_job_is_a_record():
    big = LayerProblem(random_weight(1, 32, 1), random_gram(32, "full", 2), Unstructured(0.5))
    record = compare(sample_rows([big], 1), ["exhaustive"], time_limit=3)[0]
    assert record.status == "failed"
    assert "masks" in record.error


def test_foreign_files_and_formats_are_refused(layer, tmp_path):
    rows = sample_rows([layer], 1, columns=6)
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match="no record"):
        compare(rows, ["wanda"], output=tmp_path / "other.jsonl")
    with pytest.raises(OptionError, match=r"\.jsonl, \.csv, \.parquet"):
        compare(rows, ["wanda"], output=tmp_path / "x.xlsx")
    with pytest.raises(OptionError, match="no such folder"):
        compare(rows, ["wanda"], output=tmp_path / "no" / "x.csv")


def test_parquet_without_its_package_names_the_remedy(layer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    rows = sample_rows([layer], 1, columns=6)
    with pytest.raises(OptionError, match=r"pyarrow.*maskopt\[parquet\]"):
        compare(rows, ["wanda"], output=tmp_path / "x.parquet")
    assert list(tmp_path.iterdir()) == []


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_compare_command(layer, tmp_path):
    layer.save(tmp_path / "q.npz")
    out = tmp_path / "t.csv"
    result = run(
        "compare", tmp_path / "q.npz", "--solvers", "wanda,scip", "--rows", 2, "--columns", 10,
        "--output", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    with out.open(newline="") as file:
        records = list(csv.DictReader(file))
    assert [(r["solver"], r["status"]) for r in records] == [
        ("wanda", "feasible"), ("scip", "optimal"),
    ] * 2  # fmt: skip
    assert all(record["status"] in result.output for record in records)


def test_extract_command_writes_what_other_programs_read(layer, tmp_path):
    from pyscipopt import Model

    layer.save(tmp_path / "q.npz")
    source = tmp_path / "q.npz"
    assert run("extract", source, tmp_path / "r.npz", "--row", 3, "--columns", 10).exit_code == 0
    row = RowProblem.load(tmp_path / "r.npz")
    assert row.n == 10
    best = compare([row], ["exhaustive"])[0].objective
    for form, formulation in (("cip", "factored"), ("lp", "epigraph"), ("mps", "linear")):
        target = tmp_path / f"r.{form}"
        words = ("extract", tmp_path / "r.npz", target, "--formulation", formulation)
        assert run(*words).exit_code == 0
        model = Model()
        model.hideOutput()
        model.readProblem(str(target))
        model.optimize()
        assert model.getObjVal() == pytest.approx(best, rel=1e-4, abs=1e-5)
        again = run(*words).exception
        assert isinstance(again, OptionError)
        assert "exists; pass --overwrite" in str(again)
    unknown = run("extract", source, tmp_path / "r.txt").exception
    assert isinstance(unknown, OptionError)
    assert "unknown format 'txt'" in str(unknown)

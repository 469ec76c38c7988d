"""The comparison: records, resumption, formats, and its commands."""

import csv
import json
import math
import os
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import run
from strategies import random_gram, random_weight

from maskopt import (
    NM,
    LayerProblem,
    Limits,
    Refit,
    RowProblem,
    Solution,
    Status,
    Unstructured,
    certify,
    make_solver,
    record_file,
)
from maskopt.compare import Record, compare, sample_rows
from maskopt.errors import DataError, OptionError
from maskopt.files import check_writable
from maskopt.jobs import job_key
from maskopt.prove import prove
from maskopt.record_file import RecordFile, read_records
from maskopt.solvers.exact import branch
from maskopt.solvers.exact.rows import RowAnswer


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


def test_a_record_names_who_is_trusted_and_what_the_tree_did(layer):
    rows = sample_rows([layer], 1, columns=16)
    wanda, branch, scip = compare(rows, ["wanda", "branch", "scip"])
    assert wanda.trusted == ""
    assert branch.trusted.startswith("branch of maskopt ")
    assert scip.trusted.startswith("presolve of maskopt and SCIP ")
    assert branch.trace["ended"] == "optimal"
    assert branch.trace["nodes"] >= 1
    # its presolve leaves nothing of a row this small
    assert (scip.status, scip.trace["ended"], scip.trace["nodes"]) == ("optimal", "presolved", 0)


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
    assert len(read_records(path, Record)) == 6
    seconds = {json.loads(line)["key"]: json.loads(line)["seconds"] for line in kept}
    assert all(r.seconds == seconds[r.key] for r in records if r.key in seconds)


def stop_at(count):
    """An `on_progress` that interrupts the run when so many jobs are finished."""

    def stop(done, total):
        if done == count:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("ending", ["cut off", "whole, without its newline"])
def test_a_run_may_be_interrupted_any_number_of_times(layer, tmp_path, ending):
    rows = sample_rows([layer], 4, columns=10)
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        compare(rows, ["wanda"], output=path, on_progress=stop_at(2))
    text = path.read_text()
    path.write_text(text[:-40] if ending == "cut off" else text[:-1])
    for finished in (2, 3):
        left = len(read_records(path, Record))
        with pytest.raises(KeyboardInterrupt):
            compare(rows, ["wanda"], output=path, on_progress=stop_at(left + 1))
        assert len(read_records(path, Record)) == left + 1 >= finished
    compare(rows, ["wanda"], output=path)
    assert len(read_records(path, Record)) == len(path.read_text().splitlines()) == 4


def test_records_that_another_run_wrote_meanwhile_are_kept(layer, tmp_path):
    rows = sample_rows([layer], 2, columns=10)
    path = tmp_path / "out.jsonl"

    def meanwhile(done, total):
        if done == 1:
            compare(rows, ["magnitude"], output=path)

    compare(rows, ["wanda"], output=path, on_progress=meanwhile)
    solvers = sorted(record.solver for record in read_records(path, Record).values())
    assert solvers == ["magnitude"] * 2 + ["wanda"] * 2


@pytest.mark.parametrize("when", ["held", "finish"])
def test_a_record_that_another_run_appends_while_the_file_is_written_anew_is_kept(
    when, layer, tmp_path, monkeypatch
):
    path = tmp_path / "out.jsonl"
    own, other = compare(sample_rows([layer], 1, columns=10), ["wanda", "magnitude"])
    file = RecordFile(path, Record)
    file.append(own)
    written, threads = record_file.write_records, []

    def slowly(*args):
        threads.append(threading.Thread(target=RecordFile(path, Record).append, args=[other]))
        threads[0].start()
        threads[0].join(0.3)  # long enough to append, were it not to wait
        written(*args)

    monkeypatch.setattr(record_file, "write_records", slowly)
    file.held() if when == "held" else file.finish([own])
    threads[0].join()
    assert set(read_records(path, Record)) == {own.key, other.key}
    assert os.listdir(tmp_path) == [path.name]


def test_records_of_other_runs_in_the_file_are_kept_and_not_counted(layer, tmp_path):
    rows = sample_rows([layer], 2, columns=10)
    path = tmp_path / "out.jsonl"
    compare(rows, ["wanda"], output=path)
    counted = []
    records = compare(
        rows, ["magnitude"], output=path, on_progress=lambda *event: counted.append(event)
    )
    assert counted == [(1, 2), (2, 2)]
    assert [r.solver for r in records] == ["magnitude"] * 2
    held = read_records(path, Record)
    assert [r.solver for r in held.values()] == ["wanda"] * 2 + ["magnitude"] * 2
    again = compare(rows, ["wanda", "magnitude"], output=path, on_progress=stop_at(1))
    assert [r.seconds for r in again] == [held[r.key].seconds for r in again]


@pytest.mark.parametrize("claim", ["objective", "optimal", "bound", "trusted", "cut off"])
def test_a_forged_solution_and_a_forged_line_do_not_survive_a_resume(
    claim, layer, tmp_path, caplog
):
    rows, path = sample_rows([layer], 1), tmp_path / "out.jsonl"
    (honest,) = compare(rows, ["wanda"], output=path)
    (kept,) = (tmp_path / "out.jsonl.rows").iterdir()
    found = Solution.load(kept)
    forged = {
        "objective": replace(found, objective=found.objective / 2),
        "optimal": replace(found, status=(Status.OPTIMAL,)),
        "bound": replace(found, lower_bound=found.objective, status=(Status.OPTIMAL,)),
        "trusted": replace(found, lower_bound=found.objective / 2, trusted=("SCIP 10.0",)),
        "cut off": found,
    }[claim]
    forged.save(kept)
    if claim == "cut off":
        kept.write_bytes(kept.read_bytes()[:100])
    line = json.loads(path.read_text())
    lie = {"objective": 0.1, "value": 0.1, "status": "optimal", "lower_bound": 0.1, "gap": 0.0}
    path.write_text(json.dumps({**line, **lie}) + "\n")
    done = []
    (again,) = compare(rows, ["wanda"], output=path, on_progress=lambda *event: done.append(event))
    assert done == [(1, 1)]
    assert "dropped and solved again" in caplog.text
    assert replace(again, seconds=0.0) == replace(honest, seconds=0.0)
    (written,) = read_records(path, Record).values()
    assert written == again


def test_a_forged_line_is_replaced_by_what_its_solution_says(layer, tmp_path):
    rows, path = sample_rows([layer], 1, columns=10), tmp_path / "out.jsonl"
    honest = compare(rows, ["relax"], output=path)
    path.write_text(path.read_text().replace('"status": "swap-optimal"', '"status": "optimal"'))
    assert read_records(path, Record)[honest[0].key].status == "optimal"
    assert compare(rows, ["relax"], output=path, on_progress=stop_at(1)) == honest
    assert read_records(path, Record)[honest[0].key] == honest[0]


def test_a_failed_record_of_another_run_is_kept_and_an_own_one_replaced(layer, tmp_path):
    row = sample_rows([layer], 1, columns=10)
    path = tmp_path / "out.jsonl"
    compare(row, ["wanda"], output=path)
    done = json.loads(path.read_text())
    failed = {**done, "status": "failed", "objective": None}
    path.write_text("".join(json.dumps(r) + "\n" for r in (failed, {**failed, "key": "other"})))
    compare(row, ["wanda"], output=path)
    assert {r.key: r.status for r in read_records(path, Record).values()} == {
        "other": "failed", done["key"]: "feasible",
    }  # fmt: skip


def test_a_solver_given_twice_is_refused_before_anything_runs(layer):
    rows = sample_rows([layer], 1, columns=10)
    ran = []
    with pytest.raises(OptionError, match=r"'tabu' is given twice.*compare once for each"):
        compare(
            rows,
            ["wanda", make_solver("tabu", moves=1), make_solver("tabu", moves=500)],
            on_progress=lambda *event: ran.append(event),
        )
    assert ran == []


def test_an_option_of_a_solver_goes_before_the_one_for_all(layer):
    rows = sample_rows([layer], 1, columns=10)
    records = compare(rows, {"random": {"seed": 0}, "wanda": {}}, seed=5)
    assert [r.seed for r in records] == [0, 5]
    untimed = compare(rows, {"tabu": {"time_limit": None, "moves": 20}}, time_limit=0)
    timed = compare(rows, {"tabu": {"moves": 20}}, time_limit=0)
    assert untimed[0].key != timed[0].key
    with pytest.raises(OptionError, match="seed"):
        compare(rows, {"random": {"seed": -1}}, seed=5)


@pytest.mark.parametrize("make", [torch.as_tensor, np.asarray])
def test_long_masks_as_starts_are_told_apart(make, tmp_path):
    n = 1200  # str() leaves out the middle of more than 1000 entries
    row = RowProblem(random_weight(1, n, 1)[0], torch.eye(n), Unstructured(0.5))
    masks = np.arange(n) % 2 == 0, np.arange(n) % 2 == 0
    masks[1][600:602] = masks[1][601], masks[1][600]
    keys = [
        compare([row], {"swap": {"start": make(mask), "time_limit": 0}})[0].key
        for mask in (*masks, masks[0].copy())
    ]
    assert keys[0] != keys[1]
    assert keys[0] == keys[2]


def test_named_starts_keep_their_keys():
    """A file of an earlier version is taken up again."""
    row = RowProblem(torch.arange(1.0, 5.0), torch.eye(4), Unstructured(0.5))
    records = compare([row], {"wanda": {}, "swap": {"start": "wanda"}}, time_limit=3, seed=1)
    assert [r.key for r in records] == ["1b1a2a150ba137dca410", "60844c35e7301a059de6"]


def test_other_problems_have_other_keys():
    """Patterns that differ by little, and all else that a row may have besides weights and Gram matrix."""
    weight, gram = torch.arange(1.0, 25.0), torch.eye(24)
    more = {"mean": torch.ones(24), "variance": torch.ones(24), "refit": Refit(), "integral": True}
    rows = [RowProblem(weight, gram, Unstructured(s)) for s in (2 / 3, 0.6667, 0.6666)]
    rows += [RowProblem(weight, gram, Unstructured(0.6666), **{k: v}) for k, v in more.items()]
    rows += [RowProblem(weight, gram, Unstructured(0.6666), refit=Refit(0.5))]
    rows += [RowProblem.from_quadratic(np.eye(24), keep=8, constant=c) for c in (0.0, 100.0)]
    keys = [job_key(row, "wanda", make_solver("wanda"), None, Limits()) for row in rows]
    assert len(set(keys)) == len(rows)
    bounds = [certify_key(row) for row in rows]
    assert len(set(bounds)) == len(rows)


def certify_key(row):
    layer = row.as_layer()
    return certify._key(layer, 0, torch.ones(24, dtype=torch.bool), 0, "sdp", {})


def test_an_interrupted_search_is_no_record(tmp_path, monkeypatch):
    """What a solver has after Ctrl-C is not what it would answer: neither kept nor gone on from."""
    rows = sample_rows(
        [LayerProblem(random_weight(2, 12, 1), random_gram(12, "full", 2), Unstructured(0.5))], 2
    )
    monkeypatch.setattr(branch, "search_row", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(rows, ["wanda", "branch"], output=tmp_path / "out.jsonl")
    kept = read_records(tmp_path / "out.jsonl", Record).values()
    assert [record.solver for record in kept] == ["wanda"]
    with pytest.raises(KeyboardInterrupt):
        prove(rows[0], tmp_path / "proof.npz")
    assert not (tmp_path / "proof.npz").exists()


def stopped(task):
    return RowAnswer(task.start, "userinterrupt", message="")


@pytest.mark.parametrize("name", ["folder", "no/such.jsonl"])
def test_what_cannot_be_written_is_told_beforehand(name, layer, tmp_path):
    (tmp_path / "folder").mkdir()
    target = tmp_path / name
    with pytest.raises(OptionError, match=r"a folder; name a file|no such folder"):
        check_writable(target, overwrite=False)
    rows = sample_rows([layer], 1, columns=6)
    with pytest.raises(OptionError, match=r"a folder; name a file|no such folder|write one of"):
        compare(rows, ["wanda"], output=target)


def test_bad_numbers_of_jobs_and_solvers(layer):
    rows = sample_rows([layer], 1, columns=6)
    with pytest.raises(OptionError, match="`jobs` is at least 1"):
        compare(rows, ["wanda"], jobs=0)
    with pytest.raises(OptionError, match="at least one solver"):
        compare(rows, [])


def test_a_file_that_is_no_text_is_refused(layer, tmp_path):
    (tmp_path / "out.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="holds no text"):
        compare(sample_rows([layer], 1, columns=6), ["wanda"], output=tmp_path / "out.jsonl")


def test_infinite_gaps_are_no_json_numbers(tmp_path):
    row = RowProblem.from_quadratic(-np.eye(4), select=0, maximise=True)
    compare([row], ["wanda"], output=tmp_path / "out.jsonl")
    assert "Infinity" not in (tmp_path / "out.jsonl").read_text()


def test_infinite_gaps_come_back_out_of_the_file(tmp_path):
    path = np.zeros((6, 6))
    path[np.arange(5), np.arange(1, 6)] = -1
    row = RowProblem.from_quadratic(path + path.T, select=3, maximise=True)
    first, again = (compare([row], ["tabu"], output=tmp_path / "out.jsonl") for _ in range(2))
    assert (first[0].value, first[0].gap) == (0.0, math.inf)
    assert again == first


def test_half_a_character_in_a_line_is_named(layer, tmp_path):
    out, rows = tmp_path / "out.jsonl", sample_rows([layer], 1, columns=6)
    compare(rows, ["wanda"], output=out)
    out.write_text(text := json.dumps({**json.loads(out.read_text()), "instance": "\ud800"}) + "\n")
    with pytest.raises(DataError, match=r"out\.jsonl: line 1 is not JSON \('\\ud800' is half of"):
        compare(rows, ["wanda"], output=out)
    assert out.read_text() == text


@pytest.mark.parametrize(
    "change", [{"gap": "–"}, {"value": "0.5"}, {"seconds": "1,5"}, {"status": 5}, {"n": None}]
)
def test_a_value_of_another_kind_is_refused(change, layer, tmp_path):
    out, rows = tmp_path / "out.jsonl", sample_rows([layer], 1, columns=6)
    compare(rows, ["wanda"], output=out)
    out.write_text(text := json.dumps({**json.loads(out.read_text()), **change}) + "\n")
    with pytest.raises(DataError, match="line 1 has a value of another kind"):
        compare(rows, ["wanda"], output=out)
    assert out.read_text() == text


@pytest.mark.parametrize(
    "command", [["compare", "--solvers", "swap"], ["bound", "--method", "box"]]
)
def test_a_table_of_somebody_elses_is_not_replaced(command, layer, tmp_path):
    name, *more = command
    layer.save(tmp_path / "layer.npz")
    (out := tmp_path / "mine.csv").write_text("my,own,data\n")
    said = run(name, tmp_path / "layer.npz", *more, "--output", out, fails=OptionError)
    assert "no table of this command" in said
    assert out.read_text() == "my,own,data\n"
    words = [name, tmp_path / "layer.npz", *more, "--output", tmp_path / "out.csv"]
    run(*words)
    written = (tmp_path / "out.csv").read_bytes()
    assert "exists; pass --overwrite" in run(*words, fails=OptionError)
    assert (tmp_path / "out.csv").read_bytes() == written
    run(*words, "--overwrite")
    assert (tmp_path / "out.csv").read_text().startswith("instance,")
    for _ in range(2):  # such a file grows
        run(*words[:-1], tmp_path / "out.jsonl")


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_files_of_a_model_are_never_replaced(weights, layer, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name in (weights, "config.json", "t.csv"):
        (model / name).write_text("instance,")
    layer.save(tmp_path / "layer.npz")
    (link := tmp_path / "link").symlink_to(model / weights)
    for name in (weights, "config.json", "t.csv"):
        for overwrite in (False, True):
            for path in (model / name, link):
                with pytest.raises(
                    OptionError, match="is a file of a model folder; name a file in"
                ):
                    check_writable(path, overwrite=overwrite)
    for command in ("solve", "prove"):
        words = [command, tmp_path / "layer.npz", "--output", model / "config.json", "--overwrite"]
        assert "is a file of a model folder" in run(*words, fails=OptionError)
    words = ["compare", tmp_path / "layer.npz", "--solvers", "swap", "--output", model / "t.csv"]
    assert "is a file of a model folder" in run(*words, "--overwrite", fails=OptionError)
    assert (model / weights).read_text() == "instance,"
    (model / weights).unlink()  # then it is no model
    check_writable(model / "t.csv", overwrite=True)


def test_an_option_that_takes_a_function_is_none_of_a_command(layer, tmp_path):
    layer.save(tmp_path / "layer.npz")
    more = ["--solvers", "swap", "-o", "swap.on_progress=5"]
    assert "`on_progress`" in run("compare", tmp_path / "layer.npz", *more, fails=OptionError)
    more = ["--output", tmp_path / "out.npz", "-o", "on_progress=5"]
    assert "`on_progress`" in run("solve", tmp_path / "layer.npz", *more, fails=OptionError)


def test_a_row_keeps_its_name_through_files(layer, tmp_path):
    layer.row(3).save(tmp_path / "0.npz")
    for number in range(2):
        said = run("extract", tmp_path / f"{number}.npz", tmp_path / f"{number + 1}.npz")
        assert "RowProblem('q[3]'," in said
    assert layer.take([3]).row(0).name == "q[0]"


@pytest.mark.parametrize("text", ["my precious notes", '{"name": "Ada', '{"instance": "x"}', "1"])
def test_a_file_of_somebody_elses_is_left_as_it_is(text, layer, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text(text)
    with pytest.raises(DataError, match=r"is not JSON|no record of this command"):
        compare(sample_rows([layer], 1, columns=6), ["wanda"], output=out)
    assert out.read_text() == text


@pytest.mark.parametrize(
    "option",
    [["--calibration", "no.txt"], ["--samples", 3], ["--include", "q_proj"], ["--bos", "never"]],
)
def test_options_of_models_are_refused_for_instances(option, layer, tmp_path):
    layer.save(tmp_path / "a.npz")
    said = run("compare", tmp_path / "a.npz", "--solvers", "wanda", *option, fails=OptionError)
    assert "is for a model folder" in said
    odd = ["--solvers", "wanda", "--weights", "refitt"]
    assert "--weights is one of" in run("compare", tmp_path / "a.npz", *odd, fails=OptionError)


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


def test_compare_command(layer, tmp_path):
    layer.save(tmp_path / "q.npz")
    out = tmp_path / "t.csv"
    told = run(
        "compare", tmp_path / "q.npz", "--solvers", "wanda,scip", "--rows", 2, "--columns", 10,
        "--output", out,
    )  # fmt: skip
    with out.open(newline="") as file:
        records = list(csv.DictReader(file))
    assert [(r["solver"], r["status"]) for r in records] == [
        ("wanda", "feasible"), ("scip", "optimal"),
    ] * 2  # fmt: skip
    assert all(record["status"] in told for record in records)


def test_extract_command_writes_what_other_programs_read(layer, tmp_path):
    from pyscipopt import Model

    layer.save(tmp_path / "q.npz")
    source = tmp_path / "q.npz"
    run("extract", source, tmp_path / "r.npz", "--row", 3, "--columns", 10)
    row = RowProblem.load(tmp_path / "r.npz")
    assert row.n == 10
    best = compare([row], ["exhaustive"])[0].objective
    for form, formulation in (("cip", "factored"), ("lp", "epigraph"), ("mps", "linear")):
        target = tmp_path / f"r.{form}"
        words = ("extract", tmp_path / "r.npz", target, "--formulation", formulation)
        run(*words)
        model = Model()
        model.hideOutput()
        model.readProblem(str(target))
        model.optimize()
        assert model.getObjVal() == pytest.approx(best, rel=1e-4, abs=1e-5)
        assert "exists; pass --overwrite" in run(*words, fails=OptionError)
    for columns in ("5,3000", "5,-1", "0", "-3"):
        words = ("extract", source, tmp_path / "none.npz", "--columns", columns)
        assert "--columns is how many" in run(*words, fails=OptionError)
    unknown = run("extract", source, tmp_path / "r.xyz", fails=OptionError)
    assert "unknown format 'xyz'" in unknown

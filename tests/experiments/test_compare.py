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
from pyscipopt import Model
from resuming import stop_at
from strategies import HALF, random_gram, random_weight

from maskopt import (
    NM,
    LayerProblem,
    LeastSquaresUpdate,
    Limits,
    RowProblem,
    Solution,
    Status,
    Unstructured,
)
from maskopt.core.files import check_writable
from maskopt.errors import DataError, OptionError
from maskopt.experiments.compare import Record, compare, sample_rows
from maskopt.experiments.jobs import job_key
from maskopt.experiments.prove import prove
from maskopt.experiments.store import Store, read_records, write_records
from maskopt.models.evaluation import bound as certify_module
from maskopt.protocol.solver import make_solver
from maskopt.solvers.exact.branch import Branch
from maskopt.solvers.exact.tasks import RowAnswer

LAYER = LayerProblem(random_weight(6, 24, 1), random_gram(24, "full", 2), HALF, name="q")


def some(rows, columns=10, **options):
    return sample_rows([LAYER], rows, columns=columns, **options)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.jsonl"


@pytest.fixture
def saved(tmp_path):
    LAYER.save(tmp_path / "layer.npz")
    return tmp_path / "layer.npz"


def test_records_say_how_far_from_the_optimum_and_who_is_trusted():
    rows = some(3, 12, seed=4)
    assert [row.n for row in rows] == [12] * 3
    records = compare(rows, ["worst", "exhaustive"])
    assert [r.solver for r in records] == ["worst", "exhaustive"] * 3
    for poor, best in zip(records[::2], records[1::2], strict=True):
        assert best.status == "optimal"
        assert best.excess == 0
        assert poor.excess == pytest.approx(poor.objective / best.objective - 1)
        assert poor.excess > 0
    assert math.isnan(compare(rows[:1], ["worst"])[0].excess)
    wanda, branch, scip = compare(some(1, 16), ["wanda", "branch", "scip"])
    assert wanda.trusted == ""
    assert branch.trusted.startswith("branch of maskopt ")
    assert scip.trusted.startswith("presolve of maskopt and SCIP ")
    assert branch.trace["ended"] == "optimal"
    assert branch.trace["nodes"] >= 1
    # its presolve leaves nothing of a row this small
    assert (scip.status, scip.trace["ended"], scip.trace["nodes"]) == ("optimal", "presolved", 0)
    # a failed job is a record, too
    big = LayerProblem(random_weight(1, 32, 1), random_gram(32, "full", 2), HALF)
    record = compare(sample_rows([big], 1), ["exhaustive"], time_limit=3)[0]
    assert record.status == "failed"
    assert "masks" in record.error
    # samples depend on the seed alone
    once, again, other = some(2, 8), some(2, 8), some(2, 8, seed=1)
    assert all((a.weight == b.weight).all() for a, b in zip(once, again, strict=True))
    assert any((a.weight != b.weight).any() for a, b in zip(once, other, strict=True))
    assert some(1, 8, pattern=NM(2, 4))[0].pattern == NM(2, 4)


def interrupted(rows, solvers, path, count):
    """Lines in the file of a run that ends with so many jobs finished."""
    with pytest.raises(KeyboardInterrupt):
        compare(rows, solvers, output=path, on_progress=stop_at(count))
    return path.read_text().splitlines()


@pytest.mark.parametrize("cut", [40, 1, 0])
def test_an_interrupted_run_keeps_its_rows_and_goes_on_any_number_of_times(path, cut):
    """Cut off in the last line, before its newline, or in one more."""
    rows, solvers, heard = some(3), ["wanda", "exhaustive"], []
    kept = interrupted(rows, solvers, path, 2)
    assert len(kept) == 2
    text = path.read_text()
    path.write_text(text[:-cut] if cut else text + kept[0][:30])
    for finished in (2, 3):
        left = len(read_records(path, Record))
        interrupted(rows, solvers, path, left + 1)
        assert len(held := read_records(path, Record)) == left + 1 >= finished
    records = compare(rows, solvers, output=path, on_progress=lambda *event: heard.append(event))
    assert heard == [(done, 6) for done in range(len(held) + 1, 7)]
    assert len(read_records(path, Record)) == len(path.read_text().splitlines()) == 6
    assert all(r.seconds == held[r.key].seconds for r in records if r.key in held)


def test_a_record_that_another_run_appends_while_the_file_is_rewritten_is_kept(path, monkeypatch):
    own, other = compare(some(1), ["wanda", "magnitude"])
    threads = []

    def slowly(*args):
        threads.append(threading.Thread(target=Store(path, Record).add, args=["", None, other]))
        threads[-1].start()
        threads[-1].join(0.3)  # long enough to append, were it not to wait
        write_records(*args)

    monkeypatch.setattr("maskopt.experiments.store.write_records", slowly)
    for rewrite in (lambda file: file.records(), lambda file: file.finish([own])):
        path.unlink(missing_ok=True)
        file = Store(path, Record)
        file.add("", None, own)
        rewrite(file)
        threads[-1].join()
        assert set(read_records(path, Record)) == {own.key, other.key}
        assert os.listdir(path.parent) == [path.name]


def test_records_of_other_runs_in_the_file_are_kept_and_not_counted(path):
    rows, counted = some(2), []

    def meanwhile(done, total):
        counted.append((done, total))
        if done == 1:
            compare(rows, ["worst"], output=path)

    compare(rows, ["wanda"], output=path)
    records = compare(rows, ["magnitude"], output=path, on_progress=meanwhile)
    assert counted == [(1, 2), (2, 2)]
    assert [r.solver for r in records] == ["magnitude"] * 2
    held = read_records(path, Record)
    solvers = [r.solver for r in held.values()]
    assert solvers[:2] == ["wanda"] * 2
    assert sorted(solvers[2:]) == ["magnitude"] * 2 + ["worst"] * 2
    again = compare(rows, ["wanda", "magnitude"], output=path, on_progress=stop_at(1))
    assert [r.seconds for r in again] == [held[r.key].seconds for r in again]


@pytest.mark.parametrize("claim", ["objective", "optimal", "bound", "trusted", "cut off"])
def test_a_forged_solution_and_a_forged_line_do_not_survive_a_resume(claim, path, caplog):
    rows, done = some(1, None), []
    (honest,) = compare(rows, ["wanda"], output=path)
    (kept,) = (path.parent / "out.jsonl.rows").iterdir()
    found = Solution.load(kept)
    value, optimal = found.objective, {"status": (Status.OPTIMAL,)}
    lies = {
        "objective": {"objective": value / 2},
        "optimal": optimal,
        "bound": {"lower_bound": value, **optimal},
        "trusted": {"lower_bound": value / 2, "trusted": ("SCIP 10.0",)},
    }
    replace(found, **lies.get(claim, {})).save(kept)
    if claim == "cut off":
        kept.write_bytes(kept.read_bytes()[:100])
    line = json.loads(path.read_text())
    lie = {"objective": 0.1, "value": 0.1, "status": "optimal", "lower_bound": 0.1, "gap": 0.0}
    path.write_text(json.dumps({**line, **lie}) + "\n")
    (again,) = compare(rows, ["wanda"], output=path, on_progress=lambda *event: done.append(event))
    assert done == [(1, 1)]
    assert "dropped and solved again" in caplog.text
    assert replace(again, seconds=0.0) == replace(honest, seconds=0.0)
    (written,) = read_records(path, Record).values()
    assert written == again


def test_a_forged_line_and_a_failed_one_are_replaced(path):
    """By what the solution says; a failed record of another run is kept."""
    rows = some(1)
    (honest,) = compare(rows, ["relax"], output=path)
    path.write_text(path.read_text().replace('"status": "swap-optimal"', '"status": "optimal"'))
    assert read_records(path, Record)[honest.key].status == "optimal"
    assert compare(rows, ["relax"], output=path, on_progress=stop_at(1)) == [honest]
    assert read_records(path, Record)[honest.key] == honest
    failed = {**json.loads(path.read_text()), "status": "failed", "objective": None}
    path.write_text("".join(json.dumps(r) + "\n" for r in (failed, {**failed, "key": "other"})))
    compare(rows, ["relax"], output=path)
    found = {r.key: r.status for r in read_records(path, Record).values()}
    assert found == {"other": "failed", honest.key: "swap-optimal"}


def test_bad_calls_are_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("folder", "folder.csv"):
        os.mkdir(name)
    ran, twice = [], ["wanda", make_solver("tabu", moves=1), make_solver("tabu", moves=500)]
    for solvers, options, message in (
        (twice, {}, r"'tabu' is given twice.*compare once for each"),
        ({"random": {"seed": -1}}, {"seed": 5}, "seed"),
        (["wanda"], {"jobs": 0}, "`jobs` is at least 1"),
        ([], {}, "at least one solver"),
        (["wanda"], {"output": "x.xlsx"}, r"\.jsonl, \.csv, \.parquet"),
        (["wanda"], {"output": "folder"}, r"write one of"),
        (["wanda"], {"output": "folder.csv"}, "a folder; name a file"),
        (["wanda"], {"output": "no/such.jsonl"}, "no such folder"),
        (["wanda"], {"output": "no/x.csv"}, "no such folder"),
        (["wanda"], {"output": "x.parquet"}, r"pyarrow.*maskopt\[parquet\]"),
    ):
        with pytest.raises(OptionError, match=message):
            compare(some(1), solvers, **options, on_progress=lambda *event: ran.append(event))
    assert ran == []
    assert sorted(os.listdir()) == ["folder", "folder.csv"]


def test_the_same_jobs_have_the_same_keys_and_others_have_others():
    rows, ones = some(1), torch.ones(24)
    # an option of a solver goes before the one for all
    records = compare(rows, {"random": {"seed": 0}, "wanda": {}}, seed=5)
    assert [r.seed for r in records] == [0, 5]
    untimed = compare(rows, {"tabu": {"time_limit": None, "moves": 20}}, time_limit=0)
    timed = compare(rows, {"tabu": {"moves": 20}}, time_limit=0)
    assert untimed[0].key != timed[0].key
    # masks as starts: str() leaves out the middle of more than 1000 entries
    row = RowProblem(random_weight(1, 1200, 1)[0], torch.eye(1200), HALF)
    mask = np.arange(1200) % 2 == 0
    other = mask.copy()
    other[600:602] = other[601], other[600]
    keys = [
        compare([row], {"swap": {"start": make(start), "time_limit": 0}})[0].key
        for make in (torch.as_tensor, np.asarray)
        for start in (mask, mask.copy(), other)
    ]
    assert keys[0] == keys[1] != keys[2]
    assert keys[3] == keys[4] != keys[5]
    # patterns that differ by little, and all that a row may have besides weights and Gram matrix
    weight, gram = torch.arange(1.0, 25.0), torch.eye(24)
    updates = [{"update": LeastSquaresUpdate(damping)} for damping in (0.01, 0.5)]
    more = ({"mean": ones}, {"variance": ones}, *updates, {"integral": True})
    rows = [RowProblem(weight, gram, Unstructured(s)) for s in (2 / 3, 0.6667, 0.6666)]
    rows += [RowProblem(weight, gram, Unstructured(0.6666), **part) for part in more]
    posed = (RowProblem.from_quadratic(np.eye(24), cardinality=16, constant=c) for c in (0.0, 1e2))
    rows += posed
    wanda, mask = make_solver("wanda"), torch.ones(24, dtype=torch.bool)
    sdp = certify_module._How("sdp", {}, 0)
    for keys in (
        {job_key(row, "wanda", wanda, None, Limits()) for row in rows},
        {certify_module._key(sdp, row.as_layer(), 0, mask, 0) for row in rows},
    ):
        assert len(keys) == len(rows)


def test_an_interrupted_search_is_no_record(path, monkeypatch):
    """What a solver has after Ctrl-C is not what it would answer: neither kept nor gone on from."""
    rows = some(2, 12)
    stopped = lambda _, task: RowAnswer(task.start, "userinterrupt", message="")  # noqa: E731
    monkeypatch.setattr(Branch, "search_row", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(rows, ["wanda", "branch"], output=path)
    assert [record.solver for record in read_records(path, Record).values()] == ["wanda"]
    with pytest.raises(KeyboardInterrupt):
        prove(rows[0], path.with_name("proof.npz"))
    assert not path.with_name("proof.npz").exists()


def test_a_file_of_something_else_is_left_unchanged(path):
    compare(rows := some(1, 6), ["wanda"], output=path)
    line = json.loads(path.read_text())
    odd = {"gap": "–", "value": "0.5", "seconds": "1,5", "status": 5, "n": None}
    for content, message in (
        (b"\xff\xfe\x00", "holds no text"),
        (b'{"a": 1}\n', "no record of this command"),
        (b"1", "no record of this command"),
        (b'{"instance": "x"}', "no record of this command"),
        (b"my precious notes", "is not JSON"),
        (b'{"name": "Ada', "is not JSON"),
        ({"instance": "\ud800"}, r"out\.jsonl: line 1 is not JSON \('\\ud800' is half of"),
        *(({name: value}, "line 1 has a value of another kind") for name, value in odd.items()),
    ):
        if isinstance(content, dict):
            content = (json.dumps({**line, **content}) + "\n").encode()
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            compare(rows, ["wanda"], output=path)
        assert path.read_bytes() == content


def test_infinite_gaps_are_no_json_numbers_and_come_back_out_of_the_file(path):
    row = RowProblem.from_quadratic(-np.eye(4), cardinality=0, maximise=True)
    compare([row], ["wanda"], output=path)
    assert "Infinity" not in path.read_text()
    line = np.zeros((6, 6))
    line[np.arange(5), np.arange(1, 6)] = -1
    row = RowProblem.from_quadratic(line + line.T, cardinality=3, maximise=True)
    first, again = (compare([row], ["tabu"], output=path) for _ in range(2))
    assert (first[0].value, first[0].gap) == (0.0, math.inf)
    assert again == first


@pytest.mark.parametrize("command", ["compare --solvers swap", "bound --method box"])
def test_a_table_of_somebody_elses_is_not_replaced(command, saved, tmp_path):
    name, *more = command.split()
    (out := tmp_path / "mine.csv").write_text("my,own,data\n")
    said = run(name, saved, *more, "--output", out, fails=OptionError)
    assert "no table of this command" in said
    assert out.read_text() == "my,own,data\n"
    words = [name, saved, *more, "--output", out := tmp_path / "out.csv"]
    run(*words)
    written = out.read_bytes()
    assert "exists; pass --overwrite" in run(*words, fails=OptionError)
    assert out.read_bytes() == written
    run(*words, "--overwrite")
    assert out.read_text().startswith("instance,")
    for _ in range(2):  # such a file grows
        run(*words[:-1], tmp_path / "out.jsonl")


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_files_of_a_model_are_never_replaced(weights, saved, tmp_path):
    model, message = tmp_path / "model", "is a file of a model folder"
    model.mkdir()
    for name in (weights, "config.json", "t.csv"):
        (model / name).write_text("instance,")
    (link := tmp_path / "link").symlink_to(model / weights)
    for path in (*model.iterdir(), link):
        for overwrite in (False, True):
            with pytest.raises(OptionError, match=f"{message}; name a file in"):
                check_writable(path, overwrite=overwrite)
    for words in (
        ("solve", saved, "--output", model / "config.json"),
        ("solve", "--prove", saved, "--output", model / "config.json"),
        ("compare", saved, "--solvers", "swap", "--output", model / "t.csv"),
    ):
        assert message in run(*words, "--overwrite", fails=OptionError)
    assert (model / weights).read_text() == "instance,"
    (model / weights).unlink()  # then it is no model
    check_writable(model / "t.csv", overwrite=True)


def test_options_that_do_not_fit_are_refused(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    for words, message in (
        ("compare --solvers swap --solver-options swap.on_progress=5", "`on_progress`"),
        ("solve --output out.npz --solver-options on_progress=5", "`on_progress`"),
        (
            "compare --solvers wanda --update refitt",
            "--update must be text none or least-squares or blockwise",
        ),
        ("compare --solvers wanda --calibration no.txt", "is for a model folder"),
        ("compare --solvers wanda --samples 3", "is for a model folder"),
        ("compare --solvers wanda --include q_proj", "is for a model folder"),
        ("compare --solvers wanda --bos never", "is for a model folder"),
        ("export r.xyz", "unknown format 'xyz'"),
        ("export none.npz --columns 5,3000", "--columns is how many"),
        ("export none.npz --columns 5,-1", "--columns is how many"),
        ("export none.npz --columns 0", "--columns is how many"),
        ("export none.npz --columns -3", "--columns is how many"),
    ):
        command, *more = words.split()
        assert message in run(command, saved, *more, fails=OptionError)


def test_commands_compare_and_export_what_other_programs_read(saved, tmp_path):
    out, size = tmp_path / "t.csv", ("--rows", 2, "--columns", 10)
    said = run("compare", saved, "--solvers", "wanda,scip", *size, "--output", out)
    with out.open(newline="") as file:
        records = list(csv.DictReader(file))
    found = [(r["solver"], r["status"]) for r in records]
    assert found == [("wanda", "feasible"), ("scip", "optimal")] * 2
    assert all(record["status"] in said for record in records)
    run("export", saved, tmp_path / "r.npz", "--row", 3, "--columns", 10)
    row = RowProblem.load(tmp_path / "r.npz")
    assert row.n == 10
    best = compare([row], ["exhaustive"])[0].objective
    for form, formulation in (("cip", "factored"), ("lp", "epigraph"), ("mps", "linear")):
        target = tmp_path / f"r.{form}"
        words = ("export", tmp_path / "r.npz", target, "--formulation", formulation)
        run(*words)
        model = Model()
        model.hideOutput()
        model.readProblem(str(target))
        model.optimize()
        assert model.getObjVal() == pytest.approx(best, rel=1e-4, abs=1e-5)
        assert "exists; pass --overwrite" in run(*words, fails=OptionError)
    # a row keeps its name through files
    LAYER.row(3).save(tmp_path / "0.npz")
    for number in range(2):
        said = run("export", tmp_path / f"{number}.npz", tmp_path / f"{number + 1}.npz")
        assert "RowProblem('q[3]'," in said
    assert LAYER.take([3]).row(0).name == "q[0]"

"""The comparison, its commands and clusters of processes; proofs; certified gaps."""

import csv
import json
import math
import os
import signal
import threading
from dataclasses import replace

import joblib
import numpy as np
import pytest
import torch
from commands import run, scip_value
from forging import fails
from strategies import HALF, drawn, random_gram, random_weight
from tiny_models import save, save_tokenizer, tiny, tokens

import maskopt
import maskopt.errors as e
from maskopt import NM, LayerProblem, LeastSquaresUpdate, Limits, RowProblem, Unstructured, verify
from maskopt.core.files import check_writable
from maskopt.core.units import ObjectiveTransform
from maskopt.experiments.compare import Record, compare, sample_rows
from maskopt.experiments.jobs import Store, job_key, read_records, write_records
from maskopt.experiments.prove import prove
from maskopt.instances.formats import load_problem
from maskopt.models.checkpoints.report import result_digest
from maskopt.models.checkpoints.schema import read_manifest
from maskopt.models.evaluation import bound as certify_module
from maskopt.models.evaluation.bound import GapRecord, bound_layers, by_kind, certify_model
from maskopt.protocol.solution import Solution, Status
from maskopt.protocol.solver import make_solver, solve
from maskopt.solvers.exact.branch import Branch
from maskopt.solvers.exact.tasks import RowAnswer

LAYER = drawn(6, 24, name="q")


def some(rows, columns=10, **options):
    return sample_rows([LAYER], rows, columns=columns, **options)


def stop_at(count):
    def stop(done, total):
        if done == count:
            raise KeyboardInterrupt

    return stop


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
        assert (best.status, best.excess) == ("optimal", 0)
        assert 0 < poor.excess == pytest.approx(poor.objective / best.objective - 1)
    assert math.isnan(compare(rows[:1], ["worst"])[0].excess)
    wanda, branch, scip = compare(some(1, 16), ["wanda", "branch", "scip"])
    assert wanda.trusted == ""
    assert branch.trusted.startswith("branch of maskopt ")
    assert scip.trusted.startswith("presolve of maskopt and SCIP ")
    assert (branch.trace["ended"], branch.trace["nodes"] >= 1) == ("optimal", True)
    # its presolve leaves nothing of a row this small
    assert (scip.status, scip.trace["ended"], scip.trace["nodes"]) == ("optimal", "presolved", 0)
    record = compare(sample_rows([drawn(1, 32)], 1), ["exhaustive"], time_limit=3)[0]
    assert (record.status, "masks" in record.error) == ("failed", True)
    once, again, other = ([x.weight.tolist() for x in some(2, 8, seed=seed)] for seed in (0, 0, 1))
    assert once == again != other
    assert some(1, 8, pattern=NM(2, 4))[0].pattern == NM(2, 4)


def interrupted(rows, solvers, path, count):
    fails(KeyboardInterrupt, None, compare, rows, solvers, output=path, on_progress=stop_at(count))
    return path.read_text().splitlines()


@pytest.mark.parametrize("cut", [40, 1, 0])
def test_an_interrupted_run_keeps_its_rows_and_goes_on_any_number_of_times(path, cut):
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

    monkeypatch.setattr("maskopt.experiments.jobs.write_records", slowly)
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
    assert (solvers[:2], sorted(solvers[2:])) == (["wanda"] * 2, ["magnitude"] * 2 + ["worst"] * 2)
    again = compare(rows, ["wanda", "magnitude"], output=path, on_progress=stop_at(1))
    assert [r.seconds for r in again] == [held[r.key].seconds for r in again]


@pytest.mark.parametrize("claim", ["objective", "optimal", "bound", "trusted", "cut off"])
def test_a_forged_solution_and_a_forged_line_do_not_survive_a_resume(claim, path, caplog):
    rows, done = some(1, None), []
    (honest,) = compare(rows, ["wanda"], output=path)
    (kept,) = (path.parent / "out.jsonl.rows").iterdir()
    found = Solution.load(kept)
    value, optimal = found.objective, {"status": (Status.OPTIMAL,)}
    lies = {"objective": {"objective": value / 2}, "optimal": optimal}
    lies |= {"bound": {"lower_bound": value, **optimal}}
    lies |= {"trusted": {"lower_bound": value / 2, "trusted": ("SCIP 10.0",)}}
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
    for name in ("folder", "folder.csv"):
        os.mkdir(name)
    twice = ["wanda", make_solver("tabu", moves=1), make_solver("tabu", moves=500)]
    listen = {"on_progress": lambda *event: pytest.fail("it ran")}
    outputs = {
        "x.xlsx": r"\.jsonl, \.csv", "folder": "write one of", "no/x.csv": "no such folder",
        "folder.csv": "a folder; name a file", "no/such.jsonl": "no such folder",
    }  # fmt: skip
    for solvers, options, message in (
        (twice, {}, r"'tabu' is given twice.*compare once for each"),
        ({"random": {"seed": -1}}, {"seed": 5}, "seed"),
        (["wanda"], {"jobs": 0}, "`jobs` is at least 1"),
        ([], {}, "at least one solver"),
        *((["wanda"], {"output": name}, message) for name, message in outputs.items()),
    ):
        fails(e.OptionError, message, compare, some(1), solvers, **options, **listen)
    assert sorted(os.listdir()) == ["folder", "folder.csv"]


def test_the_same_jobs_have_the_same_keys_and_others_have_others():
    rows, ones = some(1), torch.ones(24)
    # an option of a solver goes before the one for all
    assert [r.seed for r in compare(rows, {"random": {"seed": 0}, "wanda": {}}, seed=5)] == [0, 5]
    untimed = compare(rows, {"tabu": {"time_limit": None, "moves": 20}}, time_limit=0)
    assert untimed[0].key != compare(rows, {"tabu": {"moves": 20}}, time_limit=0)[0].key
    # masks as starts: str() leaves out the middle of more than 1000 entries
    row = RowProblem(random_weight(1, 1200, 1)[0], torch.eye(1200), HALF)
    mask = np.arange(1200) % 2 == 0
    other = mask.copy()
    other[600:602] = other[601], other[600]
    for make in (torch.as_tensor, np.asarray):
        given = [{"start": make(start), "time_limit": 0} for start in (mask, mask.copy(), other)]
        one, same, another = (compare([row], {"swap": how})[0].key for how in given)
        assert one == same != another
    # patterns that differ by little, and all that a row may have besides weights and Gram matrix
    weight, gram = torch.arange(1.0, 25.0), torch.eye(24)
    updates = [{"update": LeastSquaresUpdate(damping)} for damping in (0.01, 0.5)]
    more = ({"moments": ones}, {"moments": torch.stack([ones, ones])}, *updates)
    rows = [RowProblem(weight, gram, Unstructured(s)) for s in (2 / 3, 0.6667, 0.6666)]
    rows += [RowProblem(weight, gram, Unstructured(0.6666), **part) for part in more]
    layer = LayerProblem(weight[None], gram, Unstructured(0.6666))
    kinds = {"integral": True}, {"integral": False}, {"constant": 1e2}
    rows += [layer.with_units(ObjectiveTransform(**kind)).row(0) for kind in kinds]
    wanda, mask = make_solver("wanda"), torch.ones(24, dtype=torch.bool)
    sdp = certify_module._Bounding("sdp", {}, 0)
    for keys in (
        {job_key(row, wanda, None, Limits()) for row in rows},
        {certify_module._rows(sdp, row.as_layer(), "", [0], mask[None]).keys[0] for row in rows},
    ):
        assert len(keys) == len(rows)


def test_an_interrupted_search_is_no_record(path, monkeypatch):
    rows = some(2, 12)
    stopped = lambda _, task: RowAnswer(task.start, "userinterrupt", message="")  # noqa: E731
    monkeypatch.setattr(Branch, "search_row", stopped)
    fails(KeyboardInterrupt, None, compare, rows, ["wanda", "branch"], output=path)
    assert [record.solver for record in read_records(path, Record).values()] == ["wanda"]
    fails(KeyboardInterrupt, None, prove, rows[0], path.with_name("proof.npz"))
    assert not path.with_name("proof.npz").exists()


def test_a_file_of_something_else_is_left_unchanged(path):
    compare(rows := some(1, 6), ["wanda"], output=path)
    line = json.loads(path.read_text())
    odd = {"gap": "–", "value": "0.5", "seconds": "1,5", "status": 5, "n": None}
    none = (b'{"a": 1}\n', b"1", b'{"instance": "x"}')
    for content, message in (
        (b"\xff\xfe\x00", "holds no text"),
        *((content, "no record of this command") for content in none),
        *((content, "is not JSON") for content in (b"my precious notes", b'{"name": "Ada')),
        ({"instance": "\ud800"}, r"out\.jsonl: line 1 is not JSON \('\\ud800' is half of"),
        *(({name: value}, "line 1 has a value of another kind") for name, value in odd.items()),
    ):
        if isinstance(content, dict):
            content = (json.dumps({**line, **content}) + "\n").encode()
        path.write_bytes(content)
        fails(e.DataError, message, compare, rows, ["wanda"], output=path)
        assert path.read_bytes() == content


def test_infinite_gaps_are_no_json_numbers_and_come_back_out_of_the_file(path):
    row = RowProblem.from_quadratic(-np.eye(4), cardinality=0, maximize=True)
    compare([row], ["wanda"], output=path)
    assert "Infinity" not in path.read_text()
    line = np.zeros((6, 6))
    line[np.arange(5), np.arange(1, 6)] = -1
    row = RowProblem.from_quadratic(line + line.T, cardinality=3, maximize=True)
    first, again = (compare([row], ["tabu"], output=path) for _ in range(2))
    assert (first[0].value, first[0].gap) == (0.0, math.inf)
    assert again == first


@pytest.mark.parametrize("command", ["compare --solvers swap", "bound --method box"])
def test_a_table_of_somebody_elses_is_not_replaced(command, saved, tmp_path):
    name, *more = command.split()
    (out := tmp_path / "mine.csv").write_text("my,own,data\n")
    said = run(name, saved, *more, "--output", out, fails=e.OptionError)
    assert "no table of this command" in said
    assert out.read_text() == "my,own,data\n"
    words = [name, saved, *more, "--output", out := tmp_path / "out.csv"]
    run(*words)
    written = out.read_bytes()
    assert "exists; pass --overwrite" in run(*words, fails=e.OptionError)
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
        for more in ({"overwrite": False}, {"overwrite": True}):
            fails(e.OptionError, f"{message}; name a file in", check_writable, path, **more)
    for words in (
        ("solve", saved, "--output", model / "config.json"),
        ("solve", "--prove", saved, "--output", model / "config.json"),
        ("compare", saved, "--solvers", "swap", "--output", model / "t.csv"),
    ):
        assert message in run(*words, "--overwrite", fails=e.OptionError)
    assert (model / weights).read_text() == "instance,"
    (model / weights).unlink()  # then it is no model
    check_writable(model / "t.csv", overwrite=True)


def test_options_that_do_not_fit_are_refused(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    base, columns = "compare --solvers wanda", ("5,3000", "5,-1", 0, -3)
    walk = ("--calibration no.txt", "--samples 3", "--include q_proj", "--bos never")
    for message, *commands in (
        ("`on_progress`", "compare --solvers swap --solver-options swap.on_progress=5"),
        ("`on_progress`", "solve --output out.npz --solver-options on_progress=5"),
        ("--update must be one of: none, least-squares; not", f"{base} --update refit"),
        ("is for a model folder", *(f"{base} {option}" for option in walk)),
        ("unknown format 'xyz'", "export r.xyz"),
        ("--columns is how many", *(f"export none.npz --columns {x}" for x in columns)),
    ):
        for command, *more in map(str.split, commands):
            assert message in run(command, saved, *more, fails=e.OptionError)


def test_commands_compare_and_export_what_other_programs_read(saved, tmp_path):
    out, size = tmp_path / "t.csv", ("--rows", 2, "--columns", 10)
    said = run("compare", saved, "--solvers", "wanda,scip", *size, "--output", out)
    with out.open(newline="") as file:
        records = list(csv.DictReader(file))
    found = [(r["solver"], r["status"]) for r in records]
    assert found == [("wanda", "feasible"), ("scip", "optimal")] * 2
    assert all(record["status"] in said for record in records)
    run("export", saved, tmp_path / "r.npz", "--row", 3, "--columns", 10)
    row = load_problem(tmp_path / "r.npz")
    assert row.n == 10
    best = compare([row], ["exhaustive"])[0].objective
    for form, formulation in (("cip", "factored"), ("lp", "factored"), ("mps", "linear")):
        target = tmp_path / f"r.{form}"
        words = ("export", tmp_path / "r.npz", target, "--formulation", formulation)
        run(*words)
        assert scip_value(target) == pytest.approx(best, rel=1e-4, abs=1e-5)
        assert "exists; pass --overwrite" in run(*words, fails=e.OptionError)
    LAYER.row(3).save(tmp_path / "0.npz")
    for number in range(2):
        said = run("export", tmp_path / f"{number}.npz", tmp_path / f"{number + 1}.npz")
        assert "RowProblem('q[3]'," in said
    assert LAYER.take([3]).row(0).name == "q[0]"


# --- clusters of processes, one of which dies: every row is there, none twice
ROWS, KILLED_AFTER = 200, 40
PROVEN = drawn(12, 20, "outliers", seeds=(5, 6))


def instances():
    return sample_rows([drawn(ROWS, 24, "low-rank")], ROWS, columns=12, seed=3)


def check(path, **options):
    """Records, certificates and proofs are those of one process, and the files hold every row once."""
    records = compare(instances(), ["exhaustive"], output=path / "found.jsonl", **options)
    gaps = bound_layers([PROVEN], method="box", output=path / "gaps.jsonl")
    proof = prove(PROVEN, path / "proof.npz")
    with joblib.parallel_config(backend="sequential"):
        alone = bound_layers([PROVEN], method="box")
        assert torch.equal(prove(PROVEN).mask, proof.mask)
        compared = compare(instances(), ["exhaustive"])
    assert [(r.row, r.key) for r in gaps] == [(r.row, r.key) for r in alone]
    # together, rows stop when they are within 1% on average; alone, each when it is
    assert [r.lower_bound for r in gaps] == pytest.approx([r.lower_bound for r in alone], rel=0.05)
    assert len((path / "gaps.jsonl").read_text().splitlines()) == PROVEN.rows
    assert "checked" in str(verify(PROVEN, Solution.load(path / "proof.npz"), require="checked"))
    assert not (path / "proof.npz.rows").exists()
    assert [r.objective for r in records] == [r.objective for r in compared]
    assert {r.status for r in records} == {"optimal"}
    keys = [json.loads(line)["key"] for line in (path / "found.jsonl").read_text().splitlines()]
    assert len(keys) == len(set(keys)) == ROWS


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_dask_workers_of_which_one_is_killed(tmp_path):
    distributed = pytest.importorskip("distributed", reason="needs pip install distributed")
    size, killed = {"n_workers": 4, "threads_per_worker": 1, "dashboard_address": None}, []
    with (
        distributed.LocalCluster(**size) as cluster,
        distributed.Client(cluster) as client,
        joblib.parallel_config(backend="dask", n_jobs=-1),
    ):
        pids = list(client.run(os.getpid).values())

        def kill(finished, _):
            if finished >= KILLED_AFTER and not killed:
                killed.append(pids[0])
                os.kill(pids[0], signal.SIGKILL)

        check(tmp_path, on_progress=kill)
        assert pids[0] not in client.run(os.getpid).values()


@pytest.mark.slow
def test_ray_workers(tmp_path):
    ray = pytest.importorskip("ray", reason="needs pip install ray")
    from ray.util.joblib import register_ray

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        register_ray()
        with joblib.parallel_config(backend="ray", n_jobs=4):
            check(tmp_path)
    finally:
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_processes_and_threads_of_this_machine(tmp_path, backend):
    """An interrupted comparison goes on under another backend."""
    kept = interrupted(instances(), ["exhaustive"], tmp_path / "found.jsonl", KILLED_AFTER)
    assert len(kept) == KILLED_AFTER
    with joblib.parallel_config(backend=backend, n_jobs=2):
        check(tmp_path)


def interrupted_proof(path, **options):
    fails(KeyboardInterrupt, None, prove, PROVEN, path, on_progress=stop_at(5), **options)
    assert not path.exists()
    kept = sorted((path.parent / "proof.npz.rows").iterdir())
    assert len(kept) == 5
    return kept


def test_an_interrupted_proof_keeps_its_rows_whatever_the_time_and_the_workers(tmp_path):
    path, seen = tmp_path / "proof.npz", []
    kept = interrupted_proof(path, limits=Limits(seconds=600))
    kept[0].write_bytes(kept[0].read_bytes()[:100])  # cut off by a crash
    with joblib.parallel_config(backend="threading", n_jobs=2):
        listen = {"on_progress": lambda done, rows: seen.append(done)}
        proof = prove(PROVEN, path, limits=Limits(seconds=900), **listen)
    assert seen == list(range(5, 13))  # four were kept
    verify(PROVEN, proof, require="checked")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["proof.npz"]


def test_forged_rows_of_an_interrupted_proof_are_proven_again(tmp_path):
    """Masks that are legal and claimed to be optimal: nothing proves that."""
    path, again = tmp_path / "proof.npz", []
    for kept in interrupted_proof(path):
        found = Solution.load(kept)
        forged = Solution.of(PROVEN.row(0), found.mask.flip(1), status=found.status)
        bound = {"lower_bound": found.objective, "trusted": ("branch of maskopt 0.2.0",)}
        replace(forged, objective=found.objective, **bound).save(kept)
    zero = int((PROVEN.weight == 0).all(1).sum())  # rows of which every mask is optimal
    proof = prove(PROVEN, path, on_progress=lambda done, rows: again.append(done))
    assert again == list(range(1 + zero, 13))
    assert torch.equal(proof.objective, prove(PROVEN).objective)


def test_what_will_not_do_is_refused_before_anything_is_proven(tmp_path):
    nowhere, listen = tmp_path / "nowhere" / "proof.npz", lambda *event: pytest.fail("it began")
    shared_budget = PROVEN.under(Unstructured(0.5, per="layer"))
    updated = PROVEN.with_update(LeastSquaresUpdate(0.1))
    for layer, path, start, error, message in (
        (PROVEN, nowhere, None, e.OptionError, "no such folder"),
        (PROVEN, None, torch.ones(12, 20, dtype=torch.bool), e.WarmStartError, "row 0 prunes 0"),
        (PROVEN, None, "swop", e.SolverError, "swop"),
        (updated, None, None, e.OptionError, "unchanged weights"),
        (shared_budget, None, None, e.OptionError, "an equal count"),
    ):
        fails(error, message, prove, layer, path, start=start, on_progress=listen)


# --- certified gaps
@pytest.fixture
def layer():
    return drawn(5, 24, name="a.0.q_proj")


@pytest.fixture(scope="module")
def models(dense, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    text = "the quick brown fox jumps over the lazy dog and runs away again " * 60
    (root / "text.txt").write_text(text)
    words = {"calibration": root / "text.txt", "samples": 8, "seq_len": 32}
    maskopt.prune_model(dense, sparsity=NM(keep=2, of=4), output=root / "pruned", **words)
    (root / "dense").symlink_to(dense)
    return root


def certified(models, dense="dense", pruned="pruned", **options):
    words = {"calibration": models / "text.txt", "method": "box"}
    return certify_model(models / dense, models / pruned, **{**words, **options})


def test_gaps_are_what_objective_and_bound_say_of_rows_drawn_as_for_a_comparison(layer):
    layers = [layer, LayerProblem(2 * layer.weight, layer.gram, layer.pattern, name="b")]
    seen, sampled = [], sample_rows(layers, 3, seed=5)
    listen = {"on_rows": lambda *event: seen.append(event)}
    records = bound_layers(layers, rows=3, method="box", solver="swap", seed=5, **listen)
    # before a layer is bounded, and after its rows
    assert seen == [(0, "a.0.q_proj"), (3, "a.0.q_proj"), (3, "b"), (6, "b")]
    assert [f"{r.instance}[{r.row}]" for r in records] == [row.name for row in sampled]
    assert len({r.row for r in records[:3]}) == 3
    for row, record in zip(sampled, records, strict=True):
        assert row.n == record.n
        assert record.objective == pytest.approx(float(solve(row, "swap").objective), rel=1e-9)
        assert 0 <= record.lower_bound <= record.objective
        assert record.gap == pytest.approx(1 - record.lower_bound / record.objective)
    same = LayerProblem(torch.ones(3, 8), random_gram(8, "full", 4), HALF)
    assert [r.row for r in bound_layers([same], method="box")] == [0, 1, 2]


def test_an_interrupted_run_goes_on(layer, tmp_path, monkeypatch):
    """All rows that are missing are bounded together."""
    path, bounded, held, original = tmp_path / "gaps.jsonl", [], [], certify_module.lower_bound
    words = {"rows": 4, "method": "box", "output": path}
    shift = bound_layers([layer], rows=2, method="shift", output=path)
    whole = bound_layers([layer], **words)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], lines[4][:20]]))

    def counting(problem, *args, **options):
        bounded.append(problem.rows)
        return original(problem, *args, **options)

    monkeypatch.setattr(certify_module, "lower_bound", counting)
    # the file grows before the next rows begin
    listen = {"on_rows": lambda *event: held.append(len(read_records(path, GapRecord)))}
    again = bound_layers([layer], **words, **listen)
    assert (bounded, held) == ([2], [4, 6])
    assert [r.key for r in again] == [r.key for r in whole]
    assert list(read_records(path, GapRecord).values()) == [*shift, *again]
    # a matrix product may sum in another order when fewer rows are left
    assert [r.objective for r in again] == pytest.approx([r.objective for r in whole], rel=1e-12)


@pytest.mark.parametrize("per", ["row", "layer"])
@pytest.mark.parametrize("forged", ["line", "solution", "another mask"])
def test_forged_bounds_do_not_survive_a_resume(per, forged, layer, tmp_path, caplog):
    layer = layer.under(Unstructured(sparsity=0.5, per=per))
    path = tmp_path / "gaps.jsonl"
    honest = bound_layers([layer], method="box", output=path)
    if forged == "line":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lies = [json.dumps({**r, "lower_bound": r["objective"], "gap": 0.0}) for r in lines]
        path.write_text("\n".join(lies) + "\n")
    for kept in (tmp_path / "gaps.jsonl.rows").iterdir() if forged != "line" else ():
        found = Solution.load(kept)
        if forged == "solution":
            replace(found, lower_bound=found.objective).save(kept)
        else:
            Solution.of(layer if per == "layer" else layer.row(0), found.mask.flip(1)).save(kept)
    again = bound_layers([layer], method="box", output=path)
    dropped = forged == "solution" or (forged, per) == ("another mask", "row")
    assert ("dropped" in caplog.text) == dropped
    assert [r.lower_bound for r in again] == pytest.approx([r.lower_bound for r in honest])
    assert list(read_records(path, GapRecord).values()) == again


def test_what_will_not_do_is_refused_before_anything_is_read(models, layer, tmp_path):
    path, other = tmp_path / "gaps.jsonl", tiny("llama")
    bound_layers([layer], method="box", output=path)
    said = r"gaps\.jsonl: holds gaps of another model; name another"
    began = {"on_rows": lambda *event: pytest.fail("it began")}
    fails(e.DataError, said, certified, models, output=path, **began)
    path.unlink()
    records = certified(models, output=path, include="layers.0.mlp")
    manifest = read_manifest(models / "pruned" / "maskopt-manifest.json")
    assert {r.model for r in records} == {result_digest(manifest)}
    fails(e.DataError, "another model", bound_layers, [layer], method="box", output=path)
    fails(e.MaskoptError, "unknown bound", bound_layers, [layer], method="bxo")

    def layers():
        pytest.fail("not to be asked for")
        yield

    for draw in (sample_rows, bound_layers):
        fails(e.OptionError, "rows must be at least 1, not 0", draw, layers(), rows=0)
    fails(e.OptionError, "rows", certified, models, "no", "no", rows_per_layer=0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.01
    save_tokenizer(save(other, tmp_path / "other"))
    for wrong in (tmp_path / "other", "pruned"):
        fails(e.ModelError, "was pruned from another model than", certified, models, wrong)
    fails(e.MaskoptError, None, certified, models, pruned="dense")


def test_the_masks_of_a_pruned_model_are_the_ones_judged(models, tmp_path):
    records = certified(models, rows_per_layer=2)
    windows = {"samples": 8, "seq_len": 32}  # those of the prune
    assert [r.key for r in certified(models, rows_per_layer=2, **windows)] == [
        r.key for r in records
    ]
    kinds = by_kind(records)
    names = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert {kind.split(".")[-1] for kind in kinds} == names
    assert all(count == 6 for count, *_ in kinds.values())
    assert {record.pattern for record in records} == {"2:4"}
    for record in records:
        assert record.objective > 0
        assert 0 <= record.gap <= 1
        assert math.isfinite(record.seconds)
    some = {"sparsity": NM(keep=2, of=4), "include": ("layers.0",), "output": tmp_path / "some"}
    text = {"calibration": models / "text.txt", "samples": 4, "seq_len": 32}
    maskopt.prune_model(models / "dense", **some, **text)
    records = certified(models, pruned=tmp_path / "some", include="q_proj", rows_per_layer=1)
    assert [r.instance for r in records] == ["model.layers.0.self_attn.q_proj"]
    wrong = {"pruned": tmp_path / "some", "include": "layers.1"}
    fails(e.ModelError, r"no layer matches 'layers\.1'", certified, models, **wrong)
    before = torch.get_num_threads()
    some = {"rows_per_layer": 1, "samples": 2, "include": "layers.0.mlp", "threads": before + 1}
    certified(models, **some)
    assert torch.get_num_threads() == before
    fails(ZeroDivisionError, None, certified, models, **some, on_rows=lambda *event: 1 / 0)
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_experts_that_see_tokens_in_the_pruned_model_alone(tmp_path):
    dense, out, text = save(tiny("mixtral"), tmp_path / "dense"), tmp_path / "out", tokens(2, 4)
    maskopt.prune_model(dense, text, output=out, sparsity=0.7, solver="magnitude", min_tokens=1)
    problems = (maskopt.collect_problems(folder, text, sparsity=0.7) for folder in (dense, out))
    one, other = ([name for name, _ in found] for found in problems)
    assert one != other
    records = certify_model(dense, out, calibration=text, method="box", rows_per_layer=1)
    assert [record.instance for record in records] == other


@pytest.mark.parametrize("jobs", [1, 2])
def test_rows_with_a_common_count_have_the_bound_of_their_layer(jobs, tmp_path):
    weight = random_weight(6, 24, 3) * 2.0 ** torch.arange(6.0)[:, None]
    pattern = Unstructured(0.5, per="layer")
    layer = LayerProblem(weight, random_gram(24, "full", 4), pattern, name="a")
    words = {"method": "box", "output": tmp_path / "gaps.jsonl"}
    with joblib.parallel_config(backend="threading"):
        records = bound_layers([layer], jobs=jobs, **words)
        assert bound_layers([layer], jobs=3 - jobs, **words) == records
    best = float(solve(layer, "swap").objective.sum())
    assert [r.row for r in records] == list(range(6))
    truth = float(maskopt.lower_bound(layer, "box").value.sum())
    assert sum(r.lower_bound for r in records) == pytest.approx(truth)
    assert truth <= best * (1 + 1e-9)
    assert [r.gap for r in records] == pytest.approx([1 - truth / best] * 6)
    fewer = layer.take([0, 1, 2])
    fewer.name = "a"
    assert not {r.key for r in bound_layers([fewer], **words)} & {r.key for r in records}


def test_commands(models, layer, tmp_path):
    layer.save(tmp_path / "layer.npz")
    out, box = tmp_path / "gaps.csv", ("--method", "box")
    assert "q_proj" in run("bound", tmp_path / "layer.npz", *box, "--rows", 2, "--output", out)
    assert len(out.read_text().splitlines()) == 3
    common = ("--calibration", models / "text.txt", "--samples", 4, "--seq-len", 32)
    folders = (models / "pruned", "--original", models / "dense")
    assert "q_proj" in run("bound", *folders, *box, "--rows", 1, "--include", "*q_proj", *common)
    some = ("--include", "*0*q_proj", "--sparsity", "0.5", "--rows", 1, "--columns", 12)
    solvers = ("--solvers", "wanda,swap,exhaustive")
    assert "optimal" in run("compare", models / "dense", *some, *solvers, *common)
    assert "--calibration" in run("bound", models / "dense", fails=e.MaskoptError)
    gaps = []
    for extra in ((), ("--cuts", "3")):
        out = tmp_path / f"{len(extra)}.csv"
        run("bound", tmp_path / "layer.npz", "--output", out, *extra)
        with out.open() as lines:
            gaps.append([float(row["gap"]) for row in csv.DictReader(lines)])
    assert all(after <= before for before, after in zip(*gaps, strict=True))
    assert sum(gaps[1]) < sum(gaps[0])
    refused = run("bound", tmp_path / "layer.npz", *box, "--cuts", 3, fails=e.MaskoptError)
    assert "bound 'box' has no option 'cuts'" in refused

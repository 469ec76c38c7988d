"""Rows over clusters of processes, one of which dies: every row is there, none twice."""

import json
import os
import signal
from dataclasses import replace

import joblib
import pytest
import torch
from resuming import stop_at
from strategies import HALF, random_gram, random_weight

from maskopt import LayerProblem, LeastSquaresUpdate, Limits, Solution, Unstructured, verify
from maskopt.errors import OptionError, UnknownSolverError, WarmStartError
from maskopt.experiments.compare import compare, sample_rows
from maskopt.experiments.prove import prove
from maskopt.models.evaluation.bound import bound_layers

slow = pytest.mark.slow
ROWS, KILLED_AFTER = 200, 40
LAYER = LayerProblem(random_weight(12, 20, 5), random_gram(20, "outliers", 6), HALF)


def instances():
    layer = LayerProblem(random_weight(ROWS, 24, 1), random_gram(24, "low-rank", 2), HALF)
    return sample_rows([layer], ROWS, columns=12, seed=3)


def check_certificates_and_proofs(path):
    """Certificates and proofs under the same backend: they are those of one process."""
    gaps = bound_layers([LAYER], method="box", output=path / "gaps.jsonl")
    proof = prove(LAYER, path / "proof.npz")
    with joblib.parallel_config(backend="sequential"):
        alone = bound_layers([LAYER], method="box")
        assert torch.equal(prove(LAYER).mask, proof.mask)
    assert [(r.row, r.key) for r in gaps] == [(r.row, r.key) for r in alone]
    # together, rows stop when they are within 1% on average; alone, each when it is
    assert [r.lower_bound for r in gaps] == pytest.approx([r.lower_bound for r in alone], rel=0.05)
    assert len((path / "gaps.jsonl").read_text().splitlines()) == LAYER.rows
    assert "checked" in str(verify(LAYER, Solution.load(path / "proof.npz"), require="checked"))
    assert not (path / "proof.npz.rows").exists()


def check(records, path):
    """Against the same in this process; and the file holds every row once."""
    alone = compare(instances(), ["exhaustive"])
    assert [r.objective for r in records] == [r.objective for r in alone]
    assert {r.status for r in records} == {"optimal"}
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == ROWS


@slow
@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_dask_workers_of_which_one_is_killed(tmp_path):
    distributed = pytest.importorskip("distributed", reason="needs pip install distributed")
    path, killed = tmp_path / "found.jsonl", []
    size = {"n_workers": 4, "threads_per_worker": 1, "dashboard_address": None}
    with (
        distributed.LocalCluster(**size) as cluster,
        distributed.Client(cluster) as client,
        joblib.parallel_config(backend="dask", n_jobs=-1),
    ):
        pids = list(client.run(os.getpid).values())

        def kill(finished, _):
            """One of the workers, in the middle of the work."""
            if finished >= KILLED_AFTER and not killed:
                killed.append(pids[0])
                os.kill(pids[0], signal.SIGKILL)

        records = compare(instances(), ["exhaustive"], output=path, on_progress=kill)
        survivors = client.run(os.getpid).values()
        check_certificates_and_proofs(tmp_path)
    assert pids[0] not in survivors
    check(records, path)


@slow
def test_ray_workers(tmp_path):
    ray = pytest.importorskip("ray", reason="needs pip install ray")
    from ray.util.joblib import register_ray

    path = tmp_path / "found.jsonl"
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        register_ray()
        with joblib.parallel_config(backend="ray", n_jobs=4):
            records = compare(instances(), ["exhaustive"], output=path)
            check_certificates_and_proofs(tmp_path)
    finally:
        ray.shutdown()
    check(records, path)


@slow
@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_processes_and_threads_of_this_machine(tmp_path, backend):
    with joblib.parallel_config(backend=backend, n_jobs=2):
        check_certificates_and_proofs(tmp_path)
    # an interrupted comparison goes on under another backend
    path = tmp_path / "found.jsonl"
    with pytest.raises(KeyboardInterrupt):
        compare(instances(), ["exhaustive"], output=path, on_progress=stop_at(KILLED_AFTER))
    assert len(path.read_text().splitlines()) == KILLED_AFTER
    with joblib.parallel_config(backend=backend, n_jobs=2):
        records = compare(instances(), ["exhaustive"], output=path)
    check(records, path)


def interrupted(path, **options):
    """A proof that ends with five rows; their files."""
    with pytest.raises(KeyboardInterrupt):
        prove(LAYER, path, on_progress=stop_at(5), **options)
    assert not path.exists()
    kept = sorted((path.parent / "proof.npz.rows").iterdir())
    assert len(kept) == 5
    return kept


def test_an_interrupted_proof_keeps_its_rows_whatever_the_time_and_the_workers(tmp_path):
    path, seen = tmp_path / "proof.npz", []
    kept = interrupted(path, limits=Limits(seconds=600))
    kept[0].write_bytes(kept[0].read_bytes()[:100])  # cut off by a crash
    with joblib.parallel_config(backend="threading", n_jobs=2):
        listen = {"on_progress": lambda done, rows: seen.append(done)}
        proof = prove(LAYER, path, limits=Limits(seconds=900), **listen)
    assert seen == list(range(5, 13))  # four were kept
    verify(LAYER, proof, require="checked")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["proof.npz"]


def test_forged_rows_of_an_interrupted_proof_are_proven_again(tmp_path):
    """Masks that are legal and claimed to be optimal: nothing proves that."""
    path, again = tmp_path / "proof.npz", []
    for kept in interrupted(path):
        found = Solution.load(kept)
        forged = Solution.of(LAYER.row(0), found.mask.flip(1), status=found.status)
        bound = {"lower_bound": found.objective, "trusted": ("branch of maskopt 0.2.0",)}
        replace(forged, objective=found.objective, **bound).save(kept)
    zero = int((LAYER.weight == 0).all(1).sum())  # rows of which every mask is optimal
    proof = prove(LAYER, path, on_progress=lambda done, rows: again.append(done))
    assert again == list(range(1 + zero, 13))
    assert torch.equal(proof.objective, prove(LAYER).objective)


def test_what_will_not_do_is_refused_before_anything_is_proven(tmp_path):
    began, nowhere = [], tmp_path / "nowhere" / "proof.npz"
    shared_budget = LAYER.under(Unstructured(0.5, per="layer"))
    for layer, path, start, error, message in (
        (LAYER, nowhere, None, OptionError, "no such folder"),
        (LAYER, None, torch.ones(12, 20, dtype=torch.bool), WarmStartError, "row 0 prunes 0"),
        (LAYER, None, "swop", UnknownSolverError, "swop"),
        (LAYER.with_update(LeastSquaresUpdate(0.1)), None, None, OptionError, "unchanged weights"),
        (shared_budget, None, None, OptionError, "an equal count"),
    ):
        with pytest.raises(error, match=message):
            prove(layer, path, start=start, on_progress=lambda *x: began.append(1))
    assert not began

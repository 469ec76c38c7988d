"""Rows over clusters of processes, one of which dies: every row is there, none twice."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import pytest
import torch
from strategies import random_gram, random_weight

from maskopt import LayerProblem, Limits, Refit, Solution, Unstructured, verify
from maskopt.certify import bound_layers
from maskopt.compare import Record, compare, sample_rows
from maskopt.errors import OptionError, UnknownSolverError, WarmStartError
from maskopt.prove import prove

pytestmark = pytest.mark.slow

ROWS, KILLED_AFTER = 500, 60


def instances() -> list[Any]:
    layer = LayerProblem(
        random_weight(ROWS, 24, 1), random_gram(24, "low-rank", 2), Unstructured(0.5)
    )
    return sample_rows([layer], ROWS, columns=12, seed=3)


def layer() -> LayerProblem:
    return LayerProblem(random_weight(12, 20, 5), random_gram(20, "outliers", 6), Unstructured(0.5))


def check_certificates_and_proofs(path: Path) -> None:
    """Certificates and proofs under the same backend: they are those of one process."""
    gaps = bound_layers([layer()], method="box", output=path / "gaps.jsonl")
    proof = prove(layer(), path / "proof.npz")
    with joblib.parallel_config(backend="sequential"):
        alone = bound_layers([layer()], method="box")
        assert torch.equal(prove(layer()).mask, proof.mask)
    assert [(r.row, r.key) for r in gaps] == [(r.row, r.key) for r in alone]
    # together, rows stop when they are within 1% on average; alone, each when it is
    assert [r.lower_bound for r in gaps] == pytest.approx([r.lower_bound for r in alone], rel=0.05)
    assert len((path / "gaps.jsonl").read_text().splitlines()) == layer().rows
    assert "checked" in str(verify(layer(), Solution.load(path / "proof.npz"), require="checked"))
    assert not (path / "proof.npz.rows").exists()


def check(records: list[Record], path: Path) -> None:
    """Against the same in this process; and the file holds every row once."""
    alone = compare(instances(), ["exhaustive"])
    assert [r.objective for r in records] == [r.objective for r in alone]
    assert {r.status for r in records} == {"optimal"}
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == ROWS


def kills(pids: Callable[[], list[int]]) -> Callable[[int, int], None]:
    """Told of progress, it kills one of the workers in the middle of the work."""
    done: list[int] = []

    def told(finished: int, _: int) -> None:
        if finished >= KILLED_AFTER and not done:
            done.append(pids()[0])
            os.kill(done[0], signal.SIGKILL)

    return told


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_dask_workers_of_which_one_is_killed(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="needs pip install distributed")
    path = tmp_path / "found.jsonl"
    with (
        distributed.LocalCluster(
            n_workers=4, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
        joblib.parallel_config(backend="dask", n_jobs=-1),
    ):
        pids = list(client.run(os.getpid).values())
        records = compare(instances(), ["exhaustive"], output=path, on_progress=kills(lambda: pids))
        survivors = client.run(os.getpid).values()
        check_certificates_and_proofs(tmp_path)
    assert pids[0] not in survivors
    check(records, path)


def test_ray_workers(tmp_path: Path) -> None:
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


def test_an_interrupted_comparison_goes_on_under_another_backend(tmp_path: Path) -> None:
    path, seen = tmp_path / "found.jsonl", []

    def stop(finished: int, _: int) -> None:
        seen.append(finished)
        if finished == KILLED_AFTER:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(instances(), ["exhaustive"], output=path, on_progress=stop)
    kept = len(path.read_text().splitlines())
    assert kept == KILLED_AFTER
    with joblib.parallel_config(backend="threading", n_jobs=2):
        records = compare(instances(), ["exhaustive"], output=path)
    check(records, path)


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_processes_and_threads_of_this_machine(tmp_path: Path, backend: str) -> None:
    with joblib.parallel_config(backend=backend, n_jobs=2):
        check_certificates_and_proofs(tmp_path)


def test_an_interrupted_proof_keeps_its_rows(tmp_path: Path) -> None:
    path, seen = tmp_path / "proof.npz", []

    def stop(done: int, rows: int) -> None:
        seen.append(done)
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prove(layer(), path, on_progress=stop)
    assert not path.exists()
    kept = sorted((tmp_path / "proof.npz.rows").iterdir())
    assert len(kept) == 5
    kept[0].write_bytes(kept[0].read_bytes()[:100])  # cut off by a crash
    seen.clear()
    with joblib.parallel_config(backend="threading", n_jobs=2):
        proof = prove(layer(), path, on_progress=lambda done, rows: seen.append(done))
    assert seen == list(range(5, 13))  # four were kept
    verify(layer(), proof, require="checked")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["proof.npz"]


def test_forged_rows_of_an_interrupted_proof_are_proven_again(tmp_path: Path) -> None:
    """Masks that are legal and claimed to be optimal: nothing proves that."""
    path, again = tmp_path / "proof.npz", []

    def stop(done: int, rows: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prove(layer(), path, on_progress=stop)
    for kept in (tmp_path / "proof.npz.rows").iterdir():
        found = Solution.load(kept)
        mask = found.mask.flip(1)
        forged = Solution.of(layer().row(0), mask, status=found.status)
        bound = {"lower_bound": found.objective, "trusted": ("branch of maskopt 0.2.0",)}
        replace(forged, objective=found.objective, **bound).save(kept)
    zero = int((layer().weight == 0).all(1).sum())  # rows of which every mask is optimal
    proof = prove(layer(), path, on_progress=lambda done, rows: again.append(done))
    assert again == list(range(1 + zero, 13))
    assert torch.equal(proof.objective, prove(layer()).objective)


def test_what_is_proven_is_kept_whatever_the_time_and_the_workers(tmp_path: Path) -> None:
    path, again = tmp_path / "proof.npz", []

    def stop(done: int, rows: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prove(layer(), path, limits=Limits(seconds=600), on_progress=stop)
    with joblib.parallel_config(backend="threading", n_jobs=3):
        prove(layer(), path, limits=Limits(seconds=900), on_progress=lambda *x: again.append(x))
    assert [done for done, _ in again] == list(range(6, 13))


def test_what_will_not_do_is_refused_before_anything_is_proven(tmp_path: Path) -> None:
    began: list[int] = []
    with pytest.raises(OptionError, match="no such folder"):
        prove(layer(), tmp_path / "nowhere" / "proof.npz", on_progress=lambda *x: began.append(1))
    with pytest.raises(WarmStartError, match="row 0 prunes 0"):
        prove(layer(), start=torch.ones(12, 20, dtype=torch.bool))
    with pytest.raises(UnknownSolverError, match="swop"):
        prove(layer(), start="swop")
    assert not began


def test_what_has_no_tree_is_refused() -> None:
    with pytest.raises(OptionError, match="keep their weights"):
        prove(layer().refitting(Refit(0.1)))
    with pytest.raises(OptionError, match="prune alike"):
        prove(layer().under(Unstructured(0.5, per="layer")))

"""`compare` over clusters of processes, one of which dies: every row is there, none twice."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import pytest
from strategies import random_gram, random_weight

from maskopt import LayerProblem, Unstructured
from maskopt.compare import Record, compare, sample_rows

ROWS, KILLED_AFTER = 500, 60


def instances() -> list[Any]:
    layer = LayerProblem(
        random_weight(ROWS, 24, 1), random_gram(24, "low-rank", 2), Unstructured(0.5)
    )
    return sample_rows([layer], ROWS, columns=12, seed=3)


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

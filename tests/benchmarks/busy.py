"""Seconds of commands on an idle machine, and with two other busy processes.

    python tests/benchmarks/busy.py --calibration valid.txt --rounds 3

Each round runs every command three ways, one after the other: with the defaults, with threads that spin while
they wait (`OMP_WAIT_POLICY=active`), and with the defaults while two processes multiply matrices. The table
has the median of the rounds. The kernel cache is filled before. The machine must be idle otherwise.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from book import table
from machine import machine_now

from maskopt.demo import demo_model

VERTICES, DENSITY, CARDINALITY = 120, 0.5, 30
HOG = "import numpy; a = numpy.ones((500, 500))\nwhile True: a @ a"
WAYS = {"idle": {}, "idle, active": {"OMP_WAIT_POLICY": "active"}, "busy": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", required=True, help="text of the prune")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=["solve", "verify", "prune", "demo"])
    args = parser.parse_args()
    print(machine_now())
    rows = []
    with tempfile.TemporaryDirectory(prefix="maskopt-busy-") as home:
        commands = {n: c for n, c in all_commands(Path(home), args.calibration) if n in args.only}
        for name, command in commands.items():
            run(command, {})  # compiles kernels, and fills the cache of files
            found: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(args.rounds):
                for way, environment in WAYS.items():
                    with other_work(way == "busy"):
                        found[way].append(run(command, environment))
            seconds = {way: statistics.median(times) for way, times in found.items()}
            idle = seconds["idle"]
            ratios = [f"{seconds[way] / idle:.2f}" for way in ("idle, active", "busy")]
            rows.append([f"`{name}`", f"{idle:.2f}", *ratios])
            print(rows[-1], found, flush=True)
    head = ("command", "seconds, idle", "threads spin, ratio to idle", "busy, ratio to idle")
    print(table(head, rows))


def all_commands(home: Path, calibration: str) -> Iterator[tuple[str, list[str]]]:
    """A proof of a densest subgraph, its check, a prune and the demo."""
    upper = np.triu(np.random.default_rng(0).random((VERTICES, VERTICES)) < DENSITY, 1)
    np.save(home / "graph.npy", (upper | upper.T).astype(np.float64))
    graph = [str(home / "graph.npy"), "--cardinality", str(CARDINALITY), "--maximize"]
    proof = str(home / "proof.npz")
    yield "solve", ["solve", *graph, "--prove", "--output", proof, "--overwrite"]
    yield "verify", ["verify", graph[0], proof, *graph[1:]]
    text = ["--calibration", calibration, "--samples", "12", "--seq-len", "512"]
    where = ["--output", str(home / "pruned"), "--overwrite"]
    yield "prune", ["prune", str(demo_model("gemma3")), "--sparsity", "50%", *text, *where]
    yield "demo", ["demo", "--output", str(home / "demo"), "--overwrite"]


def run(arguments: list[str], environment: dict[str, str]) -> float:
    """Seconds of one command."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "maskopt", *arguments],
        env={**os.environ, **environment},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - began


@contextmanager
def other_work(busy: bool) -> Iterator[None]:
    """Two busy processes of one thread each, while it lasts."""
    one = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    hogs = [subprocess.Popen([sys.executable, "-c", HOG], env=one) for _ in range(2 * busy)]
    try:
        if busy:
            time.sleep(1)
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


if __name__ == "__main__":
    main()

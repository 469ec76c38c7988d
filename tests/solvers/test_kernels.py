"""Compilation of kernels: when it is reported, and that no limit counts it."""

import json
import logging
import os
import pickle
import subprocess
import sys
import time

import pytest
from numba import types
from numba.extending import intrinsic
from strategies import HALF, drawn

from maskopt import Solution, solve
from maskopt.cli.console import show_compiling
from maskopt.core import clock as clocks
from maskopt.protocol.solver import Capabilities, Solver
from maskopt.solvers.kernels import njit

KERNEL = """
import io, json, logging, sys
logging.getLogger("maskopt.compile").addHandler(logging.StreamHandler(said := io.StringIO()))
logging.getLogger("maskopt.compile").setLevel(logging.INFO)
import numpy as np
from maskopt.solvers.convex.mixing_kernel import couplings
for dtype in sys.argv[1:]:
    couplings(np.eye(4, dtype=dtype), np.ones((1, 4), dtype), np.zeros((1, 4)), np.arange(1))
hits = sum(couplings.stats.cache_hits.values())
print(json.dumps({"lines": len(said.getvalue().splitlines()), "hits": hits}))
"""


def run(folder, *dtypes):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", KERNEL, *dtypes]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_first_compilation_is_reported_once_and_cached_kernels_load_silently(tmp_path):
    assert run(tmp_path, "float64", "float32") == {"lines": 1, "hits": 0}
    assert run(tmp_path, "float64", "float32") == {"lines": 0, "hits": 2}


def test_compilation_counts_neither_as_seconds_nor_towards_a_limit(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(clocks.clock, "_compiled", (0.0, None))

    def wait(seconds):
        now[0] += seconds

    @intrinsic
    def slow_to_compile(typing_context):
        wait(100.0)
        return types.void(), lambda context, *rest: context.get_dummy_value()

    @njit(cache=False)
    def inner():
        slow_to_compile()

    @njit(cache=False)
    def kernel():
        inner()

    def run(solver, problem, start, given):
        kernel()
        wait(3.0)
        seen.append((given.left, pickle.dumps(given)))
        return Solution.of(problem, start)

    seen = []
    members = {"name": "compiles", "capabilities": Capabilities(start="needed"), "run": run}
    made = type("Compiles", (Solver,), members)()
    problem = drawn(2, 8, "full", pattern=HALF)
    assert solve(problem, made, start="wanda", time_limit=10).seconds == 3.0
    assert now[0] >= 103.0
    left, sent = seen[0]
    assert left == 7.0
    monkeypatch.setattr(clocks.clock, "_compiled", (0.0, None))  # as in another process
    assert pickle.loads(sent).left == 7.0


def test_the_command_line_says_that_it_compiles(capsys, monkeypatch):
    log = logging.getLogger("maskopt.compile")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "level", log.level)
    show_compiling()
    log.info("compiling kernels")
    out, err = capsys.readouterr()
    assert (out, "compiling kernels" in err) == ("", True)

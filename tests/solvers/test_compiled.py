"""Where machine code is kept, and when there is something to wait for."""

import json
import logging
import os
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
from forging import fails
from numba import types
from numba.extending import intrinsic
from strategies import HALF, drawn

from maskopt import Solution, solve
from maskopt.cli.console import show_compiling
from maskopt.core import limits
from maskopt.protocol.solver import Capabilities, Solver
from maskopt.solvers import compiled
from maskopt.solvers.swap.numba_common import sort

LOOP = """
import io, json, logging, sys
logging.getLogger("maskopt.compile").addHandler(logging.StreamHandler(said := io.StringIO()))
logging.getLogger("maskopt.compile").setLevel(logging.INFO)
import numpy as np
from maskopt.solvers.convex.mixing_kernel import couplings
for dtype in sys.argv[1:]:
    couplings(np.eye(4, dtype=dtype), np.ones((1, 4), dtype), np.zeros((1, 4)), np.arange(1))
print(json.dumps({"said": said.getvalue().splitlines(), "hits": sum(couplings.stats.cache_hits.values())}))
"""


def run(folder, *dtypes):
    given = {**os.environ, "NUMBA_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", LOOP, *dtypes]
    done = subprocess.run(command, capture_output=True, text=True, env=given)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_first_compilation_is_named_once_and_what_is_kept_is_loaded_silently(tmp_path):
    assert run(tmp_path, "float64", "float32") == {"said": [compiled.NOTICE], "hits": 0}
    assert run(tmp_path, "float64", "float32") == {"said": [], "hits": 2}


def test_where_nothing_can_be_kept_loops_are_compiled_all_the_same(tmp_path, monkeypatch):
    """Numba's own place beside the source serves, where that can be written to."""
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    fails(RuntimeError, "file", compiled._kept_by_source, twice)
    assert compiled.loop()(twice)(2.0) == 4.0


def twice(x):
    return 2 * x


def test_compilation_counts_neither_as_seconds_nor_towards_a_limit(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(limits.clock, "_compiled", (0.0, None))

    def wait(seconds):
        now[0] += seconds

    @intrinsic
    def slow_to_compile(typing_context):
        wait(100.0)
        return types.void(), lambda context, *rest: context.get_dummy_value()

    @compiled.loop()
    def inner():
        slow_to_compile()

    @compiled.loop()
    def loop():
        inner()

    def run(solver, problem, start, given):
        loop()
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
    monkeypatch.setattr(limits.clock, "_compiled", (0.0, None))  # as in another process
    assert pickle.loads(sent).left == 7.0


def test_the_command_line_says_that_it_compiles(capsys, monkeypatch):
    log = logging.getLogger("maskopt.compile")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "level", log.level)
    show_compiling()
    log.info("compiling once …")
    out, err = capsys.readouterr()
    assert (out, "compiling once …" in err) == ("", True)


def test_the_key_goes_by_the_source_and_what_it_imports(tmp_path, monkeypatch):
    """Not by the place: another installation of the same source has the same key."""
    keys = {}
    for name, constant in (("one", 1), ("two", 1), ("three", 2)):
        root = tmp_path / name
        (root / "room").mkdir(parents=True)
        (root / "room" / "loops.py").write_text("from maskopt.solvers.room.base import HERE\n")
        (root / "room" / "base.py").write_text(f"HERE = {constant}\n")
        (root / "room" / "other.py").write_text(f"# {name}\n")
        monkeypatch.setattr(compiled, "_ROOT", root)
        keys[name] = compiled.source_key(root / "room" / "loops.py")
    assert keys["one"] == keys["two"] != keys["three"]


def test_ctrl_c_inside_a_loop_is_no_system_error_and_parts_are_not_called(monkeypatch):
    """Numba looks up an array's type in Python; what is raised there passes two layers of C."""

    class Interrupted(dict):
        def __getitem__(self, key):
            raise KeyboardInterrupt

    doubled, row = compiled.loop()(twice), np.ones(4)
    assert (doubled(row) == 2.0).all()
    monkeypatch.setattr("numba.core.serialize._unpickled_memo", Interrupted())
    fails(KeyboardInterrupt, None, doubled, row)
    fails(TypeError, "part of compiled loops", sort, np.zeros(3), 0, 3)

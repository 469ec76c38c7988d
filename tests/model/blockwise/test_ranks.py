"""Several processes that prune one model together: real ones, started by torchrun."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest
import rank_prunes
import torch
from commands import TESTS, run
from hypothesis import given
from hypothesis import strategies as st
from outputs import contents
from strategies import random_gram, random_weight
from tiny_models import save, tiny, tokens

from maskopt import LayerProblem, Refit, Unstructured, available_solvers, solve
from maskopt.cli import ranks as cli_ranks
from maskopt.cli.prune import told_of_resume
from maskopt.model.ranks import ROWS, LostRankError, Ranks
from maskopt.model.workspace import HIDDEN, JOURNAL
from maskopt.solver import make_solver

#: seconds after which a process that should have ended counts as one that hangs
PATIENCE = 240

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform != "linux",
    reason="needs torch.distributed, and /proc to find the processes",
)


def launched(processes: int, *command: object) -> subprocess.Popen[str]:
    """`torchrun --nproc-per-node … command`, with its own standard error to be read."""
    words = ["torch.distributed.run", "--standalone", "--nproc-per-node", processes, *command]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Its status, and what it and all that it started said."""
    try:
        said, told = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, said, told


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    rank_prunes.save_models(folder)
    return folder


@pytest.fixture(scope="module")
def alone(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of every case."""
    out = tmp_path_factory.mktemp("alone")
    rank_prunes.pruned(models, out)
    return out


@pytest.mark.parametrize("processes", [2, 4])
def test_the_result_does_not_depend_on_how_many_processes_there_are(
    models: Path, alone: Path, tmp_path: Path, processes: int
) -> None:
    script = TESTS / "rank_prunes.py"
    status, _, told = ended(launched(processes, script, models, tmp_path))
    assert status == 0, told
    for name in (*rank_prunes.CASES, "from grams"):
        expected, found = contents(alone / name), contents(tmp_path / name)
        assert found.keys() == expected.keys()
        for file in expected:
            assert found[file] == expected[file], (name, file)
    grams = sorted((alone / "grams").glob("*.bits"))
    assert [(tmp_path / "grams" / one.name).read_bytes() == one.read_bytes() for one in grams] == (
        [True] * len(grams)
    )


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of many blocks, tokens for it, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("deep")
    rank_prunes.FAMILIES["deep"] = (
        "LlamaConfig",
        {**rank_prunes.FAMILIES["tall"][1], "num_hidden_layers": 8},
    )
    save(tiny("deep"), folder / "model", shard="200KB")
    np.save(folder / "tokens.npy", tokens(5).numpy())
    run(*command(folder, folder / "whole"))
    return folder


def command(folder: Path, out: Path) -> list[str]:
    words = f"prune {folder / 'model'} --calibration {folder / 'tokens.npy'} --output {out}"
    return [
        *words.split(),
        "--sparsity",
        "0.5",
        "--min-tokens",
        "1",
        "--solver",
        "elimination",
        "--threads",
        "1",
    ]


def process_of(rank: int, launcher: subprocess.Popen[str]) -> int:
    """The process that the launcher started for a rank."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = re.search(r"^PPid:\t(\d+)", (entry / "status").read_text(), re.M)
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue  # it has ended, or is not ours
            if parent and int(parent[1]) == launcher.pid and f"RANK={rank}".encode() in environment:
                return int(entry.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.parametrize(
    ("processes", "killed", "blocks", "afterwards"), [(2, 1, 1, 4), (4, 0, 2, 1), (2, 1, 4, 2)]
)
def test_a_killed_process_costs_nothing_that_was_finished(
    deep: Path, tmp_path: Path, processes: int, killed: int, blocks: int, afterwards: int
) -> None:
    """All end, the folder looks unfinished, and any number of processes goes on from there."""
    out = tmp_path / "out"
    launcher = launched(processes, "-m", "maskopt", *command(deep, out))
    journal = out / HIDDEN / JOURNAL
    while launcher.poll() is None and (
        not journal.exists() or journal.read_bytes().count(b'"kind": "block"') < blocks
    ):
        time.sleep(0.02)
    os.kill(process_of(killed, launcher), signal.SIGKILL)
    status, _, told = ended(launcher)
    assert status != 0
    assert [entry.name for entry in out.iterdir()] == [HIDDEN]
    assert told.count("finished blocks are kept; go on with") == 1, told
    assert f"torchrun --nproc-per-node {processes} -m maskopt prune" in told
    again = [*command(deep, out), "--resume"]
    if afterwards == 1:
        run(*again)
    else:
        status, said, told = ended(launched(afterwards, "-m", "maskopt", *again))
        assert status == 0, told
        assert said.count("sparsity of these layers: 0.5000") == 1  # one of them speaks
    assert contents(out) == contents(deep / "whole")


def test_a_signal_while_the_end_is_told_does_not_silence_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun sends it to all that are left, when one of them may have noticed already."""
    said = []

    def interrupted(told: str, **_: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        said.append(told)

    monkeypatch.setattr(cli_ranks, "_ending", False)
    monkeypatch.setattr("maskopt.cli.prune.errors.print", interrupted)
    before = signal.signal(signal.SIGTERM, cli_ranks._interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(LostRankError, match="gone"), told_of_resume(tmp_path / "out"):
            raise LostRankError("gone")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sparsity", "1.5"], "sparsity 1.5 is outside"),
        (
            ["--weights", "reconstruct", "--holdout", "0.5", "--solver", "wanda"],
            "start it without torchrun",
        ),
        (["--calibration", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_is_wrong_is_said_once(
    deep: Path, tmp_path: Path, words: Sequence[str], message: str
) -> None:
    launcher = launched(2, "-m", "maskopt", *command(deep, tmp_path / "out"), *words)
    status, _, told = ended(launcher)
    assert status != 0
    assert told.count(message) == 1, told
    assert not (tmp_path / "out").exists()


def test_other_commands_say_that_they_run_alone(deep: Path) -> None:
    launcher = launched(2, "-m", "maskopt", "plan", deep / "model", "--sparsity", "0.5")
    status, _, told = ended(launcher)
    assert status != 0
    assert told.count("start this command without torchrun") == 1, told


APART = [name for name, info in available_solvers().items() if info.capabilities.apart]


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("refit", [None, Refit(0.01)])
def test_rows_that_are_solved_apart_are_solved_alike(name: str, refit: Refit | None) -> None:
    if refit is not None and not make_solver(name).capabilities.refit:
        pytest.skip("chooses for weights as they are")
    rows, n = 2 * ROWS + 44, 24
    layer = LayerProblem(
        random_weight(rows, n, 1), random_gram(n, "outliers", 2), Unstructured(0.5), refit=refit
    )
    whole = solve(layer, name)
    for part in Ranks(0, 3).parts(rows):
        found = solve(layer.take(part), name)
        assert torch.equal(found.mask, whole.mask[part])
        assert found.status == whole.status[part]


@given(st.integers(1, 9), st.integers(1, 40 * ROWS), st.randoms())
def test_every_row_is_solved_once_in_the_tiles_of_a_single_process(
    size: int, rows: int, random: Random
) -> None:
    order = random.sample(range(size), size)
    parts = Ranks(0, size).parts(rows, order)
    assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
    assert all(part.start % ROWS == 0 for part in parts if part.start < part.stop)
    tiles = [-(-(part.stop - part.start) // ROWS) for part in parts]
    assert max(tiles) - min(tiles) <= 1


@given(st.integers(1, 9), st.integers(0, 50), st.integers(1, 4))
def test_every_window_walks_once(size: int, count: int, threads: int) -> None:
    everybody = [Ranks(rank, size) for rank in range(size)]
    windows = [2 * number for number in range(count)]  # some may have been left out
    owned = sorted(window for ranks in everybody for window in ranks.own(windows))
    assert owned == windows
    waves = list(everybody[0].waves(windows, threads))
    assert [window for wave in waves for window in wave] == windows
    assert json.dumps(waves) == json.dumps(list(everybody[-1].waves(windows, threads)))

"""Several processes that prune one model together: forked, and as torchrun starts them."""

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from commands import TESTS, run
from forging import fails
from hypothesis import given, strategies as st
from prunes import contents, prune, slow
from strategies import ONE_PERCENT, random_gram, random_weight
from tiny_models import SHARED, overflowing, save, tiny, tokens

from maskopt import NM, LayerProblem, Unstructured, available_solvers, collect_grams, solve
from maskopt.cli import console as cli_ranks, main
from maskopt.cli.prune import naming_resume
from maskopt.errors import ModelError
from maskopt.models.blockwise.distributed import ALONE, ROWS, LostRankError, Ranks, joined
from maskopt.models.checkpoints.workspace import HIDDEN, JOURNAL
from maskopt.protocol.solver import make_solver

#: seconds after which a process that should have ended counts as one that hangs
PATIENCE = 600

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform != "linux" or torch.cuda.is_available(),
    reason="needs torch.distributed, /proc to find the processes, and a GPU for each if there are any",
)

COMMON = {"sparsity": Unstructured(sparsity=0.5), "solver": "swap", "threads": 1}
WANDA, REFIT = {"solver": "wanda"}, {"update": "least-squares"}
POOL = {"sparsity": Unstructured(sparsity=0.5, per="layer"), "sensitivity": "fisher"}
FILES = {"sparsity": NM(keep=2, of=4), "activation_memory": 0, "true_sequential": True}
BUDGET = {"allocation": "layers", "sensitivity": "fisher", "holdout": 0.3, "gram_shrinkage": "auto"}
WEIGHTED = {"token_weights": "gradient", "holdout": 0.3, "solver": "elimination"}
#: name → model, options: the rows of `tall` are shared out by tiles, but where they differ
CASES = {
    "kept": ("tall", {}),
    "refitted": ("tall", {**REFIT, "solver": "admm", "include": "self_attn,up_proj"}),
    "refitted, swapped": ("tall", {**REFIT, "include": "layers.1.*.q_proj,layers.1.*.down_proj"}),
    "2:4, in files, one after the other": ("tall", {**WANDA, **FILES}),
    "rows differ": ("tall", {**POOL, "include": "layers.1"}),
    "layers differ, held out": ("tall", {**WANDA, **BUDGET}),
    "tokens weighted": ("tall", WEIGHTED),
    "experts": ("mixtral", {**WANDA, "all_experts": True}),
    "a bad sample": ("bad", {**WANDA, "skip_bad_samples": True, "include": ("q_proj",)}),
}
QUICK = ("layers differ, held out", "a bad sample")
APART = [(name, None) for name, info in available_solvers().items() if info.capabilities.apart]
APART += [(name, ONE_PERCENT) for name, _ in APART if make_solver(name).capabilities.update]


def windows():
    """As many as are divided by no number of processes; the second overflows in the bad model."""
    data = tokens(7)
    data[data == 5] = 6
    data[1, 2] = 5
    return data


def tall(layers):
    torch.manual_seed(1)
    size = {"hidden_size": 144, "intermediate_size": 300, "num_hidden_layers": layers}
    config = transformers.LlamaConfig(**{**SHARED, **size})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def prune_all(models, out, names, ranks=ALONE):
    """Every case in a folder of its own, and the Gram matrices of one model with a prune from them."""
    for name in names:
        model, options = CASES[name]
        prune(models / model, out / name, windows(), ranks=ranks, **{**COMMON, **options})
    dense, grams = models / "tall", out / "grams"
    collect_grams(dense, windows(), output=grams, holdout=0.3, threads=1, ranks=ranks)
    prune(dense, out / "from grams", grams=grams, ranks=ranks, **{**COMMON, **WANDA})


def gloo_threads():
    found = 0
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found += "gloo" in (thread / "comm").read_text()
    return found


def prune_as_one_of(models, out, names):
    for module in [name for name in sys.modules if name.startswith("torch.distributed.nn")]:
        del sys.modules[module]
    with joined() as all_of_us:
        # as transformers does in passing
        importlib.import_module("torch.distributed.nn.functional")
        prune_all(models, out, names, all_of_us)
        assert gloo_threads()
    patience = time.monotonic() + 30  # a thread that was joined may be listed a moment longer
    while gloo_threads():
        assert time.monotonic() < patience, "gloo's threads outlive the group"
        time.sleep(0.01)


def said_into(home, function, *arguments):
    """What each process runs: with its output in files, and its number with the system in one."""
    rank = os.environ["RANK"]
    (home / f"pid.{rank}").write_text(str(os.getpid()))
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = open(home / f"{name}.{rank}", "w", buffering=1)  # noqa: SIM115
        os.dup2(file.fileno(), number)
        setattr(sys, name, file)
        setattr(sys, f"__{name}__", file)
    function(*arguments)


class Forked:
    """Processes that call the function; or their agent, as `torchrun`, which ends all when one fails."""

    def __init__(self, size, home, function, *arguments, agent=False):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "forked"}
        given |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "COLUMNS": 200}

        def one(rank):
            mine = {**given, "RANK": rank, "LOCAL_RANK": rank}
            os.environ.update({name: str(value) for name, value in mine.items()})
            said_into(home, function, *arguments)

        def launch():
            from torch.distributed.launcher.api import LaunchConfig, elastic_launch

            config = LaunchConfig(1, 1, size, rdzv_endpoint="127.0.0.1:0", rdzv_backend="c10d")
            config.run_id, config.start_method, config.max_restarts = "forked", "fork", 0
            os.environ["COLUMNS"] = "200"
            elastic_launch(config, said_into)(home, function, *arguments)

        self.home, fork = home, multiprocessing.get_context("fork")
        started = [(launch, ())] if agent else [(one, (rank,)) for rank in range(size)]
        self.processes = [fork.Process(target=call, args=words) for call, words in started]
        for process in self.processes:
            process.start()

    def ended(self):
        """The statuses, and what all of them said."""
        for process in self.processes:
            process.join(PATIENCE)
            process.kill()
        said = ([p.read_text() for p in self.home.glob(f"{n}.*")] for n in ("stdout", "stderr"))
        return [process.exitcode for process in self.processes], *map("".join, said)


def call(*words):
    sys.argv = ["maskopt", *map(str, words)]
    main()


@pytest.mark.parametrize(("processes", "names"), [(2, QUICK), slow(4, CASES)])
def test_the_result_does_not_depend_on_processes(processes, names, tmp_path):
    models, alone, out = (tmp_path / name for name in ("models", "alone", "out"))
    for name, model in (("tall", tall(2)), ("mixtral", tiny("mixtral")), ("bad", overflowing())):
        save(model, models / name, shard="200KB")
    status, _, said = Forked(processes, tmp_path, prune_as_one_of, models, out, names).ended()
    assert set(status) == {0}, said
    prune_all(models, alone, names)
    for name in (*names, "from grams"):
        expected, found = contents(alone / name), contents(out / name)
        assert found.keys() == expected.keys()
        assert not [file for file in expected if found[file] != expected[file]], name
    for one in (alone / "grams").glob("*.bits"):
        assert (out / "grams" / one.name).read_bytes() == one.read_bytes()


def command(folder, out):
    words = f"prune {folder / 'model'} --calibration {folder / 'tokens.npy'} --output {out}"
    return f"{words} --sparsity 0.5 --min-tokens 1 --solver elimination --threads 1".split()


@pytest.mark.slow
def test_a_killed_process_costs_nothing_that_was_finished(tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    save(tall(6), tmp_path / "model", shard="200KB")
    np.save(tmp_path / "tokens.npy", tokens(5).numpy())
    run(*command(tmp_path, whole))
    killed = Forked(3, tmp_path, call, *command(tmp_path, out), agent=True)
    journal = out / HIDDEN / JOURNAL
    while killed.processes[0].is_alive() and (
        not journal.exists() or journal.read_bytes().count(b'"kind": "block"') < 2
    ):
        time.sleep(0.02)
    os.kill(int((tmp_path / "pid.0").read_text()), signal.SIGKILL)
    (status,), _, said = killed.ended()
    assert status != 0
    assert [entry.name for entry in out.iterdir()] == [HIDDEN]
    assert said.count("finished blocks are kept; go on with") == 1, said
    assert "torchrun --nproc-per-node 3 -m maskopt prune" in said
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [*torchrun, "-m", "maskopt", *command(tmp_path, out), "--resume"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), "COLUMNS": "200"}
    ended = subprocess.run(words, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("sparsity of these layers: 0.5000") == 1  # one of them speaks
    assert contents(out) == contents(whole)


def test_a_signal_while_the_end_is_said_does_not_silence_it(tmp_path, monkeypatch):
    """torchrun sends it to all that are left, when one of them may have noticed already."""
    said = []
    interrupted = lambda text, **_: (signal.raise_signal(signal.SIGTERM), said.append(text))  # noqa: E731
    monkeypatch.setattr(cli_ranks, "_ending", False)
    monkeypatch.setattr("maskopt.cli.prune.errors.print", interrupted)
    before = signal.signal(signal.SIGTERM, cli_ranks._interrupt)
    try:
        fails(KeyboardInterrupt, None, signal.raise_signal, signal.SIGTERM)
        with pytest.raises(LostRankError, match="gone"), naming_resume(tmp_path / "out"):
            raise LostRankError("gone")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(said) == 1


def test_what_is_wrong_is_said_once(dense_folder, data, tmp_path):
    for words, message in {
        "prune --sparsity 1.5": "sparsity 1.5 is outside",
        "prune --update blockwise --holdout 0.5 --sparsity 0.5": "start it without torchrun",
        "prune --sparsity 0.5 --calibration nowhere.txt": "nowhere.txt",
        "bound --sparsity 0.5": "start this command without torchrun",
    }.items():
        out, (name, *words) = tmp_path / "out", words.split()
        given = [name, dense_folder, "--output", out, "--calibration", data, *words]
        status, _, said = Forked(2, tmp_path, call, *given).ended()
        assert all(status)
        assert said.count(message) == 1, said
        assert not out.exists()
    # a model in memory is pruned by one process
    said = "a model in memory is pruned in place by one process"
    fails(ModelError, said, prune, tiny("llama"), data=windows(), ranks=Ranks(0, 2), **COMMON)


@pytest.mark.parametrize(("name", "update"), APART)
def test_rows_that_are_solved_apart_are_solved_as_together(name, update):
    rows, n = 2 * ROWS + 44, 24
    gram = random_gram(n, "outliers", 2)
    layer = LayerProblem(random_weight(rows, n, 1), gram, Unstructured(0.5), update=update)
    whole = solve(layer, name)
    for part in Ranks(0, 3).parts(rows):
        found = solve(layer.take(part), name)
        assert torch.equal(found.mask, whole.mask[part])
        assert found.status == whole.status[part]


@given(st.integers(1, 9), st.integers(1, 40 * ROWS), st.randoms())
def test_every_row_is_solved_once_in_the_tiles_of_a_single_process(size, rows, random):
    parts = Ranks(0, size).parts(rows, random.sample(range(size), size))
    assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
    assert all(part.start % ROWS == 0 for part in parts if part.start < part.stop)
    tiles = [-(-(part.stop - part.start) // ROWS) for part in parts]
    assert max(tiles) - min(tiles) <= 1


@given(st.integers(1, 9), st.integers(0, 50), st.integers(1, 4))
def test_every_window_walks_once(size, count, threads):
    everybody = [Ranks(rank, size) for rank in range(size)]
    windows = [2 * number for number in range(count)]  # some may have been left out
    assert sorted(window for ranks in everybody for window in ranks.own(windows)) == windows
    waves = list(everybody[0].waves(windows, threads))
    assert [window for wave in waves for window in wave] == windows
    assert json.dumps(waves) == json.dumps(list(everybody[-1].waves(windows, threads)))

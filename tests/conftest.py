"""Settings for the whole suite: no network, few threads, no deadline on a shared machine."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Read when torch loads OpenMP: the threads of two test workers that spin at each other's barriers on
# the same cores made batched factorisations 25 times slower than threads that sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# the models and rows of tests are too small for more; as many workers as cores use the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# Read at MKL's first product: on processors of other makers than Intel the last bit of a product otherwise
# depends on where its matrices lie in memory, and what is claimed of threads and of single rows is bits.
_CPU = Path("/proc/cpuinfo")
if not (_CPU.exists() and "GenuineIntel" in _CPU.read_text()):
    os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

_COMMON: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
#: the same cases every time: a change fails by its own fault alone
settings.register_profile("suite", max_examples=20, derandomize=True, **_COMMON)
settings.register_profile("slow", max_examples=60, derandomize=True, **_COMMON)
#: fresh cases, and how to draw a failing one again: pytest -m hypothesis --hypothesis-profile=explore
settings.register_profile(
    "explore", max_examples=300, derandomize=False, print_blob=True, **_COMMON
)


#: files that begin first, in this order: one compiles loops while another worker runs what needs few of
#: them, and the longest ones, which would keep a single worker busy at the end
FIRST = [
    "ranks", "structures", "distill", "model_reconstruct", "proof", "model_families", "notebooks",
]  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow",
        action="store_true",
        help="run the tests marked slow as well, and 60 examples of each property in place of 20",
    )


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # a sixth of the time that imports take
    if not config.getoption("--hypothesis-profile"):
        settings.load_profile("slow" if config.getoption("--slow") else "suite")


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported stays
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Clock:
    """A second goes by with every look at it: no test asserts wall-clock time."""

    now = 100.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """`time.monotonic`, which every limit reads, is one that looks alone advance."""
    found = Clock()
    monkeypatch.setattr(time, "monotonic", found)
    return found


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts behind the pages can be imported."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in several shards; nobody may change it."""
    from tiny_models import save, tiny

    return save(tiny("llama"), tmp_path_factory.mktemp("dense") / "model", shard="30KB")


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a tokenizer; nobody may change it."""
    from tiny_models import save, save_tokenizer, tiny

    folder = save(tiny("llama"), tmp_path_factory.mktemp("with-tokenizer") / "model", shard="30KB")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token windows in a file; nobody may change it."""
    from tiny_models import tokens

    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(path, tokens().numpy())
    return path


@pytest.fixture(scope="session")
def pruned_folder(dense_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Wanda makes of it at 50%; nobody may change it."""
    from tiny_models import tokens

    from maskopt import prune_model

    out = tmp_path_factory.mktemp("pruned") / "out"
    prune_model(dense_folder, tokens(), sparsity=0.5, solver="wanda", min_tokens=1, output=out)
    return out


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    items.sort(key=lambda item: [*FIRST, name := item.path.stem[5:]].index(name))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))

"""Settings for the whole suite: no network, few threads, no deadline on a shared machine."""

import functools
import gc
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
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

from maskopt.core import clock as clocks

# Read at MKL's first product: on processors of other makers than Intel the last bit of a product otherwise
# depends on where its matrices lie in memory, and what is claimed of threads and of single rows is bits.
_CPU = Path("/proc/cpuinfo")
if not (_CPU.exists() and "GenuineIntel" in _CPU.read_text()):
    os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

_UNFIT = [HealthCheck.too_slow, HealthCheck.data_too_large]
#: the same cases every time, so that a change fails by its own fault alone; or fresh ones, and how to draw a
#: failing one again: pytest -m hypothesis --hypothesis-profile=explore
for name, examples, same in (("suite", 20, True), ("slow", 60, True), ("explore", 300, False)):
    how: dict[str, Any] = {"deadline": None, "suppress_health_check": _UNFIT}
    how |= {"derandomize": same, "print_blob": not same}
    settings.register_profile(name, max_examples=examples, **how)

#: files that begin first, in this order: one compiles loops while another worker runs what needs few of
#: them, and the longest ones, which would keep a single worker busy at the end
FIRST = ["ranks", "proof", "structures", "model_families", "model_reconstruct", "distill", "docs"]


def pytest_addoption(parser: pytest.Parser) -> None:
    words = "run the tests marked slow as well, and 60 examples of each property in place of 20"
    parser.addoption("--slow", action="store_true", help=words)


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # a sixth of the time that imports take
    os.fsync = lambda handle: None  # what tests write need not outlive a power failure
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


@dataclass
class Clock:
    """So many seconds go by with every look at it: no test asserts wall-clock time."""

    step: float = 1.0
    now: float = 100.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """`time.monotonic`, which every limit reads, is one that looks alone advance, compilation or not."""
    monkeypatch.setattr(time, "monotonic", found := Clock())
    monkeypatch.setattr(clocks.clock, "_compiled", (0.0, None))
    monkeypatch.setattr(clocks.clock, "stop", lambda: None)
    monkeypatch.setattr(clocks.clock, "resume", lambda: None)
    return found


@pytest.fixture
def still(clock: Clock) -> Clock:
    """The same, which the test alone advances."""
    clock.step = 0.0
    return clock


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts behind the pages can be imported."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")


# --- folders of tiny models; nobody may change them
@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in several shards."""
    from tiny_models import save, tiny

    return save(tiny("llama"), tmp_path_factory.mktemp("dense") / "model", shard="30KB")


@pytest.fixture(scope="session")
def dense(dense_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a tokenizer."""
    from tiny_models import save_tokenizer

    folder = shutil.copytree(dense_folder, tmp_path_factory.mktemp("with-tokenizer") / "model")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of two blocks."""
    from tiny_models import save, tiny

    return save(tiny("llama", layers=2), tmp_path_factory.mktemp("small") / "model", shard="30KB")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token windows in a file."""
    from tiny_models import tokens

    np.save(path := tmp_path_factory.mktemp("tokens") / "tokens.npy", tokens().numpy())
    return path


@pytest.fixture(scope="session")
def pruned_folder(dense_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Wanda makes of `dense_folder` at 50%."""
    from prunes import prune

    prune(dense_folder, out := tmp_path_factory.mktemp("pruned") / "out")
    return out


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """A model of a family with two blocks, and what Wanda makes of it at 50%."""
    from prunes import prune
    from tiny_models import loud, save

    home = tmp_path_factory.mktemp("pairs")

    @functools.cache
    def of(family: str, dtype: Any = torch.float32, model: Any = loud, **more: Any) -> Any:
        name = f"{len(list(home.iterdir()))}-{family}"
        dense = save(model(family, dtype=dtype, layers=2), home / name)
        prune(dense, pruned := home / f"{name}-pruned", **more)
        return dense, pruned

    return of


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    items.sort(key=lambda item: [*FIRST, name := item.path.stem[5:]].index(name))
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))

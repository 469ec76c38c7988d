"""What 1-swap search to a certified optimum costs, compared with the paper's algorithm and Wanda.

    pytest tests/benchmarks/test_bench_swap.py            (about ten minutes on two cores)
    pytest tests/benchmarks/test_bench_swap.py -k gemma_model --bos never

Every figure is a ratio within one run; nothing is asserted on time. Real layers come from the demo
model (`maskopt[demo]`), inputs are the dense model's on text of the standard library.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from best_swap_loops import best_swaps, best_swaps_simd
from machine import machine_now

from maskopt import LayerProblem, Solution, Status, Unstructured, solve
from maskopt.demo import demo_model, demo_text
from maskopt.errors import ModelError
from maskopt.models.pruning.prune import collect_problems

ROWS = 128
#: rows and swaps a row of the literal algorithm at n = 2048 (MASKOPT_LITERAL_ROWS: fewer rows)
LITERAL_ROWS = int(os.environ.get("MASKOPT_LITERAL_ROWS", ROWS))
LITERAL_SWAPS = 100


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print past pytest's capture; the first line names the machine."""

    def tell(line: str) -> None:
        with capsys.disabled():
            print(line, flush=True)

    tell(f"\n{machine_now()}")
    return tell


@pytest.fixture(scope="module")
def model_folder() -> Path:
    """The demo model, in the cache, or a skip with the reason."""
    try:
        return demo_model()
    except ModelError as error:
        pytest.skip(str(error))


def real_layers(
    folder: Path, sparsity: float, bos: str, layers: Sequence[str] = ()
) -> Iterator[tuple[str, LayerProblem]]:
    """Layers of the demo model, inputs from 16k tokens of the standard library's help topics."""
    return collect_problems(
        folder,
        layers=layers,
        sparsity=sparsity,
        calibration=demo_text().calibration,
        samples=32,
        seq_len=512,
        bos=bos,
        device="cpu",
    )


def real_layer(folder: Path, bos: str, name: str, rows: int, sparsity: float) -> LayerProblem:
    """Some rows of a layer of the demo model."""
    _, problem = next(real_layers(folder, sparsity, bos, [name]))
    return problem.take(slice(rows))


def synthetic_layer(rows: int, n: int, seed: int = 0) -> LayerProblem:
    """Spectrum 1/k, features of log-normal size, one in a hundred of them 20 times larger."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(n, n, generator=generator) * (n * (torch.arange(n) + 1.0)).rsqrt()
    size = torch.exp(0.5 * torch.randn(n, generator=generator))
    size[torch.randperm(n, generator=generator)[: n // 100]] *= 20
    factor = size[:, None] * factor
    weight = 0.02 * torch.randn(rows, n, generator=generator)
    gram = factor @ factor.T
    return LayerProblem(weight, (gram + gram.T) / 2, Unstructured(sparsity=0.6), assume_psd=True)


def wide_layer(rows: int, n: int, seed: int = 0) -> LayerProblem:
    """Rank 256 and a diagonal; G is the only n × n array that is ever there."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(n, 256, generator=generator) * (torch.arange(256) + 1.0).rsqrt() / 16
    gram = torch.empty(n, n)
    for first in range(0, n, 1024):
        gram[first : first + 1024] = factor[first : first + 1024] @ factor.T
    for first in range(0, n, 1024):  # products of other shapes may differ in their last bits
        for other in range(0, first + 1, 1024):
            block = gram[first : first + 1024, other : other + 1024]
            block.copy_(gram[other : other + 1024, first : first + 1024].T.clone())
    gram.diagonal().add_(torch.rand(n, generator=generator))
    weight = 0.02 * torch.randn(rows, n, generator=generator)
    return LayerProblem(weight, gram, Unstructured(sparsity=0.6), assume_psd=True)


class Seconds(NamedTuple):
    """Wall-clock seconds, and processor seconds of all threads: on a busy machine trust the latter."""

    wall: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.wall:8.3f} s (processor {self.cpu:8.3f} s)"

    def over(self, other: Seconds) -> str:
        """How many times the other's time."""
        return f"{self.wall / other.wall:.1f} times (processor: {self.cpu / other.cpu:.1f} times)"


def timed(function: Callable[[], object], repeat: int = 1) -> tuple[Seconds, Any]:
    """Least seconds of a few runs, and what the last one returned."""
    wall, cpu, result = math.inf, math.inf, None
    for _ in range(repeat):
        began, work = time.perf_counter(), time.process_time()
        result = function()
        wall = min(wall, time.perf_counter() - began)
        cpu = min(cpu, time.process_time() - work)
    return Seconds(wall, cpu), result


def describe(solution: Solution) -> str:
    trace = solution.trace
    return (
        f"{trace.swaps.double().mean():.1f} swaps, {trace.scans.double().mean():.2f} full "
        f"scans (most {int(trace.scans.max())}) a row"
    )


def compare(
    problem: LayerProblem, say: Callable[[str], None], literal_rows: int, literal_swaps: int | None
) -> tuple[float, float]:
    """The engine, the compiled loops and the literal algorithm from Wanda's mask on one layer.

    Returns the errors of engine and literal algorithm on the same rows, over Wanda's.
    """
    warm = problem.take(slice(2))
    start_warm = solve(warm, "wanda").mask
    for function in (best_swaps, best_swaps_simd):  # compile
        function(warm, start_warm)
    solve(warm, "swap")
    wanda_seconds, wanda = timed(lambda: solve(problem, "wanda"), 3)
    start = wanda.mask
    gpt_seconds, gpt = timed(lambda: solve(problem, "sparsegpt"))
    seconds, solution = timed(lambda: solve(problem, "swap", start=start), 3)
    assert set(solution.status) == {Status.SWAP_OPTIMAL}
    total = float(solution.objective.sum())
    base = float(wanda.objective.sum())
    say(f"{problem.rows} rows, n = {problem.n}, {problem.pattern} pruned, from Wanda's mask")
    say(f"  wanda              {wanda_seconds}   error 1")
    say(f"  sparsegpt's mask   {gpt_seconds}   error {float(gpt.objective.sum()) / base:.4f}")
    say(f"  swap ({solution.trace.kernel})       {seconds}   error {total / base:.4f}")
    say(f"    {describe(solution)}")
    for name, function in (("plain", best_swaps), ("SIMD", best_swaps_simd)):
        loop_seconds, mask = timed(partial(function, problem, start))
        error = float(problem.objective(mask).sum()) / base
        say(
            f"  compiled loop, {name:5s}{loop_seconds}   error {error:.4f}   "
            f"{loop_seconds.over(seconds)}"
        )
    part = problem.take(slice(literal_rows))
    part_start = start[:literal_rows]
    literal_seconds, literal = timed(
        lambda: solve(part, "swap", start=part_start, kernel="literal", max_swaps=literal_swaps)
    )
    part_seconds, ours = timed(lambda: solve(part, "swap", start=part_start), 3)
    part_base = float(wanda.objective[:literal_rows].sum())
    limit = "" if literal_swaps is None else f", at most {literal_swaps} swaps"
    error = float(ours.objective.sum()) / part_base
    literal_error = float(literal.objective.sum()) / part_base
    say(
        f"  literal, {literal_rows} rows{limit}: {literal_seconds}, error {literal_error:.4f}; "
        f"swap on them {part_seconds}, error {error:.4f}: {literal_seconds.over(part_seconds)}"
    )
    return error, literal_error


def test_n640_against_the_literal_algorithm(model_folder: Path, bos: str, say: Callable) -> None:
    """Aim: 200 times faster than literal, 5 times faster than a compiled loop."""
    problem = real_layer(model_folder, bos, "model.layers.5.self_attn.q_proj", ROWS, 0.6)
    error, literal_error = compare(problem, say, ROWS, None)
    assert error < 1.01 * literal_error < 1.01  # other optima of the same quality


def test_n2048_against_the_literal_algorithm(model_folder: Path, bos: str, say: Callable) -> None:
    """Aim: 500 times faster than literal at 100 swaps, 20 times faster than a compiled loop."""
    problem = real_layer(model_folder, bos, "model.layers.10.mlp.down_proj", ROWS, 0.6)
    error, literal_error = compare(problem, say, LITERAL_ROWS, LITERAL_SWAPS)
    assert error < literal_error < 1


def test_n4096_synthetic(say: Callable) -> None:
    """Aim: 2 s, and at most 4 full scans a row."""
    problem = synthetic_layer(64, 4096)
    start = solve(problem, "wanda")
    solve(problem.take(slice(1)), "swap")
    seconds, solution = timed(lambda: solve(problem, "swap", start=start.mask), 3)
    assert set(solution.status) == {Status.SWAP_OPTIMAL}
    say(f"64 rows, n = 4096, synthetic: {seconds}, {describe(solution)}")
    looked = solution.trace.pairs.double().mean() / (0.24 * 4096**2)
    say(f"  pairs formed in all scans: {float(looked):.3f} of one scan's")
    say(f"  error over Wanda's: {float(solution.objective.sum() / start.objective.sum()):.4f}")


def test_growth(say: Callable) -> None:
    """Aim: an exponent of at most 2.2 for the (processor) time of a row, n = 512 … 8192."""
    sizes, times = [512, 1024, 2048, 4096, 8192], []
    solve(synthetic_layer(2, 64), "swap")
    for n in sizes:
        problem = synthetic_layer(64, n)
        start = solve(problem, "wanda").mask
        seconds, solution = timed(partial(solve, problem, "swap", start=start), 2)
        assert set(solution.status) == {Status.SWAP_OPTIMAL}
        times.append(seconds.cpu / problem.rows)
        say(f"  n = {n:5d}: {1e3 * times[-1]:9.3f} ms of processor a row, {describe(solution)}")
    x = torch.tensor(sizes, dtype=torch.float64).log()
    y = torch.tensor(times, dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    say(f"  exponent (least squares) {float((x * y).sum() / (x * x).sum()):.2f}")


def test_gemma_model(model_folder: Path, bos: str, say: Callable) -> None:
    """Aim: 45 s of solving for all rows of Gemma 3 270M at 50%, on 2 cores."""
    solve(synthetic_layer(2, 64), "swap")
    totals = dict.fromkeys(("wanda", "sparsegpt", "swap"), 0.0)
    errors: dict[str, list[float]] = {}
    kinds: dict[str, float] = {}
    rows = scans = 0
    for name, problem in real_layers(model_folder, 0.5, bos):
        began = time.perf_counter()
        wanda = solve(problem, "wanda")
        totals["wanda"] += time.perf_counter() - began
        began = time.perf_counter()
        gpt = solve(problem, "sparsegpt")
        totals["sparsegpt"] += time.perf_counter() - began
        began = time.perf_counter()
        solution = solve(problem, "swap", start=wanda.mask)
        seconds = time.perf_counter() - began
        assert set(solution.status) == {Status.SWAP_OPTIMAL}
        totals["swap"] += seconds
        kind = name.rsplit(".", 1)[-1]
        kinds[kind] = kinds.get(kind, 0.0) + seconds
        rows, scans = rows + problem.rows, scans + int(solution.trace.scans.sum())
        for key, other in (("swap", solution), ("sparsegpt", gpt)):
            ratio = float(other.objective.sum() / wanda.objective.sum())
            errors.setdefault(key, []).append(ratio)
    say(f"Gemma 3 270M, 50%, {rows} rows, all proven 1-swap optimal")
    for key, seconds in totals.items():
        mean = sum(errors.get(key, [1.0])) / len(errors.get(key, [1.0]))
        say(f"  {key:10s} {seconds:7.1f} s   mean error over Wanda's {mean:.3f}")
    say(f"  {scans / rows:.2f} full scans a row; seconds by kind: ")
    say("  " + ", ".join(f"{kind} {seconds:.1f}" for kind, seconds in kinds.items()))


_MEMORY = """
import ctypes, gc, resource, sys, threading, torch
from maskopt import solve
sys.path.insert(0, {folder!r})
from test_bench_swap import synthetic_layer, wide_layer
solve(synthetic_layer(2, 64), "swap")
problem = {layer}({rows}, {n})
start = solve(problem, "wanda").mask
torch.manual_seed(0)
page = resource.getpagesize()
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * page
gc.collect()
ctypes.CDLL(None).malloc_trim(0)  # what was freed before would hide what is taken now
seen, done = [resident()], threading.Event()
def watch():
    while not done.wait(0.002):
        seen.append(resident())
thread = threading.Thread(target=watch)
thread.start()
solution = solve(problem, "swap", start=start, memory_limit={limit})
done.set()
thread.join()
print(solution.seconds, "/".join(sorted(set(solution.status))), max(seen) - seen[0])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("layer", "rows", "n", "limit"),
    [
        ("synthetic_layer", 4096, 1024, 2**26),
        ("synthetic_layer", 4096, 1024, 2**28),
        ("synthetic_layer", 4096, 1024, 2**30),
        ("wide_layer", 64, 28672, 2**26),
    ],
)
def test_memory(say: Callable, layer: str, rows: int, n: int, limit: int) -> None:
    """Aim: extra memory beyond weight and G within the budget, up to n = 28,672."""
    script = _MEMORY.format(
        folder=str(Path(__file__).parent), layer=layer, rows=rows, n=n, limit=limit
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    seconds, status, used = done.stdout.split()[-3:]
    say(
        f"{rows} rows, n = {n}, memory_limit {limit >> 20} MiB: {int(used) >> 20} MiB beyond what "
        f"was held (RSS, watched), {float(seconds):.1f} s, {status}"
    )

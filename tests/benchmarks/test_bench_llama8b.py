"""1-swap to certified optima over all 224 layers in LLaMA-3.1-8B's shapes, on one GPU.

    pytest tests/benchmarks -k llama8b --device cuda

Layers are synthetic (power-law spectrum, outlier features), made one after the other on the device.
Prints the card, the floors by bytes and by operations, the time of every step and the peak memory;
without a CUDA device the floors alone, for a card whose data-sheet figures are stated.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch

from maskopt import LayerProblem, Status, Unstructured
from maskopt.protocol.solver import solve
from maskopt.solvers.shared_budget import statuses
from maskopt.solvers.swap import engine, triton as triton_kernels
from maskopt.solvers.swap.engine import Batch

BLOCKS, SPARSITY = 32, 0.6
#: rows × n of the linear layers of one block
SHAPES = {
    "q_proj": (4096, 4096),
    "k_proj": (1024, 4096),
    "v_proj": (1024, 4096),
    "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096),
    "up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}
MEMORY = 4 * 2**30
#: of MEMORY, what the state of a batch of rows may take; the rest is for a step's temporaries
_STATE, _STATE_BYTES = MEMORY // 2, 48


@dataclass(frozen=True)
class Card:
    """What floors are computed from."""

    name: str
    lanes: int
    """Single-precision lanes of the whole card."""
    hertz: float
    bandwidth: float
    """Bytes a second."""
    doubles: float
    """Double-precision multiply-adds a second in matrix products."""
    source: str

    @classmethod
    def here(cls, device: torch.device) -> Card:
        """From the properties of the device; the data sheet for what it does not tell."""
        properties = torch.cuda.get_device_properties(device)
        capability = (properties.major, properties.minor)
        lanes = 64 if capability in {(7, 0), (7, 5), (8, 0)} else 128
        lanes *= properties.multi_processor_count
        hertz = 1e3 * getattr(properties, "clock_rate", 0)
        memory_clock = 1e3 * getattr(properties, "memory_clock_rate", 0)
        bandwidth = 2 * memory_clock * getattr(properties, "memory_bus_width", 0) / 8
        told = bool(hertz and bandwidth)
        hertz, bandwidth = hertz or H100.hertz, bandwidth or H100.bandwidth
        # double against single precision: all lanes on tensor cores of 9.0, half of that on 8.0
        rate = {(7, 0): 1 / 2, (8, 0): 1.0, (9, 0): 1.0}.get(capability, 1 / 64)
        source = "device properties" if told else f"device properties; clocks as of {H100.name}"
        return cls(properties.name, lanes, hertz, bandwidth, lanes * hertz * rate, source)


#: no GPU needs to be at hand to print floors
H100 = Card(
    "H100 SXM5 80 GB", 132 * 128, 1.755e9, 3.35e12, 33.5e12,
    "assumed, from its data sheet: 132 multiprocessors of 128 lanes at 1.755 GHz, 3.35 TB/s, "
    "67 TFLOP/s of double-precision tensor cores",
)  # fmt: skip


def floors(card: Card, blocks: int = BLOCKS) -> dict[str, float]:
    """Seconds that no implementation of a step can go below on the card."""
    elements = blocks * sum(rows * n for rows, n in SHAPES.values())
    grams = blocks * sum(n * n for _, n in SHAPES.values())
    products = blocks * sum(rows * n * n for rows, n in SHAPES.values())
    pairs = products * SPARSITY * (1 - SPARSITY)
    single = card.lanes * card.hertz
    scan, product = 3 * pairs / single, products / single
    return {
        "bytes: weight, mask and G once": (5 * elements + 4 * grams) / card.bandwidth,
        "operations: c once, float64 product": products / card.doubles,
        "operations: c once, float32 product": product,
        "operations: one scan of all pairs, 3 instructions a pair": scan,
        "operations: 4 such scans and 8 float32 products": 4 * scan + 8 * product,
    }


def print_floors(card: Card) -> None:
    pairs = BLOCKS * sum(rows * n * n for rows, n in SHAPES.values()) * SPARSITY * (1 - SPARSITY)
    print(f"\n{card.name} ({card.source})")
    print(f"224 layers, {SPARSITY:.0%} pruned: {pairs:.3g} pairs in a full scan. Floors:")
    for name, seconds in floors(card).items():
        print(f"  {name:58}{seconds:9.2f} s")


def synthetic_layer(rows: int, n: int, seed: int, device: torch.device) -> LayerProblem:
    """Gaussian weights; G with spectrum 1/k and one feature in 128 scaled by 20."""
    generator = torch.Generator(device).manual_seed(seed)
    mix = torch.randn(n, n, generator=generator, device=device)
    mix *= torch.arange(1, n + 1, device=device).rsqrt()
    mix[torch.randperm(n, generator=generator, device=device)[: max(1, n // 128)]] *= 20
    gram = mix @ mix.T
    del mix
    gram = (gram + gram.T) / (2 * gram.diagonal().mean())
    weight = torch.randn(rows, n, generator=generator, device=device)
    return LayerProblem(weight, gram, Unstructured(SPARSITY), assume_psd=True)


@dataclass
class Totals:
    """Sums over layers."""

    seconds: float = 0.0
    wanda: float = 0.0
    sparsegpt: dict[str, float] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)
    rows: int = 0
    swaps: int = 0
    scans: int = 0
    rounds: int = 0
    before: float = 0.0
    after: float = 0.0
    peak: int = 0


def refine_layer(problem: LayerProblem, totals: Totals) -> list[Status]:
    """Wanda's mask, then 1-swap to proven optima, both timed; adds to the totals."""
    from maskopt.solvers.swap.triton.steps import TritonKernel

    device = problem.device
    on_gpu = device.type == "cuda"

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def timed(name: str, step: Callable[..., object], *arguments: object) -> object:
        before = now()
        result = step(*arguments)
        totals.steps[name] = totals.steps.get(name, 0.0) + now() - before
        return result

    if on_gpu:
        resident = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    began = now()
    start = solve(problem, "wanda")
    middle = now()
    found: list[Status] = []
    tile = max(1, _STATE // (_STATE_BYTES * problem.n))
    masks = []
    for first in range(0, problem.rows, tile):
        part = slice(first, first + tile)
        batch = Batch.of(problem.take(part), start.mask[part])
        kernel = TritonKernel(batch, memory=MEMORY - _STATE)
        for step in ("refresh", "search", "price"):
            setattr(kernel, step, partial(timed, step, getattr(kernel, step)))
        engine.refine(batch, kernel)
        found += statuses(batch.proven)
        masks.append(batch.kept)
        totals.swaps += int(batch.swaps.sum())
        totals.scans += int(batch.scans.sum())
        totals.rounds += int(batch.rounds.sum())
    end = now()
    if on_gpu:
        totals.peak = max(totals.peak, torch.cuda.max_memory_allocated(device) - resident)
    totals.wanda += middle - began
    totals.seconds += end - middle
    totals.rows += problem.rows
    totals.before += float(start.objective.sum())
    totals.after += float(problem.objective(torch.cat(masks)).sum())
    return found


def print_totals(totals: Totals, layers: int) -> None:
    print(f"{layers} layers, {totals.rows} rows, every row proven 1-swap optimal:")
    print(f"  solving {totals.seconds:.2f} s (waiting for the device after every step)")
    for step, seconds in sorted(totals.steps.items(), key=lambda item: -item[1]):
        print(f"    {step:20}{seconds:9.2f} s  {seconds / totals.seconds:6.1%}")
    print(
        f"  {totals.swaps / totals.rows:.1f} swaps, {totals.rounds / totals.rows:.1f} rounds of "
        f"candidates and {totals.scans / totals.rows:.2f} full scans a row; "
        f"error {totals.after / totals.before:.3f} of Wanda's"
    )
    print(f"  peak beyond weight and G: {totals.peak / 2**30:.2f} GiB")
    print(f"  Wanda's masks, which the search starts from: {totals.wanda:.2f} s")


def test_llama8b(device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        reason = triton_kernels.unavailable(device)
        if device.type != "cuda" or not torch.cuda.is_available() or reason:
            print_floors(H100)
            pytest.skip(f"measured on a CUDA device only: {reason or f'--device is {device}'}")
        print_floors(Card.here(device))
        # compilation is not part of a solve: every kernel once, at n of each kind
        for n in (4096, 14336):
            refine_layer(synthetic_layer(8, n, 0, device), Totals())
        totals = Totals()
        for block in range(BLOCKS):
            for place, (rows, n) in enumerate(SHAPES.values()):
                problem = synthetic_layer(rows, n, 1 + len(SHAPES) * block + place, device)
                assert set(refine_layer(problem, totals)) == {Status.SWAP_OPTIMAL}
        print(f"{datetime.date.today()}, torch {torch.__version__}")
        print_totals(totals, BLOCKS * len(SHAPES))
        seconds = 0.0
        for place, (rows, n) in enumerate(SHAPES.values()):
            problem = synthetic_layer(rows, n, 1 + place, device)
            torch.cuda.synchronize(device)
            began = time.perf_counter()
            solve(problem, "sparsegpt")
            torch.cuda.synchronize(device)
            seconds += time.perf_counter() - began
        print(f"  SparseGPT's masks: {seconds:.2f} s for the first block, × {BLOCKS} for all")


def test_llama8b_in_miniature(device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    """The same path, at a small part of the size: it works here, whatever the device."""
    reason = triton_kernels.unavailable(device)
    if reason:
        pytest.skip(reason)
    totals = Totals()
    for place, (rows, n) in enumerate(SHAPES.values()):
        problem = synthetic_layer(max(2, rows // 1024), n // 64, place, device)
        assert set(refine_layer(problem, totals)) == {Status.SWAP_OPTIMAL}
    assert totals.after < totals.before
    with capsys.disabled():
        print_totals(totals, len(SHAPES))

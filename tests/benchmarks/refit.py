"""Least-squares updates: masks chosen for them and other masks. Writes updates.csv and others.

    python tests/benchmarks/refit.py --calibration calibration.npy --heldout heldout.npy

Both are token windows int64 [windows, length] of the demo model, or text (then 32 and 16 windows of 512).
Every finished layer is a line of a JSONL file (`--data`), as in `generalisation.py`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from book import FIGURES, PATTERNS, POOLED, TABLES, Book
from demo_layers import name_of
from machine import machine, machine_now
from tables import write

from maskopt import (
    LayerProblem,
    LeastSquaresUpdate,
    Limits,
    Unstructured,
    lower_bound,
    make_solver,
    solve,
)
from maskopt.demo import demo_model
from maskopt.models.pruning.prune import collect_problems
from maskopt.protocol.solution import Status

LAYERS = ("2.q", "8.q", "14.q", "2.down", "8.down", "14.down")
#: λ by kind, for every power of D: chosen on blocks 5 and 11, and with a power on all odd blocks; on no
#: layer of the tables
DAMPING = {0.0: {"q": 0.003, "down": 0.1}, 0.5: {"q": 0.02, "down": 0.1}}
#: inputs of toy rows, which are proven; of each layer so many
TOYS, TOY_ROWS = (24, 32, 48, 64), 4
#: for the proof of a toy row
TOY_SECONDS = 120
#: the search beyond 1-swap optima, and of layers too wide to go through it whole so many rows
BEYOND: dict[str, Any] = {"generations": 10, "children": 4, "pool": 6}
BEYOND_ROWS = 128
#: rows of the plain loop that least squares are compared with
LOOP = 64
EVERY = {**PATTERNS, **POOLED}
#: label → solver that chooses, start, whether it chooses for updated weights, power of D
METHODS: dict[str, tuple[str, str | None, bool, float]] = {
    "Wanda": ("wanda", None, False, 0.0),
    "1-swap from relax": ("swap", "relax", False, 0.0),
    "SparseGPT's mask": ("sparsegpt", None, False, 0.0),
    "OBS": ("obs", None, True, 0.0),
    "ADMM": ("admm", None, True, 0.0),
    "1-swap for updates, from relax": ("swap", "relax", True, 0.0),
    "1-swap for updates, from ADMM": ("swap", "admm", True, 0.0),
    "1-swap for updates, from ADMM, power ½": ("swap", "admm", True, 0.5),
    "memetic for updates, from ADMM": ("memetic", "admm", True, 0.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", required=True, help="windows that all is fitted to")
    parser.add_argument("--heldout", required=True, help="windows that all is judged on")
    parser.add_argument("--layers", nargs="*", default=list(LAYERS))
    parser.add_argument("--patterns", nargs="*", choices=list(EVERY), default=list(EVERY))
    parser.add_argument("--data", type=Path, default=FIGURES / "refit.jsonl")
    parser.add_argument("--tables", type=Path, default=TABLES, help="folder for the CSV files")
    args = parser.parse_args()
    book = Book(args.data)
    book.begin({"calibration": Path(args.calibration).name, "heldout": Path(args.heldout).name})
    book.check()
    wanted = {
        layer: [f"{p}/{layer}/{m}" for p in args.patterns for m in methods(p, layer)]
        + [f"pace/{layer}", *(f"toy/{n}/{layer}" for n in TOYS)]
        + [f"beyond/{layer}" for _ in range(layer.endswith("down"))]
        for layer in args.layers
    }
    missing = [layer for layer in args.layers if any(key not in book for key in wanted[layer])]
    for layer, fitted, judge in problems(args, missing):
        for pattern in args.patterns:
            for label in methods(pattern, layer):
                if (key := f"{pattern}/{layer}/{label}") not in book:
                    problem, aside = (x.under(EVERY[pattern]) for x in (fitted, judge))
                    book.put(key, measured(problem, aside, label, damped(layer, METHODS[label][3])))
        refitted = fitted.with_update(damped(layer))
        if (key := f"pace/{layer}") not in book:
            book.put(key, pace(refitted))
        if (key := f"beyond/{layer}") in wanted[layer] and key not in book:
            book.put(key, beyond(refitted, judge))
        for n in TOYS:
            if (key := f"toy/{n}/{layer}") not in book:
                book.put(key, toys(refitted, n))
    write("refit", book, folder=args.tables)


def damped(layer: str, power: float = 0.0) -> LeastSquaresUpdate:
    return LeastSquaresUpdate(DAMPING[power][layer.split(".")[1]], power)


def methods(pattern: str, layer: str) -> list[str]:
    """Those that choose for it; the slowest at 50% and of rows that are not long."""
    found = [m for m in METHODS if pattern not in POOLED or m not in ("SparseGPT's mask", "OBS")]
    long = not pattern.startswith("50%") or layer.endswith("down")
    return [m for m in found if not long or METHODS[m][0] != "memetic"]


def problems(
    args: argparse.Namespace, layers: list[str]
) -> Iterator[tuple[str, LayerProblem, LayerProblem]]:
    """(layer, its problem, the same with the Gram matrix of the held-out windows)."""
    if not layers:
        return
    names = [name_of(layer) for layer in layers]
    found = []
    for text, samples in ((args.calibration, 32), (args.heldout, 16)):
        more: dict[str, Any] = {
            "layers": names,
            "sparsity": 0.5,
            "samples": samples,
            "seq_len": 512,
        }
        found.append(dict(collect_problems(demo_model(), calibration=text, device="cpu", **more)))
    for layer, name in zip(layers, names, strict=True):
        yield layer, found[0][name], found[1][name]


def measured(
    problem: LayerProblem, judge: LayerProblem, label: str, update: LeastSquaresUpdate
) -> dict[str, Any]:
    """One mask, with its weights kept and refitted: errors as parts of the outputs' energy."""
    name, start, for_refit, _ = METHODS[label]
    solver = make_solver(name, **(BEYOND if name == "memetic" else {}))
    refitted = problem.with_update(update)
    target = refitted if for_refit else problem
    solve(target.take(slice(0, 2)), solver, start=start)  # compiles what is to be compiled
    began = time.perf_counter()
    solution = solve(target, solver, start=start, limits=Limits(seed=0))
    seconds = time.perf_counter() - began
    weights = solution.weight if solution.weight is not None else refitted.weights(solution.mask)
    energy, aside = problem.output_energy().sum(), judge.output_energy().sum()
    trace = solution.trace if solution.trace.scans is not None else None
    kept = solution.mask.sum(1).cpu()
    pairs = (kept * (problem.n - kept)).clamp(min=1)  # B's entries
    return {
        "kept": float(problem.objective(solution.mask).sum() / energy),
        "kept_held": float(judge.objective(solution.mask).sum() / aside),
        "fitted": float(problem.error(weights).sum() / energy),
        "held": float(judge.error(weights).sum() / aside),
        "proven": solution.status.count(Status.SWAP_OPTIMAL) / problem.rows,
        "swaps": None if trace is None else float(trace.swaps.double().mean()),
        "formed": None if trace is None else float((trace.pairs / trace.scans / pairs).mean()),
        "seconds": seconds,
        "rows": problem.rows,
        "damping": update.damping,
        "power": update.power,
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
    }


def pace(problem: LayerProblem) -> dict[str, Any]:
    """Seconds a row that least squares take of Wanda's mask at 50%: all rows, also under a
    shared budget, and a plain loop over some."""
    mask = solve(problem, "wanda").mask
    traded = solve(problem.under(POOLED["50% per layer"]), "wanda").mask
    squares = problem.least_squares
    target = squares.target(problem.weight, problem.correlation)
    damped = squares.damped

    def plain() -> None:
        for row in range(LOOP):
            kept = mask[row].nonzero()[:, 0]
            torch.linalg.solve(damped[kept][:, kept], target[row, kept])

    ours, trading = (_seconds(partial(squares.solve, target, m)) for m in (mask, traded))
    return {
        "n": problem.n,
        "ours": ours / problem.rows,
        "trading": trading / problem.rows,
        "loop": _seconds(plain) / LOOP,
        "machine": machine_now(),
        "date": time.strftime("%Y-%m-%d"),
    }


def toys(problem: LayerProblem, n: int) -> dict[str, Any]:
    """Rows with n inputs, 50%: their proven optima, and how far above others end, as parts of them."""
    found: dict[str, list[float]] = {name: [] for name in ("swap", "admm", "kept", "root", "gap")}
    seconds, nodes = [], []
    for number in range(TOY_ROWS):
        generator = torch.Generator().manual_seed(number)
        row = int(torch.randint(problem.rows, (1,), generator=generator))
        inputs = torch.randperm(problem.n, generator=generator)[:n]
        toy = problem.row(row).restrict(inputs, Unstructured(sparsity=0.5))
        best = solve(toy, "branch", start="admm", limits=Limits(seconds=TOY_SECONDS))
        optimum = float(best.objective[0])
        masks = {
            "swap": solve(toy, "swap", start="admm").mask,
            "admm": solve(toy, "admm").mask,
            "kept": solve(toy.with_update(None), "swap", start="relax").mask,
        }
        for name, mask in masks.items():
            found[name].append(float(toy.objective(mask[0])) / optimum - 1)
        found["gap"].append(best.gap)
        found["root"].append(1 - float(lower_bound(toy, "perspective").value[0]) / optimum)
        seconds.append(best.seconds)
        nodes.append(int(best.trace.columns(1)["nodes"][0]))
    taken = {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
    return {**found, "seconds": seconds, "nodes": nodes, **taken}


def beyond(problem: LayerProblem, judge: LayerProblem) -> dict[str, Any]:
    """Some rows of a layer at 50%: masks of `memetic` compared with the 1-swap optima that it begins with,
    by F and held out.

    `held` is the quotient of the rows' held-out errors, all together, and `about` its standard error.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(problem.rows, generator=generator)[:BEYOND_ROWS]
    some, aside = (x.take(rows).under(EVERY["50%"]) for x in (problem, judge))
    before = solve(some, "swap", start="admm")
    after = solve(some, "memetic", start=before.mask, **BEYOND)
    assert before.weight is not None
    assert after.weight is not None
    held, base = aside.error(after.weight), aside.error(before.weight)
    quotient = held.sum() / base.sum()
    rest = held - quotient * base
    return {
        "least": float((after.objective / before.objective).mean()),
        "held": float(quotient),
        "about": float(rest.square().sum().sqrt() / base.sum()),
        "proven": after.status.count(Status.SWAP_OPTIMAL) / some.rows,
        "count": some.rows,
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _seconds(work: Callable[[], object]) -> float:
    """The least of three runs."""
    found = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


if __name__ == "__main__":
    main()

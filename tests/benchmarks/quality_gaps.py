"""Studies of how far masks are from the optimum: certified gaps, and rows with a proven optimum."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from book import Book
from demo_layers import LAYERS, columns_of, loaded, sample

from maskopt import LayerProblem, RowProblem, Unstructured, lower_bound, solve, verify

#: moves of the search for the best mask that can be found
LONG_SEARCH = 100_000
#: of memetic search
GENERATIONS = 300
#: inputs of rows whose optimum is proven
PROVEN_N = 80


@dataclass(frozen=True)
class Rows:
    """Two rows of a layer, of all its inputs or of some drawn at random."""

    layer: str
    sparsity: float
    n: int | None = None

    @property
    def label(self) -> str:
        part = "" if self.n is None else f" on {self.n}"
        return f"{self.layer}{part}, {self.sparsity:.0%}"

    def of(self, whole: LayerProblem, seed: int) -> LayerProblem:
        problem = sample(whole, 2, seed)
        if self.n is not None:
            columns = columns_of(whole.n, self.n, seed)
            problem = LayerProblem(
                problem.weight[:, columns].contiguous(),
                problem.gram[columns][:, columns].contiguous(),
                Unstructured(sparsity=self.sparsity),
                assume_psd=True,
            )
        return problem.under(Unstructured(sparsity=self.sparsity))


#: the rows of the certified gaps
CERTIFIED = (
    Rows("10.down", 0.6, 256),
    Rows("5.q", 0.6, 256),
    Rows("10.gate", 0.6),
    Rows("17.gate", 0.6),
    Rows("5.q", 0.6),
    Rows("0.q", 0.6),
    Rows("5.o", 0.6),
    Rows("10.down", 0.6),
    Rows("17.down", 0.5),
)
#: the hard kinds on fewer and fewer inputs: where does the gap come from?
GROWTH = tuple(Rows(layer, 0.6, n) for layer in ("5.o", "0.q") for n in (64, 128, 256, 512))


def gaps(book: Book, args: argparse.Namespace) -> None:
    """The best mask of long searches of full rows, and the certified bound."""
    for label, problem in certified_rows(args):
        book.measure(f"gaps/{label}", partial(certified, problem, args))


def crossed(book: Book, args: argparse.Namespace) -> None:
    """Memetic search compared with the best of the long searches, on the same rows."""
    for label, problem in certified_rows(args):
        book.measure(f"crossed/{label}", partial(memetic, problem, args))


def tightened(book: Book, args: argparse.Namespace) -> None:
    """The bound with rounds of triangle inequalities, of the same rows."""
    for label, problem in certified_rows(args):
        book.measure(f"tightened/{label}", partial(with_cuts, problem, args))


def certified_rows(args: argparse.Namespace) -> Iterator[tuple[str, LayerProblem]]:
    """By what the page calls them."""
    lines = CERTIFIED + GROWTH
    for layer, whole in loaded(args, tuple(dict.fromkeys(x.layer for x in lines))):
        for rows in lines:
            if rows.layer == layer:
                yield rows.label, rows.of(whole, args.seed)


def certified(problem: LayerProblem, args: argparse.Namespace) -> dict[str, Any]:
    """The best mask of long searches from three starts, and the bound below it."""
    plain = solve(problem, "sdp", time_limit=args.bound_seconds)
    verify(problem, plain)
    starts = begun(problem, plain.mask)
    ends = long_searches(problem, starts)
    best = torch.stack(list(ends.values())).min(0).values
    masks = {
        "wanda": solve(problem, "wanda").objective,
        **{start: problem.objective(mask) for start, mask in starts.items()},
        "tabu": solve(problem, "tabu", start="swap").objective,
        "best": best,
    }
    return {
        "n": problem.n,
        "gap": {k: (1 - plain.lower_bound / objective).tolist() for k, objective in masks.items()},
        "above_best": {k: float((v / best).mean()) - 1 for k, v in ends.items()},
        "seconds": float(plain.trace.relax_seconds.mean()),
    }


def with_cuts(problem: LayerProblem, args: argparse.Namespace) -> dict[str, Any]:
    """Its gaps of Wanda's masks, which every run finds; a plain bound out of time is not."""
    cut = lower_bound(problem, "sdp", cuts=args.cuts, time_limit=args.cut_seconds)
    gap = 1 - cut.value / solve(problem, "wanda").objective
    return {"wanda": gap.tolist(), "seconds": cut.seconds / problem.rows}


def begun(problem: LayerProblem, rounded: torch.Tensor) -> dict[str, torch.Tensor]:
    """What long searches start from; `rounded`: the mask of `sdp`."""
    return {
        "1-swap": solve(problem, "swap", start="wanda").mask,
        "relax": solve(problem, "relax").mask,
        "sdp": rounded,
    }


def long_searches(
    problem: LayerProblem, starts: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Objectives of three runs of tabu search from each start."""
    return {
        f"{start} {seed}": solve(
            problem, "tabu", start=mask, moves=LONG_SEARCH, seed=seed
        ).objective
        for start, mask in starts.items()
        for seed in range(3)
    }


def memetic(problem: LayerProblem, args: argparse.Namespace) -> dict[str, Any]:
    """Objectives of memetic search as parts of the best of the long ones, a figure a row."""
    rounded = solve(problem, "sdp", time_limit=args.bound_seconds).mask
    ends = long_searches(problem, begun(problem, rounded))
    found = solve(problem, "memetic", generations=GENERATIONS)
    verify(problem, found)
    best = torch.stack(list(ends.values())).min(0).values
    return {"ratio": (found.objective / best).tolist()}


def blame(book: Book, args: argparse.Namespace) -> None:
    """Small rows with a proven optimum: how far is the search above it, and the bound below?"""
    for layer, whole in loaded(args, LAYERS):
        problem = sample(whole, 3, args.seed)
        columns = columns_of(problem.n, PROVEN_N, args.seed)
        for row in range(problem.rows):
            small = problem.row(row).restrict(columns, Unstructured(sparsity=0.6))

            def run(small: RowProblem = small) -> dict[str, Any]:
                exact = solve(small, "branch", time_limit=60)
                optimum = float(exact.objective)
                relaxed = solve(small, "relax")
                return {
                    "status": str(exact.status[0]),
                    "swap": float(solve(small, "swap", start="wanda").objective) / optimum,
                    "relax": float(relaxed.objective) / optimum,
                    "tabu": float(solve(small, "tabu").objective) / optimum,
                    "sdp": float(lower_bound(small, "sdp").value) / optimum,
                    "box": float(relaxed.lower_bound) / optimum,
                }

            book.measure(f"blame/{layer}/{row}", run)

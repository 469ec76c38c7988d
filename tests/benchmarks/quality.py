"""How good are the masks? Writes masks.csv and others (docs/results/index.md#masks).

    python tests/benchmarks/quality.py            # everything, on Gemma 3 270M (extra `demo`)
    python tests/benchmarks/quality.py --rows 4 --only masks starts --data FOLDER --tables FOLDER
    python tests/benchmarks/quality.py --only model   # all rows of all layers; the rest is samples

Every finished measurement is a line of a JSONL file in the folder `--data`: `quality.jsonl` has the
studies of layers, `quality-gaps.jsonl` those of the distance to the optimum. A second run keeps what is
there and measures the rest, so that the studies can be run one at a time; a run that would measure in
another way than a file says is refused.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from book import FIGURES, PATTERNS, TABLES, Book
from machine import machine
from quality_gaps import blame, crossed, gaps, tightened
from quality_layers import METHODS, interaction, masks, model, moves, sixteen, starts, whole
from tables import write

from maskopt import LayerProblem, solve
from maskopt.demo import cache_directory
from maskopt.models.checkpoints.bos import BOS

Study = Callable[[Book, argparse.Namespace], None]
OF_LAYERS: dict[str, Study] = {
    "sixteen": sixteen,
    "moves": moves,
    "masks": masks,
    "starts": starts,
    "interaction": interaction,
    "whole": whole,
    "model": model,
}
OF_GAPS: dict[str, Study] = {
    "gaps": gaps,
    "tightened": tightened,
    "crossed": crossed,
    "blame": blame,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16, help="rows of each layer")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--bos", choices=BOS, default="auto", help="what they begin with")
    parser.add_argument("--bound-seconds", type=float, default=60.0, help="for two rows")
    parser.add_argument("--cuts", type=int, default=500, help="rounds of triangle inequalities")
    parser.add_argument("--cut-seconds", type=float, default=120.0, help="for two rows")
    parser.add_argument("--note", help="what else the machine did")
    parser.add_argument("--cheap", action="store_true", help="leave the slow methods for later")
    parser.add_argument("--seed", type=int, default=0)
    studies = [*OF_LAYERS, *OF_GAPS]
    parser.add_argument("--only", nargs="*", choices=studies, default=studies)
    parser.add_argument("--data", type=Path, default=FIGURES)
    parser.add_argument(
        "--problems", type=Path, default=cache_directory() / "quality", help="collected layers"
    )
    parser.add_argument("--tables", type=Path, default=TABLES, help="folder for the CSV files")
    args = parser.parse_args()
    of_layers, of_gaps = Book(args.data / "quality.jsonl"), Book(args.data / "quality-gaps.jsonl")
    warm_up()
    for family, book in ((OF_LAYERS, of_layers), (OF_GAPS, of_gaps)):
        book.begin(about(args))
        for name, study in family.items():
            if name in args.only:
                study(book, args)
    write("quality", of_layers, of_gaps, folder=args.tables)


def about(args: argparse.Namespace) -> dict[str, Any]:
    """How this run measures."""
    return {
        "rows": args.rows,
        "samples": args.samples,
        "bos": args.bos,
        "seed": args.seed,
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "note": args.note,
    }


def warm_up() -> None:
    """Compile whatever compiles, so that no figure contains it."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(32, 40, generator=generator)
    weight = torch.randn(4, 32, generator=generator)
    for pattern in PATTERNS.values():
        problem = LayerProblem(weight, factor @ factor.T / 40, pattern, moments=factor.mean(1))
        for solver, start, options in METHODS.values():
            solve(problem, solver, start=start, **options)


if __name__ == "__main__":
    main()

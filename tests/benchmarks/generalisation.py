"""Masks judged on text that they were not fitted to. Writes docs/generalisation.md.

    python tests/benchmarks/generalisation.py --calibration valid.txt --text test.txt
    python tests/benchmarks/generalisation.py … --only bos --models gemma3

Every finished measurement is a line of a JSONL file (`--data`); a second run keeps what is there and measures
the rest. The models are those of the demo (`maskopt demo --model`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from maskopt import NM, Unstructured, prune_model
from maskopt.model.demo_model import MODELS, demo_model
from maskopt.model.evaluate import evaluate
from maskopt.model.options import WalkOptions
from maskopt.model.report import PruneReport
from maskopt.pattern import Pattern

ROOT = Path(__file__).parents[2]
PATTERNS: dict[str, Pattern] = {
    "50%": Unstructured(sparsity=0.5),
    "60%": Unstructured(sparsity=0.6),
    "2:4": NM(keep=2, of=4),
}
#: label → solver, start
METHODS = {
    "Wanda": ("wanda", None),
    "1-swap from Wanda": ("swap", "wanda"),
    "1-swap (default)": ("swap", None),
}
SIZES = (4, 8, 16, 32, 64, 128, 256)
SHRINK = (0.0, 0.05, 0.1, 0.3)
HOLDOUT = 0.25


class Book:
    """Finished measurements by key, one line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                record = json.loads(line)
                self.lines[record.pop("key")] = record

    def add(self, key: str, record: dict[str, Any]) -> None:
        self.lines[key] = record
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key, **record}) + "\n")


def prune_and_judge(
    args: argparse.Namespace, name: str, evaluated: str = "auto", **options: Any
) -> dict[str, Any]:
    """Prune a demo model, and hold it against the dense one on the text."""
    dense = demo_model(name)
    folder = Path(tempfile.mkdtemp(prefix="maskopt-generalisation-"))
    try:
        began = time.perf_counter()
        report = prune_model(
            dense, calibration=args.calibration, output=folder / "out", seq_len=512, **options
        )
        seconds = time.perf_counter() - began
        walk = WalkOptions(seq_len=512, bos=evaluated)
        first, second = evaluate([dense, folder / "out"], args.text, walk, windows=args.windows)
    finally:
        shutil.rmtree(folder)
    assert second.change is not None
    return {
        "dense": first.perplexity.value,
        "perplexity": second.perplexity.value,
        "low": second.perplexity.low,
        "high": second.perplexity.high,
        "ratio": [second.change.ratio, second.change.ratio_low, second.change.ratio_high],
        "kl": second.change.kl,
        "agreement": second.change.agreement,
        "seconds": seconds,
        **errors(report),
    }


def errors(report: PruneReport) -> dict[str, Any]:
    """Mean over the layers of the relative errors, fitted and held out, and of α."""
    layers = [layer for layer in report.layers if not layer.fallback]
    held = [layer.relative_held for layer in layers if layer.relative_held is not None]
    return {
        "fitted": sum(layer.relative for layer in layers) / len(layers),
        "held": sum(held) / len(held) if held else None,
        "shrink": sum(layer.shrink for layer in layers) / len(layers),
    }


def methods(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for pattern, value in PATTERNS.items():
        for label, (solver, start) in METHODS.items():
            how = {"pattern": value, "solver": solver, "warm_start": start, "samples": 32}
            yield f"methods/{name}/{pattern}/{label}", how


def bos(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for calibrated in ("never", "auto"):
        for evaluated in ("never", "auto"):
            how = {"sparsity": 0.5, "samples": 32, "bos": calibrated, "evaluated": evaluated}
            yield f"bos/{name}/{calibrated}/{evaluated}", how


def sizes(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for size in SIZES:
        how = {"sparsity": 0.5, "samples": size, "holdout": HOLDOUT}
        yield f"sizes/{name}/{size}", how


def shrink(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for label, value in PATTERNS.items():
        for alpha in (*SHRINK, "auto"):
            how = {"pattern": value, "samples": 16, "holdout": HOLDOUT, "shrink": alpha}
            yield f"shrink/{name}/{label}/{alpha}", how


STUDIES = {"methods": methods, "bos": bos, "sizes": sizes, "shrink": shrink}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", required=True, help="text that masks are fitted to")
    parser.add_argument("--text", required=True, help="text that models are judged on")
    parser.add_argument("--windows", type=int, default=32, help="of 512 tokens")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--only", nargs="*", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument(
        "--data", type=Path, default=ROOT / "docs" / "figures" / "generalisation.jsonl"
    )
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "generalisation.md")
    args = parser.parse_args()
    book = Book(args.data)
    if "about" not in book.lines:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
        about = {"machine": machine, "windows": args.windows, "date": time.strftime("%Y-%m-%d")}
        texts = {"calibration": Path(args.calibration).name, "text": Path(args.text).name}
        book.add("about", {**about, **texts})
    for study in args.only:
        for name in args.models:
            for key, how in STUDIES[study](name):
                if key not in book.lines:
                    book.add(key, prune_and_judge(args, name, **how))
                    print(key, book.lines[key], flush=True)
    from generalisation_page import write

    write(book.lines, args.page)
    print(f"wrote {args.page}")


if __name__ == "__main__":
    main()

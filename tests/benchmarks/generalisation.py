"""Masks judged on text that they were not fitted to. Writes docs/generalisation.md.

    python tests/benchmarks/generalisation.py --calibration valid.txt --text test.txt --corpus WikiText-2
    python tests/benchmarks/generalisation.py … --only bos --models gemma3

Every finished measurement is a line of a JSONL file (`--data`); a second run keeps what is there and measures
the rest, and is refused where it would measure in another way. The models are those of the demo
(`maskopt demo --model`).
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from book import PATTERNS, ROOT, Book
from generalisation_page import write
from machine import machine

from maskopt.model.demo_model import MODELS, demo_model
from maskopt.model.evaluate import evaluate
from maskopt.model.options import WalkOptions
from maskopt.model.prune import prune_model
from maskopt.model.report import PruneReport

#: label → solver, start
METHODS = {
    "Wanda": ("wanda", None),
    "1-swap from Wanda": ("swap", "wanda"),
    "1-swap (default)": ("swap", None),
}
SIZES = (4, 8, 16, 32, 64, 128, 256)
SHRINK = (0.0, 0.05, 0.1, 0.3)
HOLDOUT = 0.25


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", required=True, help="text that masks are fitted to")
    parser.add_argument("--text", required=True, help="text that models are judged on")
    parser.add_argument("--corpus", help="where the two texts are from, for the page")
    parser.add_argument("--windows", type=int, default=32, help="of 512 tokens")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--only", nargs="*", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument(
        "--data", type=Path, default=ROOT / "docs" / "figures" / "generalisation.jsonl"
    )
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "generalisation.md")
    args = parser.parse_args()
    book = Book(args.data)
    book.begin(about(args))
    for study in args.only:
        for name in args.models:
            for key, how in STUDIES[study](name):
                book.measure(key, partial(prune_and_judge, args, name, **how))
    write(book, args.page)
    print(f"wrote {args.page}")


def about(args: argparse.Namespace) -> dict[str, Any]:
    """How this run measures."""
    return {
        "machine": machine(),
        "windows": args.windows,
        "date": time.strftime("%Y-%m-%d"),
        "calibration": Path(args.calibration).name,
        "text": Path(args.text).name,
        "corpus": args.corpus,
    }


if __name__ == "__main__":
    main()

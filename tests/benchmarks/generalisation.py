"""Pruned models on text that they were not fitted to: models.csv and others (docs/results/index.md#models).

    python tests/benchmarks/generalisation.py --calibration valid.txt --text test.txt --corpus WikiText-2
    python tests/benchmarks/generalisation.py … --only bos --models gemma3

Every finished measurement is a line of a JSONL file (`--data`), with the machine that took it; a second run
keeps what is there and measures the rest, and is refused where it would measure in another way. The models
are those of the demo (`maskopt demo --model`).
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from book import FIGURES, TABLES, Book
from generalisation_cases import STUDIES, Case
from judges import dense_errors, judging_layers
from machine import machine
from tables import write
from yardsticks import shared_out

from maskopt.demo import MODELS, demo_model
from maskopt.models.checkpoints.report import PruneReport
from maskopt.models.checkpoints.schema import MASKS
from maskopt.models.distillation import distill_model
from maskopt.models.evaluation.evaluate import Evaluation, evaluate
from maskopt.models.options.prune import prune_options
from maskopt.models.options.walk import WalkOptions
from maskopt.models.pruning.output import apply_masks
from maskopt.models.pruning.prune import prune_model

#: pruned models that are kept, to be evaluated together: the dense one is run once for all of them
TOGETHER = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", required=True, help="text that masks are fitted to")
    parser.add_argument("--text", required=True, help="text that models are judged on")
    parser.add_argument("--corpus", help="where the two texts are from")
    parser.add_argument("--windows", type=int, default=32, help="of 512 tokens")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--only", nargs="*", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--data", type=Path, default=FIGURES / "generalisation.jsonl")
    parser.add_argument("--tables", type=Path, default=TABLES, help="folder for the CSV files")
    args = parser.parse_args()
    book = Book(args.data)
    book.begin(about(args))
    book.check()
    for study in args.only:
        for name in args.models:
            repeat(book, name, study)
            missing = [
                c for c in STUDIES[study](name) if any(k not in book for k in c.keys.values())
            ]
            for first in range(0, len(missing), TOGETHER):
                measure(args, book, name, missing[first : first + TOGETHER])
    write("generalisation", book, folder=args.tables)


def repeat(book: Book, name: str, study: str) -> None:
    """What another study of the model has measured of the same cases is a line of this one, too."""
    others = [c for make in STUDIES.values() if make is not STUDIES[study] for c in make(name)]
    for case in STUDIES[study](name):
        for judged, key in case.keys.items():
            same = (o.keys[judged] for o in others if judged in o.keys and same_prune(o, case))
            known = next((other for other in same if other in book), None)
            if key not in book and known is not None:
                book.put(key, book.lines[known])


def same_prune(one: Case, other: Case) -> bool:
    """The same prune, however its options are given."""
    same = prune_options(None, one.options) == prune_options(None, other.options)
    return same and one._replace(options={}, keys={}) == other._replace(options={}, keys={})


def about(args: argparse.Namespace) -> dict[str, Any]:
    """How this run measures."""
    return {
        "windows": args.windows,
        "calibration": Path(args.calibration).name,
        "text": Path(args.text).name,
        "corpus": args.corpus,
    }


def measure(args: argparse.Namespace, book: Book, name: str, cases: Sequence[Case]) -> None:
    """Prune a demo model in several ways, and hold the results against the dense one on the text."""
    dense = demo_model(name)
    folder = Path(tempfile.mkdtemp(prefix="maskopt-generalisation-"))
    try:
        found = []
        pruned: list[tuple[Case, Path, PruneReport]] = []
        for number, case in enumerate(cases):
            judges = judging_layers(dense, args.calibration)
            prune = case._replace(masks_alone=False, distilled=None)
            known = [x for x in pruned if same_prune(x[0], prune)]
            if known:
                _, out, report = known[0]
            else:
                out, how = folder / str(number), dict(case.options)
                if case.shares is not None:
                    how["counts"] = shared_out(case.shares, judges, how["sparsity"])
                report = prune_model(
                    dense, calibration=args.calibration, output=out, seq_len=512, **how
                )
                pruned.append((prune, out, report))
            facts = {"seconds": report.seconds, **errors(report)}
            if case.masks_alone:
                out = apply_masks(dense, out / MASKS, folder / f"{number}, masks alone")
                # those reported are of other weights
                del facts["fitted"], facts["held"]
            if case.distilled is not None:
                after = folder / f"{number}, distilled"
                better = distill_model(
                    out, dense, calibration=args.calibration, output=after, **case.distilled
                )
                facts["seconds"] += better.seconds
                facts |= {"distilling": better.seconds, "epoch": better.epoch}
                facts["divergence"] = [better.before.held, better.after.held]
                out = after
            taken = {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
            found.append((case, out, {**facts, **dense_errors(out, judges), **taken}))
        for begin in {begin for case in cases for begin in case.keys}:
            wanted = [(c.keys[begin], out, more) for c, out, more in found if begin in c.keys]
            walk = WalkOptions(seq_len=512, bos=begin)
            models = [dense, *(out for _, out, _ in wanted)]
            first, *others = evaluate(models, args.text, walk, windows=args.windows)
            for (key, _, more), other in zip(wanted, others, strict=True):
                if key not in book:
                    book.put(key, {**judged(first, other), **more})
    finally:
        shutil.rmtree(folder)


def judged(dense: Evaluation, pruned: Evaluation) -> dict[str, Any]:
    assert pruned.change is not None
    return {
        "dense": dense.perplexity.value,
        "perplexity": pruned.perplexity.value,
        "low": pruned.perplexity.low,
        "high": pruned.perplexity.high,
        "ratio": [pruned.change.ratio, pruned.change.ratio_low, pruned.change.ratio_high],
        "kl": pruned.change.kl,
        "agreement": pruned.change.agreement,
        "hidden": [pruned.change.hidden_mean, pruned.change.hidden_median],
        "losses": [round(loss, 6) for loss in pruned.losses],
    }


def errors(report: PruneReport) -> dict[str, Any]:
    """Mean over the layers of the relative errors, fitted and held out, and of α; seconds of solving."""
    layers = [layer for layer in report.layers if not layer.fallback]
    held = [layer.relative_held for layer in layers if layer.relative_held is not None]
    return {
        "fitted": sum(layer.relative for layer in layers) / len(layers),
        "held": sum(held) / len(held) if held else None,
        "shrink": sum(layer.gram_shrinkage for layer in layers) / len(layers),
        "solving": sum(layer.seconds for layer in report.layers),
        "training": sum(block.seconds for block in report.trained),
    }


if __name__ == "__main__":
    main()

"""The tables of SparseSwaps (arXiv 2512.10922) on any models; see docs/results/index.md#paper.

    python tests/benchmarks/paper_table.py MODEL … --calibration hf:c4 --text hf:wikitext2:test --bos never

Every cell is a whole prune, into a temporary folder next to the data, and its perplexity. Every finished cell
is a line of a JSONL file (`--data`): the same command goes on after an interrupt.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from book import PATTERNS, Book, Record, table

from maskopt import perplexity, prune_model

#: title → solver, its options, and the solver whose mask it starts from and is compared with
METHODS: dict[str, tuple[str, dict[str, Any], str]] = {
    "magnitude": ("magnitude", {}, "wanda"),
    "Wanda": ("wanda", {}, "wanda"),
    "RIA": ("ria", {}, "wanda"),
    "SparseFW": ("frank_wolfe", {}, "wanda"),
    **{f"1-swap, T = {t}": ("swap", {"max_swaps": t}, "wanda") for t in (1, 2, 5, 10, 25, 50, 100)},
    "1-swap": ("swap", {}, "wanda"),
    "1-swap from RIA": ("swap", {}, "ria"),
    "relax": ("relax", {}, "wanda"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="model folders, or names on the hub")
    parser.add_argument("--calibration", required=True, help="text for the masks")
    parser.add_argument("--text", required=True, help="text for the perplexity")
    parser.add_argument("--patterns", nargs="*", choices=list(PATTERNS), default=list(PATTERNS))
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--include", help="layers to prune; default: all")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--windows", type=int, help="of the text for the perplexity; default: all")
    parser.add_argument("--bos", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", type=Path, default=Path("table.jsonl"))
    parser.add_argument("--page", type=Path, default=Path("table.md"))
    args = parser.parse_args()
    book = Book(args.data)
    names = ("calibration", "text", "include", "samples", "seq_len", "windows", "bos")
    book.begin({**{n: getattr(args, n) for n in names}, "date": time.strftime("%Y-%m-%d")})
    for model in args.models:
        book.measure(model, lambda m=model: judged(args, m))  # type: ignore[misc]
        for pattern in args.patterns:
            for method in args.methods:
                key = f"{model}/{pattern}/{method}"
                book.measure(key, lambda c=(model, pattern, method): cell(args, *c))  # type: ignore[misc]
    args.page.write_text(page(book, args.models, args.patterns, args.methods))
    print(f"wrote {args.page}")


def cell(args: argparse.Namespace, model: str, pattern: str, method: str) -> Record:
    """One prune: its perplexity, and by how much each layer's error is below that of Wanda."""
    solver, options, start = METHODS[method]
    with tempfile.TemporaryDirectory(prefix="table-", dir=args.data.absolute().parent) as home:
        report = prune_model(
            model, calibration=args.calibration, output=Path(home, "out"), sparsity=PATTERNS[pattern],
            solver=solver, solver_options=options, start=None if start == solver else start,
            include=args.include or (), samples=args.samples, seq_len=args.seq_len, bos=args.bos,
            device=args.device,
        )  # fmt: skip
        found = judged(args, Path(home, "out"))
    below = [
        (layer.kind, str(layer.block), 1 - layer.error / layer.error_wanda)
        for layer in report.layers
        if layer.error_wanda and not layer.fallback
    ]
    return {**found, "below": below, "seconds": report.seconds}


def judged(args: argparse.Namespace, model: str | Path) -> Record:
    found = perplexity(
        model, text=args.text, windows=args.windows, seq_len=args.seq_len, bos=args.bos,
        device=args.device,
    )  # fmt: skip
    return {"perplexity": found.value, "low": found.low, "high": found.high}


def page(book: Book, models: Sequence[str], patterns: Sequence[str], methods: Sequence[str]) -> str:
    """All tables, as Markdown."""
    parts = []
    for model in models:
        cells = {p: {m: book.lines[f"{model}/{p}/{m}"] for m in methods} for p in patterns}
        rows = [["dense", *[f"{book.lines[model]['perplexity']:.2f}"] * len(patterns)]]
        rows += [[m, *(f"{cells[p][m]['perplexity']:.2f}" for p in patterns)] for m in methods]
        parts.append(f"## Perplexity, {model}\n\n" + table(["method", *patterns], rows))
        for pattern in patterns:
            for place, what in enumerate(("layer kind", "block")):
                title = f"## Error below the start's in %, by {what}, {model}, {pattern}\n\n"
                parts.append(title + reductions(cells[pattern], place, what))
    return "\n".join(parts)


def reductions(cells: Mapping[str, Record], place: int, what: str) -> str:
    """Means over the layers of each kind or block, and over all layers."""
    columns = {method: record["below"] for method, record in cells.items() if record["below"]}
    names = dict.fromkeys(layer[place] for below in columns.values() for layer in below)
    rows = []
    for name in [*names, "all layers"]:
        parts = [
            [layer[2] for layer in below if name in ("all layers", layer[place])]
            for below in columns.values()
        ]
        rows.append([name, *(f"{100 * sum(x) / len(x):.1f}" if x else "–" for x in parts)])
    return table([what, *columns], rows)


if __name__ == "__main__":
    main()

"""Recipe × sparsity × model, and what `--transform` gains at 50% and 2:4: each cell by one command of a user.

    python tests/benchmarks/recipes.py --calibration valid.txt --text test.txt --corpus WikiText-2
    python tests/benchmarks/recipes.py … --cells gemma3/fast/50% smollm2/best/2:4/rotation

A cell runs `maskopt prune MODEL --recipe R --sparsity S --calibration TEXT --output OUT` in a process of its
own, whose CPU minutes and peak memory are recorded, and then compares OUT with the dense model on the text,
in another process: Linux counts what its parent once used as a new process's own peak.
An interrupted cell is resumed. Every finished cell is a line of a JSONL file (`--data`), of which a CSV file
(`--csv`) and the section Recipes of a page (`--page`) are made. The models are those of the demo.
A transform is compared with the cell without one, window by window. At 50% a permutation changes no mask, so
that only the rotation is measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from book import FIGURES, RESULTS, TABLES, TITLES, Book, table
from machine import machine
from tables import write_csv

from maskopt.demo import MODELS, demo_model
from maskopt.models.checkpoints.report import (
    PruneReport,
    proven_share,
    ratio_to_wanda,
    result_digest,
)
from maskopt.models.checkpoints.schema import MANIFEST, read_manifest
from maskopt.models.checkpoints.workspace import unfinished
from maskopt.models.evaluation.evaluate import evaluate, exponential, interval
from maskopt.models.options.prune import FREE, NONE, PERMUTATION, RECIPES, ROTATION
from maskopt.models.options.walk import WalkOptions

SPARSITIES = ("50%", "60%", "70%", "2:4")
#: by sparsity, the transforms that change a mask
TRANSFORMS = {"50%": (ROTATION,), "2:4": (ROTATION, PERMUTATION, FREE)}
CELLS = [f"{m}/{recipe}/{s}" for m in MODELS for recipe in RECIPES for s in SPARSITIES]
CELLS += [f"{cell}/{t}" for cell in CELLS for t in TRANSFORMS.get(cell.rpartition("/")[2], ())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", required=True, help="text of the command")
    parser.add_argument("--text", required=True, help="text that models are evaluated on")
    parser.add_argument(
        "--other", help="another text, that nothing was chosen on, to evaluate on, too"
    )
    parser.add_argument("--corpus", help="where the two texts are from, for the page")
    parser.add_argument("--windows", type=int, default=32, help="of 512 tokens, to evaluate")
    parser.add_argument("--cells", nargs="*", choices=CELLS, default=CELLS, metavar="CELL")
    parser.add_argument("--work", type=Path, default=Path("recipes"), help="folder for the models")
    parser.add_argument("--data", type=Path, default=FIGURES / "recipes.jsonl")
    parser.add_argument("--csv", type=Path, default=TABLES / "recipes.csv")
    parser.add_argument("--page", type=Path, default=RESULTS / "index.md")
    parser.add_argument(
        "--more", nargs=argparse.REMAINDER, default=[], help="of the command, for a trial"
    )
    args = parser.parse_args()
    book = Book(args.data)
    texts = {name: Path(getattr(args, name)).name for name in ("calibration", "text")}
    about = {**texts, "windows": args.windows, "corpus": args.corpus, "more": args.more}
    book.begin({**about, "date": time.strftime("%Y-%m-%d")})
    for cell in args.cells:
        book.measure(cell, partial(measure, args, cell))
        write_csv(args.csv, (row(name, book) for name in CELLS if name in book))
        write_section(book, args.page)
    print(f"wrote {args.page}")


def measure(args: argparse.Namespace, cell: str) -> dict[str, Any]:
    """One command, and an evaluation of what it wrote."""
    name, recipe, sparsity, transform = parts(cell)
    dense, out = demo_model(name), args.work / re.sub(r"\W", "-", cell)
    used, began = args.work / f"{out.name}.json", time.time()
    # of the runs that were interrupted
    spent = json.loads(used.read_text()) if used.exists() else {"cpu": 0.0, "wall": 0.0, "peak": 0}
    command = [sys.executable, "-m", "maskopt", "prune", str(dense), "--recipe", recipe]
    command += ["--sparsity", sparsity, "--transform", transform]
    command += ["--calibration", args.calibration, "--output", str(out)]
    if not (out / MANIFEST).exists() or unfinished(out):
        args.work.mkdir(parents=True, exist_ok=True)
        resume = ["--resume"] if unfinished(out) else []
        process = subprocess.Popen([*command, *resume, *args.more])
        _, status, usage = os.wait4(process.pid, 0)
        spent["cpu"] += usage.ru_utime + usage.ru_stime
        spent["wall"] += time.time() - began
        spent["peak"] = max(spent["peak"], usage.ru_maxrss * 1024)
        used.write_text(json.dumps(spent))
        if status:
            raise SystemExit(f"{cell}: the command failed or was interrupted; start again")
    manifest = read_manifest(out / MANIFEST)
    pruned = PruneReport.of(manifest, out)
    found = {
        **apart(compared, dense, out, args.text, args.windows),
        "wanda": ratio_to_wanda(pruned.solved),
        "proven": proven_share(pruned.solved),
        "minutes": spent["cpu"] / 60,
        "wall": spent["wall"] / 60,
        "peak": spent["peak"],
        "digest": result_digest(manifest),
        "machine": machine(),
    }
    if args.other:
        found["other"] = apart(compared, dense, out, args.other, args.windows)
    shutil.rmtree(out)
    used.unlink(missing_ok=True)
    return found


def parts(cell: str) -> Sequence[str]:
    """Model, recipe, sparsity and transform of a cell."""
    found = cell.split("/")
    return found if len(found) == 4 else [*found, NONE]


def apart(call: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """The result of a call in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(call, *given).result()


def compared(dense: Path, out: Path, text: str, windows: int) -> dict[str, Any]:
    """Perplexities of the two models on a text, their ratio with its interval, and the divergence."""
    first, second = evaluate([dense, out], text, WalkOptions(seq_len=512), windows=windows)
    change = second.change
    assert change is not None
    return {
        "text": Path(text).name,
        "perplexity": second.perplexity.value,
        "dense": first.perplexity.value,
        "ratio": [change.ratio, change.ratio_low, change.ratio_high],
        "kl": change.kl,
        "losses": second.losses,
    }


def to_none(cell: str, book: Book) -> list[float]:
    """Perplexity of a transformed model as a ratio to the one without, and its paired 95% interval; or []."""
    both = [book.lines.get(key, {}).get("losses") for key in (cell, cell.rpartition("/")[0])]
    if None in both:
        return []
    one, none = (torch.tensor(losses, dtype=torch.float64) for losses in both)
    return [exponential(x) for x in (float((one - none).mean()), *interval(one - none))]


def row(cell: str, book: Book) -> dict[str, Any]:
    """A line of the CSV file."""
    one = book.lines[cell]
    model, recipe, sparsity, transform = parts(cell)
    ratio, low, high = one["ratio"]
    ratio_to_none, none_low, none_high = to_none(cell, book) or (None,) * 3
    other = one.get("other", {"text": None, "ratio": [None] * 3, "kl": None})
    return {
        "model": TITLES[model],
        "recipe": recipe,
        "sparsity": sparsity,
        "transform": transform,
        "perplexity_dense": one["dense"],
        "perplexity": one["perplexity"],
        "perplexity_ratio_to_dense": ratio,
        "ratio_low": low,
        "ratio_high": high,
        "kl_to_dense_nats": one["kl"],
        "ratio_to_none": ratio_to_none,
        "ratio_to_none_low": none_low,
        "ratio_to_none_high": none_high,
        "other_text": other["text"],
        "other_text_ratio_to_dense": other["ratio"][0],
        "other_text_ratio_low": other["ratio"][1],
        "other_text_ratio_high": other["ratio"][2],
        "other_text_kl_to_dense_nats": other["kl"],
        "error_ratio_to_wanda": one["wanda"],
        "rows_proven_1_swap_optimal_share": one["proven"],
        "cpu_minutes": one["minutes"],
        "wall_minutes": one["wall"],
        "peak_memory_gib": one["peak"] and one["peak"] / 2**30,
        "machine": one.get("machine"),
    }


def with_interval(three: Sequence[float] | None) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*three) if three else "–"


def section(book: Book) -> str:
    """The section of the page."""
    about = book.about
    cells: dict[str, tuple[Sequence[str], Callable[[str], str]]] = {
        "Ratio of perplexity to the dense model, 95% interval": (
            SPARSITIES,
            lambda cell: with_interval(book.lines[cell]["ratio"]),
        ),
        "The same on Python's help topics, far from the calibration text, on which nothing was chosen": (
            SPARSITIES,
            lambda cell: with_interval(book.lines[cell].get("other", {}).get("ratio")),
        ),
        "CPU minutes, one thread; peak memory, GiB": (
            SPARSITIES,
            lambda cell: "; ".join(
                "–" if value is None else f"{value / unit:.{digits}f}"
                for value, unit, digits in (
                    (book.lines[cell]["minutes"], 1, 1),
                    (book.lines[cell]["peak"], 2**30, 2),
                )
            ),
        ),
        "`--transform`, ratio of perplexity to the same without one, 95% paired interval": (
            [f"{s}/{t}" for s, transforms in TRANSFORMS.items() for t in transforms],
            lambda cell: with_interval(to_none(cell, book)),
        ),
    }
    tables = []
    for title, (columns, shown) in cells.items():
        rows = []
        for name, recipe in itertools.product(MODELS, RECIPES):
            keys = [f"{name}/{recipe}/{column}" for column in columns]
            line = [shown(key) if key in book else "–" for key in keys]
            if set(line) != {"–"}:
                rows.append([TITLES[name], recipe, *line])
        if rows:
            head = ("model", "recipe", *(column.replace("/", ", ") for column in columns))
            tables.append(f"{title}:\n\n{table(head, rows)}")
    machines = sorted({one["machine"] for one in book.lines.values() if "machine" in one})
    corpus = f" of {about['corpus']}" if about.get("corpus") else ""
    more = "".join(f" {word}" for word in about["more"])
    return (
        "## Recipes\n\n"
        "One command per cell, `maskopt prune MODEL --recipe R --sparsity S --calibration TEXT --output "
        f"OUT{more}`,\nby `python tests/benchmarks/recipes.py`; –: not measured. Calibration on "
        f"`{about['calibration']}`, perplexity on {about['windows']} windows of 512 tokens of\n"
        f"`{about['text']}`{corpus}. {'; '.join(machines)}, {book.dates or about['date']}. All figures:\n"
        "[recipes.csv](tables/recipes.csv).\n\n" + "\n".join(tables)
    )


def write_section(book: Book, page: Path) -> None:
    """Replace the section, or put it before the first one."""
    text = page.read_text()
    text = re.sub(r"## Recipes\n.*?(?=\n## |\Z)", "", text, flags=re.DOTALL)
    before, first, after = text.partition("\n## ")
    page.write_text(f"{before.rstrip()}\n\n{section(book).rstrip()}\n{first}{after.lstrip()}")


if __name__ == "__main__":
    main()

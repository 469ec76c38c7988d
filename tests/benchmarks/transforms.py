"""What `prune --transform` gains: transform × recipe × sparsity × model, each prune by one command.

    python tests/benchmarks/transforms.py --calibration valid.txt --text test.txt --work transforms

The prunes of a recipe, a sparsity and a model are compared with the dense model and with the prune without a
transform, on the same windows. At 50% a permutation changes no mask, so that it is not measured. Finished
groups are lines of a JSONL file (`--data`); an interrupted one is resumed. CSV file: `--csv`.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from book import FIGURES, TABLES, TITLES, Book
from machine import machine
from recipes import apart
from tables import write_csv

from maskopt.demo import demo_model
from maskopt.models.checkpoints.schema import MANIFEST
from maskopt.models.checkpoints.workspace import unfinished
from maskopt.models.evaluation.evaluate import evaluate
from maskopt.models.options.prune import FREE, NONE, PERMUTATION, RECIPES, ROTATION
from maskopt.models.options.walk import WalkOptions

TRANSFORMS = (NONE, ROTATION, PERMUTATION, FREE)
GROUPS = [f"{m}/{recipe}/{s}" for recipe in RECIPES for s in ("2:4", "50%") for m in TITLES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", required=True, help="text of the command")
    parser.add_argument("--text", required=True, help="text that models are evaluated on")
    parser.add_argument("--windows", type=int, default=32, help="of 512 tokens, to evaluate")
    parser.add_argument("--groups", nargs="*", choices=GROUPS, default=GROUPS, metavar="GROUP")
    parser.add_argument("--work", type=Path, default=Path("transforms"), help="for the models")
    parser.add_argument("--data", type=Path, default=FIGURES / "transforms.jsonl")
    parser.add_argument("--csv", type=Path, default=TABLES / "transforms.csv")
    args = parser.parse_args()
    book = Book(args.data)
    texts = {name: Path(getattr(args, name)).name for name in ("calibration", "text")}
    book.begin({**texts, "windows": args.windows, "date": time.strftime("%Y-%m-%d")})
    for group in args.groups:
        if f"{group}/{FREE}" not in book:
            book.check()
            for key, record in measure(args, group).items():
                book.put(key, record)
        write_csv(args.csv, (row(k, one) for k, one in book.lines.items() if k != "about"))


def measure(args: argparse.Namespace, group: str) -> dict[str, dict[str, Any]]:
    """The prunes of a group that differ, and their comparison."""
    model, _, sparsity = group.split("/")
    dense = demo_model(model)
    names = [t for t in TRANSFORMS if sparsity == "2:4" or t in (NONE, ROTATION)]
    folders = {name: prune(args, dense, group, name) for name in names}
    given = (str(args.text), args.windows)
    against_dense = apart(compared, [dense, *folders.values()], *given)
    against_none = apart(compared, list(folders.values()), *given)
    found = {}
    for name in TRANSFORMS:
        same = {FREE: ROTATION, PERMUTATION: NONE}.get(name) if name not in names else name
        folder = str(folders[str(same)])
        found[f"{group}/{name}"] = {
            "dense": against_dense[folder],
            "none": against_none.get(folder),
            "machine": machine(),
        }
    for out in folders.values():
        shutil.rmtree(out)
    return found


def prune(args: argparse.Namespace, dense: Path, group: str, transform: str) -> Path:
    """The folder of one prune, which may be finished or begun already."""
    _, recipe, sparsity = group.split("/")
    out: Path = args.work / re.sub(r"\W", "-", f"{group}-{transform}")
    if not (out / MANIFEST).exists() or unfinished(out):
        args.work.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "maskopt", "prune", str(dense), "--recipe", recipe]
        command += ["--sparsity", sparsity, "--transform", transform, "--output", str(out)]
        command += ["--calibration", args.calibration, "--samples", "72", "--seq-len", "512"]
        subprocess.run([*command, *["--resume"] * unfinished(out)], check=True)
    return out


def compared(models: list[Path], text: str, windows: int) -> dict[str, Any]:
    """By folder, what all but the first lose compared with it."""
    found = {}
    for model, one in zip(
        models, evaluate(models, text, WalkOptions(seq_len=512), windows=windows), strict=False
    ):
        if (change := one.change) is not None:
            ratio = [change.ratio, change.ratio_low, change.ratio_high]
            found[str(model)] = {
                "perplexity": one.perplexity.value,
                "ratio": ratio,
                "kl": change.kl,
            }
    return found


def row(key: str, one: Any) -> dict[str, Any]:
    """A line of the CSV file."""
    model, recipe, sparsity, transform = key.split("/")
    none = one["none"] or {"ratio": [1.0, None, None]}
    return {
        "model": TITLES[model],
        "recipe": recipe,
        "sparsity": sparsity,
        "transform": transform,
        "perplexity": one["dense"]["perplexity"],
        **{
            f"{x}_to_dense": v
            for x, v in zip(("ratio", "low", "high"), one["dense"]["ratio"], strict=False)
        },
        "kl_to_dense_nats": one["dense"]["kl"],
        **{
            f"{x}_to_none": v for x, v in zip(("ratio", "low", "high"), none["ratio"], strict=False)
        },
        "machine": one["machine"],
    }


if __name__ == "__main__":
    main()

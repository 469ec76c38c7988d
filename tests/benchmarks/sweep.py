"""What a sweep costs compared with one prune: seconds of both, on a demo model, in one run.

    python tests/benchmarks/sweep.py --calibration valid.txt
    python tests/benchmarks/sweep.py --calibration valid.txt --blocks 2 --samples 128 --seq-len 2048

One prune in one pass from the text, then Gram matrices collected and four sparsities pruned from them; of all
blocks, or of the first few, which writes the whole model all the same.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine_now

from maskopt import collect_grams, prune_model
from maskopt.demo import MODELS, demo_model
from maskopt.models.evaluation.sweep import sweep

SPARSITIES = (0.4, 0.5, 0.6, 0.7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--model", choices=list(MODELS), default="gemma3")
    parser.add_argument("--solver", default="swap")
    parser.add_argument("--blocks", type=int, help="only so many; all by default")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    args = parser.parse_args()
    model = demo_model(args.model)
    text = {"calibration": args.calibration, "samples": args.samples, "seq_len": args.seq_len}
    some: dict[str, Any] = {}
    if args.blocks is not None:
        some["include"] = [f"layers.{block}" for block in range(args.blocks)]
    with tempfile.TemporaryDirectory(prefix="maskopt-sweep-") as home:
        folder = Path(home)
        prune_model(  # compiles what has to be compiled
            model, calibration=args.calibration, output=folder / "first", sparsity=0.5,
            solver=args.solver, samples=1, seq_len=32, include="layers.0.*", min_tokens=1,
        )  # fmt: skip
        began = time.perf_counter()
        prune_model(
            model, output=folder / "one", calibrate_on="dense", sparsity=0.5, solver=args.solver, **text,
            **some,
        )  # fmt: skip
        one = time.perf_counter() - began
        began = time.perf_counter()
        collect_grams(model, output=folder / "grams", **text, **some)
        collected = time.perf_counter() - began
        size = sum(file.stat().st_size for file in (folder / "grams").iterdir())
        sweep(
            model, folder / "grams", folder / "sweep", solver=[args.solver],
            sparsity=SPARSITIES, **some,
        )  # fmt: skip
        swept = time.perf_counter() - began
    print(machine_now())
    print(f"one prune in one pass: {one:.1f} s")
    print(
        f"a sweep of {len(SPARSITIES)}: {swept:.1f} s, of which {collected:.1f} s for {size / 2**30:.2f} GiB "
        f"of Gram matrices: {swept / one:.2f} times the prune"
    )


if __name__ == "__main__":
    main()

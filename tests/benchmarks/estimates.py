"""The time that `maskopt prune --dry-run` estimates, and what the prune takes: some blocks of a model.

python tests/benchmarks/estimates.py --calibration valid.txt
python tests/benchmarks/estimates.py --calibration valid.txt --model smollm2 --blocks 2
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine_now

from maskopt import prune_model
from maskopt.demo import MODELS, demo_model
from maskopt.models.pruning.plan import plan_prune

#: label → options of a prune
CASES: dict[str, dict[str, Any]] = {
    "weights kept": {},
    "2:4": {"sparsity": "2:4"},
    "refitted": {"update": "least-squares"},
    "refitted, ADMM": {"update": "least-squares", "solver": "admm"},
    "allocation by layer": {"allocation": "layers"},
    "trained": {"update": "blockwise", "holdout": 0.2},
    "refitted, then trained": {
        "solver": "admm",
        "update": "blockwise",
        "holdout": 0.2,
        "training": {"begin": "least-squares"},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--model", choices=list(MODELS), default="gemma3")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    args = parser.parse_args()
    model = demo_model(args.model)
    print(machine_now())
    for label in args.only:
        how = {"sparsity": 0.5, "samples": 32, "seq_len": 512, **CASES[label]}
        how["include"] = [f"layers.{block}" for block in range(args.blocks)]
        said = plan_prune(model, **how)
        with tempfile.TemporaryDirectory(prefix="maskopt-estimates-") as home:
            began = time.perf_counter()
            report = prune_model(
                model, calibration=args.calibration, output=Path(home) / "out", **how
            )
            took = time.perf_counter() - began
        assert said.seconds is not None
        assert said.solve_seconds is not None
        solving = sum(layer.seconds for layer in report.layers)
        training = sum(block.seconds for block in report.trained)
        print(
            f"{label}: said {said.seconds:.0f} s (passes {said.forward_seconds:.0f}, solving "
            f"{said.solve_seconds:.0f}, files {said.file_seconds:.0f}), took {took:.0f} s (solving "
            f"{solving:.0f}, training {training:.0f}): {said.seconds / took:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

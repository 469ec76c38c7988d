"""What `maskopt plan` says of the time of a prune, beside what the prune takes: some blocks of a demo model.

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
from maskopt.model.demo_model import MODELS, demo_model
from maskopt.model.plan import plan_prune

#: label → options of a prune
CASES: dict[str, dict[str, Any]] = {
    "weights kept": {},
    "2:4": {"pattern": "2:4"},
    "refitted": {"weights": "refit"},
    "refitted, ADMM": {"weights": "refit", "solver": "admm"},
    "layers trade": {"budget": "model"},
    "trained": {"weights": "reconstruct", "holdout": 0.2},
    "refitted, then trained": {
        "solver": "admm",
        "weights": "reconstruct",
        "holdout": 0.2,
        "reconstruct": {"begin": "refit"},
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
        how = {"samples": 32, "seq_len": 512, **CASES[label]}
        how["include"] = [f"layers.{block}" for block in range(args.blocks)]
        pattern = how.pop("pattern", None)
        how |= {"sparsity": 0.5} if pattern is None else {"pattern": _pattern(pattern)}
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
        training = sum(part.seconds for part in report.parts)
        print(
            f"{label}: said {said.seconds:.0f} s (passes {said.forward_seconds:.0f}, solving "
            f"{said.solve_seconds:.0f}, files {said.file_seconds:.0f}), took {took:.0f} s (solving "
            f"{solving:.0f}, training {training:.0f}): {said.seconds / took:.2f}",
            flush=True,
        )


def _pattern(written: str) -> Any:
    from maskopt import NM

    keep, of = written.split(":")
    return NM(keep=int(keep), of=int(of))


if __name__ == "__main__":
    main()

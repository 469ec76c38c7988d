"""Prune Gemma 3 270M with two solvers: wall and CPU time, share of solving, errors, peak memory.

    python tests/benchmarks/prune_gemma.py --solver wanda --solver swap

    python tests/benchmarks/prune_gemma.py --solver swap --update blockwise --text valid.txt \\
        --samples 72 --holdout 0.118

Every prune runs in a process of its own, so that its peak resident size is its own. Calibration: the
demo's text, 32 windows of 512 tokens. The ratio printed last is the second solver's wall time over the
first one's. A solver that takes a start gets `--start`, by default what `maskopt prune` gives it. Where
weights are trained, `passes` are the seconds of `training` in forward and backward passes of what is trained
at once, and `recorded` those of the passes through a block that tell what that is to make, which is no part
of `training`, and by parts what it is given, which is.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from machine import machine_now

from maskopt.cli.command import read_pairs
from maskopt.models.blockwise.job import Block
from maskopt.models.checkpoints.bos import BOS
from maskopt.models.training import trainer as training


def timed(place: Any, names: Iterable[str]) -> list[float]:
    """The seconds of every call of these functions of a module or a class, from now on; of a generator, of
    all that it makes."""
    spent: list[float] = []

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            began = time.perf_counter()
            found = function(*given)
            spent.append(time.perf_counter() - began)
            return following(found) if inspect.isgenerator(found) else found

        return call

    def following(found: Iterator[Any]) -> Iterator[Any]:
        while True:
            began = time.perf_counter()
            item = next(found, None)
            spent.append(time.perf_counter() - began)
            if item is None:
                return
            yield item

    for name in names:
        setattr(place, name, around(getattr(place, name)))
    return spent


def child(arguments: argparse.Namespace) -> None:
    import transformers

    from maskopt.demo import demo_model, demo_text
    from maskopt.models.checkpoints.report import ratio_to_wanda
    from maskopt.models.pruning.prune import prune_model
    from maskopt.protocol.solver import available_solvers

    starts_from = None
    if available_solvers()[arguments.child].capabilities.start == "needed":
        starts_from = arguments.start
    transformers.logging.set_verbosity_error()
    include = [f"layers.{index}.*" for index in range(arguments.blocks)]
    text = arguments.text or demo_text().calibration
    # gradients of a batch, and losses; what parts are given and what they are to make
    passes = timed(training, ("_set_gradients", "_mean"))
    recorded = timed(Block, ("run_dense",))
    began, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        report = prune_model(
            demo_model(), sparsity=arguments.sparsity, solver=arguments.child,
            start=starts_from,
            calibration=text, samples=arguments.samples, seq_len=512, holdout=arguments.holdout,
            bos=arguments.bos, update=arguments.update,
            training=read_pairs(arguments.training),
            include=include, output=Path(folder) / "out", threads=arguments.threads,
        )  # fmt: skip
    print(
        json.dumps(
            {
                "solver": arguments.child,
                "start": report.fingerprint["options"]["start"],
                "wall": time.perf_counter() - began,
                "cpu": time.process_time() - cpu,
                "solving": sum(layer.seconds for layer in report.layers),
                "training": sum(block.seconds for block in report.trained),
                "passes": sum(passes),
                "recorded": sum(recorded),
                "error/Wanda": ratio_to_wanda(report.layers),
                "peak GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                "sparsity": report.sparsity,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--solver", action="append")
    parser.add_argument("--child")
    parser.add_argument("--start", help="of a solver that takes one; default: as prune has it")
    parser.add_argument("--blocks", type=int, default=18)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--text", help="calibration text; default: the demo's")
    parser.add_argument(
        "--holdout", type=float, default=0.0, help="part of the windows that judges"
    )
    parser.add_argument("--update", choices=("none", "least-squares", "blockwise"), default="none")
    parser.add_argument("--training", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--bos", choices=BOS, default="auto", help="what windows begin with")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    print(f"{machine_now()}; windows: --bos {arguments.bos}", flush=True)
    results = []
    for solver in arguments.solver or ["wanda", "swap"]:
        command = [
            sys.executable, __file__, "--child", solver, "--blocks", str(arguments.blocks),
            "--samples", str(arguments.samples), "--sparsity", str(arguments.sparsity),
            "--threads", str(arguments.threads), "--bos", arguments.bos,
            "--update", arguments.update, "--holdout", str(arguments.holdout),
            *(word for how in arguments.training for word in ("--training", how)),
            *(["--start", arguments.start] if arguments.start else []),
            *(["--text", arguments.text] if arguments.text else []),
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.strip().split("\n")[-1]))
        print(results[-1], flush=True)
    if len(results) > 1:
        for key in ("wall", "cpu"):
            ratio = results[1][key] / results[0][key]
            print(f"{results[1]['solver']} / {results[0]['solver']}, {key}: {ratio:.2f}")


if __name__ == "__main__":
    main()

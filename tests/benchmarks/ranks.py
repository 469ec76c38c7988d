"""Several processes that prune some blocks of a demo model: what each sends and how evenly they work.

    torchrun --nproc-per-node 2 tests/benchmarks/ranks.py --calibration valid.txt
    torchrun --nproc-per-node 4 tests/benchmarks/ranks.py --calibration valid.txt --model smollm2

Bytes that a process receives, compared with the counts in large_models.csv of the results; and of every
process its tiles of the Gram matrices and its rows, as parts of an even share, and its seconds of solving.
"""

from __future__ import annotations

import argparse
import pickle
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from machine import machine_now
from torch import Tensor

from maskopt import prune_model
from maskopt.core.gram import TILE, Gram
from maskopt.demo import MODELS, demo_model
from maskopt.models.architecture.blocks import Layer
from maskopt.models.blockwise.collect import Grams
from maskopt.models.blockwise.distributed import Ranks, joined
from maskopt.models.blockwise.memory import distinct_inputs
from maskopt.models.pruning import prune_layer

T = TypeVar("T")


@dataclass(frozen=True)
class Counting(Ranks):
    """The same, with what comes in from others counted: `inputs` and tiles are tensors, all else `words`."""

    received: dict[str, int] = field(default_factory=lambda: {"tensors": 0, "words": 0})

    def send(self, tensor: Tensor, rank: int) -> None:
        if rank != self.rank:
            self.received["tensors"] += tensor.nbytes
        super().send(tensor, rank)

    def gathered(self, value: T) -> list[T]:
        found = super().gathered(value)
        others = (other for rank, other in enumerate(found) if rank != self.rank)
        self.received["words"] += sum(len(pickle.dumps(other)) for other in others)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--model", choices=list(MODELS), default="gemma3")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    args = parser.parse_args()
    with joined() as ranks, tempfile.TemporaryDirectory(prefix="maskopt-ranks-") as home:
        mine = Counting(ranks.rank, ranks.size)
        model = mine.agreed(lambda: demo_model(args.model))
        out = mine.agreed(lambda: Path(home) / "out")
        work = Work()
        work.watch()
        began = time.perf_counter()
        report = prune_model(
            model, calibration=args.calibration, output=out, sparsity=0.5, ranks=mine,
            samples=args.samples, seq_len=args.seq_len,
            include=[f"layers.{block}" for block in range(args.blocks)],
        )  # fmt: skip
        seconds = time.perf_counter() - began
        everybody = mine.gathered((mine.received, work))
        if mine.leads:
            tell(args, mine, report, everybody, seconds)


class Work:
    """What a process did: entries of Gram matrices that it summed, entries of weights and seconds of
    solving."""

    def __init__(self) -> None:
        self.summed = self.solved = 0
        self.seconds = 0.0

    def watch(self) -> None:
        share_out, solve_rows = Grams._share_out, prune_layer.solve_rows

        def shared(grams: Grams, gram: Gram) -> dict[int, int]:
            tiles = share_out(grams, gram)
            own = (tile for tile, rank in tiles.items() if rank == grams.ranks.rank)
            self.summed += sum(gram.tile(tile)[0].numel() for tile in own)
            return tiles

        def solved(job: Any, layer: Layer, grams: Grams, options: Any, rows: slice) -> Any:
            began = time.perf_counter()
            found = solve_rows(job, layer, grams, options, rows)
            self.seconds += time.perf_counter() - began
            self.solved += (rows.stop - rows.start) * layer.n**2
            return found

        Grams._share_out = shared  # type: ignore[method-assign, assignment]
        prune_layer.solve_rows = solved


def tell(
    args: argparse.Namespace,
    ranks: Ranks,
    report: Any,
    everybody: Sequence[tuple[dict[str, int], Work]],
    seconds: float,
) -> None:
    from maskopt.models.blockwise.job import open_job
    from maskopt.models.options.walk import WalkOptions

    include = tuple(f"layers.{block}" for block in range(args.blocks))
    layers = open_job(demo_model(args.model), None, WalkOptions(include=include)).layers
    inputs = [
        n
        for block in range(args.blocks)
        for n in distinct_inputs([layer for layer in layers if layer.block == block])
    ]
    tokens, others = args.samples * args.seq_len, 1 - 1 / ranks.size
    given = tokens * sum(inputs) * 4 * others
    tiles = sum(8 * _summed(n) for n in inputs) * others
    print(machine_now())
    print(f"{ranks.size} processes, {args.blocks} blocks, {seconds:.0f} s")
    print(
        f"received by a process, MiB, by the model: {given / 2**20:.1f} of inputs, "
        f"{tiles / 2**20:.1f} of tiles"
    )
    for rank, (received, work) in enumerate(everybody):
        even = [
            sum(getattr(w, name) for _, w in everybody) / ranks.size
            for name in ("summed", "solved")
        ]
        print(
            f"rank {rank}: received {received['tensors'] / 2**20:.1f} MiB of tensors and "
            f"{received['words'] / 2**20:.1f} MiB of all else; summed {work.summed / even[0]:.2f} and solved "
            f"{work.solved / even[1]:.2f} of an even share, in {work.seconds:.1f} s"
        )


def _summed(n: int) -> int:
    """Entries of a matrix's tiles."""
    return sum((min(start + TILE, n) - start) * (n - start) for start in range(0, n, TILE))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

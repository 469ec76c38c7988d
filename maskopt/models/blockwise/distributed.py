"""Several processes that work on one model: the work of each, and their communication.

Every rank walks through the blocks with windows of its own, sums tiles of its own of every Gram matrix, and
solves rows of its own; rank 0 writes. Sums are taken in the order of the windows and rows are solved in the
tiles of a single process, so the result does not depend on the number of ranks.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from maskopt.errors import MaskoptError, ModelError

T = TypeVar("T")

#: how long a rank waits for one that hangs; one that ends is noticed at once
PATIENCE = datetime.timedelta(hours=6)
#: rows that are solved together wherever ranks share rows: every solver of independent rows solves them in
#: tiles of this, or of a part of it
ROWS = 128


class LostRankError(ModelError):
    """Another process of the run ended, or does not answer."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from the one with this `rank`; by default there is one."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Does this one write and print?"""
        return self.rank == 0

    def own(self, windows: Sequence[int]) -> list[int]:
        """The windows of this rank."""
        return [window for window in windows if self.owner(window) == self.rank]

    def owner(self, window: int) -> int:
        """The rank of a window."""
        return window % self.size

    def waves(self, windows: Sequence[int], threads: int) -> Iterator[Sequence[int]]:
        """The windows, as many at a time as all ranks run at once."""
        for start in range(0, len(windows), threads * self.size):
            yield windows[start : start + threads * self.size]

    def parts(self, rows: int, order: Sequence[int] | None = None, tile: int = ROWS) -> list[slice]:
        """Rows of a layer by rank, in whole tiles; the first ranks in `order` get the tiles left over."""
        tiles = -(-rows // tile)
        each, more = divmod(tiles, self.size)
        one_more = (order or range(self.size))[:more]
        found, first = [], 0
        for rank in range(self.size):
            last = first + each + (rank in one_more)
            found.append(slice(min(first * tile, rows), min(last * tile, rows)))
            first = last
        return found

    def gathered(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _others_there():
            dist.all_gather_object(found, value)
        return found

    def agreed(self, make: Callable[[], T]) -> T:
        """The value that rank 0 makes, on all of them; or the error that it raises."""
        if self.size == 1:
            return make()
        message: list[Any] = [None, None]
        if self.leads:
            try:
                message[0] = make()
            except MaskoptError as error:
                message[1] = error
        with _others_there():
            dist.broadcast_object_list(message)
        if message[1] is not None:
            raise message[1]
        made: T = message[0]
        return made

    def send(self, tensor: Tensor, rank: int) -> None:
        """Fill the tensor with the data of `rank`."""
        if self.size == 1 or not tensor.numel():
            return
        whole = tensor.contiguous()
        with _others_there():
            dist.broadcast(whole.view(-1).view(torch.uint8), rank)
        if rank != self.rank and whole is not tensor:
            tensor.copy_(whole)


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun started: NCCL between GPUs, gloo between processors."""
    # Its functions have the world's group as a default: imported while there is one, as transformers does in
    # passing, it keeps the group and gloo's threads beyond the group's end, and one of them that lets go of a
    # tensor while the interpreter ends aborts the process.
    import torch.distributed.nn.functional

    local = int(os.environ.get("LOCAL_RANK", "0"))
    backend = "gloo"
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise ModelError(
                f"there are {torch.cuda.device_count()} GPUs for {local + 1} processes on this machine; "
                "start one for each"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"the processes do not find each other ({error}); start them by torchrun"
        ) from error
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@contextmanager
def _others_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what gloo and NCCL raise where a connection breaks
        raise LostRankError(
            "another process of this run ended or does not answer; start all of them again, a prune with "
            "`resume`, which goes on where its blocks are kept"
        ) from error

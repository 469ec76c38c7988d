"""Rows as jobs of their own, under the configured backend of joblib, and their keys."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import current_process
from typing import Any

import numpy as np
import torch
from joblib import Parallel, effective_n_jobs
from joblib.parallel import get_active_backend

from maskopt.core.limits import Limits
from maskopt.core.problem import LayerProblem, RowProblem
from maskopt.errors import OptionError, SolverError
from maskopt.protocol.solver import Solver

#: jobs at a time of a backend that gives no result before all are there
BATCH = 64


def workers(jobs: int | None) -> int:
    """How many jobs run at a time, of joblib's n_jobs (None: of its `parallel_config`); OptionError for 0."""
    if jobs == 0:
        raise OptionError("`jobs` is at least 1, or −1 for one a core")
    return int(effective_n_jobs(jobs))


def as_they_finish(calls: Sequence[Any], jobs: int | None) -> Iterator[Any]:
    """What `joblib.delayed` calls return, as they end; SolverError where a worker process was killed."""
    workers(jobs)
    here = os.getpid()
    calls = [(_job, (here, function, *given), named) for function, given, named in calls]
    backend, _ = get_active_backend()
    try:
        if backend.supports_return_generator:
            yield from Parallel(n_jobs=jobs, return_as="generator_unordered")(calls)
            return
        for first in range(0, len(calls), BATCH):  # Ray returns none before all are finished
            yield from Parallel(n_jobs=jobs)(calls[first : first + BATCH])
    except BrokenProcessPool:
        raise SolverError(
            "a worker process was killed, in most cases for want of memory; run fewer of them at a time, "
            "such as `jobs` 1"
        ) from None


def _job(asker: int, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """A call, in a process that ends with the one that asked for it."""
    if current_process().name.startswith("LokyProcess"):
        _end_with(asker)
    return function(*given, **named)


@functools.cache
def _end_with(parent: int) -> None:
    """End this process of joblib's when its parent has ended, since a killed parent stops no worker."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def job_key(row: RowProblem, name: str, solver: Solver, start: Any, limits: Limits) -> str:
    """Of a job: its row, the solver under its name, its start (a name, a value or a mask) and its limits."""
    digest = digest_of(row.as_layer(), 0)
    of_limits = [limits.seconds, limits.memory, limits.seed]
    text = [str(row.pattern), row.name, name, repr(solver), of_limits, _start_text(start)]
    digest.update(json.dumps(text).encode())
    return digest.hexdigest()[:20]


def digest_of(problem: LayerProblem, row: int) -> hashlib._Hash:
    """Of everything that a row's problem is but its pattern and its name."""
    digest = hashlib.sha256()
    tensors = {
        "weight": problem.weight[row].double(),
        "gram": problem.gram.double(),
        "correlation": problem.correlation[row],
        "constant": problem.constant[row],
        "mean": problem.mean,
        "variance": problem.variance,
    }
    for name, tensor in tensors.items():
        if tensor is not None:
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    digest.update(repr([problem.update, problem.integral, problem.units]).encode())
    return digest


def _start_text(start: Any) -> str:
    """A start in a job's key; a mask by all of its entries, most of which str() leaves out."""
    if isinstance(start, torch.Tensor) and start.dtype == torch.bool:
        start = start.cpu().numpy()
    if not isinstance(start, np.ndarray):
        return str(start)
    return f"{start.dtype} {start.shape} {hashlib.sha256(start.tobytes()).hexdigest()}"

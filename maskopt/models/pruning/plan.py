"""An estimate of a prune's memory, disk and time."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from maskopt.core.problem import LayerProblem
from maskopt.core.threads import fast_products, torch_threads
from maskopt.errors import MaskoptError, ModelError
from maskopt.models.architecture.blocks import Layer, vocabulary_size
from maskopt.models.architecture.source import Source
from maskopt.models.blockwise.job import Job, open_job
from maskopt.models.blockwise.memory import (
    Memory,
    check_memory,
    distinct_inputs,
    estimate_memory,
    hidden_size,
)
from maskopt.models.checkpoints.checkpoint import Checkpoint, resolve_model
from maskopt.models.checkpoints.report import grouped
from maskopt.models.checkpoints.result import disk_needed
from maskopt.models.checkpoints.workspace import check_inputs
from maskopt.models.options.prune import NONE, PruneOptions
from maskopt.models.options.walk import GRADIENT_WINDOWS, DistillOptions, options_by_name
from maskopt.models.pruning.bases import order_seconds
from maskopt.models.pruning.gram_store import prune_source
from maskopt.models.pruning.prune import check_prunable
from maskopt.models.pruning.prune_layer import solve_layer
from maskopt.models.training.tasks import disk_of_training

#: inputs of the small problem that the solver's speed is measured on, and its rows, more while they are fast
PROBE_N, PROBE_ROWS = 512, (2, 64, 256, 512)
#: seconds for each of these
PROBE_LIMIT = 5.0
#: part of its limit from which on a solver counts as cut off
CUT_OFF = 0.5
#: inputs from which on products of n³ operations take most of the time of updated weights
CUBIC = 4096
#: bytes of a small model's weights, and of a shard that are read and hashed for their speed
SMALL = PROBE_BYTES = 64 * 2**20
#: parts of the speed of a large matrix product that passes with Gram matrices, and training, reach, and
#: seconds to load the libraries: from runs of Gemma 3 270M on a CPU (docs/results/tables/commands.csv)
SHARE, TRAINED_SHARE, START = 0.6, 0.8, 5.0


class Distillation(NamedTuple):
    """What a distillation takes."""

    memory: Memory
    seconds: float
    disk: int


@dataclass(frozen=True)
class Plan:
    """The layers, memory, bytes on disk, and seconds by stage (None: not estimated).

    Attributes:
        pruned: weights that will be pruned, by layer name.
        refusal: why the prune would not start for want of memory, or None.
        distillation: its part of the other fields; None without one.
    """

    layers: Sequence[Layer]
    pruned: dict[str, int]
    memory: Memory
    forward_seconds: float
    solve_seconds: float | None
    file_seconds: float
    disk: int
    refusal: ModelError | None = None
    distillation: Distillation | None = None

    @property
    def seconds(self) -> float | None:
        if self.solve_seconds is None:
            return None
        return START + self.forward_seconds + self.solve_seconds + self.file_seconds


def is_small(model: str | Path) -> bool:
    """Whether a prune takes about as long as the measurements for a plan."""
    shards = resolve_model(model).glob("*.safetensors")
    return sum(shard.stat().st_size for shard in shards) < SMALL


def plan_prune(
    model: nn.Module | str | Path,
    tokens: Any = None,
    options: PruneOptions | None = None,
    *,
    grams: str | Path | None = None,
    output: str | Path | None = None,
    **shorthand: Any,
) -> Plan:
    """Memory, disk and time of `prune_model` with the same arguments, `tokens` int64 [samples, length].
    Nothing is written. Times come from three short measurements: a matrix product, the solver on a small
    layer, and reading a piece of the weights. Raises what the prune itself would refuse, but for want of
    memory."""
    options, store = prune_source(grams, options, shorthand)
    if store is not None and tokens is not None:
        raise ModelError(
            "pruning needs `calibration` text or tokens, or `grams`; name one of the two"
        )
    job = open_job(model, tokens, replace(options, max_memory=None))
    check_prunable(job, store)
    if output is not None and job.source.checkpoint is not None:
        check_inputs(Path(output), model=job.source.checkpoint.folder, grams=grams)
    refusal = distillation = None
    layers, checkpoint = job.layers, job.source.checkpoint
    loads = [job.load]
    if options.distilled is not None:
        loads.append(replace(job.load, together=True))
    if options.max_memory is not None:
        try:
            for load in loads:
                job.activation_memory = check_memory(load, int(options.max_memory))
        except ModelError as error:
            refusal = error
    disk = 0 if checkpoint is None else disk_needed(checkpoint, options.update != NONE)
    with torch_threads(job.threads):
        if (how := options.distilled) is not None:
            distillation = _distillation(job, how)
            disk += distillation.disk
        seconds = 0.0 if store is not None else _pass_seconds(job, options)
        return Plan(
            layers=layers,
            pruned={x.name: options.pattern_of(x.name, x.n).pruned_in(x.rows, x.n) for x in layers},
            memory=max(map(estimate_memory, loads), key=lambda memory: memory.peak),
            forward_seconds=seconds + (distillation.seconds if distillation else 0.0),
            solve_seconds=_solve_seconds(job, options),
            file_seconds=0.0 if checkpoint is None else _file_seconds(checkpoint),
            disk=disk,
            refusal=refusal,
            distillation=distillation,
        )


def plan_distill(pruned: str | Path, tokens: Any = None, **shorthand: Any) -> Distillation:
    """Memory, disk and time of `distill_model` with the same arguments, as `plan_prune`."""
    options = options_by_name(DistillOptions, None, shorthand)
    job = open_job(pruned, tokens, replace(options.walk, max_memory=None))
    assert job.source.checkpoint is not None
    with torch_threads(job.threads):
        found = _distillation(job, options)
    return found._replace(disk=found.disk + disk_needed(job.source.checkpoint))


def _distillation(job: Job, how: DistillOptions) -> Distillation:
    """What training all layers together takes, on the windows of the job, with a pass through the dense
    model."""
    passes = how.epochs * (3 * (1 - how.holdout) + how.holdout) + 2 * how.holdout
    blocks, head = _pass_operations(job), 2.0 * _head_operations(job)
    operations = (1 + passes) * blocks + passes * head
    return Distillation(
        estimate_memory(replace(job.load, together=True, recompute=how.recompute)),
        operations * job.count * job.length / (TRAINED_SHARE * _speed(job.source, torch.float32)),
        disk_of_training(sum(x.rows * x.n for x in job.layers), how),
    )


def _pass_seconds(job: Job, options: PruneOptions) -> float:
    """Seconds of forward passes and Gram matrices, in the model's dtype; and of training, in float32: epochs,
    targets, losses, and the inputs of parts."""
    source, how = job.source, options.reconstruction
    dtype = next(source.model.parameters()).dtype
    seconds = _forward_operations(job, options) / (SHARE * _speed(source, dtype))
    if how is not None:
        passes = (3 * (1 - options.holdout) + options.holdout) * how.epochs + 3
        trained = passes * _pass_operations(job, grouped(job.layers, "block"))
        speed = TRAINED_SHARE * _speed(source, torch.float32)
        seconds += trained * job.count * job.length / speed
    return seconds


def _pass_operations(job: Job, indices: Iterable[int] | None = None) -> float:
    """Operations of a forward pass through blocks (None: all), a token: two a weight, and attention's two
    products."""
    blocks = job.source.blocks.modules
    chosen = list(blocks) if indices is None else [blocks[index] for index in indices]
    weights = sum(p.numel() for block in chosen for p in block.parameters())
    return 2.0 * weights + len(chosen) * 4 * job.length * hidden_size(job.source.model)


def _head_operations(job: Job) -> float:
    """Operations of the logits of a token."""
    return 2.0 * vocabulary_size(job.source.model) * hidden_size(job.source.model)


def _forward_operations(job: Job, options: PruneOptions) -> float:
    """Operations of all forward passes and Gram matrices, n² a token each, and of the loss's gradients."""
    chosen = grouped(job.layers, "block")
    total = 0.0
    for index in range(job.last + 1):
        mine = chosen.get(index, [])
        distinct = distinct_inputs(mine)
        passes = 1.0 if options.reconstruction is None else 2.0
        if mine and not options.one_pass:
            passes += len(distinct) if options.true_sequential else 1
            if mine[-1].expert is None:  # its product is not needed once its inputs are seen
                total -= 2 * mine[-1].rows * mine[-1].n
        if options.layers_differ and not options.counts:  # once more through the dense model
            passes += min(GRADIENT_WINDOWS, job.count) / job.count
        passes += options.transform != NONE  # through the dense model, too
        total += passes * _pass_operations(job, [index]) + sum(n * n for n in distinct)
    gradients = 4.0 * _pass_operations(job) + 2 * _head_operations(job)
    return (total * job.count + options.gradient_windows(job.count) * gradients) * job.length


def _speed(source: Source, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product."""
    a = torch.rand(1024, 1024, device=source.device).to(dtype)

    def timed(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            product = a @ a
        float(product[0, 0])  # waits for a device that runs on its own
        return time.perf_counter() - began

    with fast_products():
        timed(2)
        count = 2
        while (seconds := timed(count)) < 0.3:
            count *= 2
    return count * 2 * 1024**3 / seconds


def _solve_seconds(job: Job, options: PruneOptions) -> float | None:
    """Seconds of a small random layer, scaled by rows·n²; None where it cannot be solved in time."""
    generator, layers = torch.Generator().manual_seed(0), job.layers
    n, device = PROBE_N, job.source.device
    given = options.solver_options.get("time_limit")
    longest = math.inf if given is None else float(given)
    patience = min(longest, PROBE_LIMIT)
    probing = replace(options, solver_options={**options.solver_options, "time_limit": patience})

    def timed(rows: int) -> float:
        weight = torch.randn(rows, n, generator=generator).to(device)
        problem = LayerProblem(
            weight, gram, options.pattern, update=options.least_squares, assume_psd=True
        )
        return sum(found.seconds for found in solve_layer(problem, probing) if found is not None)

    try:
        options.pattern.check(n)
        x = torch.randn(2 * n, n, generator=generator)
        gram = (x.T @ x / (2 * n)).to(device)
        timed(PROBE_ROWS[0])  # compiles what has to be compiled
        measured = None
        for rows in PROBE_ROWS:
            seconds = timed(rows)
            if seconds >= CUT_OFF * patience:
                break
            measured = seconds, rows
            if seconds > 1.0:
                break
    except MaskoptError:
        return None
    if measured is None:
        return longest * len(layers) if math.isfinite(longest) else None

    def work(rows: int, n: int) -> float:
        return rows * n**2 * (1.0 if options.least_squares is None else 1 + n / CUBIC)

    seconds, rows = measured
    unit = seconds / work(rows, n)
    solving = sum(min(longest, unit * work(layer.rows, layer.n)) for layer in layers)
    return solving + order_seconds(job, options)


def _file_seconds(checkpoint: Checkpoint) -> float:
    """Time for the shards: read twice, written once, hashed both times."""
    shard = max(checkpoint.shards.values(), key=lambda shard: shard.path.stat().st_size)
    began = time.perf_counter()
    with shard.path.open("rb") as file:
        data = file.read(PROBE_BYTES)
    hashlib.sha256(data)
    seconds = time.perf_counter() - began
    total = sum(shard.path.stat().st_size for shard in checkpoint.shards.values())
    return 3 * total * seconds / max(len(data), 1)

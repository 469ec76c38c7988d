"""Make a model smaller: whole blocks first, then channels and attention heads, block by block.

    choose  the blocks to remove, by the output of the dense model (`structured.blocks`)
    for every block that stays:
        grams   of the inputs of the consumers (down_proj, o_proj), from the pruned blocks before
        choose  the structures whose removal changes the consumer's output least (`instances.structure`)
        update  the consumer's kept weights by least squares
        advance the windows through the block, the removed columns being zero

The walk, its journal and its resumption are those of a prune, with columns of zeros; only what is written is
smaller.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from maskopt.core.limits import Limits
from maskopt.core.problem import RowProblem
from maskopt.errors import ModelError, OptionError
from maskopt.instances.structure import change, refit_inputs, structure_problem
from maskopt.models.architecture.blocks import Layer, matrix
from maskopt.models.architecture.source import FolderSource, as_stored
from maskopt.models.architecture.structures import (
    CHANNEL,
    Change,
    Structures,
    block_settings,
    renumbered,
    structure_cuts,
    structure_settings,
    structures_of,
    without_blocks,
)
from maskopt.models.blockwise.collect import Grams
from maskopt.models.blockwise.forward import OnBlockProgress
from maskopt.models.blockwise.job import Block, Job
from maskopt.models.checkpoints.report import LayerReport, PruneReport
from maskopt.models.checkpoints.result import MaskFile, unpack
from maskopt.models.checkpoints.schema import MASKS, STRUCTURES
from maskopt.models.options.structured import ShrinkOptions
from maskopt.models.options.walk import (
    EVALUATION,
    WalkOptions,
    check_size,
    default_start,
    options_by_name,
)
from maskopt.models.pruning.output import BlockResult, FolderResults, LayerResult
from maskopt.models.pruning.run import Run, fingerprint_of
from maskopt.models.structured.blocks import choose_blocks, leave_out
from maskopt.models.structured.change import check_shapes, finish_smaller, open_original
from maskopt.protocol.bounds import lower_bound
from maskopt.protocol.solution import Solution, Status
from maskopt.protocol.solver import solve

#: heads and groups are few: their choice is proven
_EXACT = "branch"
#: of the bound of a choice that is not
_BOUND = "sdp"
_BOUND_SECONDS = 60.0
#: options of the walk that scores blocks
_SCORING = (*EVALUATION, "max_memory")
#: what it means if the written model computes something else
_WHY = "what was removed does more in this family than pass through the layer that takes it"


def shrink_model(
    model: str | Path,
    tokenizer_or_tokens: Any = None,
    options: ShrinkOptions | None = None,
    *,
    output: str | Path,
    calibration: Any = None,
    overwrite: bool = False,
    resume: bool = False,
    on_progress: OnBlockProgress | None = None,
    **shorthand: Any,
) -> PruneReport:
    """Write a smaller copy of a model folder, which `from_pretrained` loads.

    Some MLP channels and attention heads are removed from every block, after `blocks` whole blocks. All
    blocks are cut to the same sizes, since configurations name one width.

    Args:
        model: a folder, or a name on the hub; `tokenizer_or_tokens` and `calibration` as for `prune_model`.
        shorthand: single options by name, with or without `options`: `channels=0.25, heads=0.25`.
        resume: go on with an interrupted run of the same options.

    Returns:
        A report with a `LayerReport` for every consumer (`down_proj`, `o_proj`). Its bound and statuses are
        of the choice with unchanged weights (`error_kept`); `error` is that of the written weights.

    Raises:
        MaskoptError: a family whose blocks or configuration are not known, or what `prune_model` refuses.
    """
    began = time.perf_counter()
    options = options_by_name(ShrinkOptions, options, shorthand)
    inputs = {"model": model, "calibration": calibration}
    run = Run(output, overwrite=overwrite, resume=resume, **inputs)
    whole, source = open_original(
        model, tokenizer_or_tokens, calibration, options.walk, "shrinking", on_progress=on_progress
    )
    every = _structures_of(source, options)
    settings: dict[str, Any] = dict(structure_settings(source.model, every))
    _check_family(source, settings, every, [])
    record = options.record()
    removed = run.recorded("removed", {**record, "removed": None}) if options.blocks else []
    if removed is None:
        removed = _choose_blocks(model, whole, tokenizer_or_tokens, calibration, options)
    record["removed"] = removed
    every = [one for one in every if one.consumer.block not in removed]
    names: Mapping[str, str | None] = {}
    if removed:
        settings |= block_settings(source.blocks, source.checkpoint.config, removed)
        _check_family(source, settings, every, removed)
        names = without_blocks(source.conversion, source.blocks, settings, removed).names
    layers = [one.consumer for one in every]
    job = Job(source, layers, whole.windows, options.walk, on_progress=whole.tell)
    source.blocks.check_unshared(job.layers)
    cuts = structure_cuts(source.conversion, every)
    results = FolderResults(job, run, shards=False)
    fingerprint = fingerprint_of(job, record)
    if (finished := run.finished_report(fingerprint)) is not None:
        return finished
    with results.opened(fingerprint) as folder, torch.no_grad():
        with job:
            for block in job.blocks(dict(results.blocks), folder):
                if block.index in removed:
                    leave_out(block)
                    continue
                solve = partial(_shrink, block, {one.consumer.name: one for one in every}, options)
                results.keep(block, BlockResult.of(block, solve))
        report, edits = results.report(fingerprint, STRUCTURES), results.edits()
        done = {i: dataclasses.replace(one, bad=[]) for i, one in results.stored_blocks().items()}
        change = Change(settings, names, cuts, _kept(source, every, edits.masks))

        def skip_removed(block: Block) -> None:
            if block.index in removed:
                leave_out(block)

        how: dict[str, Any] = {"edits": edits, "finished": done, "prepare": skip_removed}
        finish_smaller(job, run, change, report, _WHY, **how)
    return dataclasses.replace(report, seconds=time.perf_counter() - began)


def _choose_blocks(
    model: str | Path,
    walk: Job,
    tokenizer_or_tokens: Any,
    calibration: Any,
    options: ShrinkOptions,
) -> list[int]:
    """Return the blocks to remove, chosen on the first windows of the text."""
    scoring = WalkOptions(**{name: getattr(options, name) for name in _SCORING})
    how: Any = {"whole": True, "limit": options.windows, "on_progress": walk.tell}
    given = (model, tokenizer_or_tokens, calibration, scoring, "removing blocks")
    job, source = open_original(*given, **how)
    with tempfile.TemporaryDirectory(prefix="maskopt-") as folder:
        return choose_blocks(job, source, options.blocks, Path(folder)).removed


def _structures_of(source: FolderSource, options: ShrinkOptions) -> list[Structures]:
    """Of all blocks, in the order of the model; MaskoptError where they cannot be chosen or updated."""
    folder = source.checkpoint.folder
    if options.how is not None and (folder / MASKS).exists():
        raise OptionError(
            f"{folder}: was pruned, and least squares would fill its zeros; shrink the "
            "original and prune what comes of it, or take `update` none"
        )
    found = structures_of(source.blocks, options.channels, options.heads, options.round_to)
    start = default_start(options.solver)
    for one in (x for x in found if x.unit == CHANNEL):
        check_size(options.solver, options.solver_options, start, one.count, one.pattern)
    return found


def _shrink(
    block: Block,
    by_consumer: Mapping[str, Structures],
    options: ShrinkOptions,
    layers: Sequence[Layer],
    grams: Grams,
) -> Iterator[LayerResult]:
    """Choose the structures of consumers, and change their weights in the model accordingly."""
    source = block.job.source
    for layer in layers:
        structures, gathered = by_consumer[layer.name], grams.of(layer.name)
        if gathered is None:
            raise ModelError(f"layer {layer.name!r} saw no token")
        weight, gram = matrix(source.model, layer), gathered.value()
        dense = weight.detach().float().clone()
        began = time.perf_counter()
        of_input = structures.groups.to(dense.device)
        groups = None if structures.count == layer.n else of_input
        how: dict[str, Any] = {"groups": groups, "mean": gathered.moments()[0], "name": layer.name}
        problem = structure_problem(dense, gram, structures.pattern, **how)
        solution, bound = _chosen(problem, structures, options)
        kept = solution.mask[0][of_input]
        new = None
        if options.how is not None:
            new = as_stored(source, layer, refit_inputs(dense, gram, kept, options.how))
        seconds = time.perf_counter() - began
        left = torch.where(kept, dense, 0.0) if new is None else new
        error_kept = float(solution.objective)
        held_out = None if grams.held is None else grams.held.of(layer.name)
        held = None if held_out is None else held_out.value()
        report = LayerReport(
            name=layer.name,
            block=layer.block,
            kind=layer.kind,
            rows=layer.rows,
            n=layer.n,
            pattern=f"{structures.kept} of {structures.count} {structures.unit}s",
            pruned=layer.rows * int((~kept).sum()),
            error=error_kept if new is None else float(change(left, dense, gram).sum()),
            lower_bound=bound,
            statuses={str(solution.status[0]): layer.rows},
            tokens=gathered.tokens,
            fallback=False,
            seconds=seconds,
            energy=float(change(0 * dense, dense, gram).sum()),
            error_kept=None if new is None else error_kept,
            damping=None if options.how is None else options.how.damping,
            error_held=None if held is None else float(change(left, dense, held).sum()),
            energy_held=None if held is None else float(change(0 * dense, dense, held).sum()),
        )
        weight.copy_(left)
        mask = kept.expand(layer.rows, layer.n).cpu()
        yield layer, report, mask, None if new is None else new.cpu()


def _chosen(
    problem: RowProblem, structures: Structures, options: ShrinkOptions
) -> tuple[Solution, float]:
    """The solution of the options' solver, for heads a proven one; and the best known bound."""
    limits = Limits(seed=options.seed, threads=options.threads)
    if structures.unit != CHANNEL:
        solution = solve(problem, _EXACT, limits=limits)
    else:
        start = default_start(options.solver)
        solution = solve(
            problem, options.solver, start=start, limits=limits, **options.solver_options
        )
    bound = float(solution.raise_if_interrupted().lower_bound)
    if options.certify and solution.status[0] is not Status.OPTIMAL:
        found = lower_bound(problem, _BOUND, time_limit=_BOUND_SECONDS, seed=options.seed)
        bound = max(bound, float(found.value))
    return solution, bound


def _kept(
    source: FolderSource, every: Sequence[Structures], masks: Mapping[str, MaskFile]
) -> dict[str, Bool[Tensor, " m"]]:
    """The structures that stay, by consumer: all rows of a mask are equal."""
    found = {}
    for one in every:
        tensor = source.conversion.sources(one.consumer.parameter)[0]
        columns = unpack(masks[tensor].packed(tensor), 0, one.consumer.n)
        stays = torch.zeros(one.count, dtype=torch.bool)
        stays[one.groups[columns]] = True
        found[one.consumer.name] = stays
    return found


def _check_family(
    source: FolderSource,
    settings: Mapping[str, Any],
    every: Sequence[Structures],
    removed: Sequence[int],
) -> None:
    """Compare the model that the new configuration describes with what is left; as `check_shapes`."""
    sizes: dict[str, dict[int, int]] = {}
    for one in every:
        some = torch.arange(one.count) < one.kept  # the shapes depend on their number alone
        for name, cut in one.cuts.items():
            sizes.setdefault(name, {})[cut.axis] = len(cut.inside(some))
    check_shapes(source, settings, sizes, lambda x: renumbered(x, source.blocks.name, removed))

"""Make a model smaller: whole channels and attention heads are removed, block by block.

    for every block:
        grams   of what the consumers (down_proj, o_proj) are given by the model as it is by then
        choose  the structures whose removal changes the consumer's output least (`maskopt.core.structure`)
        refit   the consumer's kept weights, so that they take over from the removed ones
        advance the windows through the block, the removed columns being zero

A column of zeros is what no column is: so the walk, its journal and its resumption are those of a prune, and
only what is written at the end is smaller.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskopt.core.limits import Limits
from maskopt.core.problem import RowProblem
from maskopt.core.structure import change, refit_inputs, structure_problem
from maskopt.errors import ModelError, OptionError
from maskopt.models.architecture.blocks import Layer, matrix
from maskopt.models.architecture.source import FolderSource, as_stored
from maskopt.models.architecture.structures import CHANNELS, Structures, channels_of, heads_of
from maskopt.models.blockwise.collect import Grams
from maskopt.models.blockwise.job import Block, Job, open_job
from maskopt.models.blockwise.progress import OnBlockProgress
from maskopt.models.blockwise.windows import tokens_or_tokenizer
from maskopt.models.checkpoints.report import LayerReport, PruneReport
from maskopt.models.checkpoints.workspace import MASKS, check_inputs
from maskopt.models.options.solver import check_size, default_start
from maskopt.models.options.structured import ShrinkOptions
from maskopt.models.options.walk import options_by_name
from maskopt.models.pruning.fingerprint import fingerprint_of
from maskopt.models.pruning.output import finished_report
from maskopt.models.pruning.peak import peaks
from maskopt.models.structured.output import ShrinkRun
from maskopt.models.structured.reduced import check_family, new_settings, stored_cuts
from maskopt.models.structured.rewritten import rewritable
from maskopt.protocol.bounds import lower_bound
from maskopt.protocol.solution import Solution, Status
from maskopt.protocol.solver import solve

#: heads and groups are few: their choice is proven
_EXACT = "branch"
#: of the bound of a choice that is not
_BOUND = "sdp"
_BOUND_SECONDS = 60.0


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
    """Write a smaller copy of a model folder, without some of its MLP channels and attention heads.

    What is written is an ordinary folder that `from_pretrained` loads: fewer rows and columns, another
    config.json. All blocks are cut alike, since configurations name one width.

    Args:
        model: a folder, or a name on the hub.
        tokenizer_or_tokens: as for `prune_model`.
        calibration: as for `prune_model`.
        options: what to remove, and how.
        shorthand: single options by name, with or without `options`: `channels=0.25, heads=0.25`.
        resume: go on with an interrupted run of the same options.

    Returns:
        A report with a `LayerReport` for every consumer (`down_proj`, `o_proj`). Its bound and statuses are
        of the choice with the weights as they are (`error_kept`); `error` is that of the written weights.

    Raises:
        MaskoptError: a family whose blocks or configuration are not known, or what `prune_model` refuses.
    """
    began = time.perf_counter()
    if resume and overwrite:
        raise ModelError("`resume` goes on with what `overwrite` drops; choose one")
    options = options_by_name(ShrinkOptions, options, shorthand)
    text, tokenizer = tokens_or_tokenizer(tokenizer_or_tokens, calibration)
    if text is None:
        raise ModelError("shrinking needs `calibration` text or tokens; name a source of text")
    check_inputs(Path(output), model=model, calibration=calibration)
    whole = open_job(model, text, options, tokenizer=tokenizer, on_progress=on_progress)
    source = rewritable(whole)
    if options.how is not None and (source.checkpoint.folder / MASKS).exists():
        raise OptionError(
            f"{source.checkpoint.folder}: was pruned, and least squares would fill its zeros; shrink the "
            "original and prune what comes of it, or take `update` none"
        )
    every = find_structures(source, options)
    start = default_start(options.solver)
    for one in every:
        if one.kind == CHANNELS:
            check_size(options.solver, options.solver_options, start, one.count, one.pattern)
    settings = new_settings(source, every)
    check_family(source, settings, every)
    by_layer = {one.consumer.name: one for one in every}
    job = Job(
        source, [one.consumer for one in every], whole.windows, options, on_progress=whole.tell
    )
    source.blocks.check_unshared(job.layers)
    run = ShrinkRun(
        source,
        every,
        stored_cuts(source, every),
        settings,
        Path(output),
        overwrite=overwrite,
        resume=resume,
    )
    fingerprint = fingerprint_of(job, options.record())
    if resume and (finished := finished_report(Path(output), fingerprint)) is not None:
        return finished
    with run.opened(fingerprint), torch.no_grad():
        with job:
            layers, bad = _shrink_blocks(job, options, by_layer, run)
        seconds, memory = time.perf_counter() - began, peaks(source.device)
        report = PruneReport(layers, fingerprint, bad, {}, Path(output), seconds, (), memory)
        run.finish_smaller(job, report)
    return dataclasses.replace(report, seconds=time.perf_counter() - began)


def find_structures(source: FolderSource, options: ShrinkOptions) -> list[Structures]:
    """Of all blocks, in the order of the model."""
    found: list[Structures] = []
    for index in range(len(source.blocks)):
        if options.heads:
            found.append(heads_of(source.blocks, index, options.heads))
        if options.channels:
            found.append(channels_of(source.blocks, index, options.channels, options.round_to))
    return found


def _shrink_blocks(
    job: Job, options: ShrinkOptions, by_layer: Mapping[str, Structures], run: ShrinkRun
) -> tuple[list[LayerReport], list[dict[str, Any]]]:
    """The main loop; see the module's docstring."""
    finished = {i: done for i in range(job.last + 1) if (done := run.done(i)) is not None}
    reports = {index: done.layers for index, done in finished.items()}
    bad = {index: done.bad for index, done in finished.items()}
    for block in job.blocks(finished, run.activation_folder()):
        results: dict[str, LayerReport] = {}
        masks: dict[str, tuple[Layer, Tensor]] = {}
        weights: dict[str, tuple[Layer, Tensor]] = {}
        for layers, grams in block.rounds():
            tick = block.ticker("solve", len(layers))
            for layer in layers:
                report, mask, new = _shrink_layer(block, by_layer[layer.name], grams, options)
                results[layer.name] = report
                masks[layer.name] = layer, mask
                if new is not None:
                    weights[layer.name] = layer, new
                tick(1, report)
            del grams  # the next pass needs their memory
        block.advance()
        reports[block.index] = [results[layer.name] for layer in block.layers]
        bad[block.index] = [dataclasses.asdict(sample) for sample in block.bad]
        run.add(block.index, reports[block.index], (), bad[block.index], masks, weights, {})
    order = sorted(reports)
    return [r for i in order for r in reports[i]], [b for i in order for b in bad[i]]


def _shrink_layer(
    block: Block, structures: Structures, grams: Grams, options: ShrinkOptions
) -> tuple[LayerReport, Tensor, Tensor | None]:
    """Choose the structures of one consumer, and make of it in the model what is left.

    Returns:
        (report, mask [rows, n], new weights float64 [rows, n] where they were refitted).
    """
    layer, source = structures.consumer, block.job.source
    gathered = grams.of(layer.name)
    if gathered is None:
        raise ModelError(f"layer {layer.name!r} saw no token")
    weight, gram = matrix(source.model, layer), gathered.value()
    dense = weight.detach().float().clone()
    began = time.perf_counter()
    of_input = structures.groups.to(dense.device)
    problem = structure_problem(
        dense,
        gram,
        structures.pattern,
        groups=None if structures.count == layer.n else of_input,
        mean=gathered.mean(),
        name=layer.name,
    )
    solution, bound = _chosen(problem, structures, options)
    kept = solution.mask[0][of_input]
    new = None
    if options.how is not None:
        new = as_stored(source, layer, refit_inputs(dense, gram, kept, options.how))
    seconds = time.perf_counter() - began
    mask = kept.expand(layer.rows, layer.n)
    left = torch.where(kept, dense, 0.0) if new is None else new
    error_kept = float(solution.objective)
    error_held, energy_held = _held_out(layer, grams, dense, left)
    report = LayerReport(
        name=layer.name,
        block=layer.block,
        kind=layer.kind,
        rows=layer.rows,
        n=layer.n,
        pattern=f"{structures.kept} of {structures.count} {structures.unit}s",
        pruned=int((~mask).sum()),
        error_start=None,
        error=error_kept if new is None else float(change(left, dense, gram).sum()),
        lower_bound=bound,
        statuses={str(solution.status[0]): layer.rows},
        tokens=gathered.tokens,
        fallback=False,
        seconds=seconds,
        energy=float(change(0 * dense, dense, gram).sum()),
        error_kept=None if new is None else error_kept,
        damping=None if options.how is None else options.how.damping,
        error_held=error_held,
        energy_held=energy_held,
    )
    weight.copy_(left)
    return report, mask.cpu(), None if new is None else new.cpu()


def _chosen(
    problem: RowProblem, structures: Structures, options: ShrinkOptions
) -> tuple[Solution, float]:
    """The solution of the options' solver, of heads a proven one; and the best bound that is known."""
    limits = Limits(seed=options.seed, threads=options.threads)
    if structures.kind != CHANNELS:
        solution = solve(problem, _EXACT, limits=limits)
    else:
        start = default_start(options.solver)
        solution = solve(
            problem, options.solver, start=start, limits=limits, **options.solver_options
        )
    bound = float(solution.uninterrupted().lower_bound)
    if options.certify and solution.status[0] is not Status.OPTIMAL:
        found = lower_bound(problem, _BOUND, time_limit=_BOUND_SECONDS, seed=options.seed)
        bound = max(bound, float(found.value))
    return solution, bound


def _held_out(
    layer: Layer, grams: Grams, dense: Tensor, new: Tensor
) -> tuple[float | None, float | None]:
    """Error and energy on the windows kept aside; None where there are none."""
    aside = None if grams.held is None else grams.held.of(layer.name)
    if aside is None:
        return None, None
    gram = aside.value()
    return float(change(new, dense, gram).sum()), float(change(0 * dense, dense, gram).sum())

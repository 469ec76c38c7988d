"""Prune a causal language model block by block.

The main loop is `_prune_blocks`: for every decoder block, the Gram matrices of its layers' inputs; hand
each layer to a solver; set what the mask prunes to zero; send the samples through the pruned block and
go on with its outputs. It is the same for a model in memory and for a folder of which one block at a
time is in memory, and it never knows which solver runs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskopt.errors import ModelError
from maskopt.model.blocks import Layer, matrix
from maskopt.model.collect import Grams
from maskopt.model.job import Job, open_job
from maskopt.model.options import AUTO, PruneOptions, prune_options
from maskopt.model.output import Run, finished_report
from maskopt.model.problems import held_problem, layer_problem
from maskopt.model.progress import OnBlockProgress
from maskopt.model.report import LayerReport, PruneReport, versions
from maskopt.model.solving import solve_by_held_error, solve_by_magnitude, solve_layer
from maskopt.model.windows import tokens_or_tokenizer
from maskopt.problem import LayerProblem


def prune_model(
    model: nn.Module | str | Path,
    tokenizer_or_tokens: Any = None,
    options: PruneOptions | None = None,
    *,
    calibration: str | Path | Sequence[Any] | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    on_progress: OnBlockProgress | None = None,
    **shorthand: Any,
) -> PruneReport:
    """Prune every linear layer in the decoder blocks of a causal language model.

    `prune_model(model, tokens, PruneOptions(Unstructured(sparsity=0.5), samples=64))` and
    `prune_model(model, tokens, sparsity=0.5, samples=64)` are the same.

    Args:
        model: a model in memory, which is changed in place; or a model folder (or a name on the
            hub), which is read block by block and left as it is: `output` is then needed.
        tokenizer_or_tokens: a tokenizer (text comes from `calibration`), or calibration tokens
            int64 [samples, length]; None takes the tokenizer of the model folder.
        options: how to prune; `help(maskopt.PruneOptions)` lists all options.
        calibration: see `maskopt.model.text.read_documents`; a list of strings is taken as
            documents, a `.npy` file as tokens. With the option `chat`, conversations: see
            `maskopt.model.chat.read_conversations`.
        output: folder for the pruned model, its masks and its manifest.
        overwrite: replace what is in the output folder.
        resume: go on with the unfinished run in it.
        on_progress: called with `BlockProgress`.
        shorthand: single options by name, with or without `options`; `sparsity=0.5` is short for
            `pattern=Unstructured(sparsity=0.5)`.

    Raises:
        MaskoptError: with one line that names the thing and the remedy. A model in memory keeps
            the blocks that were pruned before an error; an output folder is not half-written.
    """
    began = time.perf_counter()
    options = prune_options(options, shorthand)
    if resume and overwrite:
        raise ModelError("`resume` goes on with what `overwrite` drops; choose one")
    text, tokenizer = tokens_or_tokenizer(tokenizer_or_tokens, calibration)
    if text is None:
        raise ModelError("pruning needs `calibration` text or tokens; name a source of text")
    target = None if output is None else Path(output)
    job = open_job(model, text, options, tokenizer=tokenizer, on_progress=on_progress)
    job.source.blocks.check_unshared(job.layers)
    run = job.source.start_run(
        job.layers, target, tokenizer=tokenizer, overwrite=overwrite, resume=resume
    )
    fingerprint = _fingerprint(job, options)
    if resume and target is not None:
        finished = finished_report(target, fingerprint)
        if finished is not None:
            return finished
    with run.opened(fingerprint), torch.no_grad():
        with job:
            layers, bad = _prune_blocks(job, options, run)
        seconds = time.perf_counter() - began
        report = PruneReport(layers, fingerprint, bad, run.masks, target, seconds)
        run.finish(report, options.pattern)
    return dataclasses.replace(report, seconds=time.perf_counter() - began)


def _prune_blocks(
    job: Job, options: PruneOptions, run: Run
) -> tuple[list[LayerReport], list[dict[str, Any]]]:
    """The main loop; see the module's docstring. Layer reports in the order of the model, and the
    samples that were left out."""
    finished = {i: done for i in range(job.last + 1) if (done := run.done(i)) is not None}
    reports = {index: done.layers for index, done in finished.items()}
    bad = {index: done.bad for index, done in finished.items()}
    for block in job.blocks(finished, run.activation_folder()):
        results: dict[str, LayerReport] = {}
        masks: dict[str, tuple[Layer, Tensor]] = {}
        for layers, grams in block.rounds():
            tick = block.ticker("solve", len(layers))
            for layer in grams.neighbours(layers):
                results[layer.name], mask = _prune_layer(job, layer, grams, options)
                masks[layer.name] = layer, mask
                tick(1)
            del grams  # the next pass needs their memory
        block.advance()
        reports[block.index] = [results[layer.name] for layer in block.layers]
        bad[block.index] = [dataclasses.asdict(sample) for sample in block.bad]
        ordered = {layer.name: masks[layer.name] for layer in block.layers}
        run.add(block.index, reports[block.index], bad[block.index], ordered)
    order = sorted(reports)
    return [r for i in order for r in reports[i]], [b for i in order for b in bad[i]]


def _prune_layer(
    job: Job, layer: Layer, grams: Grams, options: PruneOptions
) -> tuple[LayerReport, Tensor]:
    """Solve one layer and set what its mask prunes to zero in the model."""
    weight = matrix(job.source.model, layer)
    gram = grams.of(layer.name)
    tokens = 0 if gram is None else gram.tokens
    fallback = tokens < options.min_tokens
    dense = weight.detach().float()
    used = None if fallback else gram

    def at(alpha: float) -> LayerProblem:
        return layer_problem(layer, dense, used, options.pattern, alpha, grams.moved(layer.name))

    judge = held_problem(layer, dense, grams, options.pattern)
    began = time.perf_counter()
    if options.shrink == AUTO and judge is not None and not fallback:
        solved, shrink = solve_by_held_error(at, judge, options)
        fitted = at(shrink)
    else:
        shrink = 0.0 if fallback or options.shrink == AUTO else float(options.shrink)
        fitted = at(shrink)
        solved = solve_by_magnitude(fitted) if fallback else solve_layer(fitted, options)
    seconds = time.perf_counter() - began
    solution, start = solved.solution, solved.start
    begun = None if start is None else start.objective
    if start is not None and options.shrink == AUTO:
        # it starts once for every α, on another G than that of the error
        begun = fitted.objective(start.mask)
    energy = float(fitted.output_energy().sum())
    energy_held = None if judge is None else float(judge.output_energy().sum())
    error_held = None if judge is None else float(judge.objective(solution.mask).sum())
    weight.masked_fill_(~solution.mask.to(weight.device), 0)  # the problems may share it
    report = LayerReport(
        name=layer.name,
        block=layer.block,
        kind=layer.kind,
        rows=layer.rows,
        n=layer.n,
        pattern=str(options.pattern),
        pruned=int((~solution.mask).sum()),
        error_start=None if begun is None else float(begun.sum()),
        error=float(solution.objective.sum()),
        lower_bound=float(solution.lower_bound.sum()),
        statuses={str(s): solution.status.count(s) for s in sorted(set(solution.status))},
        tokens=tokens,
        fallback=fallback,
        seconds=seconds,
        energy=energy,
        error_held=error_held,
        energy_held=energy_held,
        shrink=shrink,
    )
    return report, solution.mask.cpu()


def _fingerprint(job: Job, options: PruneOptions) -> dict[str, Any]:
    """What decides the result: for the manifest, and for `resume` to compare."""
    source, windows = job.source, job.windows
    assert windows is not None
    fingerprint = {
        "versions": versions(),
        "options": options.record(),
        "calibration": {
            "source": windows.source,
            "samples": len(windows),
            "length": windows.length,
            "beginning": windows.beginning.record(),
            "sha256": windows.digest,
        },
        "dtype": str(next(source.model.parameters()).dtype).removeprefix("torch."),
        "device": source.device.type,
    }
    if source.checkpoint is not None:
        fingerprint["model"] = source.checkpoint.digest
    return fingerprint

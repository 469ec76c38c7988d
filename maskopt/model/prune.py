"""Prune a causal language model block by block.

The main loop is `_prune_blocks`: for every decoder block, the Gram matrices of its layers' inputs; hand
each layer to a solver; set what the mask prunes to zero, and the rest anew where weights are refitted or
trained; send the samples through the pruned block and go on with its outputs. It is the same for a model in
memory and for a folder of which one block at a time is in memory, and it never knows which solver runs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskopt.errors import ModelError
from maskopt.limits import torch_threads
from maskopt.model.allocate import allocate
from maskopt.model.blocks import Layer, matrix
from maskopt.model.collect import Grams
from maskopt.model.fingerprint import fingerprint_of
from maskopt.model.gram_store import GramStore, StoredBlock, stored_blocks
from maskopt.model.importance import counting
from maskopt.model.job import Block, Job, open_job
from maskopt.model.options import AUTO, MODEL, PruneOptions, prune_options
from maskopt.model.output import Run, finished_report, recorded_counts
from maskopt.model.peak import peaks
from maskopt.model.problems import held_problem, layer_problem
from maskopt.model.progress import OnBlockProgress
from maskopt.model.reconstruct import PartReport, Targets
from maskopt.model.report import LayerReport, PruneReport
from maskopt.model.solving import (
    Solved,
    damping_by_held_error,
    solve_by_held_error,
    solve_by_magnitude,
    solve_layer,
)
from maskopt.model.source import as_stored
from maskopt.model.windows import tokens_or_tokenizer
from maskopt.problem import LayerProblem
from maskopt.solution import Solution
from maskopt.solver import make_solver


def prune_model(
    model: nn.Module | str | Path,
    tokenizer_or_tokens: Any = None,
    options: PruneOptions | None = None,
    *,
    calibration: str | Path | Sequence[Any] | None = None,
    grams: str | Path | None = None,
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
        grams: what `collect_grams` wrote of the model, in place of text: the result is that of `one_pass`.
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
    if (text is None) == (grams is None):
        raise ModelError(
            "pruning needs `calibration` text or tokens, or `grams`; name a source of text, or one of the two"
        )
    store = None if grams is None else GramStore(grams)
    options = options if store is None else store.options(options)
    target = None if output is None else Path(output)
    job = open_job(model, text, options, tokenizer=tokenizer, on_progress=on_progress)
    job.source.blocks.check_unshared(job.layers)
    if store is not None:
        store.check_model(job)
    run = job.source.start_run(
        job.layers, target, tokenizer=tokenizer, overwrite=overwrite, resume=resume
    )
    if options.budget == MODEL and not options.counts:
        options = _with_counts(job, options, target if resume else None)
        job = job.again(options)
    known = None if store is None else store.fingerprint["calibration"]
    fingerprint = fingerprint_of(job, options.record(), known)
    if resume and target is not None:
        finished = finished_report(target, fingerprint)
        if finished is not None:
            return finished
    with run.opened(fingerprint), torch.no_grad():
        with job, nullcontext() if store is None else torch_threads(job.threads):
            layers, parts, bad = _prune_blocks(job, options, run, store)
        seconds = time.perf_counter() - began
        memory = peaks(job.source.device)
        report = PruneReport(layers, fingerprint, bad, run.masks, target, seconds, parts, memory)
        run.finish(report, options.pattern)
    return dataclasses.replace(report, seconds=time.perf_counter() - began)


def _with_counts(job: Job, options: PruneOptions, resumed: Path | None) -> PruneOptions:
    """The options with what each layer prunes: as the run has it that is to be resumed, or chosen here."""
    counts = None if resumed is None else recorded_counts(resumed)
    if counts is None:
        counts = allocate(job, options)
    return dataclasses.replace(options, counts=counts)


def _prune_blocks(
    job: Job, options: PruneOptions, run: Run, store: GramStore | None
) -> tuple[list[LayerReport], list[PartReport], list[dict[str, Any]]]:
    """The main loop; see the module's docstring. Layers and trained parts in the order of the model, and
    the samples that were left out."""
    finished = {i: done for i in range(job.last + 1) if (done := run.done(i)) is not None}
    reports = {index: done.layers for index, done in finished.items()}
    parts = {index: done.parts for index, done in finished.items()}
    bad = {index: done.bad for index, done in finished.items()}
    blocks: Iterator[Block | StoredBlock] = (
        job.blocks(finished, run.activation_folder())
        if store is None
        else stored_blocks(job, store, finished)
    )
    for block in blocks:
        targets = _targets(block, options, run)
        results: dict[str, LayerReport] = {}
        masks: dict[str, tuple[Layer, Tensor]] = {}
        weights: dict[str, tuple[Layer, Tensor]] = {}
        vectors: dict[str, Tensor] = {}
        for layers, grams in block.rounds():
            tick = block.ticker("solve", len(layers))
            for layer in grams.neighbours(layers):
                results[layer.name], mask, new = _prune_layer(job, layer, grams, options)
                masks[layer.name] = layer, mask
                if new is not None:
                    weights[layer.name] = layer, new
                tick(1, results[layer.name])
            del grams  # the next pass needs their memory
        parts[block.index] = []
        if targets is not None:
            some = {name: mask for name, mask in masks.items() if not results[name].fallback}
            parts[block.index] = list(targets.train(some, block.ticker))
            targets.close()
            weights = _stored_weights(job, some)
            vectors = _stored_vectors(job, block.index, targets.trained_vectors)
        block.advance()
        reports[block.index] = [results[layer.name] for layer in block.layers]
        bad[block.index] = [dataclasses.asdict(sample) for sample in block.bad]
        ordered = {layer.name: masks[layer.name] for layer in block.layers}
        run.add(
            block.index,
            reports[block.index],
            parts[block.index],
            bad[block.index],
            ordered,
            weights,
            vectors,
        )
    order = sorted(reports)
    return (
        [r for i in order for r in reports[i]],
        [p for i in order for p in parts[i]],
        [b for i in order for b in bad[i]],
    )


def _targets(block: Block | StoredBlock, options: PruneOptions, run: Run) -> Targets | None:
    """What the block's parts give in the dense model, where its weights are to be trained."""
    if options.reconstruction is None or isinstance(block, StoredBlock):
        return None
    states = block.opened.samples.states
    folder = run.activation_folder() if states.in_file else None
    targets = Targets(
        block.opened,
        block.index,
        block.layers,
        block.job.source.vectors(block.index),
        options.reconstruction,
        options.seed,
        folder,
    )
    # where the Gram matrices speak of the dense inputs, too, it is with those that they advance
    advance = not options.moved
    targets.record(block.ticker("targets", len(block.opened.samples.active)), advance=advance)
    block.dense_advanced = advance
    return targets


def _stored_weights(
    job: Job, masks: Mapping[str, tuple[Layer, Tensor]]
) -> dict[str, tuple[Layer, Tensor]]:
    """What trained layers are in the model, as they can be stored; and so they are from here on."""
    found = {}
    for name, (layer, _) in masks.items():
        weight = matrix(job.source.model, layer)
        new = as_stored(job.source, layer, weight.double())
        weight.copy_(new.to(weight.dtype))
        found[name] = layer, new.cpu()
    return found


def _stored_vectors(job: Job, index: int, names: Set[str]) -> dict[str, Tensor]:
    """Trained norms and biases of a block likewise, by the names and in the dtypes of the stored tensors."""
    found = {}
    for name, (tensor, dtype) in job.source.vectors(index).items():
        if name in names:
            parameter = job.source.model.get_parameter(name)
            found[tensor] = parameter.detach().to("cpu", dtype)
            parameter.copy_(found[tensor])
    return found


def _prune_layer(
    job: Job, layer: Layer, grams: Grams, options: PruneOptions
) -> tuple[LayerReport, Tensor, Tensor | None]:
    """Solve one layer and make of it in the model what its mask, and the least squares, say.

    Returns:
        (report, mask, new weights, float64 [rows, n], where they were refitted).
    """
    weight = matrix(job.source.model, layer)
    gram = grams.of(layer.name)
    tokens = 0 if gram is None else gram.tokens
    fallback = tokens < options.min_tokens
    dense = weight.detach().float()
    used = None if fallback else gram
    refit = None if fallback else options.refit
    pattern = options.pattern_of(layer)

    def at(alpha: float) -> LayerProblem:
        moved = grams.moved(layer.name)
        problem = layer_problem(layer, dense, used, pattern, alpha, moved, refit)
        return counting(problem, options.importance, job.gradients)

    judge = held_problem(layer, dense, grams, pattern)
    began = time.perf_counter()
    if refit is not None and options.damping == AUTO and judge is not None:
        refit = damping_by_held_error(at(_fixed(options.shrink)), judge, options)
    if options.shrink == AUTO and judge is not None and not fallback:
        solved, shrink = solve_by_held_error(at, judge, options)
        fitted = at(shrink)
    else:
        shrink = 0.0 if fallback else _fixed(options.shrink)
        fitted = at(shrink)
        solved = solve_by_magnitude(fitted) if fallback else solve_layer(fitted, options)
    mask = solved.solution.mask
    new = None
    if refit is not None:
        found = solved.solution.weight
        new = as_stored(job.source, layer, fitted.weights(mask) if found is None else found)
    seconds = time.perf_counter() - began
    facts = {"tokens": tokens, "fallback": fallback, "seconds": seconds, "shrink": shrink}
    report = _report(layer, fitted, judge, solved, new, options, facts)
    if new is None:
        weight.masked_fill_(~mask.to(weight.device), 0)  # the problems may share it
    else:
        weight.copy_(new.to(weight.dtype))
    return report, mask.cpu(), None if new is None else new.cpu()


def _fixed(shrink: float | str) -> float:
    """α where it is a number; else that of an unshrunk G."""
    return 0.0 if shrink == AUTO else float(shrink)


def _report(
    layer: Layer,
    fitted: LayerProblem,
    judge: LayerProblem | None,
    solved: Solved,
    new: Tensor | None,
    options: PruneOptions,
    facts: dict[str, Any],
) -> LayerReport:
    """What became of a layer; `fitted` is what it was solved on, `judge` that of the windows kept aside, and
    `facts` what else is known of it."""
    solution, start, kept = solved.solution, solved.start, fitted.refitting(None)
    begun = None if start is None else start.objective
    alike = None if solved.alike is None else kept.objective(solved.alike.mask)
    if start is not None and (options.shrink == AUTO or new is not None):
        # it starts once for every α, on another G than that of the error; or is judged by refitted weights
        begun = kept.objective(start.mask)
    if new is None:
        error, error_kept = solution.objective, None
        held = None if judge is None else judge.objective(solution.mask)
    else:
        error, error_kept = fitted.error(new), kept.objective(solution.mask)
        held = None if judge is None else judge.error(new)
    chosen_for = "kept"
    if new is not None and make_solver(options.solver).capabilities.refit:
        chosen_for = "updated" if solution.own else "refitted"
    return LayerReport(
        name=layer.name,
        block=layer.block,
        kind=layer.kind,
        rows=layer.rows,
        n=layer.n,
        pattern=str(fitted.pattern),
        pruned=int((~solution.mask).sum()),
        error_start=_sum(begun),
        error_alike=_sum(alike),
        error=float(error.sum()),
        lower_bound=float(solution.lower_bound.sum()),
        statuses={str(s): solution.status.count(s) for s in sorted(set(solution.status))},
        energy=float(fitted.output_energy().sum()),
        error_held=_sum(held),
        energy_held=None if judge is None else float(judge.output_energy().sum()),
        error_kept=_sum(error_kept),
        chosen_for=chosen_for,
        damping=None if fitted.refit is None else fitted.refit.damping,
        swaps=_count(solution, "swaps"),
        scans=_count(solution, "scans"),
        gained=None if fitted.pooled else _gained(solution, start),
        **facts,
    )


def _count(solution: Solution, what: str) -> int | None:
    """Of all rows together, what a trace tells; None where it does not."""
    told = getattr(solution.trace, what, None)
    return int(told.sum()) if isinstance(told, Tensor) else None


def _gained(solution: Solution, start: Solution | None) -> list[float] | None:
    """Quantiles of the rows' improvements by the solver; those of rows that cost nothing are 0."""
    if start is None:
        return None
    before, after = start.objective.double().cpu(), solution.objective.double().cpu()
    part = torch.where(before > 0, 1 - after / before.clamp(min=1e-300), 0.0)
    found = torch.quantile(part, torch.tensor([0, 0.1, 0.5, 0.9, 1]).double()).tolist()
    return [round(value, 9) + 0.0 for value in found]  # no -0.0


def _sum(rows: Tensor | None) -> float | None:
    return None if rows is None else float(rows.sum())

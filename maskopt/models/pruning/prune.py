"""Prune a causal language model block by block.

The main loop is `_prune_blocks`: for every decoder block, compute the Gram matrices of its layers' inputs;
solve each layer; set pruned weights to zero and update the others where asked to; send the samples through
the pruned block.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskopt.core.problem import LayerProblem
from maskopt.core.threads import torch_threads
from maskopt.errors import ModelError, OptionError
from maskopt.models.architecture.blocks import Layer, matrix
from maskopt.models.architecture.source import FolderSource
from maskopt.models.blockwise.distributed import ALONE, Ranks
from maskopt.models.blockwise.forward import OnBlockProgress
from maskopt.models.blockwise.job import Block, Job, open_job, windows_of
from maskopt.models.blockwise.memory import check_memory
from maskopt.models.calibration.tokens import (
    CALIBRATION,
    DISTILLATION,
    SELF,
    Windows,
    are_tokens,
    held_out,
    tokens_or_tokenizer,
)
from maskopt.models.checkpoints.report import PruneReport
from maskopt.models.checkpoints.schema import differences
from maskopt.models.checkpoints.workspace import check_dense
from maskopt.models.options.prune import AUTO, BLOCKWISE, NONE, PruneOptions, prune_options
from maskopt.models.options.walk import DistillOptions, name_patterns
from maskopt.models.pruning.allocate import allocate
from maskopt.models.pruning.bases import find_bases
from maskopt.models.pruning.gram_store import GramStore, StoredBlock, prune_source, stored_blocks
from maskopt.models.pruning.output import BlockResult, FolderResults, Results
from maskopt.models.pruning.prune_layer import counting, layer_problem, prune_layers
from maskopt.models.pruning.run import Run, fingerprint_of, text_record
from maskopt.models.training.tasks import train_block


def prune_model(
    model: nn.Module | str | Path,
    tokenizer_or_tokens: Any = None,
    options: PruneOptions | None = None,
    *,
    calibration: str | Path | Sequence[Any] | Mapping[Any, float | None] | None = None,
    grams: str | Path | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    on_progress: OnBlockProgress | None = None,
    ranks: Ranks = ALONE,
    **shorthand: Any,
) -> PruneReport:
    """Prune every linear layer in the decoder blocks of a causal language model.

    Args:
        model: in memory, changed in place; or a folder (or a name on the hub), with an `output`.
        tokenizer_or_tokens: a tokenizer for `calibration` (None: that of the model folder), or tokens int64
            [samples, length].
        calibration: a list of documents, or as for `read_documents`, with `chat` as `read_conversations`;
            "self" (default): the model writes it, see `maskopt.models.calibration.generation`; or a mixture:
            shares by source, None for an equal part of the rest, as in `{"text.txt": 0.5, "self": None}`.
        grams: what `collect_grams` wrote of the model, in place of text; as with `calibrate_on` dense.
        overwrite: replace the result in the folder `output`.
        resume: go on with the unfinished run in it.
        ranks: the processes that prune together, each with the same call; see `distributed.joined`.
        shorthand: single options by name, with or without `options`, as in `sparsity="2:4"`.

    Raises MaskoptError, one line with cause and remedy; a model in memory keeps the blocks pruned before.
    """
    began = time.perf_counter()
    options, store = prune_source(grams, options, shorthand)
    if calibration is None and grams is None and not are_tokens(tokenizer_or_tokens):
        calibration = SELF
    text, tokenizer = tokens_or_tokenizer(tokenizer_or_tokens, calibration)
    _check_given(model, text, options, ranks, output=output, grams=grams, resume=resume)
    inputs: Any = {"model": model, "calibration": calibration, "grams": grams, "ranks": ranks}
    run = None if output is None else Run(output, overwrite=overwrite, resume=resume, **inputs)
    how: dict[str, Any] = {"tokenizer": tokenizer, "on_progress": on_progress, "ranks": ranks}
    stored = None if run is None else ranks.agreed(lambda: run.recorded_windows(CALIBRATION))
    job = open_job(model, text, options, written=stored, **how)
    check_prunable(job, store)
    results = Results(job) if run is None else FolderResults(job, run)
    if options.transform != NONE:
        bases = None if run is None else run.recorded_bases()
        bases = find_bases(job, options) if bases is None else bases
        if job.source.checkpoint is not None:  # a model in memory is in them already
            job.source.checkpoint.bases.update(bases)
    if options.layers_differ and not options.counts:
        known = None if run is None else run.recorded("counts", options.record())
        counts = allocate(job, options) if known is None else known
        options = dataclasses.replace(options, counts=counts)
        job = results.job = job.again(options)
    collected = None if store is None else store.fingerprint["calibration"]
    fingerprint = fingerprint_of(job, options.record(), collected)
    stored = None if run is None else run.recorded_windows(DISTILLATION)
    windows = _distillation_windows(job, text, tokenizer, options.distilled, stored)
    if isinstance(results, FolderResults):
        results.written = _written(job, windows)
    if windows is not None:
        fingerprint["distillation"] = text_record(windows)
    _check_uniform(ranks, fingerprint)
    if run is not None and (finished := run.finished_report(fingerprint)) is not None:
        return finished
    with results.opened(fingerprint) as folder:
        _prune_blocks(job, options, results, store, folder)
        if windows is not None and isinstance(results, FolderResults):
            results.distil(windows)
        report = results.report(fingerprint)
        ranks.agreed(lambda: results.finish(report))
    return dataclasses.replace(report, seconds=time.perf_counter() - began)


def check_prunable(job: Job, store: GramStore | None) -> None:
    """Raise MaskoptError for a pruned model, a weight that several layers share, or Gram matrices of another
    model."""
    if job.source.checkpoint is not None:
        check_dense(job.source.checkpoint.folder)
    job.source.blocks.check_unshared(job.layers)
    if store is not None:
        store.check_model(job)


def _distillation_windows(
    job: Job, text: Any, tokenizer: Any, options: DistillOptions | None, written: Tensor | None
) -> Windows | None:
    """The windows to train on; MaskoptError where they, the model or the memory cannot be used."""
    source = job.source
    if options is None:
        return None
    if not isinstance(source, FolderSource):
        raise OptionError("`distillation` needs a model folder and an `output`; save the model")
    if source.checkpoint.config.get("auto_map"):
        raise OptionError(
            f"{source.checkpoint.folder}: config.json asks to run code that comes with the model (auto_map), "
            "which is not copied; leave out `distillation`, copy it to the result and run `maskopt distill`"
        )
    own: dict[str, Any] = {"on_progress": job.tell, "written": written}
    windows = windows_of(source, text, tokenizer, options.walk, False, None, **own)
    windows.check_targets()
    held_out(len(windows), options.holdout)
    if options.max_memory is not None:
        check_memory(dataclasses.replace(job.load, together=True), int(options.max_memory))
    return windows


def _written(job: Job, distillation: Windows | None) -> dict[str, Tensor]:
    """The windows that the model wrote, by their use."""
    uses = {CALIBRATION: job.text, DISTILLATION: distillation}
    return {
        use: windows.written
        for use, windows in uses.items()
        if windows is not None and windows.written is not None
    }


def _check_given(
    model: Any,
    text: Any,
    options: PruneOptions,
    ranks: Ranks,
    *,
    output: Any,
    grams: Any,
    resume: bool,
) -> None:
    """Raise MaskoptError for arguments that exclude each other, or what several processes cannot do."""
    if (text is None) == (grams is None):
        raise ModelError(
            "pruning needs `calibration` text or tokens, or `grams`; name a source of text, or one of the two"
        )
    if not isinstance(model, nn.Module):
        if output is None:
            raise ModelError("pruning a model folder needs an output folder: name `output`")
    elif output is not None or grams is not None or resume or ranks.size > 1:
        raise ModelError(
            "a model in memory is pruned in place by one process, from text; for `output`, `grams`, `resume` "
            "or several processes save it, and name its folder"
        )
    if options.transform != NONE and grams is not None:
        raise OptionError(
            "`transform` needs text: Gram matrices that were collected are of the model as it is stored"
        )
    for name, trains in {
        "`update` blockwise": options.update == BLOCKWISE,
        "`distillation`": bool(options.distillation),
    }.items():
        if ranks.size > 1 and trains:
            raise OptionError(f"{name} trains in one process: start it without torchrun")


def _check_uniform(ranks: Ranks, fingerprint: dict[str, Any]) -> None:
    """Raise ModelError unless all processes are about to do the same."""
    first, *others = ranks.gathered(fingerprint)
    for rank, theirs in enumerate(others, start=1):
        if apart := differences(first, theirs):
            raise ModelError(f"process {rank} would prune otherwise: {apart}")


def _prune_blocks(
    job: Job,
    options: PruneOptions,
    results: Results,
    store: GramStore | None,
    folder: Path,
) -> None:
    """The main loop; see the module's docstring."""
    finished = dict(results.blocks)
    blocks: Iterator[Block | StoredBlock] = (
        job.blocks(finished, folder) if store is None else stored_blocks(job, store, finished)
    )
    threads = nullcontext() if store is None else torch_threads(job.threads)
    how = options.reconstruction
    with torch.no_grad(), job, threads:
        for block in blocks:
            found = BlockResult.of(
                block,
                lambda layers, grams: prune_layers(job, layers, grams, options),
            )
            if how is not None and isinstance(block, Block):
                some = {n: mask for n, mask in found.masks.items() if not found.reports[n].fallback}
                trained = train_block(block, how, options.seed, some)
                found.trained, weights, found.vectors = trained
                found.weights |= weights
            results.keep(block, found)


# --- layer problems, without pruning


def collect_problems(
    model: nn.Module | str | Path,
    tokenizer_or_tokens: Any = None,
    options: PruneOptions | None = None,
    *,
    layers: str | Sequence[str] = (),
    calibration: str | Path | Sequence[Any] | None = None,
    on_progress: OnBlockProgress | None = None,
    **shorthand: Any,
) -> Iterator[tuple[str, LayerProblem]]:
    """The layer problems of a dense model, block by block: (name, problem).

    Arguments are those of `prune_model`, with 32 samples of 512 tokens by default; `layers` adds to
    `include`. Layers that saw no token are left out.
    """
    if layers:
        shorthand["include"] = (*name_patterns(layers), *name_patterns(shorthand.get("include")))
    shorthand |= {"calibration": calibration, "on_progress": on_progress}
    found = layer_problems(model, tokenizer_or_tokens, options, **shorthand)
    return ((layer.name, problem) for layer, problem in found)


def layer_problems(
    model: nn.Module | str | Path,
    tokenizer_or_tokens: Any = None,
    options: PruneOptions | None = None,
    *,
    calibration: str | Path | Sequence[Any] | None = None,
    on_progress: OnBlockProgress | None = None,
    unseen: bool = False,
    **shorthand: Any,
) -> Generator[tuple[Layer, LayerProblem], None, None]:
    """As `collect_problems`, with the `Layer`; `unseen`: also layers without tokens, G the identity."""
    if options is None:
        shorthand = {"samples": 32, "seq_len": 512, **shorthand}
    dense = {"calibrate_on": "dense", "true_sequential": False}
    options = prune_options(options, {**shorthand, **dense})
    for name in ("gram_shrinkage", "damping"):
        if getattr(options, name) == AUTO:
            raise ModelError(
                f"`{name}` auto chooses by masks, and none are made here; give a number"
            )
    if options.layers_differ and not options.counts:
        raise ModelError(
            f"`allocation` {options.allocation} is computed by a prune; give its `counts`, or another one"
        )
    text, tokenizer = tokens_or_tokenizer(tokenizer_or_tokens, calibration, "Gram matrices need")
    job = open_job(model, text, options, tokenizer=tokenizer, on_progress=on_progress)
    return _walked(job, options, unseen=unseen)


def _walked(
    job: Job, options: PruneOptions, *, unseen: bool
) -> Generator[tuple[Layer, LayerProblem], None, None]:
    gram_shrinkage = float(options.gram_shrinkage)
    with job:
        for block in job.blocks():
            grams = block.grams()
            for layer in block.layers:
                gram = grams.of(layer.name)
                if gram is not None or unseen:
                    weight = matrix(job.source.model, layer).detach().float().clone()
                    pattern, update = options.pattern_of(layer.name, layer.n), options.least_squares
                    problem = layer_problem(
                        layer.name, weight, gram, pattern, gram_shrinkage, update
                    )
                    yield layer, counting(problem, options.sensitivity, job.gradients)
            block.advance()

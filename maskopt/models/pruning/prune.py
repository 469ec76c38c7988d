"""Prune a causal language model block by block.

The main loop is `_prune_blocks`: for every decoder block, compute the Gram matrices of its layers' inputs;
solve each layer; set pruned weights to zero and update the others where asked to; send the samples through
the pruned block.
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

from maskopt.core.limits import torch_threads
from maskopt.errors import ModelError, OptionError
from maskopt.models.architecture.blocks import Layer, matrix
from maskopt.models.architecture.source import as_stored
from maskopt.models.blockwise.distributed import ALONE, Ranks
from maskopt.models.blockwise.job import Block, Job, open_job
from maskopt.models.blockwise.progress import OnBlockProgress
from maskopt.models.blockwise.windows import tokens_or_tokenizer
from maskopt.models.checkpoints.journal import differences, in_words
from maskopt.models.checkpoints.report import PruneReport
from maskopt.models.checkpoints.workspace import check_dense
from maskopt.models.options.prune import BLOCKWISE, KL, PruneOptions, prune_options
from maskopt.models.pruning.allocate import allocate
from maskopt.models.pruning.distil import distil, distillation_windows
from maskopt.models.pruning.gram_store import GramStore, StoredBlock, stored_blocks
from maskopt.models.pruning.output import BlockResult, FolderResults, MemoryResults, results_of
from maskopt.models.pruning.prune_layer import prune_layers
from maskopt.models.pruning.run import Run, fingerprint_of, text_record
from maskopt.models.training.blockwise import Targets


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
    ranks: Ranks = ALONE,
    **shorthand: Any,
) -> PruneReport:
    """Prune every linear layer in the decoder blocks of a causal language model.

    `prune_model(model, tokens, PruneOptions(Unstructured(sparsity=0.5), samples=64))` and `prune_model(model,
    tokens, sparsity=0.5, samples=64)` are the same.

    Args:
        model: a model in memory, changed in place; or a model folder (or a name on the hub), read block by
            block and not changed: `output` is then needed.
        tokenizer_or_tokens: a tokenizer (text comes from `calibration`), or calibration tokens int64
            [samples, length]; None takes the tokenizer of the model folder.
        options: how to prune; `help(maskopt.PruneOptions)` lists all options.
        calibration: see `maskopt.models.calibration.text.read_documents`; a list of strings are documents, a
            `.npy` file tokens. With `chat`: `maskopt.models.calibration.chat.read_conversations`.
        grams: what `collect_grams` wrote of the model, in place of text; as with `calibrate_on` dense.
        output: folder for the pruned model, its masks and its manifest.
        overwrite: replace the result in the output folder.
        resume: go on with the unfinished run in it.
        on_progress: called with `BlockProgress`.
        ranks: the processes that prune together, each with the same call; see
            `maskopt.models.blockwise.distributed.joined`.
        shorthand: single options by name, with or without `options`, as in `sparsity="2:4"`.

    Raises:
        MaskoptError: one line that names the cause and the remedy. A model in memory keeps the blocks that
            were pruned before an error; an output folder is not half-written.
    """
    began = time.perf_counter()
    store = None if grams is None else GramStore(grams)
    options = (prune_options if store is None else store.options)(options, shorthand)
    text, tokenizer = tokens_or_tokenizer(tokenizer_or_tokens, calibration)
    if (text is None) == (grams is None):
        raise ModelError(
            "pruning needs `calibration` text or tokens, or `grams`; name a source of text, or one of the two"
        )
    if isinstance(model, nn.Module) and (store is not None or resume):
        raise ModelError(
            "`resume` needs a model folder; a model in memory is pruned in one go"
            if resume
            else "`grams` are of model folders; name the folder that they were made of"
        )
    _check_ranks(ranks, options)
    run = None
    if output is not None:
        inputs: dict[str, Any] = {"model": model, "calibration": calibration, "grams": grams}
        run = Run(output, overwrite=overwrite, resume=resume, ranks=ranks, **inputs)
    job = open_job(model, text, options, tokenizer=tokenizer, on_progress=on_progress, ranks=ranks)
    if job.source.checkpoint is not None:
        check_dense(job.source.checkpoint.folder)
    job.source.blocks.check_unshared(job.layers)
    if store is not None:
        store.check_model(job)
    results = results_of(job, run, tokenizer)
    if options.layers_differ and not options.counts:
        counts = None if run is None else run.recorded_counts(options.record())
        counts = allocate(job, options) if counts is None else counts
        options = dataclasses.replace(options, counts=counts)
        job = results.job = job.again(options)
    known = None if store is None else store.fingerprint["calibration"]
    fingerprint = fingerprint_of(job, options.record(), known)
    if (how := options.distilled) is not None:
        windows = distillation_windows(job, text, tokenizer, how)
        fingerprint["distillation"] = text_record(windows)
    _check_uniform(ranks, fingerprint)
    if run is not None and (finished := run.finished_report(fingerprint)) is not None:
        return finished
    with results.opened(fingerprint) as folder:
        threads = nullcontext() if store is None else torch_threads(job.threads)
        with torch.no_grad(), job, threads:
            _prune_blocks(job, options, results, store, folder)
        if how is not None and isinstance(results, FolderResults):
            distil(results, windows, how)
        report = results.report(fingerprint)
        ranks.agreed(lambda: results.finish(report, options.pattern))
    return dataclasses.replace(report, seconds=time.perf_counter() - began)


def _check_ranks(ranks: Ranks, options: PruneOptions) -> None:
    """Raise for what several processes cannot do together."""
    for name, trains in {
        "`update` blockwise": options.update == BLOCKWISE,
        "`distillation`": bool(options.distillation),
    }.items():
        if ranks.size > 1 and trains:
            raise OptionError(f"{name} trains in one process: start it without torchrun")
    if ranks.size > 1 and options.sensitivity == KL and not options.counts:
        raise OptionError(
            "`sensitivity` kl is measured in one process: start it without torchrun, or give its `counts`"
        )


def _check_uniform(ranks: Ranks, fingerprint: dict[str, Any]) -> None:
    """Raise ModelError unless all processes are about to do the same."""
    first, *others = ranks.gathered(fingerprint)
    for rank, theirs in enumerate(others, start=1):
        lines = differences(first, theirs)
        if lines:
            raise ModelError(f"process {rank} would prune otherwise: {in_words(lines)}")


def _prune_blocks(
    job: Job,
    options: PruneOptions,
    results: FolderResults | MemoryResults,
    store: GramStore | None,
    folder: Path,
) -> None:
    """The main loop; see the module's docstring."""
    finished = dict(results.blocks)
    blocks: Iterator[Block | StoredBlock] = (
        job.blocks(finished, folder) if store is None else stored_blocks(job, store, finished)
    )
    for block in blocks:
        targets = _targets(block, options, folder)
        found = BlockResult.of(
            block, lambda layers, grams: prune_layers(job, grams.neighbours(layers), grams, options)
        )
        if targets is not None:
            some = {n: mask for n, mask in found.masks.items() if not found.reports[n].fallback}
            found.parts = list(targets.train(some, block.ticker))
            targets.close()
            # of a part that training did not better, what it had stays as it was stored
            trained = {name: some[name] for name in some if name in targets.trained_layers}
            found.weights |= _stored_weights(job, trained)
            found.vectors = _stored_vectors(job, block.index, targets.trained_vectors)
        results.keep(block, found)


def _targets(block: Block | StoredBlock, options: PruneOptions, folder: Path) -> Targets | None:
    """The outputs of the block's parts in the dense model, where its weights are to be trained."""
    if options.reconstruction is None or isinstance(block, StoredBlock):
        return None
    targets = Targets(
        block.opened,
        block.index,
        block.layers,
        block.job.source.vectors(block.index),
        block.job.source.stored_dtype,
        options.reconstruction,
        options.seed,
        folder if block.opened.samples.states.in_file else None,
    )
    # where Gram matrices are of the dense inputs as well, the samples advance with them
    advance = not options.moved
    targets.record(block.ticker("targets", len(block.opened.samples.active)), advance=advance)
    block.dense_advanced = advance
    return targets


def _stored_weights(
    job: Job, masks: Mapping[str, tuple[Layer, Tensor]]
) -> dict[str, tuple[Layer, Tensor]]:
    """The weights of trained layers, rounded to the stored dtype, in the model too."""
    found = {}
    for name, (layer, _) in masks.items():
        weight = matrix(job.source.model, layer)
        new = as_stored(job.source, layer, weight.double())
        weight.copy_(new.to(weight.dtype))
        found[name] = layer, new.cpu()
    return found


def _stored_vectors(job: Job, index: int, names: Set[str]) -> dict[str, Tensor]:
    """Trained norms and biases of a block likewise, by stored tensor."""
    found = {}
    for name, (tensor, dtype) in job.source.vectors(index).items():
        if name in names:
            parameter = job.source.model.get_parameter(name)
            found[tensor] = parameter.detach().to("cpu", dtype)
            parameter.copy_(found[tensor])
    return found

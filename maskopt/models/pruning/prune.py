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
from functools import partial
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
from maskopt.models.checkpoints.report import LayerReport, PruneReport
from maskopt.models.checkpoints.workspace import check_inputs
from maskopt.models.options.prune import BLOCKWISE, KL, PruneOptions, prune_options
from maskopt.models.pruning.allocate import allocate
from maskopt.models.pruning.fingerprint import fingerprint_of
from maskopt.models.pruning.gram_store import GramStore, StoredBlock, stored_blocks
from maskopt.models.pruning.output import Run, finished_report, recorded_counts, start_run
from maskopt.models.pruning.peak import peaks
from maskopt.models.pruning.prune_layer import prune_layers
from maskopt.models.training.blockwise import PartReport, Targets


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

    `prune_model(model, tokens, PruneOptions(Unstructured(sparsity=0.5), samples=64))` and
    `prune_model(model, tokens, sparsity=0.5, samples=64)` are the same.

    Args:
        model: a model in memory, which is changed in place; or a model folder (or a name on the
            hub), which is read block by block and left as it is: `output` is then needed.
        tokenizer_or_tokens: a tokenizer (text comes from `calibration`), or calibration tokens
            int64 [samples, length]; None takes the tokenizer of the model folder.
        options: how to prune; `help(maskopt.PruneOptions)` lists all options.
        calibration: see `maskopt.models.calibration.text.read_documents`; a list of strings is taken as
            documents, a `.npy` file as tokens. With the option `chat`, conversations: see
            `maskopt.models.calibration.chat.read_conversations`.
        grams: what `collect_grams` wrote of the model, in place of text; as with `calibrate_on` dense.
        output: folder for the pruned model, its masks and its manifest.
        overwrite: replace what is in the output folder.
        resume: go on with the unfinished run in it.
        on_progress: called with `BlockProgress`.
        ranks: the processes that prune together, each calling this function alike; see
            `maskopt.models.blockwise.distributed.joined`.
        shorthand: single options by name, with or without `options`, as in `sparsity="2:4"`.

    Raises:
        MaskoptError: with one line that names the thing and the remedy. A model in memory keeps
            the blocks that were pruned before an error; an output folder is not half-written.
    """
    began = time.perf_counter()
    store = None if grams is None else GramStore(grams)
    options = (prune_options if store is None else store.options)(options, shorthand)
    text, tokenizer = tokens_or_tokenizer(tokenizer_or_tokens, calibration)
    if resume and overwrite:
        raise ModelError("`resume` goes on with what `overwrite` drops; choose one")
    if (text is None) == (grams is None):
        raise ModelError(
            "pruning needs `calibration` text or tokens, or `grams`; name a source of text, or one of the two"
        )
    if store is not None and isinstance(model, nn.Module):
        raise ModelError("`grams` are of model folders; name the folder that they were made of")
    _check_ranks(ranks, options)
    target = None if output is None else Path(output)
    if target is not None:
        check_inputs(target, model=model, calibration=calibration, grams=grams)
    job = open_job(model, text, options, tokenizer=tokenizer, on_progress=on_progress, ranks=ranks)
    job.source.blocks.check_unshared(job.layers)
    if store is not None:
        store.check_model(job)
    run = start_run(
        job.source,
        job.layers,
        target,
        tokenizer=tokenizer,
        overwrite=overwrite,
        resume=resume,
        ranks=ranks,
    )
    if options.layers_trade and not options.counts:
        options = _with_counts(job, options, target if resume else None)
        job = job.again(options)
    known = None if store is None else store.fingerprint["calibration"]
    fingerprint = fingerprint_of(job, options.record(), known)
    _check_alike(ranks, fingerprint)
    if resume and target is not None:
        finished = ranks.agreed(lambda: finished_report(target, fingerprint))
        if finished is not None:
            return finished
    with run.opened(fingerprint), torch.no_grad():
        with job, nullcontext() if store is None else torch_threads(job.threads):
            layers, parts, bad = _prune_blocks(job, options, run, store)
        seconds = time.perf_counter() - began
        memory = peaks(job.source.device)
        report = PruneReport(layers, fingerprint, bad, run.masks, target, seconds, parts, memory)
        ranks.agreed(lambda: run.finish(report, options.pattern))
    return dataclasses.replace(report, seconds=time.perf_counter() - began)


def _with_counts(job: Job, options: PruneOptions, resumed: Path | None) -> PruneOptions:
    """The options with what each layer prunes: as the run has it that is to be resumed, or chosen here."""
    counts = None if resumed is None else recorded_counts(resumed, options.record())
    if counts is None:
        counts = allocate(job, options)
    return dataclasses.replace(options, counts=counts)


def _check_ranks(ranks: Ranks, options: PruneOptions) -> None:
    """Raise for what several processes cannot do together."""
    if ranks.size > 1 and options.update == BLOCKWISE:
        raise OptionError("`update` blockwise trains in one process: start it without torchrun")
    if ranks.size > 1 and options.sensitivity == KL and not options.counts:
        raise OptionError(
            "`sensitivity` kl is measured in one process: start it without torchrun, or give its `counts`"
        )


def _check_alike(ranks: Ranks, fingerprint: dict[str, Any]) -> None:
    """Raise where processes are not about to do the same."""
    first, *others = ranks.gathered(fingerprint)
    for rank, theirs in enumerate(others, start=1):
        lines = differences(first, theirs)
        if lines:
            raise ModelError(f"process {rank} would prune otherwise: {in_words(lines)}")


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
            for layer, report, mask, new in prune_layers(
                job, grams.neighbours(layers), grams, options
            ):
                results[layer.name], masks[layer.name] = report, (layer, mask)
                if new is not None:
                    weights[layer.name] = layer, new
                tick(1, report)
            del grams  # the next pass needs their memory
        parts[block.index] = []
        if targets is not None:
            some = {name: mask for name, mask in masks.items() if not results[name].fallback}
            parts[block.index] = list(targets.train(some, block.ticker))
            targets.close()
            # of a part that training did not better, what it had stays as it was stored
            trained = {name: some[name] for name in some if name in targets.trained_layers}
            weights |= _stored_weights(job, trained)
            vectors = _stored_vectors(job, block.index, targets.trained_vectors)
        block.advance()
        reports[block.index] = [results[layer.name] for layer in block.layers]
        bad[block.index] = [dataclasses.asdict(sample) for sample in block.bad]
        ordered = {layer.name: masks[layer.name] for layer in block.layers}
        of_block = (reports[block.index], parts[block.index], bad[block.index], ordered)
        job.ranks.agreed(partial(run.add, block.index, *of_block, weights, vectors))
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
        block.job.source.stored_dtype,
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

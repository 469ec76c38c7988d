"""Prune a causal language model block by block.

The main loop is `_prune_blocks`: for every decoder block, run the calibration samples through it and
sum the Gram matrix of each layer's inputs; hand each layer to a solver; set what the mask prunes to
zero; run the samples through the pruned block and go on with its outputs. It is the same for a model in
memory and for a folder of which one block at a time is in memory, and it never knows which solver runs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskopt.errors import ModelError
from maskopt.gram import Gram
from maskopt.limits import Limits
from maskopt.model.blocks import Layer, choose, matrix, vocabulary_size, within
from maskopt.model.collect import Grams, Samples, collect, forward
from maskopt.model.forward import Captured, Workers, capture
from maskopt.model.opening import capped_length, open_source
from maskopt.model.options import (
    MIN_TOKENS,
    OnProgress,
    PruneOptions,
    check_pattern,
    one_pattern,
    ticker,
    windows_of,
)
from maskopt.model.output import FolderRun, MemoryRun, Run, finished_report
from maskopt.model.plan import check_memory
from maskopt.model.report import LayerReport, PruneReport, versions
from maskopt.model.source import FolderSource, MemorySource, Source, return_memory
from maskopt.model.tokens import (
    Windows,
    check_vocabulary,
)
from maskopt.pattern import Pattern
from maskopt.problem import LayerProblem
from maskopt.solver import make_start, solve


def prune_model(
    model: nn.Module | str | Path,
    tokenizer_or_tokens: Any = None,
    *,
    sparsity: float | None = None,
    pattern: Pattern | None = None,
    solver: str = "swap",
    warm_start: str | None = None,
    solver_options: Mapping[str, Any] | None = None,
    calibration: str | Path | Sequence[str] | None = None,
    samples: int = 128,
    seq_len: int = 2048,
    text_field: str = "text",
    seed: int = 0,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    one_pass: bool = False,
    true_sequential: bool = False,
    all_experts: bool = False,
    min_tokens: int = MIN_TOKENS,
    shrink: float = 0.0,
    skip_bad_samples: bool = False,
    threads: int | None = None,
    activation_memory: int = 4 * 2**30,
    max_memory: int | None = None,
    trust_remote_code: bool = False,
    on_progress: OnProgress | None = None,
) -> PruneReport:
    """Prune every linear layer in the decoder blocks of a causal language model.

    Args:
        model: a model in memory, which is changed in place; or a model folder (or a name on the
            hub), which is read block by block and left as it is: `output` is then needed.
        tokenizer_or_tokens: a tokenizer (text comes from `calibration`), or calibration tokens
            int64 [samples, length]; None takes the tokenizer of the model folder.
        sparsity, pattern: one of them: 0.6, or `NM(keep=2, of=4)`.
        solver, warm_start, solver_options: as for `maskopt.solve`, but that `swap` starts from
            `relax` unless told otherwise.
        calibration: see `maskopt.model.text.read_documents`; a list of strings is taken as
            documents, a `.npy` file as tokens.
        samples, seq_len, text_field, seed: how windows are cut out of the text.
        output: folder for the pruned model, its masks and its manifest.
        overwrite, resume: what to do with an output folder that is not empty.
        device: "cpu", "cuda", or "auto" (CUDA where there is one; the model's own if in memory).
        dtype: of the forward passes; "auto": as stored, float32 on the CPU.
        include, exclude: shell patterns on layer names.
        one_pass: all Gram matrices from the dense model, instead of from the model with all
            earlier blocks pruned. One forward pass less, and each layer's error is judged on inputs
            that it will not see.
        true_sequential: inside a block, too, each layer sees inputs that the layers before it, already
            pruned, produce. One more forward pass for each group of layers.
        all_experts: Gram matrices of experts from all tokens, not only from those routed to them.
        min_tokens: layers that saw fewer tokens are pruned by magnitude and listed as fallbacks.
        shrink: α of G ← (1−α)G + α·diag(G).
        skip_bad_samples: leave out samples with NaN or infinite activations instead of stopping.
        threads: on the CPU; the result does not depend on it.
        activation_memory: bytes of hidden states above which they go to a file.
        max_memory: refuse to start where the estimate of the peak is higher.
        on_progress: called with `Progress`.

    Raises:
        MaskoptError: with one line that names the thing and the remedy. A model in memory keeps
            the blocks that were pruned before an error; an output folder is not half-written.
    """
    began = time.perf_counter()
    options = PruneOptions(
        pattern=one_pattern(sparsity, pattern),
        solver=solver,
        warm_start=warm_start,
        solver_options=dict(solver_options or {}),
        include=tuple(include),
        exclude=tuple(exclude),
        seed=seed,
        one_pass=one_pass,
        true_sequential=true_sequential,
        all_experts=all_experts,
        min_tokens=min_tokens,
        shrink=shrink,
        skip_bad_samples=skip_bad_samples,
    )
    if resume and overwrite:
        raise ModelError("resume goes on with what overwrite drops; choose one")
    in_memory = isinstance(model, nn.Module)
    source, tokenizer = open_source(
        model, tokenizer_or_tokens, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    layers = choose(source.blocks.all_layers(), options.include, options.exclude)
    source.blocks.check_unshared(layers)
    check_pattern(options.pattern, layers)
    windows = windows_of(
        tokenizer_or_tokens
        if in_memory or isinstance(tokenizer_or_tokens, Tensor | Windows)
        else None,
        tokenizer,
        calibration,
        samples=samples,
        seq_len=capped_length(source.model, seq_len),
        seed=seed,
        field=text_field,
    )
    check_vocabulary(windows, vocabulary_size(source.model))
    threads = threads or torch.get_num_threads()
    if max_memory is not None:
        activation_memory = check_memory(
            source, layers, len(windows), windows.length, threads, max_memory, activation_memory
        )
    fingerprint = {
        "versions": versions(),
        "options": options.record(),
        "calibration": {
            "source": windows.source,
            "samples": len(windows),
            "length": windows.length,
            "sha256": windows.digest,
        },
        "dtype": str(next(source.model.parameters()).dtype).removeprefix("torch."),
        "device": source.device.type,
    }
    run: Run
    if isinstance(source, FolderSource):
        if output is None:
            raise ModelError("pruning a model folder needs an output folder")
        run = FolderRun(source, layers, Path(output), overwrite=overwrite, resume=resume)
        fingerprint["model"] = source.checkpoint.digest
        if resume and (finished := finished_report(Path(output), fingerprint)) is not None:
            return finished
        del tokenizer  # a large vocabulary takes half a gigabyte
        return_memory()
    else:
        assert isinstance(source, MemorySource)
        if resume:
            raise ModelError("resume needs a model folder; a model in memory is pruned in one go")
        run = MemoryRun(source, None if output is None else Path(output), tokenizer, overwrite)
    with run.opened(fingerprint), Workers(source.device, threads) as workers, torch.no_grad():
        if isinstance(source, FolderSource):
            source.load_outside()
        reports, bad = _prune_blocks(
            source, layers, windows, options, run, workers, activation_memory,
            on_progress or (lambda _: None),
        )  # fmt: skip
        report = PruneReport(
            layers=reports,
            fingerprint=fingerprint,
            bad_samples=bad,
            masks=run.masks,
            output=None if output is None else Path(output),
            seconds=time.perf_counter() - began,
        )
        run.finish(report, options.pattern)
    return dataclasses.replace(report, seconds=time.perf_counter() - began)


def _prune_blocks(
    source: Source,
    layers: Sequence[Layer],
    windows: Windows,
    options: PruneOptions,
    run: Run,
    workers: Workers,
    activation_memory: int,
    report: OnProgress,
) -> tuple[list[LayerReport], list[dict[str, Any]]]:
    """The main loop; see the module's docstring."""
    blocks, wanted = source.blocks, {layer.name for layer in layers}
    last = max(index for index in range(len(blocks)) if within(blocks, index, wanted))
    last_open = max((i for i in range(last + 1) if run.done(i) is None), default=-1)
    reports: list[LayerReport] = []
    bad: list[dict[str, Any]] = []
    flow: Samples | None = None
    captured: Captured | None = None
    if last_open >= 0:

        def folder(size: int) -> Path | None:
            return run.activation_folder() if size > activation_memory else None

        captured = capture(source.model, blocks, windows.tokens, workers, source.device, folder)
        flow = Samples(captured.states, len(windows), skip_bad=options.skip_bad_samples)
    for index in range(last + 1):
        prefix = blocks.prefix(index)
        finished = run.done(index)
        if finished is not None:
            reports.extend(finished.layers)
            bad.extend(finished.bad)
            if flow is not None and captured is not None and index < last_open:
                flow.active = [
                    s for s in flow.active if s not in {b["sample"] for b in finished.bad}
                ]
                masks = None if options.one_pass else finished.masks
                with source.open(index, masks) as block:
                    tick = ticker(report, index, last + 1, "replay", len(flow.active))
                    forward(
                        block, prefix, captured.calls[index], flow, workers, source.device, tick
                    )
            continue
        assert flow is not None
        assert captured is not None
        mine = within(blocks, index, wanted)
        with source.open(index) as block:
            before = len(flow.bad)
            done: dict[str, tuple[LayerReport, Tensor]] = {}
            stages = [mine] if mine or options.one_pass else []  # else only pass through
            while stages:
                stage = stages.pop(0)
                grams = collect(
                    source.model, block, prefix, stage, captured.calls[index], flow, workers,
                    source.device, advance=options.one_pass, all_experts=options.all_experts,
                    tick=ticker(report, index, last + 1, "calibrate", len(flow.active)),
                )  # fmt: skip
                if options.true_sequential:
                    stage, later = _first_stage(stage, grams)
                    stages = [later] if later else []
                _check_multiplied(source.model, stage, grams)
                tick = ticker(report, index, last + 1, "solve", len(mine))
                for layer in sorted(stage, key=lambda layer: grams.leader(layer.name)):
                    done[layer.name] = _solve_layer(source, layer, grams, options)
                    tick(1)
                del grams
            if not options.one_pass and index < last:
                tick = ticker(report, index, last + 1, "forward", len(flow.active))
                forward(block, prefix, captured.calls[index], flow, workers, source.device, tick)
            ordered = [done[layer.name] for layer in mine]
            run.add(
                index,
                [r for r, _ in ordered],
                [dataclasses.asdict(b) for b in flow.bad[before:]],
                {layer.name: (layer, done[layer.name][1]) for layer in mine},
            )
            reports.extend(r for r, _ in ordered)
            bad.extend(dataclasses.asdict(b) for b in flow.bad[before:])
    if captured is not None:
        captured.states.close()
    return reports, bad


def _check_multiplied(model: nn.Module, layers: Sequence[Layer], grams: Grams) -> None:
    """Raise ModelError for a 3-D parameter of which no part was multiplied with any token: some expert
    always is, so it holds something else."""
    unseen: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.expert is not None:
            unseen.setdefault(layer.parameter, []).append(layer)
    for layer in layers:
        if grams.of(layer.name) is not None:
            unseen.pop(layer.parameter, None)
    for name, parts in unseen.items():
        if len(parts) == model.get_parameter(name).shape[0]:
            raise ModelError(
                f"parameter {name!r} looks like experts, but no token was multiplied with any of them; "
                f"leave it out with --exclude {parts[0].stage!r}"
            )


def _solve_layer(
    source: Source, layer: Layer, grams: Grams, options: PruneOptions
) -> tuple[LayerReport, Tensor]:
    """Solve one layer and set what its mask prunes to zero in the model."""
    weight = matrix(source.model, layer)
    gram: Gram | None = grams.of(layer.name)
    tokens = 0 if gram is None else gram.tokens
    fallback = gram is None or tokens < options.min_tokens
    if gram is None or fallback:
        values, mean = torch.eye(layer.n, device=source.device), None
    else:
        values, mean = gram.value(shrink=options.shrink), gram.mean()
    problem = LayerProblem(
        weight.detach().float(),
        values,
        options.pattern,
        name=layer.name,
        assume_psd=True,
        mean=mean,
    )
    del values
    began = time.perf_counter()
    if fallback:
        start, solution = None, solve(problem, "magnitude")
    else:
        start = None
        if options.start is not None and options.start != options.solver:
            start = make_start(problem, options.start, Limits(seed=options.seed))
        solution = solve(
            problem,
            options.solver,
            start=None if start is None else start.mask,
            **{"seed": options.seed, **options.solver_options},
        )
    seconds = time.perf_counter() - began
    mask = solution.mask
    weight.masked_fill_(~mask.to(weight.device), 0)
    return (
        LayerReport(
            name=layer.name,
            rows=layer.rows,
            n=layer.n,
            pattern=str(options.pattern),
            pruned=int((~mask).sum()),
            error_start=None if start is None else float(start.objective.sum()),
            error=float(solution.objective.sum()),
            lower_bound=float(solution.lower_bound.sum()),
            statuses={str(s): solution.status.count(s) for s in sorted(set(solution.status))},
            tokens=tokens,
            fallback=fallback,
            seconds=seconds,
        ),
        mask.cpu(),
    )


def _first_stage(layers: Sequence[Layer], grams: Grams) -> tuple[list[Layer], list[Layer]]:
    """The layers that are called first and share their inputs, all experts of a kind together;
    and the rest. Layers that were never called come last."""
    by_name = {layer.name: layer for layer in layers}
    called = [by_name[name] for name in grams.order if name in by_name]
    if not called:
        return list(layers), []
    leader = grams.leader(called[0].name)
    kinds = {layer.stage for layer in called if grams.leader(layer.name) == leader}
    first = [layer for layer in layers if layer.stage in kinds]
    return first, [layer for layer in layers if layer.stage not in kinds]

"""Make a mixture-of-experts model smaller by whole experts, the same number in every block.

A token's output is Σ gₑ·Eₑ(x) over the experts e that it is routed to. Without the experts P it misses
Σ_{e∈P} gₑ·Eₑ(x), whose mean square is pᵀQp with Q_ef = mean over tokens of gₑ·g_f·⟨Eₑ(x), E_f(x)⟩: a mixture
is one row with as many entries as it has experts, solved block by block. The router of the smaller model
gives such a token to its next best experts; that change is measured afterwards.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from maskopt.core.problem import RowProblem
from maskopt.errors import ModelError, OptionError
from maskopt.models.architecture.blocks import Mixture, mixtures_of
from maskopt.models.architecture.structures import expert_settings, experts_left, without_experts
from maskopt.models.blockwise.forward import OnBlockProgress, forwards
from maskopt.models.blockwise.job import Block, Job
from maskopt.models.checkpoints.report import LayerReport, PruneReport
from maskopt.models.checkpoints.result import disk_needed
from maskopt.models.checkpoints.schema import EXPERTS
from maskopt.models.options.prune import NONE
from maskopt.models.options.walk import WalkOptions
from maskopt.models.pruning.run import Run, fingerprint_of, peaks
from maskopt.models.structured.change import check_shapes, finish_smaller, open_original
from maskopt.protocol.solver import solve

#: what it means if the written model computes something else
_WHY = "its experts are routed to otherwise"
#: seconds to prove a choice
_SECONDS = 60.0
#: options of the walk that apply where all tokens of all windows count
OPTIONS = (
    *("seed", "skip_bad_samples", "samples", "seq_len", "bos", "text_field", "chat"),
    *("device", "dtype", "threads", "activation_memory", "max_memory", "trust_remote_code"),
)
T = TypeVar("T")


def remove_experts(
    model: str | Path,
    tokenizer_or_tokens: Any = None,
    *,
    share: float,
    output: str | Path,
    calibration: Any = None,
    options: WalkOptions | None = None,
    overwrite: bool = False,
    on_progress: OnBlockProgress | None = None,
) -> PruneReport:
    """Write a copy of a model folder without a share of the experts of every mixture, which `from_pretrained`
    loads.

    Args:
        model: a folder, or a name on the hub; `tokenizer_or_tokens` and `calibration` as for `prune_model`.
        share: of the experts to remove, rounded down to a whole number of them.

    Returns:
        A report with a `LayerReport` for every mixture. `error` is the change of its output in the smaller
        model; `error_kept`, of which statuses and bounds are, the change without new routing of tokens.

    Raises:
        MaskoptError: no mixtures, or some that cannot be cut; a share that takes none, or leaves fewer than a
            token goes to; what `prune_model` refuses.
    """
    began = time.perf_counter()
    if not 0 < share < 1:
        raise OptionError(f"`experts` is the share that goes, between 0 and 1, not {share}")
    options = options or WalkOptions()
    options.refuse_all_but(OPTIONS, "`experts` are chosen block by block, by all windows")
    run = Run(output, overwrite=overwrite, model=model, calibration=calibration)
    doing, how = "removing experts", {"on_progress": on_progress}
    job, source = open_original(model, tokenizer_or_tokens, calibration, options, doing, **how)
    mixtures = [m for index in range(len(source.blocks)) for m in mixtures_of(source.blocks, index)]
    left = experts_left(mixtures, share)
    settings = expert_settings(source.model, source.checkpoint.config, mixtures, left)
    check_shapes(source, settings, {name: {0: left} for m in mixtures for name in m.parameters})
    run.reads(model=source.checkpoint)
    record = {"experts": share, "update": NONE, "seed": options.seed}
    record["skip_bad_samples"] = options.skip_bad_samples
    with run.opened(disk_needed(source.checkpoint)) as work:
        kept, layers, bad = _choose(job, mixtures, left, work.hidden)
        change = without_experts(source.conversion, settings, mixtures, kept)
        fingerprint, memory = fingerprint_of(job, record), peaks(source.device)
        report = PruneReport(
            layers, fingerprint, bad, output=run.output, memory=memory, kind=EXPERTS
        )

        def cut_block(block: Block) -> None:
            for one in (x for x in mixtures if x.block == block.index):
                cut(block.job.source.model, one, kept[one.name])

        finish_smaller(job, run, change, report, _WHY, prepare=cut_block)
    return dataclasses.replace(report, seconds=time.perf_counter() - began)


def _choose(
    job: Job, mixtures: Sequence[Mixture], left: int, folder: Path
) -> tuple[dict[str, Bool[Tensor, " experts"]], list[LayerReport], list[dict[str, Any]]]:
    """The main loop: experts that stay and report, by mixture, and the samples that were left out."""
    kept: dict[str, Tensor] = {}
    layers: list[LayerReport] = []
    bad: list[dict[str, Any]] = []
    with job, torch.no_grad():
        for block in job.blocks(folder=folder):
            mine = [mixture for mixture in mixtures if mixture.block == block.index]
            tick = block.ticker("solve", len(mine))
            for mixture in mine:
                began = time.perf_counter()
                quadratic, tokens = costs(block, mixture)
                gone, name = len(quadratic) - left, mixture.name
                problem = RowProblem.from_quadratic(quadratic.numpy(), cardinality=gone, name=name)
                solution = solve(problem, "branch", time_limit=_SECONDS).raise_if_interrupted()
                kept[name] = solution.mask[0]
                model = job.source.model
                dense = copy.deepcopy(model.get_submodule(mixture.parent))
                cut(model, mixture, kept[name])
                error, energy = change_of(block, mixture, dense)
                report = LayerReport(
                    name=name,
                    block=mixture.block,
                    kind=mixture.kind,
                    rows=1,
                    n=mixture.count,
                    pattern=f"{left} of {mixture.count} experts",
                    pruned=mixture.count - left,
                    error=error,
                    lower_bound=max(solution.bound, 0.0),
                    statuses={str(solution.status[0]): 1},
                    tokens=tokens,
                    fallback=False,
                    seconds=time.perf_counter() - began,
                    energy=energy,
                    error_kept=max(solution.value, 0.0),
                )
                layers.append(report)
                tick(1, report)
            block.advance()
            bad += [dataclasses.asdict(sample) for sample in block.bad]
    return kept, layers, bad


def cut(model: nn.Module, mixture: Mixture, kept: Bool[Tensor, " experts"]) -> None:
    """Leave only these experts in the model."""
    for name in mixture.parameters:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data[kept.to(parameter.device)]


def costs(block: Block, mixture: Mixture) -> tuple[Float[Tensor, "experts experts"], int]:
    """Q of a mixture in float64, from all windows, and how many tokens it is the mean over."""
    module = block.job.source.model.get_submodule(mixture.name)

    def visit(args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> tuple[Tensor, int]:
        hidden, index, weights = (*args, *kwargs.values())
        index = index.reshape(-1, index.shape[-1])
        weights = weights.reshape(index.shape)
        flat = hidden.reshape(-1, hidden.shape[-1])
        parts = torch.stack(
            [module(flat, index[:, [j]], weights[:, [j]]) for j in range(index.shape[1])], 1
        ).double()
        products = parts @ parts.transpose(1, 2)
        place = index[:, :, None] * mixture.count + index[:, None, :]
        q = torch.zeros(mixture.count**2, dtype=torch.float64, device=flat.device)
        q.index_add_(0, place.reshape(-1), products.reshape(-1))
        return q.view(mixture.count, mixture.count).cpu(), len(flat)

    found = seen_by(block, module, mixture.name, visit)
    tokens = sum(count for _, count in found)
    total = torch.stack([q for q, _ in found]).sum(0) / max(tokens, 1)
    return (total + total.T) / 2, tokens


def change_of(block: Block, mixture: Mixture, dense: nn.Module) -> tuple[float, float]:
    """Change and energy of the mixture's outputs, means over tokens, sums over outputs."""
    module = block.job.source.model.get_submodule(mixture.parent)

    def visit(args: Any, kwargs: dict[str, Any], output: Tensor) -> tuple[Tensor, Tensor, int]:
        before, after = first(dense(*args, **kwargs)).double(), output.double()
        error, energy = (after - before).square().sum(), before.square().sum()
        return error, energy, before.numel() // before.shape[-1]

    found = seen_by(block, module, mixture.parent, visit)
    tokens = max(sum(count for *_, count in found), 1)
    return tuple(float(sum(one[i] for one in found)) / tokens for i in (0, 1))  # type: ignore[return-value]


def seen_by(
    block: Block,
    module: nn.Module,
    name: str,
    visit: Callable[[tuple[Any, ...], dict[str, Any], Tensor], T],
) -> list[T]:
    """What `visit` returns for a module's call, window by window; ModelError unless it is one call."""
    seen: list[T] = []
    remedy = "and its experts cannot be removed"
    heard, forward = threading.local(), module.forward

    def recorded(*args: Any, **kwargs: Any) -> Any:
        state = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(state, Tensor):
            raise ModelError(f"{type(module).__name__} is called without a hidden state, {remedy}")
        # the model may change its own input in place
        kept = state.clone()
        before = tuple(kept if value is state else value for value in args)
        named = {name: kept if value is state else value for name, value in kwargs.items()}
        output = forward(*args, **kwargs)
        heard.calls.append((before, named, first(output).clone()))
        return output

    def one(sample: int) -> tuple[T, bool]:
        heard.calls = []
        block.run(sample, block.samples.states)
        if len(heard.calls) != 1:
            raise ModelError(f"{name} is called {len(heard.calls)} times in a pass, {remedy}")
        args, kwargs, output = heard.calls[0]
        return visit(args, kwargs, output), bool(output.isfinite().all())

    with forwards([(module, recorded)]):
        for sample, (found, finite) in block.threads.each(one, list(block.samples.active)):
            if finite:
                seen.append(found)
            else:
                block.samples.leave_out(sample, name)
    return seen


def first(output: Any) -> Tensor:
    """The hidden state in a module's return value."""
    found = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(found, Tensor):
        raise ModelError("a mixture does not return a hidden state")
    return found

"""Make a mixture-of-experts model smaller by whole experts, as many of every block.

for every block with a mixture:
    costs    what the experts add to its output, on what the smaller blocks before it leave
    choose   those whose removal costs least, proven where the search ends in time
    cut      them from the block, and their rows from its router
    change   of the mixture's output, tokens being routed anew; then on to the next block
"""

from __future__ import annotations

import copy
import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from maskopt.core.pattern import Unstructured
from maskopt.core.problem import RowProblem
from maskopt.errors import ModelError, OptionError
from maskopt.models.architecture.source import FolderSource
from maskopt.models.architecture.structures import Cut
from maskopt.models.blockwise.job import Job, open_job
from maskopt.models.blockwise.progress import OnBlockProgress
from maskopt.models.blockwise.walk_block import Block
from maskopt.models.blockwise.windows import tokens_or_tokenizer
from maskopt.models.checkpoints.checkpoint import read_json
from maskopt.models.checkpoints.report import LayerReport, PruneReport
from maskopt.models.checkpoints.workspace import check_inputs, check_output, open_workspace
from maskopt.models.checkpoints.write import disk_needed
from maskopt.models.options.prune import NONE
from maskopt.models.options.walk import WalkOptions
from maskopt.models.pruning.fingerprint import fingerprint_of
from maskopt.models.pruning.output import check_disk
from maskopt.models.pruning.peak import peaks
from maskopt.models.structured.expert_costs import Mixture, change_of, costs, cut, mixtures_of
from maskopt.models.structured.reduced import CONFIG, StoredCut, check_shapes
from maskopt.models.structured.rewritten import Change, rewritable, write_changed
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import solve

#: what configurations call the number of experts
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
#: a tensor of one expert: what those of all of them are called alike, its number, and the rest
_EXPERT = re.compile(r"(?P<home>.*\bexperts)\.(?P<number>\d+)\.(?P<rest>.*)")
#: seconds in which a choice is proven, or not
_SECONDS = 60.0
#: of the walk's options, those that mean nothing where all tokens and all windows are looked at in order
_NOT_HERE = (
    "include", "exclude", "token_weights", "all_experts", "holdout", "calibrate_on", "true_sequential",
)  # fmt: skip


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
    """Write a copy of a model folder without a share of the experts of every mixture: an ordinary folder that
    `from_pretrained` loads.

    Args:
        model: a folder, or a name on the hub.
        tokenizer_or_tokens: as for `prune_model`.
        share: of the experts that goes, rounded down to a whole number of them.
        calibration: as for `prune_model`.

    Returns:
        A report with a `LayerReport` for every mixture. `error` is the change of its output in the smaller
        model, `error_kept` what it would be if no token were routed anew, of which statuses and bounds are.

    Raises:
        MaskoptError: a model without mixtures, or with some that cannot be cut; a share that takes none, or
            leaves fewer than a token goes to; what `prune_model` refuses.
    """
    began = time.perf_counter()
    if not 0 < share < 1:
        raise OptionError(f"`experts` is the share that goes, between 0 and 1, not {share}")
    options = options or WalkOptions()
    options.refuse(_NOT_HERE, "`experts` are chosen block by block, by all windows")
    target = Path(output)
    check_output(target, overwrite=overwrite, resume=False, model=model, calibration=calibration)
    text, tokenizer = tokens_or_tokenizer(tokenizer_or_tokens, calibration)
    if text is None:
        raise ModelError("removing experts needs `calibration` text or tokens; name some")
    job = open_job(model, text, options, tokenizer=tokenizer, on_progress=on_progress)
    source = rewritable(job)
    check_inputs(target, model=source.checkpoint.folder)
    mixtures = [m for index in range(len(source.blocks)) for m in mixtures_of(source.blocks, index)]
    left = _left(mixtures, share)
    settings = _check_family(source, mixtures, left)
    with open_workspace(target, overwrite=overwrite, resume=False) as work:
        check_disk(work.output, disk_needed(source.checkpoint))
        kept, layers, bad = _choose(job, mixtures, left, work.hidden)
        change, homes = _change(source, mixtures, kept, settings)
        record = {"experts": share, "update": NONE, "seed": options.seed}
        record["skip_bad_samples"] = options.skip_bad_samples
        seconds, memory = time.perf_counter() - began, peaks(source.device)
        report = PruneReport(
            layers, fingerprint_of(job, record), bad, {}, target, seconds, (), memory
        )
        write_changed(job, work, change, report, experts=homes)
    return dataclasses.replace(report, seconds=time.perf_counter() - began)


def _left(mixtures: Sequence[Mixture], share: float) -> int:
    """How many experts stay."""
    if not mixtures:
        raise ModelError("the model has no experts that tokens are routed to; leave out `experts`")
    counts = {(m.count, m.each) for m in mixtures}
    if len(counts) > 1:
        raise ModelError(
            "its blocks have different numbers of experts, and a configuration names one; leave out `experts`"
        )
    (count, each) = counts.pop()
    gone = Unstructured(sparsity=share).pruned_in(1, count)
    if not gone:
        raise ModelError(
            f"a share of {share:g} of {count} experts is none; take a larger `experts`"
        )
    if count - gone < each:
        raise ModelError(
            f"a share of {share:g} leaves {count - gone} of {count} experts, and a token goes to {each}; "
            "take a smaller `experts`"
        )
    return count - gone


def _check_family(source: FolderSource, mixtures: Sequence[Mixture], left: int) -> dict[str, int]:
    """What of the configuration changes.

    Raises:
        ModelError: it does not say the smaller model's shapes.
    """
    text: Any = source.model.config.get_text_config()
    keys = [key for key in _COUNTS if getattr(text, key, None) == mixtures[0].count]
    settings = dict.fromkeys(keys, left)
    inside = {name for mixture in mixtures for name in mixture.parameters}
    shapes = {
        name: (left, *p.shape[1:]) if name in inside else tuple(p.shape)
        for name, p in source.model.named_parameters()
    }
    check_shapes(source, settings, shapes)
    return settings


def _as_stored(config: Mapping[str, Any], settings: Mapping[str, int]) -> dict[str, int]:
    """The settings by the keys of the stored configuration, which may have several words for one thing; all
    of them where it has none."""
    nested = config.get("text_config")
    known = {*config, *(nested if isinstance(nested, dict) else ())}
    return {key: value for key, value in settings.items() if key in known} or dict(settings)


def _choose(
    job: Job, mixtures: Sequence[Mixture], left: int, folder: Path
) -> tuple[dict[str, Bool[Tensor, " experts"]], list[LayerReport], list[dict[str, Any]]]:
    """The main loop; see the module's docstring. The experts that stay, by mixture, what became of each, and
    the samples that were left out."""
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
                problem = RowProblem.from_quadratic(
                    quadratic.numpy(), cardinality=len(quadratic) - left, name=mixture.name
                )
                solution = solve(problem, "branch", time_limit=_SECONDS).uninterrupted()
                kept[mixture.name] = solution.mask[0]
                model = job.source.model
                dense = copy.deepcopy(model.get_submodule(mixture.parent))
                cut(model, mixture, kept[mixture.name].nonzero()[:, 0])
                found = change_of(block, mixture, dense)
                seconds = time.perf_counter() - began
                layers.append(_report(mixture, problem, solution, found, tokens, seconds))
                tick(1, layers[-1])
            block.advance()
            bad += [dataclasses.asdict(sample) for sample in block.bad]
    return kept, layers, bad


def _report(
    mixture: Mixture,
    problem: RowProblem,
    solution: Solution,
    found: tuple[float, float],
    tokens: int,
    seconds: float,
) -> LayerReport:
    kept = int(solution.mask.sum())
    posed = problem.posed(float(solution.objective), float(solution.lower_bound))
    return LayerReport(
        name=mixture.name,
        block=mixture.block,
        kind=mixture.kind,
        rows=1,
        n=mixture.count,
        pattern=f"{kept} of {mixture.count} experts",
        pruned=mixture.count - kept,
        error_start=None,
        error=found[0],
        lower_bound=max(posed.bound, 0.0),
        statuses={str(solution.status[0]): 1},
        tokens=tokens,
        fallback=False,
        seconds=seconds,
        energy=found[1],
        error_kept=max(posed.value, 0.0),
    )


def _change(
    source: FolderSource,
    mixtures: Sequence[Mixture],
    kept: Mapping[str, Bool[Tensor, " experts"]],
    settings: Mapping[str, int],
) -> tuple[Change, dict[str, str]]:
    """What becomes of the stored model; and of experts that are stored one by one, what their tensors' names
    begin with, and their mixture.

    Raises:
        ModelError: experts that are stored in another way.
    """
    names: dict[str, str | None] = {name: name for name in source.checkpoint.where}
    cuts: dict[str, StoredCut] = {}
    homes: dict[str, str] = {}
    for mixture in mixtures:
        numbers = {old: new for new, old in enumerate(kept[mixture.name].nonzero()[:, 0].tolist())}
        for parameter in mixture.parameters:
            tensor = source.stored_as_is(parameter)
            if tensor is not None:
                cuts[tensor] = StoredCut(((mixture.name, Cut(0, [(mixture.count, 1)])),))
                continue
            for name in source.stored_parts(parameter):
                found = _EXPERT.match(name)
                if found is None or int(found["number"]) >= mixture.count:
                    raise ModelError(
                        f"parameter {parameter!r} is stored in another form than expert by expert; its "
                        "experts cannot be removed"
                    )
                homes[found["home"]] = mixture.name
                new = numbers.get(int(found["number"]))
                names[name] = None if new is None else f"{found['home']}.{new}.{found['rest']}"

    def cut_block(block: Block) -> None:
        for mixture in mixtures:
            if mixture.block == block.index:
                cut(block.job.source.model, mixture, kept[mixture.name].nonzero()[:, 0])

    stored = _as_stored(read_json(source.checkpoint.folder / CONFIG), settings)
    why = "its experts are routed to otherwise"
    return Change(stored, names, cut_block, why, cuts, kept), homes

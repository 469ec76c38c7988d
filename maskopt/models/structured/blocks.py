"""Make a model smaller by whole decoder blocks: those whose absence its output shows least."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from maskopt.errors import ModelError, OptionError
from maskopt.models.architecture.source import FolderSource
from maskopt.models.blockwise.job import Job, open_job
from maskopt.models.blockwise.progress import OnBlockProgress
from maskopt.models.blockwise.variants import place
from maskopt.models.blockwise.walk_block import Block
from maskopt.models.blockwise.windows import tokens_or_tokenizer
from maskopt.models.checkpoints.checkpoint import read_json
from maskopt.models.checkpoints.report import PruneReport
from maskopt.models.checkpoints.workspace import (
    Workspace,
    check_inputs,
    check_output,
    open_workspace,
)
from maskopt.models.checkpoints.write import disk_needed
from maskopt.models.options.prune import NONE
from maskopt.models.options.walk import WalkOptions
from maskopt.models.pruning.fingerprint import fingerprint_of
from maskopt.models.pruning.output import check_disk
from maskopt.models.pruning.peak import peaks
from maskopt.models.structured.block_effects import Effects, Left, measure_effects, measure_sets
from maskopt.models.structured.block_search import Measure, search_sets
from maskopt.models.structured.reduced import CONFIG, check_shapes
from maskopt.models.structured.rewritten import Change, rewritable, write_changed
from maskopt.protocol.solution import Solution

#: windows that blocks are judged on, unless said otherwise
WINDOWS = 4
#: of the sets that a round of the search leaves out, those that are judged on all tokens
JUDGED = 16
#: of the walk's options, those that mean nothing where whole models are held against each other
_NOT_HERE = (
    "include", "exclude", "token_weights", "all_experts", "holdout", "calibrate_on", "true_sequential",
    "skip_bad_samples", "samples", "seed",
)  # fmt: skip
#: lists of blocks by their index, where other lists have an entry a block
_INDICES = (
    "moe_layers", "mlp_only_layers", "attn_layer_indices", "full_attn_idxs", "cross_attention_layers",
)  # fmt: skip
#: what configurations call the number of blocks
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


@dataclass(frozen=True)
class BlocksReport:
    """Which blocks went, and what others would have cost.

    Attributes:
        removed: their indices.
        effects: of every block and pair.
        solution: of least cost by these; its status says whether that is proven. For one block or two it is
            what was removed; beyond, where the search began.
        measured: nats a token by set, of the yardsticks and of what else was left out as a whole; the least
            was removed.
        seconds: wall time.
    """

    removed: list[int]
    effects: Effects
    solution: Solution
    measured: dict[Left, float]
    output: Path
    seconds: float


def remove_blocks(
    model: str | Path,
    tokenizer_or_tokens: Any = None,
    *,
    count: int,
    output: str | Path,
    calibration: Any = None,
    windows: int = WINDOWS,
    options: WalkOptions | None = None,
    overwrite: bool = False,
    on_progress: OnBlockProgress | None = None,
) -> BlocksReport:
    """Write a copy of a model folder without `count` of its blocks: an ordinary folder that `from_pretrained`
    loads.

    The set of least cost by all single blocks and pairs (`block_effects`), solved exactly; of
    more than two blocks, searched from there by exchanges that are measured as a whole
    (`block_search`).

    Args:
        model: a folder, or a name on the hub.
        tokenizer_or_tokens: as for `prune_model`.
        calibration: as for `prune_model`; the first windows of the text are taken.
        count: how many blocks go.
        windows: of calibration, `options.seq_len` tokens each (2048 unless said otherwise).

    Raises:
        MaskoptError: a count that leaves no block, a family whose configuration cannot say what is left, or
            what `prune_model` refuses.
    """
    began = time.perf_counter()
    options = options or WalkOptions()
    options.refuse(_NOT_HERE, "`blocks` are chosen by the model's output on all tokens")
    target = Path(output)
    check_output(target, overwrite=overwrite, resume=False, model=model, calibration=calibration)
    text, tokenizer = tokens_or_tokenizer(tokenizer_or_tokens, calibration)
    if text is None:
        raise ModelError(
            "removing blocks needs `calibration` text or tokens; name a source of text"
        )
    job = open_job(
        model,
        text,
        options,
        tokenizer=tokenizer,
        whole=True,
        limit=windows,
        on_progress=on_progress,
    )
    source = rewritable(job)
    check_inputs(target, model=source.checkpoint.folder)
    if not 0 < count < len(source.blocks):
        raise OptionError(f"`blocks` must be 1 to {len(source.blocks) - 1}, not {count}")
    _check_family(source, list(range(len(source.blocks) - count, len(source.blocks))))
    sayable = _sayable(source)
    with open_workspace(target, overwrite=overwrite, resume=False) as work:
        check_disk(work.output, disk_needed(source.checkpoint))
        with job, torch.no_grad():
            pairs = len(source.blocks) * (len(source.blocks) + 1) // 2
            effects = measure_effects(job, place(job, pairs, work.hidden))
            best, solution = effects.best(count)
            measured = choose(effects, best, _as_a_whole(job, options, work), sayable)
        least = min(measured, key=lambda left: measured[left])
        removed = sorted(least)
        change = Change(
            _check_family(source, removed),
            _new_names(source, removed),
            _leaving_out(removed),
            "blocks of this family depend on their numbers, and cannot be removed",
        )
        record = {"removed": removed, "update": NONE, "seed": options.seed}
        seconds, memory = time.perf_counter() - began, peaks(source.device)
        report = PruneReport([], fingerprint_of(job, record), (), {}, target, seconds, (), memory)
        found = _effects(removed, effects, solution, measured)
        write_changed(job, work, change, report, blocks=removed, effects=found)
    seconds = time.perf_counter() - began
    return BlocksReport(removed, effects, solution, measured, target, seconds)


def choose(
    effects: Effects, best: Sequence[int], measure: Measure, sayable: Callable[[Left], bool]
) -> dict[Left, float]:
    """KL of sets without which the model was looked at; that of the least is removed.

    Args:
        best: of least cost by pairs.
        measure: of sets of more than two.
        sayable: whether a configuration can say what is left; that of the last blocks does.
    """
    count = len(best)
    first = list(filter(sayable, dict.fromkeys(map(Left, (best, *effects.yardsticks(count))))))
    if count <= 2:
        if Left(best) not in first:
            ranked = sorted((s for s in effects.kl if len(s) == count), key=effects.kl.__getitem__)
            first.append(next(filter(sayable, ranked)))
        return {left: effects.kl[left] for left in first}

    def known(sets: Sequence[Left]) -> Mapping[Left, float]:
        some = list(filter(sayable, sets))
        return measure(some) if some else {}

    return search_sets(known, effects, first)


def _as_a_whole(job: Job, options: WalkOptions, work: Workspace) -> Measure:
    def measure(sets: Sequence[Left]) -> dict[Left, float]:
        with job.again(options) as walk:
            return measure_sets(walk, sets, place(job, len(sets), work.hidden), judged=JUDGED)

    return measure


def _sayable(source: FolderSource) -> Callable[[Left], bool]:
    """Whether the family's configuration can say what is left without some blocks. Where every single block
    can go, any set of them is taken to; what is written is checked in any case."""

    @cache
    def can_go(left: Left) -> bool:
        try:
            _check_family(source, sorted(left))
        except ModelError:
            return False
        return True

    singles = [can_go(Left({index})) for index in range(len(source.blocks))]
    return (lambda _: True) if all(singles) else can_go


def _check_family(source: FolderSource, removed: list[int]) -> dict[str, Any]:
    """The settings of the model without these blocks.

    Raises:
        ModelError: the family's configuration does not say what is left.
    """
    blocks = len(source.blocks)
    stored = read_json(source.checkpoint.folder / CONFIG)
    nested = stored.get("text_config", {}) if isinstance(stored.get("text_config"), dict) else {}
    keys = [key for key in _DEPTHS if blocks in (stored.get(key), nested.get(key))]
    text: Any = source.model.config.get_text_config()
    settings: dict[str, Any] = {(keys or [_DEPTHS[0]])[0]: blocks - len(removed)}
    for key, value in text.to_dict().items():
        if key in _INDICES and isinstance(value, list):
            left = [index for index in value if index not in removed]
            settings[key] = [index - sum(gone < index for gone in removed) for index in left]
        elif isinstance(value, list) and len(value) == blocks and not key.endswith("token_id"):
            settings[key] = [item for index, item in enumerate(value) if index not in removed]
    renamed = {name: new for name, new in _renamed(source, removed) if new is not None}
    shapes = {
        renamed[name]: tuple(p.shape)
        for name, p in source.model.named_parameters()
        if name in renamed
    }
    check_shapes(source, settings, shapes)
    return settings


def _renamed(source: FolderSource, removed: list[int]) -> list[tuple[str, str | None]]:
    """The model's parameters and what they are called without the blocks; None: they are gone."""
    return [
        (name, _without(name, source.blocks.name, removed))
        for name, _ in source.model.named_parameters()
    ]


def _new_names(source: FolderSource, removed: list[int]) -> dict[str, str | None]:
    """The same of the tensors that the checkpoint stores, whose names may begin otherwise: only those that
    the blocks are made of, since a vision tower has blocks of that name, too."""
    last = source.blocks.name.rpartition(".")[2]
    of_blocks = source.stored_inside(source.blocks.name)
    return {
        name: _without(name, last, removed) if name in of_blocks else name
        for name in source.checkpoint.where
    }


def _without(name: str, blocks: str, removed: list[int]) -> str | None:
    found = re.search(rf"(?:^|\.){re.escape(blocks)}\.(\d+)\.", name)
    if found is None:
        return name
    index = int(found[1])
    if index in removed:
        return None
    new = index - sum(i < index for i in removed)
    return f"{name[: found.start(1)]}{new}{name[found.end(1) :]}"


def _leaving_out(removed: list[int]) -> Callable[[Block], None]:
    """Leaves these blocks of the original without sending windows through them."""

    def prepare(block: Block) -> None:
        if block.index in removed:
            block.advanced = block.dense_advanced = True

    return prepare


def _effects(
    removed: list[int], effects: Effects, solution: Solution, measured: dict[Left, float]
) -> dict[str, Any]:
    """What was measured and found, as JSON values."""
    count = len(removed)
    return {
        "kl": {",".join(map(str, sorted(left))): kl for left, kl in effects.kl.items()},
        "similarity": effects.similarity,
        "cost": effects.cost(removed),
        "status": str(solution.status[0]),
        "measured": {",".join(map(str, sorted(left))): kl for left, kl in measured.items()},
        "last": effects.cost(effects.last(count)),
        "most_alike": effects.cost(effects.most_alike(count)),
    }

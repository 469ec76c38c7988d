"""A model folder with structures removed. Every kind of structured pruning ends in a `Change`; the written
model must compute what the original computes when it is changed in memory in the same way."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from maskopt.errors import ModelError
from maskopt.models.architecture.source import FolderSource, Source
from maskopt.models.architecture.structures import Change, cannot_say, changed
from maskopt.models.blockwise.job import Block, Job, open_job
from maskopt.models.calibration.tokens import tokens_or_tokenizer
from maskopt.models.checkpoints.checkpoint import open_safe, write_file
from maskopt.models.checkpoints.report import FinishedBlock, PruneReport
from maskopt.models.checkpoints.result import Edits, write_shard
from maskopt.models.checkpoints.schema import CONFIG, INDEX, SINGLE
from maskopt.models.options.walk import WalkOptions
from maskopt.models.pruning.run import Run

#: relative difference of the last hidden states
_SAME = 1e-2


def folder_source(source: Source) -> FolderSource:
    """The source of a model folder; ModelError for a model in memory."""
    if not isinstance(source, FolderSource):
        raise ModelError("only model folders can be made smaller; save the model first")
    return source


def open_original(
    model: str | Path,
    tokenizer_or_tokens: Any,
    calibration: Any,
    options: WalkOptions,
    doing: str,
    **how: Any,
) -> tuple[Job, FolderSource]:
    """A walk through a model folder whose smaller copy can be opened and compared with it; ModelError for no
    text, a model in memory, or code of its own. `doing`: in messages, what needs the text; `how`: for
    `open_job`."""
    text, tokenizer = tokens_or_tokenizer(tokenizer_or_tokens, calibration, f"{doing} needs")
    job = open_job(model, text, options, tokenizer=tokenizer, **how)
    source = folder_source(job.source)
    if source.checkpoint.config.get("auto_map"):
        raise ModelError(
            f"{source.checkpoint.folder}: config.json asks to run code that comes with the model (auto_map), "
            "and code is not copied: the smaller model could not be checked. Without auto_map transformers' "
            "own code runs"
        )
    return job, source


def finish_smaller(
    job: Job,
    run: Run,
    change: Change,
    report: PruneReport,
    why: str,
    *,
    edits: Edits | None = None,
    finished: Mapping[int, FinishedBlock] | None = None,
    prepare: Callable[[Block], None] = lambda _: None,
    **more: Any,
) -> None:
    """Write the smaller model, after `edits`, move it into view, and record what stays with `more`: all else
    follows from the options. ModelError where it does not compute what the changed original does; `why`: what
    that means."""
    checkpoint, staging = folder_source(job.source).checkpoint, run.work.staging
    edits = edits or Edits()
    left = {
        name: {cut.axis: cut.inside(change.kept[by]) for by, cut in found}
        for name, found in change.cuts.items()
    }
    how: Any = {"names": change.names or None, "left": left}
    shards = {
        name: write_shard(checkpoint, name, staging / name, edits, **how)
        for name, file in checkpoint.shards.items()
        if not change.names or any(change.names[tensor] is not None for tensor in file.entries)
    }

    def rewrite(folder: Path) -> None:
        _write_json(folder / CONFIG, changed(checkpoint.config, change.settings))
        if SINGLE not in checkpoint.shards:
            files = {name: open_safe(folder / name).entries for name in shards}
            total = sum(entry.size for entries in files.values() for entry in entries.values())
            where = {tensor: name for name, entries in files.items() for tensor in entries}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            _write_json(folder / INDEX, index)
        bad = {sample["sample"] for sample in report.bad_samples}
        _check_same_output(job, folder, why, bad, finished, prepare)

    kept = {name: stays.nonzero()[:, 0].tolist() for name, stays in change.kept.items()}
    updated = sorted(change.names.get(name) or name for name in edits.values)
    shrunk = {"kept": kept, "updated": updated, **more}
    run.finish(report, shards, rewrite, shrunk=shrunk)


def _check_same_output(
    job: Job,
    written: Path,
    why: str,
    bad: set[int],
    finished: Mapping[int, FinishedBlock] | None,
    prepare: Callable[[Block], None],
) -> None:
    """Raise ModelError where the changed original and the written model differ on a good window."""
    window = next((w for w in range(len(job.windows)) if w not in bad), None)
    if window is None:
        return
    original, tokens = folder_source(job.source).checkpoint.folder, job.windows.tokens
    # in float32, so that a sum in another order is no difference
    walk = WalkOptions(device=job.options.device, dtype="float32", threads=job.options.threads)
    states = []
    for folder, change, done in ((original, prepare, finished), (written, lambda _: None, None)):
        with (
            open_job(folder, tokens[window : window + 1], walk, whole=True) as one,
            torch.no_grad(),
        ):
            try:
                for block in one.blocks(done):
                    change(block)
                    block.advance()
            except RuntimeError as error:  # torch's, of shapes that do not fit
                if folder != written:
                    raise
                raise ModelError(f"the smaller model does not run ({error}): {why}") from error
            states.append(one.last_state(0).double())
    apart = float((states[1] - states[0]).norm() / states[0].norm())
    if not apart <= _SAME:
        raise ModelError(f"the smaller model's output is off by {apart:.1e}: {why}")


def check_shapes(
    source: FolderSource,
    settings: Mapping[str, Any],
    sizes: Mapping[str, Mapping[int, int]] = MappingProxyType({}),
    rename: Callable[[str], str | None] = str,
) -> None:
    """Raise ModelError where the new configuration describes other parameters than are left: by new names,
    None for one that is removed, with new `sizes` by axis."""
    wanted: dict[str, tuple[int, ...]] = {}
    for name, parameter in source.model.named_parameters():
        if (new := rename(name)) is not None:
            left = {**dict(enumerate(parameter.shape)), **sizes.get(name, {})}
            wanted[new] = tuple(left.values())
    before = source.model.config
    record = changed(before.to_dict(), settings)
    try:
        with torch.device("meta"):
            model = type(source.model)(type(before).from_dict(record))
    except Exception as error:  # configurations fail in as many ways as there are models
        raise cannot_say(source.model, str(error).splitlines()[-1].strip()) from error
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(name) != shapes.get(name):
            raise cannot_say(
                source.model,
                f"parameter {name!r} is {list(shapes.get(name, ()))} in the model that it describes and "
                f"would be {list(wanted.get(name, ()))}",
            )


def _write_json(path: Path, value: Any) -> None:
    write_file(path, [(json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()])

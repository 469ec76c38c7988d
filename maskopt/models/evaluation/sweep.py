"""Many prunes of one model from the same Gram matrices, with one table at the end."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskopt.core.pattern import Pattern, parse_sparsity
from maskopt.errors import ModelError, OptionError
from maskopt.models.blockwise.distributed import ALONE, Ranks
from maskopt.models.blockwise.job import Job, open_job
from maskopt.models.blockwise.progress import OnBlockProgress
from maskopt.models.checkpoints.report import PruneReport
from maskopt.models.checkpoints.workspace import MANIFEST, check_output, check_place, unfinished
from maskopt.models.evaluation.evaluate import Evaluation, evaluate
from maskopt.models.evaluation.perplexity import check_targets
from maskopt.models.options.prune import NONE, PruneOptions, prune_options
from maskopt.models.options.walk import WalkOptions
from maskopt.models.pruning.gram_store import OF_TEXT, GramStore, open_store
from maskopt.models.pruning.prune import prune_model

#: of a prune's options, those that its judging takes over
_OF_JUDGING = ("device", "threads", "activation_memory", "trust_remote_code")


@dataclass(frozen=True)
class Swept:
    """One prune of a sweep.

    Attributes:
        label: name of its folder: `0.5-swap-none`.
        evaluation: of its model, where there was text to judge it on.
    """

    label: str
    output: Path
    report: PruneReport
    evaluation: Evaluation | None = None


def sweep(
    model: str | Path,
    grams: str | Path,
    output: str | Path,
    *,
    sparsity: Sequence[Pattern | float | str],
    calibration: Any = None,
    solvers: Sequence[str] = ("swap",),
    update: Sequence[str] = (NONE,),
    text: Any = None,
    windows: int | None = None,
    walk: WalkOptions | None = None,
    overwrite: bool = False,
    on_progress: Callable[[str], OnBlockProgress | None] = lambda label: None,
    ranks: Ranks = ALONE,
    **shorthand: Any,
) -> tuple[list[Swept], Evaluation | None]:
    """Prune a model in every combination of sparsities, solvers and treatments of the kept weights.

    What an earlier sweep finished is kept, what it left unfinished goes on, unless it is to be replaced.

    Args:
        model: a folder, or a name on the hub.
        grams: folder of its Gram matrices; if it does not exist, they are collected from `calibration` and
            stored there.
        calibration: text, as for `prune_model`; None: the folder exists.
        output: a folder with one for each prune.
        text: what all of them, and the dense model, are judged on, as for `evaluate`; None: nothing.
        windows: as many of it; None: all.
        walk: how; None: windows of 512 tokens, on the same machine as the prunes.
        overwrite: prune anew what an earlier sweep left there.
        on_progress: given a prune's label, what to tell of its progress.
        ranks: processes that share the work, without `text`.
        shorthand: other options of every prune, and of the collection.

    Returns:
        The prunes in their order, and the dense model's evaluation; None without text.

    Raises:
        MaskoptError: as for `prune_model`, of any combination before the first of them begins.
    """
    asked = list(_cases(sparsity, solvers, update, shorthand))
    if text is not None and ranks.size > 1:
        raise OptionError(
            "`text` is evaluated by one process; leave it out, and use `maskopt eval`"
        )
    if calibration is None:
        store = GramStore(grams)
    else:
        for _, how in asked:  # which may be refused before anything is collected
            prune_options(None, how)
        walk_names = {field.name for field in dataclasses.fields(WalkOptions)}
        of_walk = {name: value for name, value in shorthand.items() if name in walk_names}
        store = open_store(
            model, grams, calibration, of_walk, on_progress=on_progress("grams"), ranks=ranks
        )
        asked = [
            (label, {k: v for k, v in how.items() if k not in OF_TEXT}) for label, how in asked
        ]
    cases = {label: store.options(None, how) for label, how in asked}
    if not cases:
        raise OptionError("nothing is swept; give at least one `sparsity`")
    _check(model, store, list(cases.values()))
    walk = walk or _judging(next(iter(cases.values())))
    if text is not None:
        _check_judging(open_job(model, text, walk, whole=True, limit=windows))
    check_place(Path(output))
    targets = [Path(output) / label for label in cases]
    resumed = ranks.agreed(lambda: {x: not overwrite and _begun(x) for x in targets})
    inputs: dict[str, Any] = {"model": model, "grams": grams, "text": text}
    for target, resume in resumed.items():
        checked = functools.partial(check_output, target, overwrite=overwrite, resume=resume)
        ranks.agreed(functools.partial(checked, **inputs))
    found = []
    for (label, options), target in zip(cases.items(), targets, strict=True):
        report = prune_model(
            model,
            None,
            options,
            grams=grams,
            output=target,
            overwrite=overwrite,
            resume=resumed[target],
            on_progress=on_progress(label),
            ranks=ranks,
        )
        found.append(Swept(label, target, report))
    if text is None:
        return found, None
    dense, *others = evaluate([model, *(one.output for one in found)], text, walk, windows=windows)
    judged = [
        Swept(one.label, one.output, one.report, other)
        for one, other in zip(found, others, strict=True)
    ]
    return judged, dense


def _begun(target: Path) -> bool:
    """Is there a finished result, or one that could go on?"""
    return unfinished(target) or (target / MANIFEST).exists()


def _judging(options: PruneOptions) -> WalkOptions:
    """How models are judged beside such prunes: on what they run on, in the precision that `evaluate` has."""
    return WalkOptions(seq_len=512, **{name: getattr(options, name) for name in _OF_JUDGING})


def _check_judging(job: Job) -> None:
    """Refuse text, or a model of which pruned folders cannot be opened as they are written."""
    checkpoint = job.source.checkpoint
    assert checkpoint is not None
    if checkpoint.config.get("auto_map"):
        raise ModelError(
            f"{checkpoint.folder}: config.json asks to run code that comes with the model (auto_map), which "
            "is not copied to the pruned folders; leave out `text`, copy it there and judge by `maskopt eval`"
        )
    assert job.windows is not None
    check_targets(job.windows)


def _check(model: str | Path, store: GramStore, options: Sequence[PruneOptions]) -> None:
    """Refuse what `prune_model` would of any of them."""
    job = open_job(model, None, options[0])
    job.source.blocks.check_unshared(job.layers)
    store.check_model(job)
    for one in options:
        one.check_layers(job.layers)


def _cases(
    sparsity: Sequence[Pattern | float | str],
    solvers: Sequence[str],
    update: Sequence[str],
    shorthand: dict[str, Any],
) -> Iterator[tuple[str, dict[str, Any]]]:
    for pattern, solver, after in itertools.product(map(parse_sparsity, sparsity), solvers, update):
        how = {"sparsity": pattern, "solver": solver, "update": after, **shorthand}
        if after == NONE and len(set(update)) > 1:
            for name in ("damping", "damping_exponent"):  # they are of the others
                how.pop(name, None)
        yield f"{str(pattern).replace(':', 'of')}-{solver}-{after}", how

"""Many prunes of one model from the same Gram matrices, with one table at the end."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from maskopt.core.pattern import Pattern, parse_sparsity
from maskopt.errors import ModelError, OptionError
from maskopt.models.blockwise.distributed import ALONE, Ranks
from maskopt.models.blockwise.job import Job, open_job
from maskopt.models.blockwise.progress import OnBlockProgress
from maskopt.models.blockwise.windows import check_targets
from maskopt.models.checkpoints.report import PruneReport
from maskopt.models.checkpoints.workspace import MANIFEST, check_dense, check_place, unfinished
from maskopt.models.evaluation.evaluate import Evaluation, evaluate
from maskopt.models.options.prune import NONE, prune_options
from maskopt.models.options.walk import WalkOptions
from maskopt.models.pruning.gram_store import OF_TEXT, GramStore, open_store
from maskopt.models.pruning.prune import prune_model
from maskopt.models.pruning.run import Run

#: options of a prune that hold for its evaluation, too
_OF_JUDGING = ("device", "threads", "activation_memory", "trust_remote_code")


@dataclass(frozen=True)
class Swept:
    """One prune of a sweep. `label` names its folder: `0.5-swap-none`; `evaluation` needs text."""

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
    """Prune a model in every combination of sparsities, solvers and updates of the kept weights. Finished
    prunes of an earlier sweep are kept, and unfinished ones go on.

    Args:
        model: a folder, or a name on the hub.
        grams: folder of its Gram matrices; if it does not exist, they are collected from `calibration` and
            stored there.
        calibration: text, as for `prune_model`; None: the folder exists.
        output: a folder with one for each prune.
        text: for the evaluation of all prunes and the dense model, as for `evaluate`; None: none.
        windows: number of evaluation windows; None: all.
        walk: options of the evaluation; None: windows of 512 tokens, on the same device as the prunes.
        overwrite: replace the prunes of an earlier sweep.
        on_progress: takes a prune's label, and returns a callback for its progress.
        ranks: processes that share the work, without `text`.
        shorthand: other options of every prune, and of the collection.

    Returns:
        The prunes in their order, and the dense model's evaluation; None without text.

    Raises:
        MaskoptError: as for `prune_model`, for any combination before the first prune begins.
    """
    check_dense(Path(model))
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
        asked = [(x, {k: v for k, v in how.items() if k not in OF_TEXT}) for x, how in asked]
    cases = {label: store.options(None, how) for label, how in asked}
    if not cases:
        raise OptionError("nothing is swept; give at least one `sparsity`")
    first = next(iter(cases.values()))
    job = open_job(model, None, first)
    job.source.blocks.check_unshared(job.layers)
    store.check_model(job)
    for options in cases.values():  # refuses what a later prune would refuse
        options.check_layers(job.layers)
    if walk is None:
        walk = WalkOptions(seq_len=512, **{name: getattr(first, name) for name in _OF_JUDGING})
    if text is not None:
        _check_judging(open_job(model, text, walk, whole=True, limit=windows))
    check_place(Path(output))
    runs: dict[str, dict[str, Any]] = {}
    for label in cases:
        target = Path(output) / label
        begun = ranks.agreed(lambda at=target: unfinished(at) or (at / MANIFEST).exists())  # type: ignore[misc]
        runs[label] = {"output": target, "overwrite": overwrite, "resume": begun and not overwrite}
        inputs = {"model": model, "grams": grams, "text": text}
        Run(**runs[label], ranks=ranks, **inputs)  # refuses before the first prune
    found = []
    for label, options in cases.items():
        how = {"grams": grams, "on_progress": on_progress(label), "ranks": ranks, **runs[label]}
        report = prune_model(model, None, options, **how)
        found.append(Swept(label, runs[label]["output"], report))
    if text is None:
        return found, None
    dense, *others = evaluate([model, *(one.output for one in found)], text, walk, windows=windows)
    return [replace(one, evaluation=x) for one, x in zip(found, others, strict=True)], dense


def _check_judging(job: Job) -> None:
    """Refuse a text without targets, or a model whose pruned folders cannot be opened."""
    checkpoint = job.source.checkpoint
    assert checkpoint is not None
    if checkpoint.config.get("auto_map"):
        raise ModelError(
            f"{checkpoint.folder}: config.json asks to run code that comes with the model (auto_map), which "
            "is not copied to the pruned folders; leave out `text`, copy it there and judge by `maskopt eval`"
        )
    check_targets(job.windows)


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

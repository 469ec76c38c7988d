"""Sweeps: many prunes of one model from the same Gram matrices, with one table at the end."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from maskopt.core.pattern import parse_sparsity
from maskopt.errors import ModelError, OptionError
from maskopt.models.blockwise.distributed import ALONE, Ranks
from maskopt.models.blockwise.forward import OnBlockProgress
from maskopt.models.blockwise.job import open_job
from maskopt.models.checkpoints.report import PruneReport
from maskopt.models.checkpoints.schema import MANIFEST
from maskopt.models.checkpoints.workspace import check_dense, check_place, unfinished
from maskopt.models.evaluation.evaluate import Evaluation, evaluate
from maskopt.models.options.prune import NONE, PruneOptions, prune_options
from maskopt.models.options.walk import WalkOptions
from maskopt.models.pruning.gram_store import OF_TEXT, GramStore, open_store
from maskopt.models.pruning.prune import check_prunable, prune_model
from maskopt.models.pruning.run import Run

#: options of which a sweep takes several, and their defaults
_SWEPT: dict[str, Sequence[Any]] = {"sparsity": (), "solver": ("swap",), "update": (NONE,)}
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
    calibration: Any = None,
    text: Any = None,
    windows: int | None = None,
    overwrite: bool = False,
    on_progress: Callable[[str], OnBlockProgress | None] = lambda label: None,
    ranks: Ranks = ALONE,
    **shorthand: Any,
) -> tuple[list[Swept], Evaluation | None]:
    """Prune a model in every combination of sparsities, solvers and updates, or go on with a sweep.

        sweep(model, grams, output, sparsity=[0.5, "2:4"], solver=["swap", "wanda"], samples=64)

    Args:
        grams: folder of its Gram matrices, which are collected from `calibration` if it does not exist.
        calibration: text, as for `prune_model`; None: the folder exists.
        text: to evaluate all prunes and the dense model on, in windows of 512 tokens; None: none.
        on_progress: takes a prune's label, and returns a callback for its progress.
        shorthand: options of the prunes by name; `sparsity`, `solver` and `update` are several each.

    Returns:
        The prunes in their order, and the dense model's evaluation; None without text.
    """
    check_dense(Path(model))
    asked = dict(_cases(shorthand))
    if text is not None and ranks.size > 1:
        raise OptionError(
            "`text` is evaluated by one process; leave it out, and use `maskopt eval`"
        )
    store = None if calibration is not None else GramStore(grams)
    if store is None:
        for case in asked.values():  # which may be refused before anything is collected
            prune_options(None, case)
        asked = {x: {k: v for k, v in y.items() if k not in OF_TEXT} for x, y in asked.items()}
        of_walk = {k: v for k, v in shorthand.items() if k in WalkOptions.__dataclass_fields__}
        store = open_store(
            model, grams, calibration, of_walk, on_progress=on_progress("grams"), ranks=ranks
        )
    cases = {label: store.options(None, case) for label, case in asked.items()}
    check_place(Path(output))
    walk = _check_cases(model, store, cases, text, windows)
    runs: dict[str, dict[str, Any]] = {}
    for label in cases:
        target = Path(output) / label
        begun = ranks.agreed(lambda at=target: unfinished(at) or (at / MANIFEST).exists())  # type: ignore[misc]
        runs[label] = {"output": target, "overwrite": overwrite, "resume": begun and not overwrite}
        # refuses before the first prune
        Run(**runs[label], ranks=ranks, model=model, grams=grams, text=text)
    prunes = []
    for label, options in cases.items():
        run = {"grams": grams, "on_progress": on_progress(label), "ranks": ranks, **runs[label]}
        prunes.append(Swept(label, run["output"], prune_model(model, None, options, **run)))
    if text is None:
        return prunes, None
    models = [model, *(prune.output for prune in prunes)]
    dense, *others = evaluate(models, text, walk, windows=windows)
    evaluated = zip(prunes, others, strict=True)
    return [replace(prune, evaluation=other) for prune, other in evaluated], dense


def _check_cases(
    model: str | Path,
    store: GramStore,
    cases: Mapping[str, PruneOptions],
    text: Any,
    windows: int | None,
) -> WalkOptions:
    """Refuse what a later prune or the evaluation would refuse; the options of the evaluation."""
    if not cases:
        raise OptionError("nothing is swept; give at least one `sparsity`")
    first = next(iter(cases.values()))
    job = open_job(model, None, first)
    check_prunable(job, store)
    for options in cases.values():
        options.check_layers(job.layers)
    walk = WalkOptions(seq_len=512, **{name: getattr(first, name) for name in _OF_JUDGING})
    if text is not None:
        job = open_job(model, text, walk, whole=True, limit=windows)
        checkpoint = job.source.checkpoint
        assert checkpoint is not None
        if checkpoint.config.get("auto_map"):
            raise ModelError(
                f"{checkpoint.folder}: config.json asks to run code that comes with the model (auto_map), "
                "which is not copied to the pruned folders; leave out `text`, copy it there and judge by "
                "`maskopt eval`"
            )
        job.windows.check_targets()
    return walk


def _cases(options: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the label and the options of each prune."""
    several = {name: options.get(name, usual) for name, usual in _SWEPT.items()}
    for sparsity, solver, after in itertools.product(*several.values()):
        pattern = parse_sparsity(sparsity)
        case = {**options, "sparsity": pattern, "solver": solver, "update": after}
        if after == NONE and len(set(several["update"])) > 1:
            for name in ("damping", "damping_exponent"):  # they are of the others
                case.pop(name, None)
        yield f"{str(pattern).replace(':', 'of')}-{solver}-{after}", case

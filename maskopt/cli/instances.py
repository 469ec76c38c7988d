"""Layers from instances or from a model, for `compare`, `bound` and `export`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from maskopt.cli.command import OF_A_MODEL as HEADING
from maskopt.cli.prune_view import PruneView
from maskopt.cli.view import view
from maskopt.core.fields import options_of
from maskopt.core.least_squares import LeastSquaresUpdate
from maskopt.core.pattern import Pattern, parse_sparsity
from maskopt.core.problem import LayerProblem
from maskopt.errors import OptionError
from maskopt.experiments.compare import load_instances
from maskopt.models.options.prune import BLOCKWISE, LEAST_SQUARES, NONE, PruneOptions

#: options of a prune that have no effect on Gram matrices and patterns, or that each command has itself
_NOT_HERE = (
    *("solver", "start", "solver_options", "allocation", "sensitivity", "max_deviation", "counts"),
    *("training", "seed", "calibrate_on", "true_sequential", "holdout", "target", "min_tokens"),
)
#: fewer and shorter windows than a prune has: defaults of `collect_problems`
_DEFAULTS = {"samples": 32, "seq_len": 512, "sparsity": None}
#: options of a command whose source may be a model
OF_A_MODEL = tuple(
    replace(one, group=HEADING, default=_DEFAULTS.get(one.name, one.default))
    for one in options_of(PruneOptions)
    if one.name not in _NOT_HERE
)
#: options that also apply to instances
_OF_BOTH = ("update", "damping", "damping_exponent", "activation_memory")


@dataclass(frozen=True)
class Layers:
    """The layers of a source.

    Attributes:
        pattern: the requested sparsity, or None.
        kinds: kinds of a model's layers, by name.
    """

    problems: list[LayerProblem]
    pattern: Pattern | None
    kinds: dict[str, str]


def load_layers(
    source: list[Path],
    options: Mapping[str, Any],
    *,
    calibration: str | None,
    seed: int,
    cardinality: int | None = None,
) -> Layers:
    """Layers of instances, or of one model folder by running text through it; with an update of kept weights
    if `options` ask for it.

    Raises:
        OptionError: a model without calibration text or sparsity, or among other sources.
    """
    (update,) = (one for one in OF_A_MODEL if one.name == "update")
    if update.checked(options.get("update", NONE)) == BLOCKWISE:
        raise OptionError("`update` blockwise trains whole blocks of a model; take `maskopt prune`")
    pattern = parse_sparsity(options["sparsity"]) if "sparsity" in options else None
    models = [path for path in source if path.is_dir()]
    if not models:
        given = {**options, **({} if calibration is None else {"calibration": calibration})}
        return Layers(_of_instances(source, pattern, given, cardinality), pattern, {})
    if len(source) > 1:
        raise OptionError(f"{models[0]} is a model folder: name it alone, or .npz instances")
    if calibration is None:
        raise OptionError(f"{models[0]} is a model: name text for its Gram matrices, --calibration")
    if pattern is None:
        raise OptionError(f"{models[0]} is a model: say what to prune, --sparsity 0.6 or 2:4")
    from maskopt.models.pruning.problems import layer_problems

    with view() as shown:
        found = list(
            layer_problems(
                models[0],
                calibration=calibration,
                seed=seed,
                on_progress=PruneView(shown),
                **options,
            )
        )
    kinds = {layer.name: layer.kind for layer, _ in found}
    return Layers([problem for _, problem in found], pattern, kinds)


def _of_instances(
    source: list[Path],
    pattern: Pattern | None,
    given: Mapping[str, Any],
    cardinality: int | None,
) -> list[LayerProblem]:
    for name, value in given.items():
        if name not in ("sparsity", *_OF_BOTH):
            raise OptionError(
                f"`{name}` is for a model folder, and {value!r} says nothing of an instance"
            )
    layers = load_instances(source, cardinality)
    if pattern is not None:
        layers = [layer.under(pattern) for layer in layers]
    if given.get("update") == LEAST_SQUARES:
        damping, power = (
            given.get("damping", LeastSquaresUpdate.damping),
            given.get("damping_exponent", LeastSquaresUpdate.power),
        )
        return [layer.with_update(LeastSquaresUpdate(damping, power)) for layer in layers]
    for name in ("damping", "damping_exponent"):
        if name in given:
            raise OptionError(f"`{name}` needs `update` least-squares")
    return layers

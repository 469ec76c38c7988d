"""What `compare`, `bound` and `export` share: layers out of instances or out of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskopt.cli.parameters import FIELDS, WALK, takes
from maskopt.cli.view import view
from maskopt.core.least_squares import Refit
from maskopt.core.pattern import Pattern
from maskopt.core.problem import LayerProblem
from maskopt.errors import OptionError
from maskopt.experiments.compare import load_instances
from maskopt.models.options.prune import BLOCKWISE, LEAST_SQUARES, UPDATES, check_undamped

#: the options of a command whose source may be a model, and how few samples do there
_SAMPLES, _SEQ_LEN = 32, 512
takes_source = takes(
    ("sparsity", "update", "damping", "damping_exponent", *WALK),
    panel="Of a model",
    samples=_SAMPLES,
    seq_len=_SEQ_LEN,
)
#: as they are where nobody gives them; and those that are of instances, too, or do nothing without a walk
_HERE: dict[str, Any] = {"samples": _SAMPLES, "seq_len": _SEQ_LEN, "calibration": None}
_OF_BOTH = ("update", "damping", "damping_exponent", "activation_memory")


@dataclass(frozen=True)
class Layers:
    """What a source holds.

    Attributes:
        pattern: the one that was asked for, or None.
        kinds: of a model's layers, by name.
    """

    problems: list[LayerProblem]
    pattern: Pattern | None
    kinds: dict[str, str]


def load_layers(
    source: list[Path],
    options: dict[str, Any],
    *,
    calibration: str | None,
    seed: int,
    cardinality: int | None = None,
) -> Layers:
    """Layers of `.npz` instances, or of one model folder by running text through it; for refitted weights
    where `update` says so.

    Raises:
        OptionError: a model without calibration text or pattern, or among other sources.
    """
    if options["update"] not in UPDATES:
        raise OptionError(f"`update` is one of {', '.join(UPDATES)}, not {options['update']!r}")
    if options["update"] == BLOCKWISE:
        raise OptionError("`update` blockwise trains whole blocks of a model; take `maskopt prune`")
    pattern = options.pop("sparsity")
    models = [path for path in source if path.is_dir()]
    if not models:
        _refuse_of_models({**options, "calibration": calibration})
        layers = [
            layer if pattern is None else layer.under(pattern)
            for layer in load_instances(source, cardinality)
        ]
        if options["update"] == LEAST_SQUARES:
            refit = Refit(options["damping"], options["damping_exponent"])
            layers = [layer.refitting(refit) for layer in layers]
        else:
            check_undamped(options["damping"], options["damping_exponent"])
        return Layers(layers, pattern, {})
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
                sparsity=pattern,
                calibration=calibration,
                seed=seed,
                on_progress=lambda p: shown.show(
                    f"block {p.block + 1} of {p.blocks}: {p.stage}",
                    p.done,
                    p.total,
                    part=p.block / p.blocks,
                ),
                **options,
            )
        )
    kinds = {layer.name: layer.kind for layer, _ in found}
    return Layers([problem for _, problem in found], pattern, kinds)


def _refuse_of_models(options: dict[str, Any]) -> None:
    """Raise OptionError for an option that says nothing of instances: they hold their Gram matrices."""
    for name, value in options.items():
        usual = _HERE[name] if name in _HERE else FIELDS[name].default
        if name not in _OF_BOTH and value != usual:
            raise OptionError(
                f"`{name}` is for a model folder, and {value!r} says nothing of an instance"
            )

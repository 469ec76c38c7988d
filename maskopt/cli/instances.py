"""What `compare`, `bound`, `certify` and `extract` share: layers out of instances or out of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskopt.cli.console import progress_bars
from maskopt.compare import load_instances
from maskopt.errors import OptionError
from maskopt.pattern import Pattern
from maskopt.problem import LayerProblem

Calibration = Annotated[
    str | None, typer.Option(help="Of a model: text file, folder, or hf:DATASET.")
]
Samples = Annotated[int, typer.Option(min=1, help="Of a model: calibration windows.")]
SeqLen = Annotated[int, typer.Option("--seq-len", min=1, help="Tokens of such a window.")]


def option_list(text: str | None) -> list[str]:
    """`a, b` → ['a', 'b']."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def load_layers(
    source: list[Path],
    *,
    pattern: Pattern | None,
    layers: str | None,
    seed: int,
    calibration: str | None = None,
    samples: int = 32,
    seq_len: int = 512,
) -> list[LayerProblem]:
    """Layers of `.npz` instances, or of one model folder by running text through it.

    Raises:
        OptionError: a model without calibration text or pattern, or among other sources.
    """
    models = [path for path in source if path.is_dir()]
    if not models:
        return [_with_pattern(layer, pattern) for layer in load_instances(source)]
    if len(source) > 1:
        raise OptionError(f"{models[0]} is a model folder: name it alone, or .npz instances")
    if calibration is None:
        raise OptionError(f"{models[0]} is a model: name text for its Gram matrices, --calibration")
    if pattern is None:
        raise OptionError(f"{models[0]} is a model: say what to prune, --pattern 0.6 or 2:4")
    from maskopt.model.problems import collect_problems

    with progress_bars() as bars:
        task = bars.add_task("collecting", total=None)
        found = collect_problems(
            models[0],
            layers=option_list(layers),
            pattern=pattern,
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            on_progress=lambda p: bars.update(
                task,
                description=f"block {p.block + 1}/{p.blocks}: {p.stage}",
                completed=p.done,
                total=p.total,
            ),
        )
        return [problem for _, problem in found]


def _with_pattern(layer: LayerProblem, pattern: Pattern | None) -> LayerProblem:
    """The layer under the pattern that was asked for, where one was."""
    if pattern is None:
        return layer
    return LayerProblem(
        layer.weight, layer.gram, pattern, name=layer.name, mean=layer.mean, assume_psd=True
    )

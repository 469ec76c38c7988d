"""What `compare`, `bound` and `extract` share: layers out of instances or out of a model."""

from __future__ import annotations

from pathlib import Path

from maskopt.compare import load_instances
from maskopt.errors import OptionError
from maskopt.pattern import Pattern
from maskopt.problem import LayerProblem


def option_list(text: str | None) -> list[str]:
    """`a, b` → ['a', 'b']."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def load_layers(
    source: list[Path], *, pattern: Pattern | None, layers: str | None, seed: int
) -> list[LayerProblem]:
    """Layers of `.npz` instances."""
    models = [path for path in source if path.is_dir()]
    if models:
        raise OptionError(f"{models[0]}: name .npz instances")
    return load_instances(source)

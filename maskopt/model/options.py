"""What decides a prune, and how it tells of its progress."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from maskopt.errors import ModelError, PatternError
from maskopt.model.blocks import Layer
from maskopt.model.tokens import Windows, calibration_windows, token_windows
from maskopt.pattern import Pattern, Unstructured, pattern_to_dict
from maskopt.solver import limits_of, make_solver

#: layers that saw fewer calibration tokens are pruned by magnitude
MIN_TOKENS = 32
#: starts that serve whole layers better than the solvers' own, which also have to serve single rows
DEFAULT_STARTS = {"swap": "relax"}


@dataclass(frozen=True)
class Progress:
    """Told to `on_progress`: `done` of `total` samples or layers of one stage of one block."""

    block: int
    blocks: int
    stage: str
    done: int
    total: int
    detail: str = ""


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class PruneOptions:
    """Everything but the model and the tokens that decides which masks come out."""

    pattern: Pattern
    solver: str = "swap"
    warm_start: str | None = None
    solver_options: Mapping[str, Any] = field(default_factory=dict)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    seed: int = 0
    one_pass: bool = False
    true_sequential: bool = False
    all_experts: bool = False
    min_tokens: int = MIN_TOKENS
    shrink: float = 0.0
    skip_bad_samples: bool = False

    def __post_init__(self) -> None:
        if self.one_pass and self.true_sequential:
            raise ModelError("one-pass and true-sequential exclude each other; choose one")
        if not 0 <= self.shrink <= 1:
            raise ModelError(f"shrink must lie in [0, 1], not {self.shrink}")
        if self.min_tokens < 1:
            raise ModelError(f"min_tokens must be at least 1, not {self.min_tokens}")
        _, own = limits_of(None, self.solver_options)
        make_solver(self.solver, **own)
        if self.start is not None:
            make_solver(self.start)

    @property
    def start(self) -> str | None:
        """The solver that makes the start: the one named, `relax` for swap, or the solver's own."""
        return self.warm_start or default_start(self.solver)

    def record(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["pattern"] = pattern_to_dict(self.pattern)
        values["warm_start"] = self.start
        values["solver_options"] = {
            k: values["solver_options"][k] for k in sorted(values["solver_options"])
        }
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def default_start(solver: str) -> str | None:
    """What `solver` starts from in a prune where nothing is named."""
    return DEFAULT_STARTS.get(solver) or make_solver(solver).capabilities.default_start


def ticker(
    report: OnProgress, block: int, blocks: int, stage: str, total: int
) -> Callable[[int], None]:
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        report(Progress(block, blocks, stage, done, total))

    report(Progress(block, blocks, stage, 0, total))
    return tick


def one_pattern(sparsity: float | None, pattern: Pattern | None) -> Pattern:
    if (sparsity is None) == (pattern is None):
        raise PatternError("give either a sparsity or a pattern, exactly one of them")
    return Unstructured(sparsity=sparsity) if pattern is None else pattern


def check_pattern(pattern: Pattern, layers: Sequence[Layer]) -> None:
    for layer in layers:
        try:
            pattern.check(layer.n)
        except PatternError as error:
            raise PatternError(f"layer {layer.name!r}: {error}") from None


def windows_of(tokens: Any, tokenizer: Any, calibration: Any, **how: Any) -> Windows:
    if isinstance(tokens, Windows):
        return tokens
    if isinstance(tokens, Tensor):
        return token_windows(tokens, "token tensor")
    if calibration is None:
        raise ModelError("pruning needs calibration text or tokens; name a source of text")
    return calibration_windows(calibration, tokenizer, **how)

"""The options of a prune beyond those of its walk (`walk_options`), each in one place: what it is called, its
default, and what it does. `prune_model`, `collect_problems`, `plan_prune`, the command line and the manifest
take them from here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from maskopt.errors import ModelError, OptionError, PatternError, SolverError
from maskopt.fields import build
from maskopt.least_squares import Refit
from maskopt.model.importance import IMPORTANCES, LOSS, MEASURED, VARIANT_WINDOWS, VARIANTS
from maskopt.model.solving import check_size, check_solver, default_start
from maskopt.model.training import Reconstruction
from maskopt.model.walk_options import (
    MASKS,
    WalkOptions,
    about,
    check_names,
    described,
    option_field,
)
from maskopt.pattern import NM, Pattern, Unstructured, pattern_to_dict

if TYPE_CHECKING:
    from maskopt.model.blocks import Layer

#: of `shrink`
AUTO = "auto"
#: of `target`
TARGETS = ("pruned", "dense")
#: of `weights`
KEEP, REFIT, RECONSTRUCT = WEIGHTS = ("keep", "refit", "reconstruct")
#: of `budget`
ROW, LAYER, MODEL, BOTH = BUDGETS = ("row", "layer", "model", "both")
#: where none is given: of rows that trade, the best of ± 0.05, 0.1, 0.2 and any on both demo models at
#: 70% (tests/benchmarks/generalisation.py); of layers, whether their rows trade, too, or not
ROW_SPREAD, LAYER_SPREAD = 0.1, 0.2


@dataclass(frozen=True)
class PruneOptions(WalkOptions):
    """Everything but model, text and output that a prune can be told.

    `PruneOptions(Unstructured(sparsity=0.5))`, `PruneOptions(NM(keep=2, of=4), "wanda", samples=64)`.

    Raises:
        MaskoptError: a value that cannot be, an unknown solver, an option that it does not have.
    """

    pattern: Pattern = field(
        metadata=about(MASKS, "0.6, or 2:4, which keeps 2 of every 4 consecutive inputs.")
    )
    solver: str = option_field("swap", MASKS, "See `maskopt solvers`.")
    warm_start: str | None = option_field(
        None,
        MASKS,
        "The solver that makes the start; default: for swap relax, or admm where weights are refitted; else "
        "the solver's own.",
    )
    solver_options: Mapping[str, Any] = field(
        default_factory=dict,
        metadata=about(MASKS, "An option of the solver, NAME=VALUE; may be repeated."),
    )
    budget: str = option_field(
        ROW,
        MASKS,
        "What has a count of its own. row: every row of a layer prunes as many weights, as do layers; layer: "
        "only the layer, and its rows trade; model: only the model, and its layers trade, their rows alike; "
        "both: as model, and then the rows of each layer trade.",
        choices=BUDGETS,
    )
    importance: str = option_field(
        LOSS,
        MASKS,
        "Of what trades, what a row's or a layer's error counts. alike: as it is; relative: as "
        "a part of its output; loss: by the squared gradient of the dense model's loss by each output; "
        "measured: of the layers of a block together, by what the model's output loses (`budget` model).",
        choices=IMPORTANCES,
    )
    spread: float | None = option_field(
        None,
        MASKS,
        "Of what trades, how far a sparsity may be from the mean: a layer's from the model's, a row's from "
        "its layer's. 1: any. Default: 0.1 where rows alone trade, else 0.2.",
        least=0,
        most=1,
    )
    counts: Mapping[str, int] = field(
        default_factory=dict,
        metadata=about(
            MASKS,
            "Of layers that trade, how many inputs each row of a layer prunes (of `budget` both: in the "
            "mean), by layer name; chosen by `importance` where none are given.",
        ),
    )
    target: str = option_field(
        "pruned",
        MASKS,
        "What a layer's output is to be like. pruned: the dense layer's on the inputs that it has in the "
        "model pruned so far; dense: what it is in the dense model, which then goes along.",
        choices=TARGETS,
    )
    weights: str = option_field(
        KEEP,
        MASKS,
        "Of what is kept. keep: as they are; refit: set anew by least squares, so that they take over from "
        "the pruned ones, and masks are chosen for that; reconstruct: trained, block by block, to give what "
        "the dense model gives.",
        choices=WEIGHTS,
    )
    reconstruct: Mapping[str, Any] = field(
        default_factory=dict,
        metadata=about(
            MASKS, "Of `weights` reconstruct: how to train, NAME=VALUE; may be repeated."
        ),
    )
    damping: float | str = option_field(
        Refit.damping,
        MASKS,
        "Of refitted weights, how strongly they stay where they were, in parts of G's mean diagonal; auto: "
        "per layer by the error on held-out windows.",
    )
    damping_power: float = option_field(
        Refit.power,
        MASKS,
        "Of `damping`, how far it goes with an input's own part of G's diagonal: 0, alike for all inputs; 1, "
        "in proportion.",
        least=0,
        most=1,
    )
    min_tokens: int = option_field(
        32, MASKS, "Layers that saw fewer tokens are pruned by magnitude.", least=1
    )
    shrink: float | str = option_field(
        0.0,
        MASKS,
        "α of G ← (1−α)G + α·diag(G); auto: per layer by the error on held-out windows.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "solver_options", dict(self.solver_options))
        counts = {n: c.item() if isinstance(c, np.generic) else c for n, c in self.counts.items()}
        object.__setattr__(self, "counts", counts)
        self._set_budget()
        self._set_reconstruction()
        _check_shrink(self.shrink, self.holdout)
        _check_damping(self.damping, self.holdout)
        if self.refit is None:
            check_undamped(self.damping, self.damping_power)
        for name in ("one_pass", "true_sequential"):
            if self.moved and getattr(self, name):
                raise OptionError(
                    f"`target` dense and `{name}` exclude each other: it takes whole blocks, and inputs "
                    "from the model pruned so far"
                )
        check_solver(self.solver, self.solver_options, self.start, self._pattern_of(self.pattern))

    def _set_budget(self) -> None:
        """Pattern and `budget` say the same; either is enough."""
        if isinstance(self.pattern, Unstructured) and self.pattern.pooled and not self.layers_trade:
            self._trade_as(self.pattern)
        elif self.budget != ROW:
            if isinstance(self.pattern, NM):
                raise OptionError(
                    f"`budget` {self.budget} is of a sparsity; {self.pattern} has a count in every group"
                )
            if self.layers_trade and (self.pattern.pooled or self.pattern.sparsity is None):
                raise OptionError(
                    f"`budget` {self.budget} is of a plain sparsity, such as 0.5, not of {self.pattern}"
                )
            if self.rows_trade and self.spread is None:
                usual = ROW_SPREAD if self.budget == LAYER else LAYER_SPREAD
                object.__setattr__(self, "spread", usual)
            if self.budget == LAYER:
                object.__setattr__(self, "pattern", self._pattern_of(self.pattern))
        elif self.spread is not None:
            raise OptionError("`spread` is of what trades: give `budget` layer, model or both, too")
        if self.counts and not self.layers_trade:
            raise OptionError("`counts` are those of layers that trade: give `budget` model, too")
        if self.budget == ROW and self.importance != LOSS:
            raise OptionError(
                "`importance` is of what trades: give `budget` layer, model or both, too"
            )
        if self.sensitive:
            self._check_every_window("`importance` loss")
        if self.importance == MEASURED and self.rows_trade:
            raise OptionError(
                "`importance` measured is of whole blocks and says nothing of rows: with `budget` "
                f"{self.budget} take loss, or `budget` model"
            )

    def _trade_as(self, pattern: Unstructured) -> None:
        """Rows trade as this pattern says; its spread and the option's are one."""
        said = 1.0 if self.spread is None else self.spread
        spread = said if pattern.spread is None else pattern.spread
        if self.spread not in (None, spread):
            raise OptionError(f"`spread` {self.spread} is not that of the pattern ({pattern})")
        object.__setattr__(self, "budget", LAYER)
        object.__setattr__(self, "spread", spread)
        object.__setattr__(self, "pattern", self._pattern_of(pattern))

    def _set_reconstruction(self) -> None:
        """Every setting is there, or none where nothing is trained."""
        given = dict(self.reconstruct)
        if self.weights != RECONSTRUCT:
            if given:
                raise OptionError(
                    "`reconstruct` says how to train: give `weights` reconstruct, too"
                )
        else:
            given = asdict(build(Reconstruction, "reconstruct", given, "option"))
            if not self.holdout:
                raise OptionError(
                    "`weights` reconstruct needs windows that judge it: give a `holdout` such as 0.1"
                )
            if self.one_pass:
                raise OptionError(
                    "`weights` reconstruct and `one_pass` exclude each other: it trains on inputs from the "
                    "model pruned so far"
                )
        object.__setattr__(self, "reconstruct", given)

    @property
    def reconstruction(self) -> Reconstruction | None:
        """How kept weights are trained; None: they are not."""
        return Reconstruction(**self.reconstruct) if self.reconstruct else None

    @property
    def start(self) -> str | None:
        """The solver that makes the start: the one named, `relax` or `admm` for swap, or the solver's own."""
        return self.warm_start or default_start(self.solver, refit=self.refit is not None)

    @property
    def refit(self) -> Refit | None:
        """How kept weights are refitted, `damping` auto counting as its default; None: they stay."""
        if self.weights == KEEP or self.reconstruct.get("begin") == KEEP:
            return None
        damping = Refit.damping if self.damping == AUTO else float(self.damping)
        return Refit(damping, self.damping_power)

    @property
    def beside(self) -> bool:
        return self.moved or self.reconstruction is not None

    @property
    def moved(self) -> bool:
        return self.target == "dense"

    @property
    def sensitive(self) -> bool:
        trades = self.rows_trade or (self.layers_trade and not self.counts)
        return trades and self.importance == LOSS

    def variant_windows(self, windows: int, blocks: int) -> int:
        measured = self.layers_trade and self.importance == MEASURED and not self.counts
        return VARIANTS * blocks * min(VARIANT_WINDOWS, windows) if measured else 0

    @property
    def rows_trade(self) -> bool:
        """Whether those of a layer do."""
        return self.budget in (LAYER, BOTH)

    @property
    def layers_trade(self) -> bool:
        """Whether those of the model do."""
        return self.budget in (MODEL, BOTH)

    @property
    def layer_spread(self) -> float:
        """How far a layer's sparsity may be from the model's."""
        return LAYER_SPREAD if self.spread is None else self.spread

    def pattern_of(self, layer: Layer) -> Pattern:
        """The layer's own where layers trade, once their counts are known; else that of all."""
        if not self.counts:
            return self.pattern
        return self._pattern_of(Unstructured(keep=layer.n - self.counts[layer.name]))

    def _pattern_of(self, alike: Pattern) -> Pattern:
        """Of a layer, from that of rows that prune alike."""
        if not self.rows_trade or isinstance(alike, NM):
            return alike
        return replace(alike, per="layer", spread=None if self.spread == 1 else self.spread)

    def check_layers(self, layers: Sequence[Layer]) -> None:
        super().check_layers(layers)
        if self.counts:
            self._check_counts(layers)
        if self.moved:
            self._check_in_order(layers, "`target` dense")
        for layer in layers:
            try:
                self.pattern.check(layer.n)
                pattern = self._pattern_of(self.pattern_of(layer))
                check_size(
                    self.solver, self.solver_options, self.start, layer.n, pattern,
                    refit=self.refit is not None,
                )  # fmt: skip
            except (PatternError, SolverError) as error:
                raise type(error)(f"layer {layer.name!r}: {error}") from None
        if not sum(self.pattern.pruned_in(layer.rows, layer.n) for layer in layers):
            widest = max(layer.n for layer in layers)
            raise OptionError(
                f"{self.pattern} prunes nothing: the rows of these layers have {widest} inputs at most"
            )

    def _check_counts(self, layers: Sequence[Layer]) -> None:
        """Raise OptionError where `counts` are not of these layers, or not as many in all as they would be
        alike."""
        check_names(self.counts, [layer.name for layer in layers], "layer that is pruned")
        total, most = 0, 1.0 if self.spread is None else self.spread
        for layer in layers:
            count = self.counts.get(layer.name)
            if type(count) is not int or not 0 <= count < layer.n:
                raise OptionError(
                    f"`counts` of layer {layer.name!r} must be a whole number of at least 0 and less than "
                    f"{layer.n}, not {count!r}"
                )
            if abs(count - self.pattern.pruned_in(1, layer.n)) > most * layer.n + 1:  # rounded
                raise OptionError(
                    f"`counts` of layer {layer.name!r} prune {count / layer.n:.1%}, further from "
                    f"{self.pattern} than `spread` {self.spread:g}; give other counts, or `spread` 1 (any)"
                )
            total += layer.rows * count
        alike = sum(self.pattern.pruned_in(layer.rows, layer.n) for layer in layers)
        if total != alike:
            raise OptionError(
                f"`counts` prune {total} weights; at sparsity {self.pattern} it must be {alike}"
            )

    def record(self) -> dict[str, Any]:
        """What decides the masks, as JSON values: for the manifest."""
        names = [f.name for f in dataclasses.fields(self) if f.metadata["decides"] == MASKS]
        values = {name: getattr(self, name) for name in names}
        values["pattern"] = pattern_to_dict(self.pattern)
        values["warm_start"] = self.start
        values["solver_options"] = dict(sorted(self.solver_options.items()))
        values["counts"] = dict(sorted(self.counts.items()))
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def prune_options(options: PruneOptions | None, shorthand: Mapping[str, Any]) -> PruneOptions:
    """The options, with single ones set by name; `sparsity=0.5` is short for its pattern.

    Raises:
        OptionError: a name that is no option (near names are given).
        PatternError: no pattern, or two of them.
    """
    check_names(shorthand, ["sparsity", *(f.name for f in dataclasses.fields(PruneOptions))])
    given = dict(shorthand)
    sparsity, pattern = given.pop("sparsity", None), given.pop("pattern", None)
    if options is None or sparsity is not None or pattern is not None:
        given["pattern"] = one_pattern(sparsity, pattern)
    return PruneOptions(**given) if options is None else dataclasses.replace(options, **given)


def one_pattern(sparsity: float | None, pattern: Pattern | None) -> Pattern:
    """Whichever of the two is given.

    Raises:
        PatternError: both or none.
    """
    if (sparsity is None) == (pattern is None):
        raise PatternError(
            "give either a `sparsity` (0.6) or a `pattern` (2:4), exactly one of them"
        )
    return Unstructured(sparsity=sparsity) if pattern is None else pattern


def _check_shrink(shrink: float | str, holdout: float) -> None:
    if shrink == AUTO:
        if not holdout:
            raise ModelError("`shrink` auto needs held-out windows: give a `holdout` such as 0.2")
    elif isinstance(shrink, str) or not 0 <= shrink <= 1:
        raise ModelError(f"`shrink` must lie in [0, 1] or be auto, not {shrink!r}")


def check_undamped(damping: float | str, damping_power: float) -> None:
    """Weights that are not refitted are not damped.

    Raises:
        OptionError: one of the two is not as it is where nobody gives it.
    """
    for name, value, usual in (
        ("damping", damping, Refit.damping),
        ("damping_power", damping_power, Refit.power),
    ):
        if value != usual:
            raise OptionError(f"`{name}` is of refitted weights: give `weights` refit, too")


def _check_damping(damping: float | str, holdout: float) -> None:
    if damping == AUTO:
        if not holdout:
            raise ModelError("`damping` auto needs held-out windows: give a `holdout` such as 0.2")
    elif isinstance(damping, str):
        raise OptionError(f"`damping` must be a number of at least 0 or auto, not {damping!r}")
    else:
        Refit(damping)


PruneOptions.__doc__ = described(PruneOptions)

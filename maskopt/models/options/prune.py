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

from maskopt.core.fields import build
from maskopt.core.least_squares import Refit
from maskopt.core.pattern import NM, Pattern, Unstructured, parse_sparsity, pattern_to_dict
from maskopt.errors import ModelError, OptionError, PatternError, SolverError
from maskopt.models.options.solver import check_size, check_solver, default_start
from maskopt.models.options.training import Reconstruction
from maskopt.models.options.walk import (
    MASKS,
    WalkOptions,
    about,
    check_names,
    described,
    option_field,
)

if TYPE_CHECKING:
    from maskopt.models.architecture.blocks import Layer

#: of `gram_shrinkage`
AUTO = "auto"
#: of `target`
TARGETS = ("pruned", "dense")
#: of `update`
NONE, LEAST_SQUARES, BLOCKWISE = UPDATES = ("none", "least-squares", "blockwise")
#: of `allocation`
UNIFORM, ROWS, LAYERS, BOTH = ALLOCATIONS = ("uniform", "rows", "layers", "both")
#: of `sensitivity`
RELATIVE, FISHER, KL = "relative", "fisher", "kl"
SENSITIVITIES = (UNIFORM, RELATIVE, FISHER, KL)
#: sparsities of a block at which it is measured (the least, the model's, the most), and on how many windows
VARIANTS, VARIANT_WINDOWS = 3, 4
#: where none is given: of rows that trade, the best of ± 0.05, 0.1, 0.2 and any on both demo models at
#: 70% (tests/benchmarks/generalisation.py); of layers, whether their rows trade, too, or not
ROW_DEVIATION, LAYER_DEVIATION = 0.1, 0.2


@dataclass(frozen=True)
class PruneOptions(WalkOptions):
    """Everything but model, text and output that a prune can be told.

    `PruneOptions(0.5)`, `PruneOptions("2:4", "wanda", samples=64)`.

    Raises:
        MaskoptError: a value that cannot be, an unknown solver, an option that it does not have.
    """

    sparsity: Pattern | float | str = field(
        metadata=about(
            MASKS,
            "Share of weights to prune in each row (0.6 or 60%; an average with `allocation`), or "
            "N:M, which keeps N of every M consecutive inputs (2:4). Required.",
        )
    )
    solver: str = option_field("swap", MASKS, "See `maskopt solvers`.")
    start: str | None = option_field(
        None,
        MASKS,
        "Solver that computes the initial mask. Default with swap: relax (admm with `update` "
        "least-squares); other solvers use their own.",
    )
    solver_options: Mapping[str, Any] = field(
        default_factory=dict,
        metadata=about(MASKS, "Solver option, NAME=VALUE; may be repeated."),
    )
    allocation: str = option_field(
        UNIFORM,
        MASKS,
        "Where sparsity may differ. uniform: every row has the same sparsity; rows: rows of a layer may "
        "differ; layers: layers may differ; both.",
        choices=ALLOCATIONS,
    )
    sensitivity: str = option_field(
        FISHER,
        MASKS,
        "With `allocation`, how errors of rows or layers are weighted. uniform: equally; relative: by"
        " the inverse of the output energy; fisher: by the squared gradient of the loss of the dense "
        "model by each output; kl: one measurement per block, of the KL divergence of the model "
        "output (`allocation` layers).",
        choices=SENSITIVITIES,
    )
    max_deviation: float | None = option_field(
        None,
        MASKS,
        "With `allocation`, how far a layer's sparsity may be from the model's, a row's from its layer's. "
        "1: any. Default: 0.1 for rows alone, else 0.2.",
        least=0,
        most=1,
    )
    counts: Mapping[str, int] = field(
        default_factory=dict,
        metadata=about(
            MASKS,
            "With `allocation` layers or both, number of inputs to prune per row (on average), by layer "
            "name; on the command line a JSON file that is read.",
        ),
    )
    target: str = option_field(
        "pruned",
        MASKS,
        "Output that a pruned layer should reproduce. pruned: the dense weights applied to the "
        "activations of the model pruned so far; dense: the layer output of the dense model, which "
        "runs along.",
        choices=TARGETS,
    )
    update: str = option_field(
        NONE,
        MASKS,
        "How kept weights are updated. none: unchanged; least-squares: solved per row, and masks are "
        "chosen for the error after the update; blockwise: trained per decoder block to match the "
        "dense model.",
        choices=UPDATES,
    )
    training: Mapping[str, Any] = field(
        default_factory=dict,
        metadata=about(
            MASKS, "With `update` blockwise, how to train, NAME=VALUE; may be repeated."
        ),
    )
    damping: float | str = option_field(
        Refit.damping,
        MASKS,
        "With `update` least-squares, penalty that keeps weights near their values, relative to the "
        "mean of diag(G); auto: per layer by the error on held-out windows.",
    )
    damping_exponent: float = option_field(
        Refit.power,
        MASKS,
        "Exponent p: the damping of input i is scaled by G[i,i]^p. 0: the same for all inputs.",
        least=0,
        most=1,
    )
    min_tokens: int = option_field(
        32, MASKS, "Layers that saw fewer tokens are pruned by magnitude.", least=1
    )
    gram_shrinkage: float | str = option_field(
        0.0,
        MASKS,
        "α of G ← (1−α)G + α·diag(G); auto: per layer by the error on held-out windows.",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", parse_sparsity(self.sparsity))
        super().__post_init__()
        object.__setattr__(self, "solver_options", dict(self.solver_options))
        counts = {n: c.item() if isinstance(c, np.generic) else c for n, c in self.counts.items()}
        object.__setattr__(self, "counts", counts)
        self._set_allocation()
        self._set_reconstruction()
        _check_shrink(self.gram_shrinkage, self.holdout)
        _check_damping(self.damping, self.holdout)
        if self.refit is None:
            check_undamped(self.damping, self.damping_exponent)
        if self.moved and (self.one_pass or self.true_sequential):
            other = "`calibrate_on` dense" if self.one_pass else "`true_sequential`"
            raise OptionError(
                f"`target` dense and {other} exclude each other: it takes whole blocks, and inputs from the "
                "model pruned so far"
            )
        check_solver(
            self.solver, self.solver_options, self.start_solver, self._pattern_of(self.pattern)
        )

    def _set_allocation(self) -> None:
        """Pattern and `allocation` say the same; either is enough."""
        if isinstance(self.pattern, Unstructured) and self.pattern.pooled and not self.layers_trade:
            self._trade_as(self.pattern)
        elif self.allocation != UNIFORM:
            if isinstance(self.pattern, NM):
                raise OptionError(
                    f"`allocation` {self.allocation} needs a share such as 0.5, not {self.pattern}"
                )
            if self.layers_trade and (self.pattern.pooled or self.pattern.sparsity is None):
                raise OptionError(
                    f"`allocation` {self.allocation} needs a share such as 0.5, not {self.pattern}"
                )
            if self.rows_trade and self.max_deviation is None:
                usual = ROW_DEVIATION if self.allocation == ROWS else LAYER_DEVIATION
                object.__setattr__(self, "max_deviation", usual)
            if self.allocation == ROWS:
                object.__setattr__(self, "sparsity", self._pattern_of(self.pattern))
        elif self.max_deviation is not None:
            raise OptionError("`max_deviation` needs `allocation` rows, layers or both")
        if self.counts and not self.layers_trade:
            raise OptionError("`counts` need `allocation` layers or both")
        if self.allocation == UNIFORM and self.sensitivity != FISHER:
            raise OptionError("`sensitivity` needs `allocation` rows, layers or both")
        if self.sensitive:
            self._check_every_window("`sensitivity` fisher")
        if self.sensitivity == KL and self.rows_trade:
            raise OptionError(
                "`sensitivity` kl is of whole blocks, not of rows: take fisher, or `allocation` layers"
            )

    def _trade_as(self, pattern: Unstructured) -> None:
        """Rows differ as this pattern says; its `max_deviation` and the option's are one."""
        said = 1.0 if self.max_deviation is None else self.max_deviation
        max_deviation = said if pattern.max_deviation is None else pattern.max_deviation
        if self.max_deviation not in (None, max_deviation):
            raise OptionError(
                f"`max_deviation` {self.max_deviation} is not that of the pattern ({pattern})"
            )
        object.__setattr__(self, "allocation", ROWS)
        object.__setattr__(self, "max_deviation", max_deviation)
        object.__setattr__(self, "sparsity", self._pattern_of(pattern))

    def _set_reconstruction(self) -> None:
        """Every setting is there, or none where nothing is trained."""
        given = dict(self.training)
        if self.update != BLOCKWISE:
            if given:
                raise OptionError("`training` needs `update` blockwise")
        else:
            given = asdict(build(Reconstruction, "training", given, "option"))
            if not self.holdout:
                raise OptionError(
                    "`update` blockwise needs windows that judge it: give a `holdout` such as 0.1"
                )
            if self.one_pass:
                raise OptionError(
                    "`update` blockwise trains on inputs of the pruned model: not with `calibrate_on` dense"
                )
        object.__setattr__(self, "training", given)

    @property
    def pattern(self) -> Pattern:
        """The sparsity as a pattern."""
        return parse_sparsity(self.sparsity)

    @property
    def reconstruction(self) -> Reconstruction | None:
        """How kept weights are trained; None: they are not."""
        return Reconstruction(**self.training) if self.training else None

    @property
    def start_solver(self) -> str | None:
        """The solver that makes the start: the one named, `relax` or `admm` for swap, or the solver's own."""
        return self.start or default_start(self.solver, refit=self.refit is not None)

    @property
    def refit(self) -> Refit | None:
        """How kept weights are refitted, `damping` auto counting as its default; None: they stay."""
        if self.update == NONE or self.training.get("begin") == NONE:
            return None
        damping = Refit.damping if self.damping == AUTO else float(self.damping)
        return Refit(damping, self.damping_exponent)

    @property
    def beside(self) -> bool:
        return self.moved or self.reconstruction is not None

    @property
    def moved(self) -> bool:
        return self.target == "dense"

    @property
    def sensitive(self) -> bool:
        trades = self.rows_trade or (self.layers_trade and not self.counts)
        return trades and self.sensitivity == FISHER

    def variant_windows(self, windows: int, blocks: int) -> int:
        measured = self.layers_trade and self.sensitivity == KL and not self.counts
        return VARIANTS * blocks * min(VARIANT_WINDOWS, windows) if measured else 0

    @property
    def rows_trade(self) -> bool:
        """Whether those of a layer do."""
        return self.allocation in (ROWS, BOTH)

    @property
    def layers_trade(self) -> bool:
        """Whether those of the model do."""
        return self.allocation in (LAYERS, BOTH)

    @property
    def layer_deviation(self) -> float:
        """How far a layer's sparsity may be from the model's."""
        return LAYER_DEVIATION if self.max_deviation is None else self.max_deviation

    def pattern_of(self, layer: Layer) -> Pattern:
        """The layer's own where layers trade, once their counts are known; else that of all."""
        if not self.counts:
            return self.pattern
        return self._pattern_of(Unstructured(keep=layer.n - self.counts[layer.name]))

    def _pattern_of(self, alike: Pattern) -> Pattern:
        """Of a layer, from that of rows that prune alike."""
        if not self.rows_trade or isinstance(alike, NM):
            return alike
        return replace(
            alike,
            per="layer",
            max_deviation=None if self.max_deviation == 1 else self.max_deviation,
        )

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
                    self.solver, self.solver_options, self.start_solver, layer.n, pattern,
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
        total, most = 0, 1.0 if self.max_deviation is None else self.max_deviation
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
                    f"{self.pattern} than `max_deviation` {self.max_deviation:g}; give other counts"
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
        values["sparsity"] = pattern_to_dict(self.pattern)
        values["start"] = self.start_solver
        values["solver_options"] = dict(sorted(self.solver_options.items()))
        values["counts"] = dict(sorted(self.counts.items()))
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def prune_options(options: PruneOptions | None, shorthand: Mapping[str, Any]) -> PruneOptions:
    """The options, with single ones set by name.

    Raises:
        OptionError: a name that is no option (near names are given).
        PatternError: no sparsity.
    """
    check_names(shorthand, [f.name for f in dataclasses.fields(PruneOptions)])
    if options is not None:
        return dataclasses.replace(options, **shorthand)
    if shorthand.get("sparsity") is None:
        raise PatternError("`sparsity` is missing: give 0.5, 50% or 2:4")
    return PruneOptions(**shorthand)


def _check_shrink(gram_shrinkage: float | str, holdout: float) -> None:
    if gram_shrinkage == AUTO:
        if not holdout:
            raise ModelError(
                "`gram_shrinkage` auto needs held-out windows: give a `holdout` such as 0.2"
            )
    elif isinstance(gram_shrinkage, str) or not 0 <= gram_shrinkage <= 1:
        raise ModelError(f"`gram_shrinkage` must lie in [0, 1] or be auto, not {gram_shrinkage!r}")


def check_undamped(damping: float | str, damping_exponent: float) -> None:
    """Weights that are not refitted are not damped.

    Raises:
        OptionError: one of the two is not as it is where nobody gives it.
    """
    for name, value, usual in (
        ("damping", damping, Refit.damping),
        ("damping_exponent", damping_exponent, Refit.power),
    ):
        if value != usual:
            raise OptionError(f"`{name}` is of refitted weights: give `update` least-squares, too")


def _check_damping(damping: float | str, holdout: float) -> None:
    if damping == AUTO:
        if not holdout:
            raise ModelError("`damping` auto needs held-out windows: give a `holdout` such as 0.2")
    elif isinstance(damping, str):
        raise OptionError(f"`damping` must be a number of at least 0 or auto, not {damping!r}")
    else:
        Refit(damping)


PruneOptions.__doc__ = described(PruneOptions)

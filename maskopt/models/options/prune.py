"""The options of a prune; `WalkOptions` has the options of its walk through the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from maskopt.core.fields import (
    CALIBRATION,
    JSON_FILE,
    REQUIRED,
    SELECTION,
    UPDATE,
    Option,
    build,
    check_needs,
    option,
    options_of,
)
from maskopt.core.least_squares import LeastSquaresUpdate
from maskopt.core.pattern import NM, Pattern, Unstructured, parse_sparsity
from maskopt.errors import ModelError, OptionError, PatternError, SolverError
from maskopt.models.architecture.blocks import Layer
from maskopt.models.options.walk import (
    DISTILLATION,
    DistillOptions,
    Reconstruction,
    RuntimeOptions,
    TextOptions,
    WalkOptions,
    check_names,
    check_size,
    check_solver,
    default_start,
    described,
    options_by_name,
)

#: of `gram_shrinkage`
AUTO = "auto"
#: of `update`
NONE, LEAST_SQUARES, BLOCKWISE = UPDATES = ("none", "least-squares", "blockwise")
#: of `allocation`
UNIFORM, ROWS, LAYERS, BOTH = ALLOCATIONS = ("uniform", "rows", "layers", "both")
#: of `transform`
ROTATION, PERMUTATION, FREE = "rotation", "permutation", "free"
#: of `sensitivity`
RELATIVE, FISHER = "relative", "fisher"
#: defaults of `max_deviation`: of rows, the best of ± 0.05, 0.1, 0.2 and any on both demo models at 70%
#: (tests/benchmarks/generalisation.py); of layers, with `allocation` layers and both
ROW_DEVIATION, LAYER_DEVIATION = 0.1, 0.2
#: named sets of options of a prune: what is not named has its default (docs/results/index.md, models)
RECIPES: dict[str, dict[str, Any]] = {
    "fast": {},
    "balanced": {"solver": "admm", "update": LEAST_SQUARES},
    "best": {
        "solver": "admm",
        "allocation": LAYERS,
        "update": BLOCKWISE,
        "training": {"begin": LEAST_SQUARES},
        "distillation": {"epochs": 2},
        "samples": 72,
        "seq_len": 512,
        "holdout": 0.118,
    },
}

RECIPE = Option(
    "recipe",
    str | None,
    None,
    "Named set of options, each of which may be changed. fast (default): weights unchanged; balanced: "
    "updated by least squares; best: then trained and distilled.",
    choices=tuple(RECIPES),
    group=SELECTION,
    shown=True,
)


@dataclass(frozen=True)
class PruneOptions(WalkOptions):
    """All options of a prune but model, text and output: `PruneOptions("2:4", "wanda", samples=64)`.

    Raises MaskoptError for a value that is not allowed, an unknown solver or solver option.
    """

    sparsity: Pattern | float | str = option(
        REQUIRED,
        "Share of weights to prune in each row, 0.6 or 60%; or N:M, 2:4, to keep N of every M inputs.",
        SELECTION,
        shown=True,
    )
    solver: str = option("swap", "Solver; see `maskopt solvers`.", SELECTION, shown=True)
    start: str | None = option(
        None,
        "Solver of the initial mask. Default with swap: relax (admm with `update` least-squares); other "
        "solvers use their own.",
        SELECTION,
    )
    solver_options: Mapping[str, Any] = option(dict, "Solver option; may be repeated.", SELECTION)
    transform: str = option(
        NONE,
        "Equivalent rewriting of the dense model before pruning, which lowers the error. rotation: of value "
        "heads; permutation: of the channels of MLPs, with N:M only; free: both.",
        SELECTION,
        choices=(NONE, ROTATION, PERMUTATION, FREE),
    )
    allocation: str = option(
        UNIFORM,
        "Where sparsity may differ. uniform: nowhere; rows: between rows of a layer; layers: between layers; "
        "both.",
        SELECTION,
        choices=ALLOCATIONS,
    )
    sensitivity: str = option(
        FISHER,
        "How errors of rows or layers are weighted. uniform: equally; relative: by the inverse of the output "
        "energy; fisher: by the squared gradient of the loss of the dense model by each output.",
        SELECTION,
        choices=(UNIFORM, RELATIVE, FISHER),
        needs=("allocation", ROWS, LAYERS, BOTH),
    )
    max_deviation: float | None = option(
        None,
        "Maximum difference of a layer's sparsity from the model's, and of a row's from its layer's. 1: no "
        "limit. Default: 0.1 for rows alone, else 0.2.",
        SELECTION,
        least=0,
        most=1,
        needs=("allocation", ROWS, LAYERS, BOTH),
    )
    counts: Mapping[str, int] = option(
        dict,
        "Number of inputs to prune per row (on average), by layer name; on the command line a JSON file.",
        SELECTION,
        unit=JSON_FILE,
        needs=("allocation", LAYERS, BOTH),
    )
    update: str = option(
        NONE,
        "How kept weights are updated. none: unchanged; least-squares: solved per row, masks "
        "chosen for it; blockwise: trained per block.",
        UPDATE,
        choices=UPDATES,
        shown=True,
    )
    training: Mapping[str, Any] = option(
        dict,
        "Training option, e.g. epochs=8; may be repeated.",
        UPDATE,
        needs=("update", BLOCKWISE),
    )
    distillation: Mapping[str, Any] = option(
        dict,
        "Option of a final training of all kept weights, as by `maskopt distill`, on other windows of the "
        "text, e.g. epochs=2; epochs=0: no training; may be repeated.",
        UPDATE,
    )
    damping: float | str = option(
        LeastSquaresUpdate.damping,
        "Strength of the penalty on changes of kept weights, relative to the mean of diag(G); auto: chosen "
        "per layer by the error on held-out windows.",
        UPDATE,
        needs=("update", LEAST_SQUARES, BLOCKWISE),
    )
    damping_exponent: float = option(
        LeastSquaresUpdate.power,
        "Scale the damping of input i by this power of G[i,i]. 0: equal damping of all inputs.",
        UPDATE,
        least=0,
        most=1,
        needs=("update", LEAST_SQUARES, BLOCKWISE),
    )
    min_tokens: int = option(
        32, "Layers with fewer calibration tokens are pruned by magnitude.", CALIBRATION, least=1
    )
    gram_shrinkage: float | str = option(
        0.0,
        "Shrinkage α of Gram matrices, (1−α)G + α·diag(G); auto: chosen per layer by the error on "
        "held-out windows.",
        CALIBRATION,
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", parse_sparsity(self.sparsity))
        super().__post_init__()
        object.__setattr__(self, "solver_options", dict(self.solver_options))
        counts = {n: c.item() if isinstance(c, np.generic) else c for n, c in self.counts.items()}
        object.__setattr__(self, "counts", counts)
        self._set_allocation()
        check_needs(self)
        self._set_training()
        self._check_damping()
        pattern = _with_rows(self, self.pattern)
        check_solver(self.solver, self.solver_options, self.start_solver, pattern)

    def _set_allocation(self) -> None:
        """Move a budget that rows share from the sparsity to `allocation`; set the usual `max_deviation`."""
        pattern, given = parse_sparsity(self.sparsity), self.max_deviation
        if isinstance(pattern, Unstructured) and pattern.shared_budget and not self.layers_differ:
            own = pattern.max_deviation
            if own is None:
                own = 1.0 if given is None else given
            if given not in (None, own):
                raise OptionError(f"`max_deviation` {given} is not that of the pattern ({pattern})")
            object.__setattr__(self, "sparsity", pattern.uniform())
            object.__setattr__(self, "allocation", ROWS)
            object.__setattr__(self, "max_deviation", own)
        elif self.allocation != UNIFORM:
            if isinstance(pattern, NM) or (self.layers_differ and not _is_share(pattern)):
                raise OptionError(
                    f"`allocation` {self.allocation} needs a share such as 0.5, not {pattern}"
                )
            if self.rows_differ and given is None:
                usual = ROW_DEVIATION if self.allocation == ROWS else LAYER_DEVIATION
                object.__setattr__(self, "max_deviation", usual)
        if self.sensitive:
            self._check_every_window("`sensitivity` fisher")

    def _set_training(self) -> None:
        """All options of `training` and `distillation`; MaskoptError for what cannot be trained."""
        check_names(self.distillation, DISTILLATION, "option of `distillation`")
        if self.distillation.get("epochs") == 0:
            object.__setattr__(self, "distillation", {})
        blockwise, distilled = self.update == BLOCKWISE, bool(self.distillation)
        for what, used in {"`update` blockwise": blockwise, "`distillation`": distilled}.items():
            if used and not self.holdout:
                raise OptionError(
                    f"{what} needs windows that judge it: give a `holdout` such as 0.1"
                )
        if blockwise and self.one_pass:
            raise OptionError(
                "`update` blockwise trains on inputs of the pruned model: not with `calibrate_on` dense"
            )
        if blockwise:
            made = build(Reconstruction, "training", dict(self.training), "option")
            object.__setattr__(self, "training", asdict(made))
        if (how := self.distilled) is not None:
            object.__setattr__(self, "distillation", {x: getattr(how, x) for x in DISTILLATION})

    def _check_damping(self) -> None:
        """Raise MaskoptError for a damping or shrinkage that cannot be, or auto without held-out windows."""
        for name in ("gram_shrinkage", "damping"):
            if getattr(self, name) == AUTO and not self.holdout:
                raise ModelError(
                    f"`{name}` auto needs held-out windows: give a `holdout` such as 0.2"
                )
        shrinkage, damping = self.gram_shrinkage, self.damping
        if shrinkage != AUTO and (isinstance(shrinkage, str) or not 0 <= shrinkage <= 1):
            raise ModelError(f"`gram_shrinkage` must lie in [0, 1] or be auto, not {shrinkage!r}")
        if isinstance(damping, str) and damping != AUTO:
            raise OptionError(f"`damping` must be a number of at least 0 or auto, not {damping!r}")
        usual = LeastSquaresUpdate.damping, LeastSquaresUpdate.power
        if self.least_squares is None and (damping, self.damping_exponent) != usual:
            raise OptionError(
                "`damping` needs kept weights solved by least squares: give `training` begin=least-squares"
            )

    @property
    def pattern(self) -> Pattern:
        """The sparsity as a pattern; with `allocation` rows, one whose budget the rows of a layer share."""
        uniform = parse_sparsity(self.sparsity)
        return _with_rows(self, uniform) if self.allocation == ROWS else uniform

    @property
    def reconstruction(self) -> Reconstruction | None:
        """Training of kept weights block by block; None: no training."""
        return Reconstruction(**self.training) if self.training else None

    @property
    def distilled(self) -> DistillOptions | None:
        """Training of all kept weights together at the end; None: no training."""
        if not self.distillation:
            return None
        names = [one.name for one in (*options_of(TextOptions), *options_of(RuntimeOptions))]
        shared = {name: getattr(self, name) for name in (*names, "holdout")}
        return DistillOptions(**shared, **self.distillation)

    @property
    def start_solver(self) -> str | None:
        """The solver that makes the start: the one named, `relax` or `admm` for swap, or the solver's own."""
        updated = self.least_squares is not None
        return self.start or default_start(self.solver, least_squares=updated)

    @property
    def least_squares(self) -> LeastSquaresUpdate | None:
        """Update of kept weights, with the default for `damping` auto; None: unchanged weights."""
        if self.update == NONE or self.training.get("begin") == NONE:
            return None
        damping = LeastSquaresUpdate.damping if self.damping == AUTO else float(self.damping)
        return LeastSquaresUpdate(damping, self.damping_exponent)

    @property
    def ordered(self) -> NM | None:
        """Pattern for which channels are permuted; None: they keep their order."""
        pattern, asked = self.pattern, self.transform in (PERMUTATION, FREE)
        return pattern if asked and isinstance(pattern, NM) else None

    @property
    def sensitive(self) -> bool:
        differ = self.rows_differ or (self.layers_differ and not self.counts)
        return differ and self.sensitivity == FISHER

    @property
    def rows_differ(self) -> bool:
        return self.allocation in (ROWS, BOTH)

    @property
    def layers_differ(self) -> bool:
        return self.allocation in (LAYERS, BOTH)

    def pattern_of(self, layer: str, n: int) -> Pattern:
        """Return the pattern of a layer of n inputs: by its count where counts are known."""
        if not self.counts:
            return self.pattern
        return _with_rows(self, Unstructured(keep=n - self.counts[layer]))

    def check_layers(self, layers: Sequence[Layer]) -> None:
        super().check_layers(layers)
        if self.counts:
            _check_counts(self, layers)
        for layer in layers:
            try:
                self.pattern.check(layer.n)
                pattern = _with_rows(self, self.pattern_of(layer.name, layer.n))
                check_size(
                    self.solver, self.solver_options, self.start_solver, layer.n, pattern,
                    least_squares=self.least_squares is not None,
                )  # fmt: skip
            except (PatternError, SolverError) as error:
                raise type(error)(f"layer {layer.name!r}: {error}") from None
        if not sum(self.pattern.pruned_in(layer.rows, layer.n) for layer in layers):
            widest = max(layer.n for layer in layers)
            raise OptionError(
                f"{self.pattern} prunes nothing: the rows of these layers have {widest} inputs at most"
            )

    def record(self) -> dict[str, Any]:
        return {
            **super().record(),
            "sparsity": str(self.pattern),
            "start": self.start_solver,
            "solver_options": dict(sorted(self.solver_options.items())),
            "counts": dict(sorted(self.counts.items())),
        }


def _with_rows(options: PruneOptions, uniform: Pattern) -> Pattern:
    """Return the pattern of a layer, from that with uniform rows."""
    if not options.rows_differ or isinstance(uniform, NM):
        return uniform
    deviation = None if options.max_deviation == 1 else options.max_deviation
    return replace(uniform, per="layer", max_deviation=deviation)


def _check_counts(options: PruneOptions, layers: Sequence[Layer]) -> None:
    """Raise OptionError where `counts` are of other layers, or prune another number in all."""
    check_names(options.counts, [layer.name for layer in layers], "layer that is pruned")
    total, most = 0, 1.0 if options.max_deviation is None else options.max_deviation
    for layer in layers:
        count = options.counts.get(layer.name)
        if type(count) is not int or not 0 <= count < layer.n:
            raise OptionError(
                f"`counts` of layer {layer.name!r} must be a whole number of at least 0 and less than "
                f"{layer.n}, not {count!r}"
            )
        if abs(count - options.pattern.pruned_in(1, layer.n)) > most * layer.n + 1:  # rounded
            raise OptionError(
                f"`counts` of layer {layer.name!r} prune {count / layer.n:.1%}, further from "
                f"{options.pattern} than `max_deviation` {options.max_deviation:g}; give other counts"
            )
        total += layer.rows * count
    wanted = sum(options.pattern.pruned_in(layer.rows, layer.n) for layer in layers)
    if total != wanted:
        raise OptionError(
            f"`counts` prune {total} weights; at sparsity {options.pattern} it must be {wanted}"
        )


def with_recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """Complete single options by those of their `recipe`, mappings key by key.

    A recipe sets no `allocation` where the sparsity is no share, and nothing that needs an option that was
    changed. OptionError for an unknown recipe.
    """
    found = dict(given)
    name = found.pop("recipe", None) or "fast"
    if name not in RECIPES:
        raise OptionError(f"`recipe` must be one of: {', '.join(RECIPES)}; not {name!r}")
    for key, value in RECIPES[name].items():
        if isinstance(value, dict):
            found[key] = {**value, **found.get(key, {})}
        elif key != "allocation" or _is_share(found.get("sparsity")):
            found.setdefault(key, value)
    for one in options_of(PruneOptions):
        filled = one.needs and one.name in found and one.name not in given
        if filled and not one.has_effect(found[one.needs[0]]):
            del found[one.name]
    return found


def _is_share(sparsity: Pattern | float | str | None) -> bool:
    """Return whether layers may differ from this sparsity; None: it is not known yet."""
    pattern = parse_sparsity(0.5 if sparsity is None else sparsity)
    return isinstance(pattern, Unstructured) and pattern.keep is None and not pattern.shared_budget


def prune_options(options: PruneOptions | None, shorthand: Mapping[str, Any]) -> PruneOptions:
    """Return the options with single ones set by name; a `recipe` completes single ones alone.

    OptionError for an unknown name or recipe, PatternError without a sparsity.
    """
    if options is None:
        shorthand = with_recipe(shorthand)
        if shorthand.get("sparsity") is None:
            check_names(shorthand, [f.name for f in dataclasses.fields(PruneOptions)])
            raise PatternError("`sparsity` is missing: give 0.5, 50% or 2:4")
    elif "recipe" in shorthand:
        raise OptionError("`recipe` completes single options: give them by name, not as `options`")
    return options_by_name(PruneOptions, options, shorthand)


PruneOptions.__doc__ = described(PruneOptions)
#: options of an update where no block is trained
DAMPING = tuple(
    replace(one, needs=("update", LEAST_SQUARES))
    for one in options_of(PruneOptions, "damping", "damping_exponent")
)

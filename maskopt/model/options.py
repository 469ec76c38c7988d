"""The options of a prune, each in one place: what it is called, its default, and what it does.

`prune_model`, `collect_problems`, `perplexity`, `plan_prune`, the command line and the manifest take
them from here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from maskopt.errors import DataError, ModelError, OptionError, PatternError, near
from maskopt.fields import build, check_options, option
from maskopt.least_squares import Refit
from maskopt.limits import Limits, parse_bytes
from maskopt.model.beginning import check_bos
from maskopt.model.gradients import WINDOWS
from maskopt.model.importance import IMPORTANCES, LOSS, MEASURED, VARIANT_WINDOWS, VARIANTS
from maskopt.model.solving import check_solver, default_start
from maskopt.model.training import Reconstruction
from maskopt.model.weighting import ALIKE, GRADIENT, WEIGHTINGS
from maskopt.pattern import NM, Pattern, Unstructured, pattern_to_dict

if TYPE_CHECKING:
    from maskopt.model.blocks import Layer

#: what an option decides: the masks (the manifest records its value); the calibration text (the
#: manifest records the tokens themselves); or only how this machine goes about it
MASKS, TEXT, MACHINE = "masks", "text", "machine"
#: of `shrink`
AUTO = "auto"
#: of `target`
TARGETS = ("pruned", "dense")
#: of `weights`
KEEP, REFIT, RECONSTRUCT = WEIGHTS = ("keep", "refit", "reconstruct")
#: of `budget`
ROW, LAYER, MODEL, BOTH = BUDGETS = ("row", "layer", "model", "both")
#: of layers that trade, where none is given
LAYER_SPREAD = 0.2


def about(decides: str, words: str, **facts: Any) -> dict[str, Any]:
    """What is known of an option: what it decides, and the facts of `maskopt.fields.option`."""
    return {**option(None, words, **facts).metadata, "decides": decides}


def option_field(default: Any, decides: str, words: str, **facts: Any) -> Any:
    return field(default=default, metadata=about(decides, words, **facts))


@dataclass(frozen=True, kw_only=True)
class WalkOptions:
    """How a model is opened, and how samples walk through its blocks."""

    include: tuple[str, ...] = option_field(
        (), MASKS, "Only layers that match: q_proj, 'layers.0.*'; several by commas, or repeated."
    )
    exclude: tuple[str, ...] = option_field(
        (), MASKS, "Not the layers that match; several by commas, or repeated."
    )
    seed: int = option_field(0, MASKS, "Of calibration crops and of solvers.")
    one_pass: bool = option_field(
        False,
        MASKS,
        "All Gram matrices from the dense model, or each from the model pruned so far.",
    )
    true_sequential: bool = option_field(
        False, MASKS, "Inside a block, too, layers see what the pruned layers before them produce."
    )
    all_experts: bool = option_field(
        False,
        MASKS,
        "Each expert's Gram matrix from all tokens, not only from those routed to it.",
    )
    skip_bad_samples: bool = option_field(
        False, MASKS, "Leave out windows with NaN or infinite activations instead of stopping."
    )
    weighting: str = option_field(
        ALIKE,
        MASKS,
        "Of a window's tokens. alike; rest: the first one not at all; relative: each by one over the mean "
        "square of its hidden state; gradient: by how much the dense model's loss depends on it.",
        choices=WEIGHTINGS,
    )
    holdout: float = option_field(
        0.0,
        MASKS,
        "Share of the calibration windows that is kept aside; errors are then reported on them, too.",
        least=0,
        below=1,
    )
    samples: int = option_field(128, TEXT, "Calibration windows.", least=1)
    seq_len: int = option_field(
        2048, TEXT, "Tokens in a window; never more than the model has positions.", least=1
    )
    bos: str = option_field(
        "auto",
        TEXT,
        "What windows begin with. auto: what the tokenizer puts before a text; always: its BOS "
        "token; never: nothing, the convention of tables of LLaMA-1 and 2.",
    )
    text_field: str = option_field("text", TEXT, "Where JSON lines hold their text.")
    chat: bool = option_field(
        False,
        TEXT,
        "The text is JSON lines of messages, which go through the model's chat template.",
    )
    device: str = option_field("auto", MACHINE, "cpu, cuda, or auto: CUDA where there is one.")
    dtype: str = option_field(
        "auto", MACHINE, "Precision of the forward passes; auto: as stored, float32 on the CPU."
    )
    threads: int | None = option_field(
        None, MACHINE, "On the CPU; the result does not depend on it. Default: all cores."
    )
    activation_memory: int | str = option_field(
        4 * 2**30,
        MACHINE,
        "Hidden states that take more go to a file, e.g. 500MB.",
        unit="bytes",
        least=0,
    )
    max_memory: int | str | None = option_field(
        None,
        MACHINE,
        "Refuse to start where the estimate of `maskopt plan` is higher, e.g. 16GiB.",
        unit="bytes",
        least=0,
    )
    trust_remote_code: bool = option_field(False, MACHINE, "Run code that comes with the model.")

    def __post_init__(self) -> None:
        object.__setattr__(self, "include", name_patterns(self.include))
        object.__setattr__(self, "exclude", name_patterns(self.exclude))
        for name in ("activation_memory", "max_memory"):
            if isinstance(given := getattr(self, name), str):
                object.__setattr__(self, name, parse_bytes(given))
        Limits(threads=self.threads, seed=self.seed)  # refuses what a solver would
        check_options(self)
        check_bos(self.bos)
        if self.one_pass and self.true_sequential:
            raise ModelError("`one_pass` and `true_sequential` exclude each other; choose one")
        if self.chat and (self.bos, self.text_field) != ("auto", "text"):
            name = "bos" if self.bos != "auto" else "text_field"
            raise DataError(
                f"`{name}` is of plain text; with `chat`, messages are under 'messages' and begin as "
                "the template says: choose one"
            )

        if self.weighting == GRADIENT:
            self._check_every_window("`weighting` gradient")

    def _check_every_window(self, what: str) -> None:
        if self.skip_bad_samples:
            raise OptionError(
                f"{what} needs every window's loss, `skip_bad_samples` leaves windows out: choose one"
            )

    @property
    def backward(self) -> bool:
        """Whether gradients of the dense model's loss are needed."""
        return self.weighting == GRADIENT or self.sensitive

    def gradient_windows(self, windows: int) -> int:
        """Of how many they are."""
        if self.weighting == GRADIENT:
            return windows
        return min(windows, WINDOWS) if self.sensitive else 0

    def variant_windows(self, windows: int, blocks: int) -> int:
        """Of variants of the model that are measured before anything is pruned, all of theirs."""
        return 0

    @property
    def sensitive(self) -> bool:
        """Whether those by the outputs of the layers are."""
        return False

    @property
    def beside(self) -> bool:
        """Whether the dense model's hidden states go through the blocks beside those of the pruned one."""
        return False

    @property
    def moved(self) -> bool:
        """Whether the Gram matrices are accompanied by how inputs differ from those in the dense model."""
        return False

    @property
    def trained(self) -> bool:
        """Whether kept weights are trained."""
        return False

    @property
    def refit(self) -> Refit | None:
        """How kept weights are refitted; None: they stay."""
        return None

    def check_layers(self, layers: Sequence[Layer]) -> None:
        """Raise MaskoptError where these layers cannot be treated as the options say."""
        if self.weighting != ALIKE:
            self._check_in_order(layers, f"`weighting` {self.weighting}")

    def _check_in_order(self, layers: Sequence[Layer], what: str) -> None:
        """Raise OptionError for a layer that is not given the tokens of a window one after the other."""
        routed = [layer.name for layer in layers if layer.expert is not None or "*" in layer.kind]
        if routed and not self.all_experts:
            raise OptionError(
                f"layer {routed[0]!r} is given the tokens that are routed to it; {what} needs "
                "`all_experts` there"
            )


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
        "Of what trades, how far a sparsity may be from the mean: a layer's from the model's (default 0.2), "
        "a row's from its layer's (default: any).",
        least=0,
        below=1,
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
        "the pruned ones, and masks are chosen for that; reconstruct: trained, part by part of a block, to "
        "give what the dense model gives.",
        choices=WEIGHTS,
    )
    reconstruct: Mapping[str, Any] = field(
        default_factory=dict,
        metadata=about(
            MASKS, "Of `weights` reconstruct: how to train, NAME=VALUE; may be repeated."
        ),
    )
    damping: float | str = option_field(
        0.01,
        MASKS,
        "Of refitted weights, how strongly they stay where they were, in parts of G's mean diagonal; auto: "
        "per layer by the error on held-out windows.",
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
        object.__setattr__(self, "counts", dict(self.counts))
        self._set_budget()
        self._set_reconstruction()
        _check_shrink(self.shrink, self.holdout)
        _check_damping(self.damping, self.holdout)
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
            if self.budget == LAYER:
                object.__setattr__(self, "pattern", self._pattern_of(self.pattern))
        elif self.spread is not None:
            raise OptionError("`spread` is of what trades: give `budget` layer, model or both, too")
        if self.counts and not self.layers_trade:
            raise OptionError("`counts` are those of layers that trade: give `budget` model, too")
        if self.sensitive:
            self._check_every_window("`importance` loss")
        if self.importance == MEASURED and self.rows_trade:
            raise OptionError(
                "`importance` measured is of whole blocks and says nothing of rows: with `budget` "
                f"{self.budget} take loss, or `budget` model"
            )

    def _trade_as(self, pattern: Unstructured) -> None:
        """Rows trade as this pattern says; its spread and the option's are one."""
        spread = self.spread if pattern.spread is None else pattern.spread
        if self.spread not in (None, spread):
            raise OptionError(f"`spread` {self.spread} is not that of the pattern ({pattern})")
        object.__setattr__(self, "budget", LAYER)
        object.__setattr__(self, "spread", spread)
        object.__setattr__(self, "pattern", replace(pattern, spread=spread))

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
        return Refit() if self.damping == AUTO else Refit(float(self.damping))

    @property
    def beside(self) -> bool:
        return self.moved or self.trained

    @property
    def moved(self) -> bool:
        return self.target == "dense"

    @property
    def trained(self) -> bool:
        return self.weights == RECONSTRUCT

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
        return replace(alike, per="layer", spread=self.spread)

    def check_layers(self, layers: Sequence[Layer]) -> None:
        super().check_layers(layers)
        if self.counts:
            self._check_counts(layers)
        if self.moved:
            self._check_in_order(layers, "`target` dense")
        for layer in layers:
            try:
                self.pattern.check(layer.n)
            except PatternError as error:
                raise PatternError(f"layer {layer.name!r}: {error}") from None

    def _check_counts(self, layers: Sequence[Layer]) -> None:
        """Raise OptionError where `counts` are not of these layers, or not as many in all as they would be
        alike."""
        check_names(self.counts, [layer.name for layer in layers], "layer that is pruned")
        total = 0
        for layer in layers:
            count = self.counts.get(layer.name)
            if type(count) is not int or not 0 <= count < layer.n:
                raise OptionError(
                    f"`counts` of layer {layer.name!r} must be a whole number of at least 0 and less than "
                    f"{layer.n}, not {count!r}"
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


#: what an evaluation has to do with
EVALUATION = (
    "seq_len",
    "text_field",
    "chat",
    "bos",
    "device",
    "dtype",
    "threads",
    "activation_memory",
    "trust_remote_code",
)
#: what a cell of a table (`maskopt.model.table`) decides by itself
OF_A_CELL = ("pattern", "solver", "warm_start", "solver_options")


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


def check_names(given: Iterable[str], known: Iterable[str], what: str = "option") -> None:
    """Raise OptionError for a name that is no option here (or no such thing)."""
    known = set(known)
    for name in given:
        if name not in known:
            raise OptionError(f"no {what} is called {name!r}{near(name, known)}")


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


def name_patterns(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Patterns on layer names; each text may hold several, separated by commas."""
    texts = [given] if isinstance(given, str) else given or ()
    return tuple(part.strip() for text in texts for part in text.split(",") if part.strip())


def _check_shrink(shrink: float | str, holdout: float) -> None:
    if shrink == AUTO:
        if not holdout:
            raise ModelError("`shrink` auto needs held-out windows: give a `holdout` such as 0.2")
    elif isinstance(shrink, str) or not 0 <= shrink <= 1:
        raise ModelError(f"`shrink` must lie in [0, 1] or be auto, not {shrink!r}")


def _check_damping(damping: float | str, holdout: float) -> None:
    if damping == AUTO:
        if not holdout:
            raise ModelError("`damping` auto needs held-out windows: give a `holdout` such as 0.2")
    elif isinstance(damping, str):
        raise OptionError(f"`damping` must be a number of at least 0 or auto, not {damping!r}")
    else:
        Refit(damping)


def described(options: type[WalkOptions]) -> str:
    """The docstring with a line for every option."""
    lines = [f"    {f.name}: {f.metadata['help']}" for f in dataclasses.fields(options)]
    return f"{(options.__doc__ or '').rstrip()}\n\nAttributes:\n" + "\n".join(lines) + "\n"


for _options in (WalkOptions, PruneOptions):
    _options.__doc__ = described(_options)

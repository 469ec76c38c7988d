"""Groups of options of which every run over a model is composed, and the checks of a solver and its start."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from maskopt.core.fields import (
    CALIBRATION,
    RUNTIME,
    SELECTION,
    TEXT,
    TRAINING,
    check_options,
    option,
    options_of,
)
from maskopt.core.least_squares import LeastSquaresUpdate
from maskopt.core.limits import Limits, parse_bytes
from maskopt.core.pattern import NM, Pattern
from maskopt.errors import DataError, ModelError, OptionError, SolverError, near
from maskopt.models.architecture.blocks import Layer
from maskopt.models.calibration.tokens import GRADIENT, TOKEN_WEIGHTS, UNIFORM
from maskopt.models.checkpoints.bos import BOS
from maskopt.protocol.solver import holds_budget, limits_of, make_solver

#: starts that serve whole layers better than the solvers' own, which also have to serve single rows
DEFAULT_STARTS = {"swap": "relax"}
UPDATE_STARTS = {"swap": "admm", "memetic": "admm"}


def default_start(solver: str, *, least_squares: bool = False) -> str | None:
    """Return the solver of the initial mask in a prune where none is named."""
    starts = UPDATE_STARTS if least_squares else DEFAULT_STARTS
    return starts.get(solver) or make_solver(solver).capabilities.default_start


def check_solver(
    solver: str, options: Mapping[str, Any], start: str | None, pattern: Pattern | None = None
) -> None:
    """Raise where solver or start do not exist, cannot run here, or do not fit the pattern."""
    backend = make_solver(solver, **limits_of(None, options)[1])
    if pattern is not None and not holds_budget(backend, pattern):
        lacks, other = "needs an equal count in every row", ""
        if backend.capabilities.shared_budget:
            lacks, other = (
                "holds no `max_deviation` of rows",
                "; or set no limits, with `max_deviation` 1",
            )
        raise SolverError(
            f"solver {solver!r} {lacks}; for a shared budget take swap, which may start from "
            f"{solver!r}{other}"
        )
    if start is not None:
        make_solver(start)
    if start == solver:
        raise OptionError(
            f"solver {solver!r} cannot be its own start; leave `start` out, or name another solver"
        )


def check_size(
    solver: str,
    options: Mapping[str, Any],
    start: str | None,
    n: int,
    pattern: Pattern,
    *,
    least_squares: bool = False,
) -> None:
    """Raise SolverError where solver or start cannot answer rows of so many inputs."""
    make_solver(solver, **limits_of(None, options)[1]).check_size(n, pattern, update=least_squares)
    if start is not None:
        make_solver(start).check_size(n, pattern, update=True)


#: windows whose gradients of the loss are computed: sums over all tokens need far fewer than masks do
GRADIENT_WINDOWS = 16


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """Layers that are pruned, and tokens that count in their Gram matrices."""

    include: tuple[str, ...] = option(
        (), "Only these layers, e.g. q_proj,'layers.0.*'.", SELECTION, shown=True
    )
    exclude: tuple[str, ...] = option((), "Not these layers.", SELECTION)
    token_weights: str = option(
        UNIFORM,
        "How tokens of a window are weighted. uniform; skip-first: all but the first; relative: by "
        "the inverse mean square of the hidden state; gradient: by the norm of the loss gradient of "
        "the dense model.",
        CALIBRATION,
        choices=TOKEN_WEIGHTS,
    )
    all_experts: bool = option(
        False,
        "Collect each expert's Gram matrix from all tokens, not only from those routed to it.",
        CALIBRATION,
    )


@dataclass(frozen=True, kw_only=True)
class PassOptions:
    """Order and precision of the passes through the blocks."""

    calibrate_on: str = option(
        "pruned",
        "Model whose activations are collected. dense: one pass for all layers; pruned: the model pruned so "
        "far, block by block.",
        CALIBRATION,
        choices=("dense", "pruned"),
    )
    true_sequential: bool = option(
        False,
        "Within a block, too, collect activations after the preceding layers are pruned.",
        CALIBRATION,
    )
    skip_bad_samples: bool = option(
        False,
        "Leave out windows with NaN or infinite activations instead of stopping.",
        CALIBRATION,
    )
    dtype: str = option(
        "auto",
        "Precision of the forward passes; auto: as stored, float32 on the CPU.",
        RUNTIME,
        recorded=False,
    )

    @property
    def one_pass(self) -> bool:
        """True if all Gram matrices are of the dense model's activations."""
        return self.calibrate_on == "dense"

    def check_passes(self) -> None:
        """Raise ModelError for an order of the passes that cannot be."""
        if self.one_pass and self.true_sequential:
            raise ModelError(
                "`calibrate_on` dense and `true_sequential` exclude each other; choose one"
            )


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """Choice of the calibration windows."""

    seed: int = option(0, "Random seed of calibration windows and solvers.", CALIBRATION)
    holdout: float = option(
        0.0,
        "Share of the calibration windows that are held out; errors are also reported on them.",
        CALIBRATION,
        least=0,
        below=1,
    )


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Text and its windows. A manifest records the tokens instead of these options."""

    samples: int = option(
        128, "Number of calibration windows.", TEXT, least=1, shown=True, recorded=False
    )
    seq_len: int = option(
        2048, "Maximum number of tokens in a window.", TEXT, least=1, shown=True, recorded=False
    )
    bos: str = option(
        "auto",
        "First token of a window. auto: what the tokenizer puts before a text; always: its BOS token;"
        " never: none, as in published results of LLaMA 1 and 2.",
        TEXT,
        choices=BOS,
        recorded=False,
    )
    text_field: str = option("text", "Key of the text in JSON lines.", TEXT, recorded=False)
    chat: bool = option(
        False,
        "The text is JSON lines of messages, to which the model's chat template is applied.",
        TEXT,
        recorded=False,
    )


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions:
    """Device, threads and memory. They do not decide the result, or a manifest records the device itself."""

    device: str = option(
        "auto", "cpu, cuda, or auto: CUDA if available.", RUNTIME, shown=True, recorded=False
    )
    threads: int | None = option(
        None,
        "Number of CPU threads; does not affect the result. Default: all cores.",
        RUNTIME,
        recorded=False,
    )
    activation_memory: int | str = option(
        4 * 2**30,
        "Store hidden states in a file above this size, e.g. 500MB.",
        RUNTIME,
        unit="bytes",
        least=0,
        recorded=False,
    )
    max_memory: int | str | None = option(
        None,
        "Stop before the computation if the estimated memory is higher, e.g. 16GiB.",
        RUNTIME,
        unit="bytes",
        least=0,
        recorded=False,
    )
    trust_remote_code: bool = option(
        False, "Run code that comes with the model.", RUNTIME, recorded=False
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions(RuntimeOptions, TextOptions, WindowOptions):
    """Options of every run over a model folder."""

    def __post_init__(self) -> None:
        for name in ("activation_memory", "max_memory"):
            if isinstance(given := getattr(self, name), str):
                object.__setattr__(self, name, parse_bytes(given))
        Limits(threads=self.threads, seed=self.seed)  # refuses what a solver would
        check_options(self)
        if self.chat and (self.bos, self.text_field) != ("auto", "text"):
            name = "bos" if self.bos != "auto" else "text_field"
            raise DataError(
                f"`{name}` is of plain text; with `chat`, messages are under 'messages' and begin as "
                "the template says: choose one"
            )

    def record(self) -> dict[str, Any]:
        """Return the options that decide the result, as JSON values for the manifest."""
        values = {
            one.name: getattr(self, one.name) for one in options_of(type(self)) if one.recorded
        }
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @property
    def walk(self) -> WalkOptions:
        """The options of the walk, with the values that this run has of them."""
        names = {one.name for one in options_of(type(self))}
        shared = [one.name for one in options_of(WalkOptions) if one.name in names]
        return WalkOptions(**{name: getattr(self, name) for name in shared})


@dataclass(frozen=True, kw_only=True)
class WalkOptions(RunOptions, PassOptions, LayerOptions):
    """Options of a walk: a model is opened, and calibration windows pass through its blocks."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "include", name_patterns(self.include))
        object.__setattr__(self, "exclude", name_patterns(self.exclude))
        super().__post_init__()
        self.check_passes()
        if self.token_weights == GRADIENT:
            self._check_every_window("`token_weights` gradient")

    def refuse_all_but(self, names: Iterable[str], why: str) -> None:
        """Raise OptionError for an option of other names that is not at its default."""
        for one in options_of(WalkOptions):
            if one.name not in names and getattr(self, one.name) != one.default:
                raise OptionError(f"{why}; leave out `{one.name}`")

    def _check_every_window(self, what: str) -> None:
        if self.skip_bad_samples:
            raise OptionError(
                f"{what} needs every window's loss, `skip_bad_samples` leaves windows out: choose one"
            )

    def gradient_windows(self, windows: int) -> int:
        """Return the number of windows whose gradients of the dense model's loss are needed."""
        if self.token_weights == GRADIENT:
            return windows
        return min(windows, GRADIENT_WINDOWS) if self.sensitive else 0

    @property
    def sensitive(self) -> bool:
        """True if gradients by the outputs of the layers are needed."""
        return False

    @property
    def reconstruction(self) -> Reconstruction | None:
        """Training of kept weights; None: no training."""
        return None

    @property
    def copies(self) -> int:
        """Hidden states of every token that are kept: of the pruned model; for training, of the dense one."""
        return 1 if self.reconstruction is None else 2

    @property
    def least_squares(self) -> LeastSquaresUpdate | None:
        """Update of kept weights; None: unchanged weights."""
        return None

    @property
    def ordered(self) -> NM | None:
        """Pattern for which channels are permuted; None: they keep their order."""
        return None

    def check_layers(self, layers: Sequence[Layer]) -> None:
        """Raise MaskoptError where these layers cannot be treated as the options say."""
        routed = [layer.name for layer in layers if layer.expert is not None or "*" in layer.kind]
        if routed and self.token_weights != UNIFORM and not self.all_experts:
            raise OptionError(
                f"layer {routed[0]!r} is given the tokens that are routed to it; `token_weights` "
                f"{self.token_weights} needs `all_experts` there"
            )


_Options = TypeVar("_Options", bound=RunOptions)
#: options of an evaluation
EVALUATION = (
    *("seq_len", "bos", "text_field", "chat"),
    *("device", "dtype", "threads", "activation_memory", "trust_remote_code"),
)


def check_names(given: Iterable[str], known: Iterable[str], what: str = "option") -> None:
    """Raise OptionError for a name that is no option here (or no such thing)."""
    known = set(known)
    for name in given:
        if name not in known:
            raise OptionError(f"no {what} is called {name!r}{near(name, known)}")


def options_by_name(
    kind: type[_Options], options: _Options | None, shorthand: Mapping[str, Any]
) -> _Options:
    """Return the options with single ones set by name; OptionError for an unknown name."""
    check_names(shorthand, [f.name for f in dataclasses.fields(options or kind)])
    return kind(**shorthand) if options is None else dataclasses.replace(options, **shorthand)


def name_patterns(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Split patterns on layer names, separated by commas; OptionError where a text holds none."""
    texts = [given] if isinstance(given, str) else given or ()
    found = tuple(part.strip() for text in texts for part in text.split(",") if part.strip())
    if texts and not found:
        raise OptionError(
            f"patterns on layer names must not be empty, as {', '.join(map(repr, texts))} is; leave the "
            "option out for all layers"
        )
    return found


def described(options: type[RunOptions]) -> str:
    """Return the docstring with a line for every option."""
    lines = [f"    {known.name}: {known.sentence}" for known in options_of(options)]
    return f"{(options.__doc__ or '').rstrip()}\n\nAttributes:\n" + "\n".join(lines) + "\n"


WalkOptions.__doc__ = described(WalkOptions)


#: of `train`
WEIGHTS, ALL = TRAINED = ("weights", "all")


@dataclass(frozen=True)
class Reconstruction:
    """Training of kept weights block by block; OptionError for a value that is not allowed."""

    train: str = option(
        WEIGHTS,
        "what is trained; weights: kept weights; all: the block's norms and biases, too",
        choices=TRAINED,
    )
    begin: str = option(
        "none",
        "update of the kept weights that training starts from",
        choices=("none", "least-squares"),
    )
    epochs: int = option(4, "over the windows", least=1)
    batch: int = option(2, "windows of a step", least=1)
    learning_rate: float = option(
        0.01,
        "of AdamW at its highest, in parts of the root mean square of what is trained of a matrix; a tenth "
        "for norms and biases",
        least=0,
    )
    weight_decay: float = option(0.0, "of AdamW, on matrices", least=0)

    def __post_init__(self) -> None:
        check_options(self, "training")


@dataclass(frozen=True, kw_only=True)
class DistillOptions(RunOptions):
    """All options of `distill_model` but models, text and output.

    Raises:
        MaskoptError: a value that is not allowed.
    """

    # windows on which a prune trained its blocks have a low loss already, and teach less
    seed: int = option(
        1,
        "Random seed of the windows and their order; use another one than the prune, for other windows.",
        CALIBRATION,
    )
    epochs: int = option(2, "Passes over the windows.", TRAINING, least=1, shown=True)
    batch: int = option(2, "Windows per step.", TRAINING, least=1, shown=True)
    learning_rate: float = option(
        0.0003,
        "Peak learning rate of AdamW, relative to the root mean square of a matrix's kept weights.",
        TRAINING,
        least=0,
        shown=True,
    )
    weight_decay: float = option(0.0, "Weight decay of AdamW.", TRAINING, least=0, shown=True)
    holdout: float = option(
        0.1,
        "Share of the windows that are held out to evaluate every epoch.",
        CALIBRATION,
        least=0,
        below=1,
        shown=True,
    )
    samples: int = option(
        64, "Number of windows of text.", TEXT, least=1, shown=True, recorded=False
    )
    seq_len: int = option(
        512, "Maximum number of tokens in a window.", TEXT, least=2, shown=True, recorded=False
    )
    recompute: bool = option(
        False,
        "Gradient checkpointing: store only the inputs of blocks; less memory, more time.",
        RUNTIME,
        recorded=False,
    )
    save_every: float = option(
        10.0, "Minutes between saves, for `resume`; 0: none.", RUNTIME, least=0, recorded=False
    )

    @property
    def walk(self) -> WalkOptions:
        """The options of the walk; trained weights are float32, whatever their stored precision."""
        return dataclasses.replace(super().walk, dtype="float32")


#: options that `distillation` of a prune sets; windows and machine are those of the prune
DISTILLATION = ("epochs", "batch", "learning_rate", "weight_decay", "seed")
DistillOptions.__doc__ = described(DistillOptions)

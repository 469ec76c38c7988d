"""The options of a walk through a model's blocks, each in one place: what it is called, its default, and what
it does. Whoever prunes, makes smaller or evaluates takes them from here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from maskopt.core.fields import check_options, option
from maskopt.core.least_squares import Refit
from maskopt.core.limits import Limits, parse_bytes
from maskopt.errors import DataError, ModelError, OptionError, near
from maskopt.models.calibration.token_weights import GRADIENT, TOKEN_WEIGHTS, UNIFORM
from maskopt.models.checkpoints.bos import check_bos

if TYPE_CHECKING:
    from maskopt.models.architecture.blocks import Layer
    from maskopt.models.options.training import Reconstruction

#: windows that gradients of the loss are taken on: sums over so many are known well, from far fewer than
#: masks take
GRADIENT_WINDOWS = 16
#: what an option decides: the masks (the manifest records its value); the calibration text (the
#: manifest records the tokens themselves); or only how this machine goes about it
MASKS, TEXT, MACHINE = "masks", "text", "machine"


def about(decides: str, words: str, **facts: Any) -> dict[str, Any]:
    """What is known of an option: what it decides, and the facts of `maskopt.core.fields.option`."""
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
    seed: int = option_field(0, MASKS, "Random seed for calibration windows and solvers.")
    calibrate_on: str = option_field(
        "pruned",
        MASKS,
        "Model whose activations are collected. dense: one pass for all layers; pruned: the model pruned so "
        "far, block by block.",
        choices=("dense", "pruned"),
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
    token_weights: str = option_field(
        UNIFORM,
        MASKS,
        "How tokens of a window are weighted. uniform; skip-first: all but the first; relative: by "
        "the inverse mean square of the hidden state; gradient: by the norm of the loss gradient of "
        "the dense model.",
        choices=TOKEN_WEIGHTS,
    )
    holdout: float = option_field(
        0.0,
        MASKS,
        "Share of the calibration windows that are held out; errors are then reported on them, too.",
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
        "First token of a window. auto: what the tokenizer puts before a text; always: its BOS token;"
        " never: none, as in published results of LLaMA 1 and 2.",
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
        None, MACHINE, "Number of CPU threads; does not affect the result. Default: all cores."
    )
    activation_memory: int | str = option_field(
        4 * 2**30,
        MACHINE,
        "Store hidden states in a file above this size, e.g. 500MB.",
        unit="bytes",
        least=0,
    )
    max_memory: int | str | None = option_field(
        None,
        MACHINE,
        "Stop before anything is computed if the estimated memory exceeds this, e.g. 16GiB.",
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
            raise ModelError(
                "`calibrate_on` dense and `true_sequential` exclude each other; choose one"
            )
        if self.chat and (self.bos, self.text_field) != ("auto", "text"):
            name = "bos" if self.bos != "auto" else "text_field"
            raise DataError(
                f"`{name}` is of plain text; with `chat`, messages are under 'messages' and begin as "
                "the template says: choose one"
            )

        if self.token_weights == GRADIENT:
            self._check_every_window("`token_weights` gradient")

    def _check_every_window(self, what: str) -> None:
        if self.skip_bad_samples:
            raise OptionError(
                f"{what} needs every window's loss, `skip_bad_samples` leaves windows out: choose one"
            )

    @property
    def one_pass(self) -> bool:
        """Whether all Gram matrices are of the dense model's activations."""
        return self.calibrate_on == "dense"

    @property
    def backward(self) -> bool:
        """Whether gradients of the dense model's loss are needed."""
        return self.token_weights == GRADIENT or self.sensitive

    def gradient_windows(self, windows: int) -> int:
        """Of how many they are."""
        if self.token_weights == GRADIENT:
            return windows
        return min(windows, GRADIENT_WINDOWS) if self.sensitive else 0

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
    def reconstruction(self) -> Reconstruction | None:
        """How kept weights are trained; None: they are not."""
        return None

    @property
    def refit(self) -> Refit | None:
        """How kept weights are refitted; None: they stay."""
        return None

    def check_layers(self, layers: Sequence[Layer]) -> None:
        """Raise MaskoptError where these layers cannot be treated as the options say."""
        if self.token_weights != UNIFORM:
            self._check_in_order(layers, f"`token_weights` {self.token_weights}")

    def _check_in_order(self, layers: Sequence[Layer], what: str) -> None:
        """Raise OptionError for a layer that is not given the tokens of a window one after the other."""
        routed = [layer.name for layer in layers if layer.expert is not None or "*" in layer.kind]
        if routed and not self.all_experts:
            raise OptionError(
                f"layer {routed[0]!r} is given the tokens that are routed to it; {what} needs "
                "`all_experts` there"
            )


_Options = TypeVar("_Options", bound=WalkOptions)
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


def check_names(given: Iterable[str], known: Iterable[str], what: str = "option") -> None:
    """Raise OptionError for a name that is no option here (or no such thing)."""
    known = set(known)
    for name in given:
        if name not in known:
            raise OptionError(f"no {what} is called {name!r}{near(name, known)}")


def options_by_name(
    kind: type[_Options], options: _Options | None, shorthand: Mapping[str, Any]
) -> _Options:
    """The options, with single ones set by name.

    Raises:
        OptionError: a name that is no option (near names are given).
    """
    check_names(shorthand, [f.name for f in dataclasses.fields(options or kind)])
    return kind(**shorthand) if options is None else dataclasses.replace(options, **shorthand)


def name_patterns(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Patterns on layer names; each text may hold several, separated by commas.

    Raises:
        OptionError: texts that hold none.
    """
    texts = [given] if isinstance(given, str) else given or ()
    found = tuple(part.strip() for text in texts for part in text.split(",") if part.strip())
    if texts and not found:
        raise OptionError(
            f"patterns on layer names must not be empty, as {', '.join(map(repr, texts))} is; leave the "
            "option out for all layers"
        )
    return found


def described(options: type[WalkOptions]) -> str:
    """The docstring with a line for every option."""
    lines = [f"    {f.name}: {f.metadata['help']}" for f in dataclasses.fields(options)]
    return f"{(options.__doc__ or '').rstrip()}\n\nAttributes:\n" + "\n".join(lines) + "\n"


WalkOptions.__doc__ = described(WalkOptions)

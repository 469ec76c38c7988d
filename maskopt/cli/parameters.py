"""Parameters that several commands share, and those that are the library's own options.

A command that is decorated with `takes(...)` gets a command-line option for each of the named fields of
`PruneOptions`, with its default and its words, and is called with them as one dict, `options`, ready to
be the keywords of a library function.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from maskopt.cli.config import Config, PrintConfig, config_text, said
from maskopt.core.pattern import parse_sparsity
from maskopt.errors import OptionError
from maskopt.models.options.prune import PruneOptions
from maskopt.models.options.walk import MACHINE, MASKS, TEXT, WalkOptions, name_patterns

TEXT_SOURCES = (
    "FILE.txt, FILE.jsonl, a folder, tokens .npy, hf:c4, hf:wikitext2, hf:DATASET[:SPLIT]."
)


def output_to(words: str) -> Any:
    """The option --output."""
    return typer.Option("--output", "-o", help=words, rich_help_panel="Output", metavar="…")


Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace existing output.",
        rich_help_panel="Output",
        metavar="",
    ),
]
Select = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Number of vertices to select, for graph files that do not specify it (.mc, .rudy).",
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue an interrupted run of the same options.",
        rich_help_panel="Output",
        metavar="",
    ),
]
Model = Annotated[str, typer.Argument(help="A model folder, or a name on the hub.")]
#: of the model where a source may also be instances
Calibration = Annotated[
    str | None,
    typer.Option(
        help=f"Calibration text; required for a model. {TEXT_SOURCES}", rich_help_panel="Of a model"
    ),
]
Out = Annotated[Path | None, output_to(".jsonl (resumable), .csv or .parquet.")]

#: those of a prune alone first
FIELDS = {
    f.name: f for f in sorted(dataclasses.fields(PruneOptions), key=lambda f: bool(f.kw_only))
}
ALL = tuple(FIELDS)
#: what it takes to run text through a model, whatever is then done with the layers
WALK = (
    "include",
    "exclude",
    "samples",
    "seq_len",
    "token_weights",
    "text_field",
    "chat",
    "bos",
    "gram_shrinkage",
    "all_experts",
    "skip_bad_samples",
    *(name for name, field in FIELDS.items() if field.metadata["decides"] == MACHINE),
)
WHAT, HOW, CALIBRATION, ON, OUTPUT = (
    "What is pruned", "How", "Calibration", "Machine", "Output",
)  # fmt: skip
#: headings in a command's help, by what an option decides
PANELS = {MASKS: HOW, TEXT: CALIBRATION, MACHINE: ON}
#: and of those that stand elsewhere
PANEL_OF = {
    **dict.fromkeys(
        (
            *(
                "sparsity",
                "include",
                "exclude",
                "allocation",
                "sensitivity",
                "max_deviation",
                "counts",
            ),
            *("channels", "heads", "round_to"),
        ),
        WHAT,
    ),
    **dict.fromkeys(("holdout", "token_weights", "skip_bad_samples"), CALIBRATION),
}
#: options that `--help` shows; `--help-all` shows the others, too
FIRST = (
    *("sparsity", "solver", "update", "allocation", "include", "samples", "seq_len", "device"),
    *("channels", "heads", "epochs", "learning_rate"),
)
#: spellings other than the field's name
FLAGS = {
    "include": ("--include", "--layers"),
    "solver_options": ("--option",),
    "counts": ("--allocation-file",),
    "training": ("--training",),
}
#: mappings too long to be repeated options: a JSON file each
FILES = ("counts",)
Text = Annotated[str, typer.Option(help=TEXT_SOURCES, rich_help_panel=CALIBRATION, metavar="…")]
StoredGrams = Annotated[
    Path | None,
    typer.Option(
        help="Gram matrices that `maskopt gram` wrote, in place of text.",
        rich_help_panel=CALIBRATION,
        metavar="…",
    ),
]
Command = Callable[..., None]


def tokens_file(calibration: str | None) -> str | None:
    """Of a source of text, what can be read beforehand at no cost: tokens."""
    return calibration if calibration is not None and calibration.endswith(".npy") else None


def takes(
    names: Sequence[str],
    panel: str | None = None,
    *,
    of: type[WalkOptions] = PruneOptions,
    config: bool = False,
    **defaults: Any,
) -> Callable[[Command], Command]:
    """Options for these fields of a class of options, in place of the command's parameter `options`.

    Args:
        panel: the heading that they stand under in the command's help, where it is one.
        config: all options of the command may come from a file, and be printed as one.
        defaults: other than the library's.
    """

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters
        added = [_parameter(of, name, panel, defaults) for name in names]
        added_names = {parameter.name for parameter in added}
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [p.replace(kind=keyword) for name, p in own.items() if name != "options"]
        parameters += [*_config_parameters()] if config else []
        parameters.append(_HELP_ALL)

        @functools.wraps(command)
        def run(**given: Any) -> None:
            options = {name: given.pop(name) for name in added_names}
            del given["help_all"]
            if config:
                ctx, printed = given.pop("ctx"), given.pop("print_config")
                file = given.pop("config")
                if printed:
                    values = {**given, **_values(options)}
                    typer.echo(config_text(values, ctx.command.params), nl=False)
                    return
                if file is not None and given["out"] is not None:
                    from maskopt.models.checkpoints.workspace import check_inputs

                    check_inputs(given["out"], config_file=file)
                if given.get("grams") is not None:
                    # which were made with options of their own
                    options = said(ctx, options)
            command(options=_values(options), **given)

        ordered = sorted((*parameters, *added), key=_panel_place)
        run.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in ordered}
        return run

    return decorate


def option_list(text: str | None) -> list[str]:
    """`a, b` → ['a', 'b']."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def read_solver_options(items: Sequence[str] | None) -> dict[str, Any]:
    """`NAME=VALUE`, the value as JSON where it is JSON, else as text.

    Raises:
        OptionError: no `=`.
    """
    options: dict[str, Any] = {}
    for item in items or []:
        name, sign, value = item.partition("=")
        if not sign or not name:
            raise OptionError(f"an option takes NAME=VALUE, not {item!r}")
        try:
            options[name.replace("-", "_")] = json.loads(value)
        except ValueError:
            options[name.replace("-", "_")] = value
    return options


def read_counts(path: str | None) -> dict[str, Any]:
    """Of a JSON file, or of JSON itself, {layer name: count}; none without one.

    Raises:
        OptionError: it cannot be read, or is none.
    """
    if path is None:
        return {}
    try:
        text = path if path.startswith("{") else Path(path).read_text(encoding="utf-8")
        counts = json.loads(text)
    except OSError as error:
        raise OptionError(f"`counts` {path}: cannot be read: {error.strerror}") from None
    except ValueError:
        counts = None
    if not isinstance(counts, dict) or not counts:
        raise OptionError(f'`counts` {path}: must be JSON, {{"layer name": inputs pruned per row}}')
    return counts


def _number_or_word(text: str | float) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _values(options: dict[str, Any]) -> dict[str, Any]:
    """As the library takes them: patterns, lists and solver options out of text."""
    readers: dict[str, Callable[[Any], Any]] = {
        "include": name_patterns,
        "exclude": name_patterns,
        "solver_options": read_solver_options,
        "training": read_solver_options,
        "counts": read_counts,
        "sparsity": parse_sparsity,
        "gram_shrinkage": _number_or_word,
        "damping": _number_or_word,  # of a model that is made smaller it is a number already
    }
    never_none = ("include", "exclude", "solver_options", "training", "counts")
    return {
        name: readers[name](value)
        if name in readers and (value is not None or name in never_none)
        else value
        for name, value in options.items()
    }


def _config_parameters() -> list[inspect.Parameter]:
    """The context is that of the command."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter("ctx", keyword, annotation=typer.Context),
        inspect.Parameter("config", keyword, default=None, annotation=Config),
        inspect.Parameter("print_config", keyword, default=False, annotation=PrintConfig),
    ]


def _show_all(ctx: typer.Context, asked: bool) -> None:
    if asked:
        for one in ctx.command.params:
            if one.param_type_name == "option":
                one.hidden = False  # type: ignore[attr-defined]
        typer.echo(ctx.get_help())
        raise typer.Exit


_HELP_ALL = inspect.Parameter(
    "help_all",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool,
        typer.Option(
            "--help-all",
            help="Show all options and exit.",
            is_eager=True,
            callback=_show_all,
            rich_help_panel="Output",
            metavar="",
        ),
    ],
)


def _parameter(
    of: type[WalkOptions], name: str, panel: str | None, defaults: dict[str, Any]
) -> inspect.Parameter:
    """The command-line option of a field."""
    field = next(field for field in dataclasses.fields(of) if field.name == name)
    kind = typing.get_type_hints(of)[name]
    default = defaults.get(name, field.default)
    if field.metadata["unit"] == "bytes":
        kind = str | None if type(None) in typing.get_args(kind) else str
        default = None if default is None else f"{default // 2**30}GiB"
    elif name in FILES or name == "sparsity":
        kind, default = str | None, None
    elif kind == float | str:
        kind, default = str, str(default)
    elif typing.get_origin(kind) not in (None, types.UnionType):  # a tuple, a mapping: repeated
        kind, default = list[str] | None, None
    flags = FLAGS.get(name) or ((_flag(name),) if kind is bool else ())
    panel = panel or PANEL_OF.get(name) or PANELS.get(field.metadata["decides"])
    option = typer.Option(
        *flags,
        help=re.sub(r"`(\w+)`", _as_flag, field.metadata["help"]),
        rich_help_panel=panel,
        metavar=_metavar(kind, field.metadata["choices"]),
        hidden=name not in FIRST,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


def _as_flag(name: re.Match[str]) -> str:
    """`seq_len` → --seq-len, where it is an option."""
    return FLAGS.get(name[1], (_flag(name[1]),))[0] if name[1] in FIELDS else name[0]


def _panel_place(parameter: inspect.Parameter) -> int:
    """In a command's help: its arguments, its own options, and the panels in their order."""
    facts = getattr(parameter.annotation, "__metadata__", (None,))[0]
    panel = getattr(facts, "rich_help_panel", None)
    order = (WHAT, HOW, CALIBRATION, ON, OUTPUT)
    return order.index(panel) if panel in order else -1


def _metavar(kind: Any, choices: Sequence[str]) -> str | None:
    """The choices, or a letter, so that words have room at 80 columns."""
    if choices:
        return f"[{'|'.join(choices)}]"
    letters = {int: "N", int | None: "N", float: "X", float | None: "X", bool: ""}
    return letters.get(kind, "…")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")

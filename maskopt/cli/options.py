"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from maskopt.errors import OptionError, PatternError
from maskopt.pattern import Pattern, Unstructured, parse_pattern

Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: CUDA where there is one.")]
Dtype = Annotated[
    str,
    typer.Option(help="Precision of the forward passes; auto: as stored, float32 on the CPU."),
]
Seed = Annotated[int, typer.Option(help="Of calibration crops and of solvers.")]
SeqLen = Annotated[int, typer.Option(help="Tokens in a window.")]
Threads = Annotated[
    int | None,
    typer.Option(help="On the CPU; the result does not depend on it. Default: all cores."),
]
ActivationMemory = Annotated[
    str, typer.Option(help="Hidden states that take more go to a file, e.g. 500MB.")
]
WarmStart = Annotated[
    str | None,
    typer.Option(
        help="The solver that makes the start; default: relax for swap, else the solver's own."
    ),
]
OnePass = Annotated[
    bool,
    typer.Option(
        "--one-pass/--sequential",
        help="All Gram matrices from the dense model, or each from the model pruned so far.",
    ),
]
TrueSequential = Annotated[
    bool, typer.Option("--true-sequential", help="Sequential inside a block, too.")
]
Field = Annotated[str, typer.Option(help="Where JSON lines hold their text.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]
Sparsity = Annotated[
    float | None, typer.Option(help="Share of every row to prune, e.g. 0.6; this or --pattern.")
]
PatternText = Annotated[
    str | None,
    typer.Option("--pattern", help="N:M, e.g. 2:4 keeps 2 of every 4 consecutive inputs."),
]
Include = Annotated[
    list[str] | None,
    typer.Option(help="Only layers that match: q_proj, 'layers.0.*'; may be repeated."),
]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Not the layers that match; may be repeated.")
]
SolverOption = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", help="An option of the solver, NAME=VALUE; may be repeated."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what an earlier run left there.")
]


def read_pattern(sparsity: float | None, pattern: str | None) -> Pattern:
    """Exactly one of the two.

    Raises:
        PatternError: both or none, or no such pattern.
    """
    if (sparsity is None) == (pattern is None):
        raise PatternError("give either --sparsity (0.6) or --pattern (2:4), exactly one of them")
    if pattern is not None:
        return parse_pattern(pattern)
    return Unstructured(sparsity=sparsity)


def read_solver_options(items: list[str] | None) -> dict[str, Any]:
    """`NAME=VALUE`, the value as JSON where it is JSON, else as text.

    Raises:
        OptionError: no `=`.
    """
    options: dict[str, Any] = {}
    for item in items or []:
        name, sign, value = item.partition("=")
        if not sign or not name:
            raise OptionError(f"--option takes NAME=VALUE, not {item!r}")
        try:
            options[name.replace("-", "_")] = json.loads(value)
        except ValueError:
            options[name.replace("-", "_")] = value
    return options

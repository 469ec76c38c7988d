"""Errors that a user can cause: one clear line that names the thing and the remedy.

The command line prints any `MaskoptError` without a traceback; `--debug` shows it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MaskoptError(Exception):
    """Base of all expected errors."""


class PatternError(MaskoptError, ValueError):
    """A sparsity pattern that does not exist or does not fit the number of inputs."""


class ProblemError(MaskoptError, ValueError):
    """Weights or a Gram matrix that do not form a mask-selection problem."""


class SolverError(MaskoptError, RuntimeError):
    """A solver could not do what was asked of it."""


class SolverUnavailableError(SolverError):
    """The backend is registered, but something that it needs is missing."""


class OptionError(MaskoptError, TypeError):
    """An option that the solver does not have, or a value that it cannot take."""


class WarmStartError(MaskoptError, ValueError):
    """A start that is not a legal mask of the problem."""


class VerificationError(MaskoptError, AssertionError):
    """A solution that does not hold what it claims."""


class ModelError(MaskoptError, RuntimeError):
    """A model that cannot be read, pruned or written as asked."""


class DataError(MaskoptError, ValueError):
    """Calibration or evaluation text that cannot be used."""


def printable(text: str) -> str:
    r"""Escape everything invisible, as in `\x1b` and `\n`.

    Text out of a file can then neither steer a terminal nor forge a line.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def near(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'swap'?` for a mistyped name, else `; known: …`."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "; known: " + ", ".join(known) if known else ""

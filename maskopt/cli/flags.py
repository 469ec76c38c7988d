"""Errors of the library name options (`skip_bad_samples`); here they become flags of the command."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand

from maskopt.errors import MaskoptError


class FlagCommand(TyperCommand):
    """A command whose expected errors say `--skip-bad-samples` where the library says
    `skip_bad_samples`, in backticks, and the command has such an option."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MaskoptError as error:
            error.args = (with_flags(str(error), self.params), *error.args[1:])
            raise


def with_flags(message: str, parameters: list[Any]) -> str:
    """The message, with a command's flags in place of the options in backticks."""
    flags = {
        flag.removeprefix("--").replace("-", "_"): flag
        for parameter in parameters
        if parameter.param_type_name == "option"
        for flag in parameter.opts
        if flag.startswith("--")
    }
    return re.sub(r"`(\w+)`", lambda found: flags.get(found[1], found[0]), message)

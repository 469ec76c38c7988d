"""`maskopt solvers`: the registered backends and bounds, and the options of one of them."""

from __future__ import annotations

from rich.table import Table

from maskopt.cli.command import command
from maskopt.cli.console import screen
from maskopt.core.fields import option, options_of
from maskopt.protocol.bounds import available_bounds
from maskopt.protocol.solver import REGISTRY, available_solvers

_HEADINGS = ("solver", "patterns", "device", "start", "proves", "n up to", "also")
#: columns that a table needs to have them all; and those that go first
_WIDE, _LEFT_OUT = 110, ("patterns", "device", "start", "also")


@command(example="maskopt solvers swap")
def solvers(
    name: str | None = option(None, "Solver whose options are listed.", argument=True),
) -> None:
    """List solvers and bounds with what each supports; or the options of one solver."""
    if name is not None:
        screen.print(_options(name))
        return
    screen.print(_solvers())
    screen.print(_bounds())


def _solvers() -> Table:
    """In a narrow terminal without the columns in which most solvers agree."""
    narrow = screen.width < _WIDE
    table = Table()
    for heading in _HEADINGS:
        if not (narrow and heading in _LEFT_OUT):
            table.add_column(heading, no_wrap=heading == "solver" or not narrow, overflow="fold")
    table.add_column("note")
    for info in available_solvers().values():
        can = info.capabilities
        note = can.note if info.available else f"unavailable: {info.unavailable}"
        also = (("update", can.update), ("shared budget", can.shared_budget))
        values = (
            info.name,
            "all" if len(can.patterns) == 2 else can.patterns[0],
            ", ".join(can.devices),
            f"{can.start}, {can.default_start}" if can.default_start else can.start,
            can.proves,
            "any" if can.largest_n is None else str(can.largest_n),
            ", ".join(word for word, has in also if has),
        )
        cells = zip(_HEADINGS, values, strict=True)
        table.add_row(*(v for heading, v in cells if not (narrow and heading in _LEFT_OUT)), note)
    return table


def _bounds() -> Table:
    table = Table()
    for heading in ("bound", "n up to", "note"):
        table.add_column(heading, no_wrap=heading != "note")
    for info in available_bounds().values():
        note = info.note if info.unavailable is None else f"unavailable: {info.unavailable}"
        table.add_row(info.name, "any" if info.largest_n is None else str(info.largest_n), note)
    return table


def _options(name: str) -> Table:
    table = Table(title=f"{name}: options", title_justify="left")
    for heading in ("option", "default", "may be", "unit", "meaning"):
        table.add_column(heading, no_wrap=heading == "option")
    for one in options_of(REGISTRY.find(name)):
        may = " ".join(part for part in (one.type, one.range) if part)
        table.add_row(one.name, str(one.default), may, one.unit, one.help)
    return table

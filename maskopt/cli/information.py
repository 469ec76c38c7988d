"""`maskopt solvers`: the registered backends and bounds; `maskopt demo`: the main job on a small model."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from maskopt.cli.command import OVERWRITE, command
from maskopt.cli.console import screen
from maskopt.cli.view import view
from maskopt.core.fields import OUTPUT, option, options_of
from maskopt.protocol.bounds import available_bounds
from maskopt.protocol.solver import REGISTRY, available_solvers

_HEADINGS = ("solver", "patterns", "device", "start", "proves", "n up to", "also", "note")
#: terminal columns that the whole table needs; columns that a narrower one leaves out
_WIDE, _LEFT_OUT = 110, ("patterns", "device", "start", "also")


@command(example="maskopt demo --model smollm2")
def demo(
    model: str = option("gemma3", "Language model.", choices=("gemma3", "smollm2")),
    sparsity: float | str = option(0.5, "As for `maskopt prune`: 0.5, 50% or 2:4."),
    samples: int = option(8, "Number of calibration windows.", least=1),
    windows: int = option(4, "Number of evaluation windows.", least=1),
    output: Path = option(
        Path("maskopt-demo"), "Folder for the report and the pruned model.", OUTPUT
    ),
    overwrite: bool = OVERWRITE,
) -> None:
    """Compare solvers with proven optima on small rows, then prune all of a small real model."""
    with view() as shown:
        shown.show("loading the libraries", 0, None)
        from maskopt.demo.run import run_demo

        result = run_demo(
            output,
            model=model,
            sparsity=sparsity,
            samples=samples,
            windows=windows,
            overwrite=overwrite,
            on_stage=shown.show,
        )
    for table in result.tables:
        screen.print(table.rich())
        screen.print()
    screen.print(f"report: {result.report}", highlight=False)
    for what, folder in (("pruned model", result.model), ("dense model", result.dense)):
        size = sum(file.stat().st_size for file in folder.iterdir()) / 1e9
        screen.print(f"{what}: {folder}, {size:.2f} GB kept on the disk", highlight=False)
    screen.print(f"{result.seconds:.0f} s in all", highlight=False)


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
    shown = [heading for heading in _HEADINGS if not (narrow and heading in _LEFT_OUT)]
    table = Table()
    for heading in shown[:-1]:
        table.add_column(heading, no_wrap=heading == "solver" or not narrow, overflow="fold")
    table.add_column("note")
    for info in available_solvers().values():
        can = info.capabilities
        also = (("update", can.update), ("shared budget", can.shared_budget))
        cells = {
            "solver": info.name,
            "patterns": "all" if len(can.patterns) == 2 else can.patterns[0],
            "device": ", ".join(can.devices),
            "start": f"{can.start}, {can.default_start}" if can.default_start else can.start,
            "proves": can.proves,
            "n up to": "any" if can.largest_n is None else str(can.largest_n),
            "also": ", ".join(word for word, has in also if has),
            "note": can.note if info.available else f"unavailable: {info.unavailable}",
        }
        table.add_row(*(cells[heading] for heading in shown))
    return table


def _bounds() -> Table:
    table = Table()
    for heading in ("bound", "n up to", "note"):
        table.add_column(heading, no_wrap=heading != "note")
    for info in available_bounds().values():
        n, note = (getattr(info.kind, name, "") for name in ("largest_n", "note"))
        note = note if info.available else f"unavailable: {info.unavailable}"
        table.add_row(info.name, str(n or "any"), note)
    return table


def _options(name: str) -> Table:
    table = Table(title=f"{name}: options", title_justify="left")
    for heading in ("option", "default", "may be", "unit", "meaning"):
        table.add_column(heading, no_wrap=heading == "option")
    for one in options_of(REGISTRY.find(name)):
        may = " ".join(part for part in (one.type, one.range) if part)
        table.add_row(one.name, str(one.default), may, one.unit, one.help)
    return table

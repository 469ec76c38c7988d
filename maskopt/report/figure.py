"""Figures of a page: drawn by matplotlib as SVG that follows the page's colours, with the numbers beside."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskopt.core.files import atomic_write
from maskopt.errors import OptionError
from maskopt.report.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: readable on white and on the page's dark ground, and told apart without colour by their markers
COLOURS = ("#2f7ed8", "#d0692b", "#2f9158", "#b0527a", "#8064c8", "#7a7a2a", "#3a8f9e")
MARKERS = "osD^vPX"
#: stands for the page's own colour of text until the SVG is there
_TEXT = "#0a0b0c"
_INCHES = (5.4, 3.4)

Draw = Callable[["Axes"], None]


@dataclass(frozen=True)
class Figure:
    """A drawing with its title, and the table of what it shows.

    Attributes:
        words: what is seen, for those who do not see it, and below the drawing.
    """

    name: str
    title: str
    words: str
    draw: Draw
    numbers: Table

    def svg(self) -> str:
        """The drawing alone; the same bytes every time."""
        text = io.StringIO()
        self._save(text, "svg", transparent=True)
        whole = text.getvalue()
        svg = whole[whole.index("<svg") :]
        svg = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"|<svg height="[^"]*" width="[^"]*"',
                     r"<svg \1", svg, count=1)  # fmt: skip
        # elements are named alike in every drawing of a page
        svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{self.name}-", svg)
        return svg.replace(_TEXT, "currentColor")

    def html(self) -> str:
        label = html.escape(f"{self.title}. {self.words}", quote=True)
        return (
            f"<h2>{html.escape(self.title)}</h2>\n<figure>"
            f'<div role="img" aria-label="{label}">{self.svg()}</div>'
            f"<figcaption>{html.escape(self.words)}</figcaption></figure>\n"
            f"<details><summary>The numbers</summary>{self.numbers.grid()}</details>"
        )

    def files(self, folder: Path) -> list[Path]:
        """What `save` writes."""
        return [folder / f"{self.name}.{kind}" for kind in ("png", "svg")]

    def save(self, folder: Path) -> list[Path]:
        """As PNG and SVG, on white."""
        paths = self.files(folder)
        for path in paths:
            with atomic_write(path) as file:
                self._save(file, path.suffix[1:], transparent=False)
        return paths

    def _save(self, target: Any, kind: str, *, transparent: bool) -> None:
        matplotlib = _matplotlib()
        text = _TEXT if transparent else "black"
        style = {
            "font.size": 11, "svg.fonttype": "none", "svg.hashsalt": "maskopt", "text.color": text,
            "axes.labelcolor": text, "axes.edgecolor": text, "xtick.color": text, "ytick.color": text,
            "legend.framealpha": 0, "axes.spines.top": False, "axes.spines.right": False,
        }  # fmt: skip
        with matplotlib.rc_context(style):
            drawing = matplotlib.figure.Figure(figsize=_INCHES, layout="constrained")
            axes = drawing.subplots()
            self.draw(axes)
            when = {"metadata": {"Date": None}} if kind == "svg" else {}
            drawing.savefig(target, format=kind, dpi=150, transparent=transparent, **when)


def plain(text: str) -> str:
    """A name as matplotlib shows it: no dollar sign begins mathematics."""
    return text.replace("$", r"\$")


def legend(text: str) -> str:
    """A name for a legend: matplotlib leaves out those that begin with an underscore."""
    return plain(f"\u200b{text}" if text.startswith("_") else text)


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError:
        raise OptionError(
            'the figures of a report need matplotlib: pip install "maskopt[report]"'
        ) from None
    return matplotlib

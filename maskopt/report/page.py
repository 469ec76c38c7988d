"""One self-contained HTML page: no script, no font, no request to anywhere.

Figures are drawn by matplotlib as SVG in the page's colours, with a table of their numbers.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Bool
from torch import Tensor
from torch.nn.functional import avg_pool2d

from maskopt.core.files import atomic_write
from maskopt.core.table import Table
from maskopt.errors import OptionError

#: readable on white and on the page's dark ground; markers distinguish series without colour
COLOURS = ("#2f7ed8", "#d0692b", "#2f9158", "#b0527a", "#8064c8", "#7a7a2a", "#3a8f9e")
MARKERS = "osD^vPX"
#: replaced by the page's own colour of text in the SVG
_TEXT = "#0a0b0c"
#: so wide that the text of a figure, at the width of the page, is no larger than the page's
_INCHES = (7.6, 4.2)

#: dots of the picture of a mask in each direction at most: one of a large layer would be megabytes
MOST = 1024
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1d2733; background: #fff }
h1 { font-size: 1.6rem; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin-top: 2rem }
p { overflow-wrap: anywhere }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #dde3ea; white-space: nowrap }
th { text-align: left; border-bottom-color: #8a97a8 }
.figure { text-align: right }
figure { margin: 1rem 0 } figcaption, .note { color: #4a5868; font-size: .92rem }
figure svg { width: 100%; height: auto; max-width: 46rem }
pre { overflow-x: auto; padding: .6rem .8rem; background: #eef2f6 }
.pane { overflow: auto; max-height: 32rem; border: 1px solid #8a97a8 }
.pane img { display: block; image-rendering: pixelated }
.zoom input:nth-of-type(1):checked ~ .pane img { width: 100%; max-height: 31rem; object-fit: contain }
.zoom input:nth-of-type(3):checked ~ .pane img { width: var(--four) }
.zoom label { margin-right: 1rem } a, summary { color: inherit }
:focus-visible { outline: 3px solid #2f7ed8; outline-offset: 2px }
@media (prefers-color-scheme: dark) { body { color: #dce3ea; background: #14191f }
  th, td { border-color: #2b3642 } pre { background: #1f2830 } figcaption, .note { color: #a9b6c4 } }
"""


@dataclass(frozen=True)
class Commands:
    """Shell commands, each of one or several lines."""

    title: str
    texts: Sequence[str]

    def html(self) -> str:
        shown = (f"<pre><code>{html.escape(text)}</code></pre>" for text in self.texts)
        return "\n".join([f"<h2>{html.escape(self.title)}</h2>", *shown])


@dataclass(frozen=True)
class MaskPicture:
    """Dark where a weight is kept, light where it is pruned; rows are outputs.

    Attributes:
        kept: bool [rows, n].
    """

    name: str
    kept: Bool[Tensor, "rows n"]

    @property
    def step(self) -> int:
        """Rows and inputs of a dot."""
        return math.ceil(max(self.kept.shape) / MOST)

    def png(self) -> bytes:
        """Return an image of one bit per weight; of grey dots for more than MOST rows or inputs."""
        try:
            from PIL import Image
        except ImportError:
            raise OptionError("the picture of a mask needs Pillow: pip install pillow") from None
        pruned = (~self.kept)[None].float()
        dots = avg_pool2d(pruned, self.step, ceil_mode=True)[0].mul(255).byte().numpy()
        data = io.BytesIO()
        Image.fromarray(dots).convert("1" if self.step == 1 else "L").save(data, "png")
        return data.getvalue()

    def html(self) -> str:
        rows, n = self.kept.shape
        dots = f"; a dot is {self.step} × {self.step} weights" if self.step > 1 else ""
        words = (
            f"Mask of {self.name}: {rows} outputs (down) by {n} inputs (across); dark is kept, "
            f"{float((~self.kept).float().mean()):.1%} is pruned{dots}"
        )
        data, four = base64.b64encode(self.png()).decode(), 4 * math.ceil(n / self.step)
        zooms = "".join(
            f'<input type="radio" name="zoom" id="zoom{i}"{" checked" * (i == 0)}>'
            f'<label for="zoom{i}">{label}</label>'
            for i, label in enumerate(("whole", "1 : 1", "4 : 1"))
        )
        return (
            f'<h2>A mask</h2>\n<figure><div class=zoom style="--four: {four}px">{zooms}'
            f'<div class="pane" tabindex="0"><img src="data:image/png;base64,{data}" '
            f'alt="{html.escape(words, quote=True)}"></div></div>'
            f"<figcaption>{html.escape(words)}.</figcaption></figure>"
        )


@dataclass(frozen=True)
class Figure:
    """A drawing with its title, and the table of what it shows.

    Attributes:
        words: description, below the drawing and for screen readers.
    """

    name: str
    title: str
    words: str
    draw: Callable[[Any], None]
    numbers: Table

    def svg(self) -> str:
        """Return the drawing alone; the same bytes every time."""
        text = io.StringIO()
        self._save(text, "svg", transparent=True)
        whole = text.getvalue()
        svg = whole[whole.index("<svg") :]
        # Elements have the same names in every drawing of a page.
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
        """Return the paths that `save` writes."""
        return [folder / f"{self.name}.{kind}" for kind in ("png", "svg")]

    def save(self, folder: Path) -> list[Path]:
        """Write PNG and SVG, on white."""
        paths = self.files(folder)
        for path in paths:
            with atomic_write(path) as file:
                self._save(file, path.suffix[1:], transparent=False)
        return paths

    def _save(self, target: Any, kind: str, *, transparent: bool) -> None:
        try:
            import matplotlib
            import matplotlib.figure
        except ImportError:
            raise OptionError("figures need matplotlib: pip install matplotlib") from None
        text = _TEXT if transparent else "black"
        style: dict[Any, Any] = {
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


#: part of a page, with a method `html`
Section = Table | Commands | MaskPicture | Figure


def plain(text: str) -> str:
    """Return a name that matplotlib shows unchanged.

    It takes text between dollar signs for mathematics, and leaves names that begin with an underscore out of
    the legend.
    """
    shown = f"\u200b{text}" if text.startswith("_") else text
    return shown.replace("$", r"\$")


def write_page(path: Path, title: str, parts: Sequence[str | Section]) -> None:
    """Write the page (atomically). A string is a paragraph."""
    body = "\n".join(
        f"<p>{html.escape(part)}</p>" if isinstance(part, str) else part.html() for part in parts
    )
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n<main>\n<h1>{html.escape(title)}</h1>\n{body}\n</main></body></html>\n"
    )
    with atomic_write(path) as file:
        file.write(page.encode())

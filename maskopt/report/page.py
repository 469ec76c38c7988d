"""One self-contained HTML page: no script, no font, no request to anywhere."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from maskopt.core.files import atomic_write

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
.pane img { display: block; image-rendering: pixelated; width: 100% }
.zoom input:nth-of-type(2):checked ~ .pane img { width: auto }
.zoom input:nth-of-type(3):checked ~ .pane img { width: var(--four) }
.zoom label { margin-right: 1rem } a, summary { color: inherit }
:focus-visible { outline: 3px solid #2f7ed8; outline-offset: 2px }
@media (prefers-color-scheme: dark) { body { color: #dce3ea; background: #14191f }
  th, td { border-color: #2b3642 } pre { background: #1f2830 } figcaption, .note { color: #a9b6c4 } }
"""


class Section(Protocol):
    """A part of a page that writes itself."""

    def html(self) -> str: ...


class Command:
    """What to type."""

    def __init__(self, text: str) -> None:
        self.text = text

    def html(self) -> str:
        return f"<pre><code>{html.escape(self.text)}</code></pre>"


class Heading:
    """Of a part of the page."""

    def __init__(self, text: str) -> None:
        self.text = text

    def html(self) -> str:
        return f"<h2>{html.escape(self.text)}</h2>"


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

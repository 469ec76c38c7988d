"""One self-contained HTML page: no script, no font, no request to anywhere."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from maskopt.files import atomic_write
from maskopt.report.table import Table

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1d2733; background: #fff }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #dde3ea; white-space: nowrap }
th { text-align: left; border-bottom-color: #8a97a8 }
.figure { text-align: right }
@media (prefers-color-scheme: dark) { body { color: #dce3ea; background: #14191f }
  th, td { border-color: #2b3642 } }
"""


def write_page(path: Path, title: str, parts: Sequence[str | Table]) -> None:
    """Write the page (atomically). A string is a paragraph, a Table a section."""
    body = "\n".join(
        part.html() if isinstance(part, Table) else f"<p>{html.escape(part)}</p>" for part in parts
    )
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )
    with atomic_write(path) as file:
        file.write(page.encode())

"""Tables of text, for the terminal and for HTML pages."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field


def cell(value: float | None, form: str) -> str:
    """Format a number, such as by `.3f`; `–` for None and NaN."""
    return "–" if value is None or math.isnan(value) else format(value, form)


def number(value: float | None) -> str:
    """Format a number of any size: `12.35`, `0.004021`, `1.2e+05`; `–` for None and NaN."""
    if value is None or value == 0 or 1e-4 <= abs(value) < 1000:
        return cell(value, ".4g")
    return cell(value, ",.0f" if 1000 <= abs(value) < 1e6 else ".3g")


def value_text(value: float, digits: int) -> str:
    """Format a whole number below 2⁵² with all its digits, any other with `digits`; `–` for NaN."""
    exact = value.is_integer() and abs(value) < 2**52
    return cell(value, f".{17 if exact else digits}g")


@dataclass
class Table:
    """Headings and rows of text; columns after the first `text_columns` are figures, right-aligned.

    Attributes:
        has_total: the last row is for all others together.
    """

    title: str
    headings: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    text_columns: int = 1
    note: str = ""
    has_total: bool = False

    def add(self, *cells: str) -> None:
        """Add a row; ValueError for another number of cells than headings."""
        if len(cells) != len(self.headings):
            raise ValueError(f"{len(cells)} cells for {len(self.headings)} columns")
        self.rows.append(cells)

    def lines(self) -> list[str]:
        """Return headings and rows as aligned lines of text."""
        columns = []
        for index, column in enumerate(zip(self.headings, *self.rows, strict=True)):
            width = max(map(len, column))
            align = str.ljust if index < self.text_columns else str.rjust
            columns.append([align(text, width) for text in column])
        return ["  ".join(row) for row in zip(*columns, strict=True)]

    def html(self) -> str:
        """Return the title as a heading, and an escaped `<table>`."""
        return f"<h2>{html.escape(self.title)}</h2>\n{self.grid()}"

    def grid(self) -> str:
        """Return an escaped `<table>` with its note."""
        head = _html_row('th scope="col"', self.headings, self.text_columns)
        body = "\n".join(_html_row("td", row, self.text_columns) for row in self.rows)
        note = f'<p class="note">{html.escape(self.note)}</p>' if self.note else ""
        return f"<table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table>\n{note}"


def _html_row(tag: str, row: Sequence[str], text_columns: int) -> str:
    cells = []
    for index, text in enumerate(row):
        kind = "text" if index < text_columns else "figure"
        cells.append(f'<{tag} class="{kind}">{html.escape(text)}</{tag.split()[0]}>')
    return f"<tr>{''.join(cells)}</tr>"

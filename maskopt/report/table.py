"""One table, shown the same way in a terminal and on a page."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import rich.table
from rich.text import Text

from maskopt.errors import printable


def number(value: float | None, digits: int = 4) -> str:
    """`12.35`, `0.004021`, `1.2e+05`; `–` where there is nothing to say."""
    if value is None or math.isnan(value):
        return "–"
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}g}"
    return f"{value:.{digits}g}" if abs(value) < 10 ** (digits - 1) else f"{value:,.0f}"


@dataclass
class Table:
    """Cells are text already; columns after the first `text_columns` are figures, right-aligned."""

    title: str
    headings: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    text_columns: int = 1
    note: str = ""

    def add(self, *cells: str) -> None:
        if len(cells) != len(self.headings):
            raise ValueError(f"{len(cells)} cells for {len(self.headings)} columns")
        self.rows.append(cells)

    def rich(self) -> rich.table.Table:
        """For `rich.print`: no markup, and no control characters."""

        def text(cell: str) -> Text:
            return Text(printable(cell))

        caption = text(self.note) if self.note else None
        table = rich.table.Table(title=text(self.title), title_justify="left", caption=caption)
        for index, heading in enumerate(self.headings):
            justify = "left" if index < self.text_columns else "right"
            table.add_column(text(heading), justify=justify, no_wrap=True)  # type: ignore[arg-type]
        for row in self.rows:
            table.add_row(*map(text, row))
        return table

    def html(self) -> str:
        """Its heading, and an escaped `<table>`."""
        return f"<h2>{html.escape(self.title)}</h2>\n{self.grid()}"

    def grid(self) -> str:
        """An escaped `<table>` with its note."""

        def cells(tag: str, row: Sequence[str]) -> str:
            return "".join(
                f'<{tag}{" scope=col" * (tag == "th")} class="'
                f'{"text" if i < self.text_columns else "figure"}">'
                f"{html.escape(cell)}</{tag}>"
                for i, cell in enumerate(row)
            )

        body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in self.rows)
        note = f'<p class="note">{html.escape(self.note)}</p>' if self.note else ""
        return (
            f"<table>\n<thead><tr>{cells('th', self.headings)}</tr></thead>\n"
            f"<tbody>\n{body}\n</tbody></table>\n{note}"
        )

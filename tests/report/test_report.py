"""Tables line up, and nothing that is shown can break out of the page."""

import io
import math

import pytest
from rich.console import Console

from maskopt.report import Table, number, write_page


def test_numbers_are_short_and_never_lose_their_size():
    cases = {
        12.3456: "12.35", 0.00402134: "0.004021", 123456.0: "123,456", 1.2e9: "1.2e+09", 0.0: "0",
        1e-7: "1e-07", 999.96: "1000",
    }  # fmt: skip
    for value, text in cases.items():
        assert number(value) == text
    assert number(None) == number(math.nan) == "–"


def test_the_same_cells_in_terminal_and_page(tmp_path):
    table = Table("A [bold]title[/bold] <b>", ("solver", "objective"), note="see <here>")
    table.add("swap", "1.5")
    with pytest.raises(ValueError, match="1 cells for 2"):
        table.add("swap")
    stream = io.StringIO()
    Console(file=stream, width=60).print(table.rich())
    assert "[bold]title[/bold]" in stream.getvalue()
    for shown in ("swap", "1.5", "objective", "see <here>"):
        assert shown in stream.getvalue()
    write_page(tmp_path / "r.html", "T & U", ["a < b", table])
    page = (tmp_path / "r.html").read_text()
    assert "a &lt; b" in page
    assert "T &amp; U" in page
    assert '<td class="figure">1.5</td>' in page
    assert "see &lt;here&gt;" in page
    assert "<b>" not in page
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]

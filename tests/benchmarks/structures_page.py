"""The page out of the measurements of `structures.py`."""

from __future__ import annotations

import statistics
from pathlib import Path

from book import Book, Record, family, percent, plain, table
from generalisation_columns import TITLES

ORDER = (
    "random", "magnitude", "diagonal of Q (Wanda-sp)", "FLAP's score", "swap", "tabu",
)  # fmt: skip
#: what `maskopt prune-structured --blocks` does
DEFAULT = "least as a whole (default)"


def write(book: Book, page: Path) -> None:
    """docs/results/structures.md; studies without lines are left out."""
    about = book.about
    command = (
        "python tests/benchmarks/structures.py "
        f"--calibration {about['calibration']} --text {about['text']} --corpus {about['corpus']}"
    )
    taken = sorted({f"{r['machine']}, {r['date']}" for r in book.lines.values() if "machine" in r})
    parts = [
        f"""# Channels, heads and blocks

How to remove them: [structured pruning](../guide/structured.md).

Written by `{command}`:
32 calibration windows of 512 tokens, eight held-out windows for held-out errors, perplexity on
{about["windows"]} windows. Windows begin with what the tokenizer puts before a text. Intervals are 95%, by
bootstrap over the windows, paired with the dense model. Seconds of solving were taken with other work on the
same cores now and then. {"; ".join(taken)}.""",
        *(text for make in (channels, heads, gaps, blocks, speed) if (text := make(book.lines))),
    ]
    page.write_text("\n\n".join(part.strip() for part in parts) + "\n")


def channels(lines: dict[str, Record]) -> str:
    """A table a model."""
    found = family(lines, "channels/")
    parts = []
    for name, title in TITLES.items():
        mine = {tuple(key.split("/")[1:]): r for key, r in found.items() if key.startswith(name)}
        shares = sorted({key[0] for key in mine}, key=lambda share: float(share.rstrip("%")))
        rows = [
            [share, method, *(_cell(mine.get((share, method, w))) for w in ("keep", "refit")),
             *(_held(mine.get((share, method, w))) for w in ("keep", "refit"))]
            for share in shares for method in ORDER
            if any((share, method, w) in mine for w in ("keep", "refit"))
        ]  # fmt: skip
        if rows:
            head = ("removed", "channels by", "perplexity / dense, unchanged", "least squares",
                    "held-out error, unchanged", "least squares")  # fmt: skip
            parts.append(f"{title}:\n\n{table(head, rows).strip()}\n\n{_beaten(mine)}")
    if not parts:
        return ""
    return "## Channels of the MLP\n\n" + "\n\n".join(parts)


def _beaten(mine: dict[tuple[str, ...], Record]) -> str:
    """In how many layers the choice of a search costs less than the diagonal's."""
    better = []
    for (share, method, _), one in sorted(mine.items()):
        if method in ("swap", "tabu") and "diagonal" in one:
            below = sum(one["errors"][n] < cost for n, cost in one["diagonal"].items())
            better.append((method, share, f"{below} of {len(one['diagonal'])}"))
    if not better:
        return ""
    return (
        "Layers in which a search's choice costs less than the diagonal's, each on the inputs that it is "
        "given, weights unchanged: "
        + ", ".join(
            f"{method} {layers} at {share}" for method, share, layers in dict.fromkeys(better)
        )
        + "."
    )


def heads(lines: dict[str, Record]) -> str:
    rows = []
    for name, title in TITLES.items():
        for weights in ("keep", "refit"):
            record = lines.get(f"heads/{name}/{weights}")
            if record:
                rows.append(
                    [title, plain(weights), percent(record["removed"]), _cell(record), _held(record),
                     f"{record['proven']} of {len(record['errors'])}", f"{record['slowest']:.2f} s"]
                )  # fmt: skip
    if not rows:
        return ""
    head = ("model", "weights", "heads removed", "perplexity / dense", "held-out error",
            "layers whose choice is proven", "slowest layer")  # fmt: skip
    return "## Heads\n\n" + table(head, rows)


def gaps(lines: dict[str, Record]) -> str:
    rows = []
    for name, title in TITLES.items():
        record = lines.get(f"gaps/{name}")
        if record:
            of = [g for n, g in record["gaps"].items() if g > 1e-6]
            rows.append(
                [title, str(len(record["gaps"])), str(record["proven"]), percent(statistics.median(of)),
                 percent(max(of)), f"{record['slowest']:.0f} s"]
            )  # fmt: skip
    if not rows:
        return ""
    head = ("model", "choices", "proven optimal", "median gap of the others", "largest",
            "slowest, bound and all")  # fmt: skip
    return "## How far from the best choice\n\n25% of the channels by swap, and heads:\n\n" + table(
        head, rows
    )


def blocks(lines: dict[str, Record]) -> str:
    rows, seconds = [], []
    for name, title in TITLES.items():
        found = family(lines, f"blocks/{name}/")
        for key in sorted(found, key=_by_count):
            record, (count, label) = found[key], key.split("/")
            gone = ", ".join(map(str, record["removed"]))
            rows.append([title, count, label, gone, f"{record['cost']:.3f}", _cell(record)])
            if "status" in record:
                assert record["status"] == "optimal", (name, key)
                seconds.append(record["solving"])
    if not rows:
        return ""
    head = ("model", "blocks", "chosen by", "index", "pᵀUp on calibration", "perplexity / dense")
    searched = {tuple(row[:2]) for row in rows if row[2] == DEFAULT}
    without = dict.fromkeys(
        f"{row[1]} of {row[0]}"
        for row in rows
        if int(row[1]) > 2 and tuple(row[:2]) not in searched
    )
    lacking = (
        f"\nThe default's choice is not in these data of: {', '.join(without)}.\n"
        if without
        else ""
    )
    return (
        "## Blocks\n\nEffects measured on 4 windows; every choice of least cost is proven, in at most "
        f"{max(seconds):.2f} s:\n\n" + table(head, rows) + lacking
    )


def _by_count(key: str) -> tuple[int, bool]:
    """Of a line of blocks: how many, and the default first."""
    count, label = key.split("/")
    return int(count), label != DEFAULT


def speed(lines: dict[str, Record]) -> str:
    rows = []
    for name, title in TITLES.items():
        record = lines.get(f"speed/{name}")
        if record:
            for label in ("dense", "smaller"):
                one = record[label]
                rows.append(
                    [title, label, f"{one['parameters'] / 1e6:.1f} M", f"{one['bytes'] / 1e6:.0f} MB",
                     f"{one['prefill']:.0f}", f"{one['decode']:.1f}"]
                )  # fmt: skip
    if not rows:
        return ""
    head = ("model", "", "parameters", "file", "tokens/s, window of 512", "tokens/s, one by one")
    return (
        "## Size and speed\n\nA quarter of the channels removed, and of the heads two of four (Gemma) or "
        "one group of three (SmolLM2); plain transformers in float32 on the CPU, dense and smaller in turn, "
        "medians of seven:\n\n" + table(head, rows)
    )


def _cell(record: Record | None) -> str:
    if record is None:
        return "–"
    ratio, low, high = record["ratio"]
    return f"{ratio:.3f} ({low:.3f}–{high:.3f})"


def _held(record: Record | None) -> str:
    return "–" if record is None else f"{record['held']:.4f}"

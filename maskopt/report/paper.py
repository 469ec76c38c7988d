"""The tables of the paper, out of the cells that `maskopt.model.table` measured."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

from maskopt.files import atomic_write
from maskopt.model.report import LayerReport
from maskopt.model.table import DENSE, Cell
from maskopt.report.table import Table, number


def perplexity_tables(cells: Sequence[Cell]) -> list[Table]:
    """One a model: methods × patterns."""
    tables = []
    for model, own in _grouped(cells, lambda cell: cell.model).items():
        dense, *pruned = sorted(own, key=lambda cell: cell.method != DENSE)
        by_pattern = _grouped(pruned, lambda cell: cell.pattern)
        figures = dense.perplexity
        table = Table(
            f"Perplexity, {model}",
            ["method", *by_pattern],
            note=f"{figures.windows} windows of {figures.length} tokens from {figures.source}, "
            f"{figures.beginning}.",
        )
        table.add("dense", *[_two_digits(figures.value)] * len(by_pattern))
        for row in zip(*by_pattern.values(), strict=True):
            table.add(row[0].title, *(_two_digits(cell.perplexity.value) for cell in row))
        tables.append(table)
    return tables


def reduction_tables(cells: Sequence[Cell]) -> list[Table]:
    """For every model and pattern, how far errors are below the start's: by kind of layer, and by block."""
    tables = []
    for (model, pattern), own in _grouped(cells, lambda c: (c.model, c.pattern)).items():
        below = [cell for cell in own if cell.reductions(_all)]
        if not below:
            continue
        for what, by in (("layer kind", _kind), ("block", _block)):
            columns = [{**cell.reductions(_all), **cell.reductions(by)} for cell in below]
            table = Table(
                f"Error below the start's in %, by {what}, {model}, {pattern}",
                [what, *(cell.title for cell in below)],
                note="Mean over the layers of 1 − error/error of the start, on the inputs that the "
                "layer sees. The start is Wanda's mask where no other is named.",
            )
            for name in dict.fromkeys(name for column in columns for name in (*column, _all(None))):
                if name != _all(None):
                    table.add(str(name), *(_percent(column.get(name)) for column in columns))
            table.add(_all(None), *(_percent(column[_all(None)]) for column in columns))
            tables.append(table)
    return tables


def write_paper_page(path: Path, cells: Sequence[Cell]) -> None:
    """All tables as one page of Markdown (atomically)."""
    versions = {", ".join(f"{k} {v}" for k, v in cell.versions.items()) for cell in cells}
    parts = [table.markdown() for table in (*perplexity_tables(cells), *reduction_tables(cells))]
    parts.append("Made by `maskopt table` with " + "; and ".join(sorted(versions)) + ".\n")
    with atomic_write(path) as file:
        file.write("\n".join(parts).encode())


def _grouped(cells: Sequence[Cell], by: Callable[[Cell], Hashable]) -> dict[Any, list[Cell]]:
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(by(cell), []).append(cell)
    return groups


def _all(_: LayerReport | None) -> str:
    return "all layers"


def _kind(layer: LayerReport) -> str:
    return layer.kind


def _block(layer: LayerReport) -> int:
    return layer.block


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _two_digits(value: float) -> str:
    """As perplexities are printed; those of broken models shortened."""
    return f"{value:.2f}" if value < 1e4 else number(value)

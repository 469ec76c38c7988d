"""Cells of the tables of docs/results/generalisation.md, each out of a measurement and its study."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from book import Record, family, plain, table

from maskopt.models.evaluation.evaluate import exponential, interval

TITLES = {"gemma3": "Gemma 3 270M", "smollm2": "SmolLM2 135M Instruct"}
Lines = Mapping[str, Record]
Key = tuple[str, ...]
Found = Mapping[Key, Record]
#: a cell out of a measurement's key, the measurement, and all of its study
Column = Callable[[Key, Record, Found], str]
#: of cells, where sparsity may differ → in words
_ALLOCATED = {"none": "uniform", "rows, loss, ± 0.1": "rows, ± 0.1", "layers, loss": "layers"}
#: of cells: what becomes of the weights → masks, weights
_WEIGHTS = {
    "unchanged": "1-swap, kept",
    "least squares": "ADMM, refitted",
    "trained": "ADMM, trained",
}
#: as they come one after the other
_PATTERNS = ("50%", "60%", "70%", "2:4")


def by_model(lines: Lines, study: str, *, best_first: bool = False) -> Found:
    """The measurements of a study by what follows its name: the models one after the other, patterns and
    numbers in their order, other words after these; then as they were measured, or by perplexity."""
    found = {tuple(k.split("/")): v for k, v in family(lines, study + "/").items()}

    def place(item: tuple[Key, Record]) -> tuple[str, list[tuple[float, int]], float]:
        (model, *rest), record = item
        return model, [_rank(word) for word in rest], record["perplexity"] if best_first else 0.0

    return dict(sorted(found.items(), key=place))


def _rank(word: str) -> tuple[float, int]:
    """Of a part of a key: the place of a pattern (few windows first), a number's value, all else last."""
    for place, pattern in enumerate(_PATTERNS):
        if word.startswith(pattern):
            return place, len(word)
    try:
        return float(word), 0
    except ValueError:
        return math.inf, 0


def part(place: int, words: Mapping[str, str] | None = None) -> Column:
    """A part of the key, in other words."""
    return lambda key, record, found: (words or {}).get(key[place], plain(key[place]))


def figure(name: str, form: str = ".4f") -> Column:
    return lambda key, record, found: format(record[name], form)


def reported(name: str) -> Column:
    """An error of the prune's own report; nothing where the weights are others."""
    return lambda key, record, found: f"{record[name]:.4f}" if name in record else ""


def minutes(name: str) -> Column:
    """Of seconds; nothing where they were not taken."""
    return lambda key, record, found: f"{record[name] / 60:.1f}" if name in record else ""


def ratio(key: Key, record: Record, found: Found) -> str:
    middle, low, high = record["ratio"]
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def ratio_to(word: str, place: int = -1) -> Column:
    """Perplexity as a multiple of that of the measurement whose key has this word in that place."""

    def cell(key: Key, record: Record, found: Found) -> str:
        other = list(key)
        other[place] = word
        return paired(record, found.get(tuple(other)))

    return cell


def paired(record: Record | None, base: Record | None) -> str:
    """Perplexity as a multiple of another's, its interval paired by window; nothing if one is missing."""
    if record is None or base is None or base is record:
        return ""
    difference = torch.tensor(record["losses"]) - torch.tensor(base["losses"])
    low, high = interval(difference)
    middle = exponential(float(difference.double().mean()))
    return f"{middle:.3f} ({exponential(low):.3f} to {exponential(high):.3f})"


def crossed(found: Found) -> str:
    """Cells by where sparsity may differ, down, and by the update of the weights, across."""
    lines = dict.fromkeys(key[:3] for key in found if key[2] in _ALLOCATED)
    place = {where: k for k, where in enumerate(_ALLOCATED)}
    rows = []
    for line in sorted(lines, key=lambda k: (k[0], _rank(k[1]), place[k[2]])):
        after = [found.get((*line, weights)) for weights in _WEIGHTS.values()]
        kept, refitted, trained = after
        rows.append(
            [
                *(TITLES[line[0]], line[1], _ALLOCATED[line[2]]),
                *(f"{r['ratio'][0]:.3f}" if r else "" for r in after),
                *(paired(refitted, kept), paired(trained, refitted)),
            ]
        )
    head = ["model", "pattern", "sparsity differs"]
    head += [*_WEIGHTS, "least squares × unchanged", "trained × least squares"]
    return (
        "\nOf these, × dense by where sparsity may differ and by the update of the weights:\n\n"
        + table(head, rows)
    )


def alpha(key: Key, record: Record, found: Found) -> str:
    return f"auto (mean {record['shrink']:.2f})" if key[-1] == "auto" else key[-1]


def divergence(place: int) -> Column:
    """Before training a model as a whole, or after."""
    return lambda key, record, found: format(record["divergence"][place], ".4f")

"""Finished measurements in a file, and what the scripts have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from maskopt import NM, Unstructured
from maskopt.core.pattern import Pattern

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
FIGURES, TABLES = RESULTS / "figures", RESULTS / "tables"
TITLES = {"gemma3": "Gemma 3 270M", "smollm2": "SmolLM2 135M Instruct"}
PATTERNS: dict[str, Pattern] = {
    "50%": Unstructured(sparsity=0.5),
    "60%": Unstructured(sparsity=0.6),
    "2:4": NM(keep=2, of=4),
}
#: rows of a layer share one budget
POOLED: dict[str, Pattern] = {
    "50% per layer": Unstructured(sparsity=0.5, per="layer"),
    "60% per layer": Unstructured(sparsity=0.6, per="layer"),
}
#: what may differ between runs whose measurements are in one file
MAY_DIFFER = ("date", "note", "corpus")

Record = Mapping[str, Any]


class Book:
    """Finished measurements by key, one JSON line each; the line `about` says how they were taken.

    A second run keeps what is there and measures the rest, if it measures in the same way.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[str, Record] = {}
        self._now: Record = {}
        if path.exists():
            for line in path.read_text().splitlines():
                record = json.loads(line)
                self.lines[record.pop("key")] = record

    @property
    def about(self) -> Record:
        return self.lines.get("about", {})

    @property
    def dates(self) -> str:
        """The days on which these measurements were taken."""
        return ", ".join(sorted({x["date"] for x in self.lines.values() if "date" in x}))

    def begin(self, about: Record) -> None:
        """How this run measures; kept with the first measurement."""
        self._now = about

    def measure(self, key: str, make: Callable[[], Record]) -> Record:
        """The measurement of this key, made if it is not there.

        Raises:
            SystemExit: the file's measurements were taken in another way, which would mix the two.
        """
        if key not in self.lines:
            self.check()
            self.put(key, make())
        return self.lines[key]

    def check(self) -> None:
        """Raise SystemExit where this run would measure otherwise than the file says."""
        if apart := self._apart():
            raise SystemExit(f"{self.path} was measured with {apart}: name another place")

    def put(self, key: str, record: Record) -> None:
        """Keep a measurement."""
        if not self.lines:
            self._add("about", self._now)
        if self._now.get("date") != self.about.get("date"):
            record = {"date": self._now["date"], **record}
        self._add(key, record)
        figures = {k: v for k, v in record.items() if isinstance(v, int | float)}
        print(key, figures, flush=True)

    def _apart(self) -> str:
        """In what this run would measure otherwise than the file says; nothing where there is none yet."""
        if not self.lines:
            return ""
        return "; ".join(
            f"{k} {self.about.get(k)} and now {self._now.get(k)}"
            for k in {**self.about, **self._now}
            if k not in MAY_DIFFER and self.about.get(k) != self._now.get(k)
        )

    def _add(self, key: str, record: Record) -> None:
        self.lines[key] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key, **record}) + "\n")

    def __contains__(self, key: str) -> bool:
        return key in self.lines


def family(lines: Mapping[str, Record], prefix: str) -> dict[str, Record]:
    """The measurements of a study, by what follows its prefix."""
    return {k[len(prefix) :]: v for k, v in lines.items() if k.startswith(prefix)}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose source is aligned."""
    lines = [list(head), *map(list, rows)]
    width = [max(3, *(len(line[k]) for line in lines)) for k in range(len(head))]
    text = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, width, strict=True)) + " |"
        for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in width) + "|")
    return "\n".join(text) + "\n"

"""The journal of a run: one line per fact, each with its own digest, flushed before it counts. A last line
that a crash cut off is dropped; any other damage is refused."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskopt.errors import ModelError
from maskopt.models.checkpoints.schema import LAYER, TRAINED, fits, is_count, plain_name

#: shapes of records
_SHAPES = {
    "header": {"header": dict},
    "block": {
        "index": lambda v: is_count(v) and v < 10**5,
        "masks": str,
        "weights?": str,
        "layers": [LAYER],
        "trained?": [TRAINED],
        "bad": [{"sample": int}],
    },
    "shard": {"name": plain_name},
    "progress": {
        "before": lambda v: fits(v, [float]) and len(v) == 2,
        "file": plain_name,
        "digest": str,
        "step": is_count,
        "epoch": is_count,
        "held": float,
    },
}


class Journal:
    """The records of a file, and new ones: the run's fingerprint, finished blocks by index, digests of
    finished shards, and where unfinished training was last saved."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: dict[str, Any] | None = None
        self.blocks: dict[int, dict[str, Any]] = {}
        self.shards: dict[str, str] = {}
        self.progress: dict[str, Any] | None = None
        if path.exists():
            for number, record in enumerate(read_journal(path), start=1):
                self._take(record, number)

    def begin(self, header: dict[str, Any]) -> None:
        """Write the header; ModelError, which names the differences, where there is another one."""
        if self.header is None:
            self._append({"kind": "header", "header": header})
            self.header = header
            return
        lines = differences(self.header, header)
        if lines:
            raise ModelError(
                f"{self.path.parent.parent}: the unfinished run is another one: "
                f"{in_words(lines)}; `overwrite` drops it"
            )

    def add_block(self, index: int, record: dict[str, Any]) -> None:
        self._append({"kind": "block", "index": index, **record})
        self.blocks[index] = record

    def add_shard(self, name: str, digest: str) -> None:
        self._append({"kind": "shard", "name": name, "digest": digest})
        self.shards[name] = digest

    def set_progress(self, record: dict[str, Any]) -> None:
        self._append({"kind": "progress", **record})
        self.progress = record

    def _take(self, record: dict[str, Any], number: int) -> None:
        kind = str(record.get("kind"))
        first = (kind == "header") == (number == 1)
        if not first or kind not in _SHAPES or not fits(record, _SHAPES[kind]):
            raise ModelError(f"{self.path}, line {number}: not a journal of maskopt")
        if kind == "header":
            self.header = record["header"]
        elif kind == "block":
            self.blocks[record["index"]] = record
        elif kind == "shard":
            self.shards[record["name"]] = str(record.get("digest"))
        else:
            self.progress = record

    def _append(self, record: dict[str, Any]) -> None:
        """A record with its digest, in place of a last line that a crash cut off."""
        line = json.dumps({**record, "sha256": _digest(record)}, sort_keys=True) + "\n"
        with open(self.path, "ab") as file:
            complete = self.path.read_bytes().rfind(b"\n") + 1
            if file.tell() != complete:
                file.truncate(complete)
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())


def read_journal(path: Path) -> list[dict[str, Any]]:
    """All complete records; ModelError where it is unreadable, or a line does not match its digest."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    lines = data.split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line.decode("utf-8"))
            digest = record.pop("sha256")
            # other bytes may mean the same: 1E-05, a 17th digit
            same = json.dumps({**record, "sha256": digest}, sort_keys=True).encode() == line
            sound = same and digest == _digest(record)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            sound = False
        if not sound:
            raise ModelError(
                f"{path}, line {number}: the journal is damaged; start over with `overwrite`"
            )
        records.append(record)
    return records


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two JSON values differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted(old.keys() | new.keys())
            for line in differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if old == new else [f"{path} was {old!r}, is {new!r}"]


def in_words(lines: Sequence[str]) -> str:
    """The first differences, and how many more there are."""
    more = f"; and {len(lines) - 5} more" if len(lines) > 5 else ""
    return "; ".join(lines[:5]) + more


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

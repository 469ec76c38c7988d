"""What a prune left in its folder, to be compared."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from maskopt.model.workspace import HIDDEN, MANIFEST


def contents(folder: Path) -> dict[str, bytes]:
    """All files by name; the manifest without seconds, memory and its digest, which covers them."""
    assert not (folder / HIDDEN).exists()
    result = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
    manifest = json.loads(result[MANIFEST])
    for part in (manifest, *manifest["layers"], *manifest["parts"]):
        del part["seconds"]
    del manifest["sha256"], manifest["memory"]
    result[MANIFEST] = json.dumps(manifest, sort_keys=True).encode()
    return result


def check_same(found: Path, expected: Path) -> None:
    """All files byte for byte; figures in the manifest, sums whose order goes with the number of threads, to
    rounding."""
    one, two = contents(found), contents(expected)
    assert one.keys() == two.keys()
    for name, data in one.items():
        if name == MANIFEST:
            assert _close(json.loads(data), json.loads(two[name])), (found, expected)
        else:
            assert data == two[name], (found, name)


def _close(one: Any, two: Any) -> bool:
    if isinstance(one, float) and isinstance(two, float):
        return math.isclose(one, two, rel_tol=1e-9, abs_tol=1e-8)
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_close(one[key], two[key]) for key in one)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(_close, one, two))
    return bool(one == two)

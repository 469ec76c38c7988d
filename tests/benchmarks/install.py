"""What an installation takes: seconds, packages, megabytes; and licence and size of every direct dependency.

    python tests/benchmarks/install.py

Makes a fresh virtual environment for the plain package and for some of its extras, through pip and its cache.
The table of dependencies is of the last one. Prints Markdown.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from machine import machine

ROOT = Path(__file__).parents[2]
SETS = ("", "[demo]", "[demo,test]")
#: in the environment's own Python: name, version, licence and bytes of every package
FACTS = """
import json
from importlib.metadata import distributions
def licence(meta):
    said = meta.get("License-Expression") or meta.get("License") or ""
    kinds = [c.split(" :: ")[-1] for c in meta.get_all("Classifier") or [] if c.startswith("License")]
    return said if said and len(said) < 60 else ", ".join(kinds)
def size(dist):
    files = [dist.locate_file(f) for f in dist.files or []]
    return sum(f.stat().st_size for f in files if f.is_file())
print(json.dumps({d.name.lower().replace("_", "-"): [d.version, licence(d.metadata), size(d)]
                  for d in distributions()}))
"""
#: names of what maskopt asks for, with its extras
DIRECT = """
import json
from importlib.metadata import requires
from packaging.requirements import Requirement
print(json.dumps(sorted({Requirement(text).name.lower() for text in requires("maskopt")})))
"""


def main() -> None:
    print(f"{machine()}, Python {sys.version.split()[0]}\n")
    print("| installed | seconds | packages | MB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="maskopt-install-") as home:
        for extra in SETS:
            python, seconds = installed(Path(home) / f"env{extra}", extra)
            facts = json.loads(asked(python, FACTS))
            total = sum(size for _, _, size in facts.values())
            print(
                f"| `maskopt{extra}` | {seconds:.0f} | {len(facts)} | {total / 1e6:.0f} |",
                flush=True,
            )
        needed = [name for name in json.loads(asked(python, DIRECT)) if name in facts]
    print("\n| package | version | licence | MB |\n|---|---|---|---|")
    for name in needed:
        version, licence, size = facts[name]
        print(f"| {name} | {version} | {licence} | {size / 1e6:.1f} |")


def installed(folder: Path, extra: str) -> tuple[Path, float]:
    """The environment's Python, and seconds of pip."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    began = time.perf_counter()
    subprocess.run([python, "-m", "pip", "install", "-q", f"{ROOT}{extra}"], check=True)
    return python, time.perf_counter() - began


def asked(python: Path, code: str) -> str:
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()

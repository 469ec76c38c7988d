"""kill -9 a prune of Gemma 3 270M at several moments, resume it, compare with an undisturbed run.

python tests/benchmarks/kill_gemma.py --blocks 4 --samples 4 --kills 3
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def command(out: Path, text: Path, arguments: argparse.Namespace, *more: str) -> list[str]:
    from maskopt.model.demo_model import demo_model

    include = [x for i in range(arguments.blocks) for x in ("--include", f"layers.{i}.*")]
    return [
        sys.executable, "-c", "from maskopt.cli import main; main()", "prune", str(demo_model()),
        "--sparsity", "0.5", "--solver", arguments.solver, "--calibration", str(text),
        "--samples", str(arguments.samples), "--seq-len", "512", "--output", str(out),
        *include, *more,
    ]  # fmt: skip


def digests(out: Path) -> dict[str, str]:
    """Of every file; of the manifest without its seconds."""
    result = {}
    for file in sorted(out.iterdir()):
        data = file.read_bytes()
        if file.name == "maskopt-manifest.json":
            manifest = json.loads(data)
            for part in (manifest, *manifest["layers"]):
                del part["seconds"]
            del manifest["sha256"]
            data = json.dumps(manifest, sort_keys=True).encode()
        result[file.name] = hashlib.sha256(data).hexdigest()
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=18)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--solver", default="swap")
    arguments = parser.parse_args()
    from maskopt.model.demo_text import demo_text

    print(platform.platform(), f"{os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory() as work:
        text = Path(work) / "text.txt"
        text.write_text("\n\n".join(demo_text().calibration))
        began = time.perf_counter()
        subprocess.run(
            command(Path(work) / "whole", text, arguments), check=True, capture_output=True
        )
        length = time.perf_counter() - began
        expected = digests(Path(work) / "whole")
        print(f"undisturbed: {length:.1f} s", flush=True)
        for kill in range(arguments.kills):
            out = Path(work) / f"killed{kill}"
            moment = length * (kill + 1) / (arguments.kills + 1)
            child = subprocess.Popen(
                command(out, text, arguments),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            time.sleep(moment)
            running = child.poll() is None
            child.send_signal(signal.SIGKILL)
            child.wait()
            blocks = sorted(p.name for p in out.glob(".maskopt/blocks/*"))
            more = ["--resume"] if (out / ".maskopt").exists() else []
            subprocess.run(command(out, text, arguments, *more), check=True, capture_output=True)
            same = digests(out) == expected
            left = [p.name for p in out.rglob("*") if p.name.startswith(".")]
            print(
                f"killed after {moment:.1f} s (running: {running}, blocks done: {len(blocks)}): "
                f"bit-identical {same}, left behind {left}",
                flush=True,
            )
            if not same or left:
                sys.exit(1)


if __name__ == "__main__":
    main()

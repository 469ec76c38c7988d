"""Prune Gemma 3 270M with 1 and with 2 threads, and killed and resumed: the same bytes each time?

    python tests/benchmarks/kill_gemma.py --samples 2

An undisturbed run for each number of threads; then runs that are killed (kill -9) at moments spread
over the blocks, in the middle of one, and resumed. Every file that comes out is compared with the
first run's, the seconds in the manifest aside, and no temporary file may be left. The exit status is
1 where one differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import machine_now


def start(
    out: Path, text: Path, arguments: argparse.Namespace, threads: int, *more: str
) -> subprocess.Popen[bytes]:
    from maskopt.demo import demo_model

    include = [x for i in range(arguments.blocks) for x in ("--include", f"layers.{i}.*")]
    command = [
        sys.executable, "-c", "from maskopt.cli import main; main()", "prune", str(demo_model()),
        "--sparsity", "0.5", "--solver", arguments.solver, "--start", arguments.start,
        "--calibration", str(text),
        "--samples", str(arguments.samples), "--seq-len", str(arguments.seq_len),
        "--output", str(out), "--threads", str(threads), *include, *more,
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def finish(child: subprocess.Popen[bytes]) -> None:
    if child.wait():
        sys.exit(f"a prune failed with status {child.returncode}")


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


def done_blocks(out: Path) -> int:
    return len(list(out.glob(".maskopt/blocks/*.safetensors")))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=18)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--solver", default="swap")
    parser.add_argument("--start", default="wanda", help="of a solver that takes one")
    arguments = parser.parse_args()
    from maskopt.demo import demo_text

    print(machine_now(), flush=True)
    print(
        f"{arguments.blocks} blocks, {arguments.samples} windows of {arguments.seq_len} tokens, "
        f"{arguments.solver} from {arguments.start}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as work:
        text = Path(work) / "text.txt"
        text.write_text("\n\n".join(demo_text().calibration))
        expected: dict[str, str] = {}
        for threads in arguments.threads:
            out = Path(work) / f"threads{threads}"
            began = time.perf_counter()
            finish(start(out, text, arguments, threads))
            length = time.perf_counter() - began
            found = digests(out)
            expected = expected or found
            differing = sorted(name for name in expected if found.get(name) != expected[name])
            print(
                f"undisturbed, {threads} threads: {length:.1f} s, {len(found)} files, "
                f"bit-identical {found == expected}{differing or ''}",
                flush=True,
            )
            if found != expected:
                sys.exit(1)
            shutil.rmtree(out)
        for kill in range(arguments.kills):
            out = Path(work) / f"killed{kill}"
            wanted = arguments.blocks * (kill + 1) // (arguments.kills + 1)
            began = time.perf_counter()
            child = start(out, text, arguments, threads)
            while child.poll() is None and done_blocks(out) < wanted:
                time.sleep(0.05)
            time.sleep(length / arguments.blocks * (kill + 1) / (arguments.kills + 1))
            moment = time.perf_counter() - began
            if child.poll() is not None:
                sys.exit("the prune ended before it could be killed; try fewer --kills")
            child.send_signal(signal.SIGKILL)
            child.wait()
            blocks = done_blocks(out)
            more = ["--resume"] if (out / ".maskopt").exists() else []
            began = time.perf_counter()
            finish(start(out, text, arguments, threads, *more))
            same = digests(out) == expected
            left = [p.name for p in out.rglob("*") if p.name.startswith(".")]
            print(
                f"killed after {moment:.1f} s ({blocks} blocks done), "
                f"{'resumed' if more else 'begun anew'} in {time.perf_counter() - began:.1f} s: "
                f"bit-identical {same}, left behind {left}",
                flush=True,
            )
            if not same or left:
                sys.exit(1)
            shutil.rmtree(out)


if __name__ == "__main__":
    main()

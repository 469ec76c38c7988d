"""Feed mutated files to the loaders of instances, masks, journals, manifests, indices and shards, and
journals and manifests that were changed in what they say, with right digests.

    PYTHONPATH=tests:tests/model/checkpoints python tests/benchmarks/fuzz_loaders.py --inputs 100000

Anything but a clear error or a sound result, and any file outside the work folder, ends it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from test_model_safety import examples, hostile, try_loaders
from tiny_models import save, tiny, tokens

from maskopt.models.pruning.prune import prune_model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=10**6)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        model = save(tiny("llama"), home / "model", shard="30KB")
        prune_model(
            model, tokens(), sparsity=0.5, solver="wanda", min_tokens=1, output=home / "out"
        )
        work = home / "work"
        work.mkdir()
        sound = examples(home / "out", work)
        before = sorted(path for path in home.rglob("*") if work not in path.parents)
        began, count, slowest = time.perf_counter(), 0, 0.0
        while count < arguments.inputs:
            for kind, data in sound.items():
                start = time.perf_counter()
                seed = arguments.seed + count
                try:
                    try_loaders(kind, hostile(kind, data, seed), work)
                except BaseException:
                    print(f"kind {kind}, seed {seed}")
                    raise
                slowest = max(slowest, time.perf_counter() - start)
                count += 1
        after = sorted(path for path in home.rglob("*") if work not in path.parents)
        assert before == after, "a file appeared outside the work folder"
        seconds = time.perf_counter() - began
        print(f"{count} inputs in {seconds:.0f} s, slowest {slowest:.2f} s: nothing found")


if __name__ == "__main__":
    main()

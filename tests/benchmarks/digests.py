"""Do two versions of the code give the same masks, bit for bit?

    export PYTHONPATH=tests
    python tests/benchmarks/digests.py write before.json              # on the one version
    python tests/benchmarks/digests.py compare before.json            # on the other
    python tests/benchmarks/digests.py write before.json layer.npz …  # saved layers as well

A digest is the SHA-256 of masks, objectives (float64) and statuses: of every solver on 30 random layers
under two patterns, of the given layers, and of a whole pruned tiny model of every family.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from strategies import KINDS, random_gram, random_weight

from maskopt import NM, LayerProblem, Solution, Unstructured, load_problem, solve
from maskopt.errors import MaskoptError
from maskopt.models.pruning.prune import prune_model

SIZES = (4, 8, 12, 16, 12)
#: solver → options that keep a run short
HEURISTIC: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "wanda": {},
    "ria": {},
    "random": {"seed": 3},
    "worst": {},
    "elimination": {},
    "sparsegpt": {},
    "dsnot": {},
    "frank_wolfe": {"iterations": 200},
    "swap": {},
    "relax": {},
    "sdp": {"sweeps": 300},
    "tabu": {"moves": 300},
}
#: all rows in this process, since starting others takes longer than the rows
EXACT: dict[str, dict[str, Any]] = {
    "exhaustive": {},
    "branch": {"workers": 0},
    "scip": {"workers": 0},
    "gurobi": {"workers": 0},
    "highs": {"workers": 0},
}
#: inputs that an exact solver gets of a given layer, and rows of it
COLUMNS, ROWS = 24, 2
#: rows of a given layer for solvers that take seconds a row
SLOW = {"sdp": 2, "frank_wolfe": 16, "elimination": 16}


def random_layers() -> Iterator[tuple[str, LayerProblem]]:
    for number in range(30):
        n, kind = SIZES[number % len(SIZES)], KINDS[number % len(KINDS)]
        dtype = torch.float64 if number % 3 else torch.float32
        gram = random_gram(n, kind, number, dtype)
        mean = torch.linspace(-1, 1, n, dtype=dtype) * gram.diagonal().sqrt() / 2
        for pattern in (Unstructured(sparsity=0.5), NM(keep=2, of=4)):
            weight = random_weight(3, n, number + 1, dtype)
            yield (
                f"{number} {kind} {n} {pattern}",
                LayerProblem(weight, gram, pattern, moments=mean),
            )


def given_layers(paths: list[Path]) -> Iterator[tuple[str, LayerProblem]]:
    for path in paths:
        layer = load_problem(path).as_layer()
        for pattern in (Unstructured(sparsity=0.5), NM(keep=2, of=4)):
            yield f"{path.stem} {pattern}", layer.under(pattern)


def digest(solution: Solution) -> str:
    sha = hashlib.sha256(solution.mask.cpu().numpy().tobytes())
    sha.update(solution.objective.cpu().numpy().tobytes())
    sha.update(",".join(map(str, solution.status)).encode())
    return sha.hexdigest()[:16]


def solved(problem: LayerProblem, solver: str, options: dict[str, Any]) -> str:
    try:
        return digest(solve(problem, solver, **options))
    except MaskoptError as error:
        return f"{type(error).__name__}"


def all_digests(paths: list[Path]) -> Iterator[tuple[str, str]]:
    for name, problem in random_layers():
        for solver, options in (HEURISTIC | EXACT).items():
            yield f"random {name} {solver}", solved(problem, solver, options)
    for name, problem in given_layers(paths):
        for solver, options in HEURISTIC.items():
            part = problem.take(slice(0, SLOW.get(solver, problem.rows)))
            yield f"layer {name} {solver}", solved(part, solver, options)
        for row in range(ROWS):
            inputs = torch.linspace(0, problem.n - 1, COLUMNS).long().numpy()
            small = problem.row(row).restrict(inputs, problem.pattern).as_layer()
            for solver, options in EXACT.items():
                yield f"layer {name} row {row} {solver}", solved(small, solver, options)
    from tiny_models import FAMILIES, tiny, tokens

    for family in FAMILIES:
        for how in ({"sparsity": 0.5}, {"sparsity": "2:4", "solver": "wanda"}):
            sha = hashlib.sha256()
            try:
                report = prune_model(tiny(family), tokens(), min_tokens=1, **how)
            except MaskoptError as error:
                yield f"model {family} {sorted(how)}", type(error).__name__
                continue
            for name, mask in report.masks.items():
                sha.update(name.encode() + mask.numpy().tobytes())
            yield f"model {family} {sorted(how)}", sha.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("write", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("layers", type=Path, nargs="*")
    arguments = parser.parse_args()
    began = time.perf_counter()
    found = dict(all_digests(arguments.layers))
    print(f"{len(found)} digests in {time.perf_counter() - began:.0f} s")
    if arguments.what == "write":
        arguments.file.write_text(json.dumps(found, indent=0))
        return
    before = json.loads(arguments.file.read_text())
    differing = [name for name in before if before[name] != found.get(name)]
    for name in differing:
        print(f"differs: {name}: {before[name]}, now {found.get(name)}")
    print(f"{len(before) - len(differing)} of {len(before)} equal")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()

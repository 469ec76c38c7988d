"""Densest k-subgraphs proven optimal by `branch`, each proof checked: graphs.csv of the results.

    python tests/benchmarks/graphs.py FOLDER --vertices 40 80 100 --time-limit 60

FOLDER holds instances of the k-cluster library, `kclusterN_DENSITY_K_SEED.dat`, and may hold `optima.csv`
(instance, edges), which every answer is held against. One row at a time, in this process.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import time
from pathlib import Path
from typing import NamedTuple

from machine import machine

from maskopt import RowProblem, Status, load_problem, solve, verify
from maskopt.certificates.proof import check_proof

_NAME = re.compile(r"kcluster(\d+)_(\d+)_(\d+)_(\d+)")


class Measured(NamedTuple):
    """A search and its proof: edges found, and edges that no cluster has more of; seconds; megabytes."""

    proven: bool
    edges: float
    bound: float
    seconds: float
    nodes: int
    checking: float
    megabytes: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vertices", type=int, nargs="+", default=[40, 80, 100])
    parser.add_argument("--seeds", type=int, nargs="*", help="of the instances; all by default")
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds an instance")
    parser.add_argument("--threads", type=int, help="of a search; all by default")
    parser.add_argument("--each", action="store_true", help="a line for every instance")
    args = parser.parse_args()
    known = optima(args.folder / "optima.csv")
    warm(args.folder)
    print(machine())
    print("| vertices | proven | median | worst | nodes | worst | check | of the search | proof |")
    print("|---|---|---|---|---|---|---|---|---|")
    for n in args.vertices:
        found = []
        for path in sorted(args.folder.glob(f"kcluster{n}_*.dat")):
            match = _NAME.match(path.stem)
            if match and (not args.seeds or int(match[4]) in args.seeds):
                found.append(measure(path, known.get(path.stem), args.time_limit, args.threads))
                if args.each:
                    print(path.stem, found[-1], flush=True)
        if found:
            print(line(n, found), flush=True)


def optima(path: Path) -> dict[str, float]:
    """Published numbers of edges; none where there is no such file."""
    if not path.is_file():
        return {}
    with path.open() as file:
        return {row["instance"]: float(row["edges"]) for row in csv.DictReader(file)}


def warm(folder: Path) -> None:
    """Compile what is compiled on first use."""
    for path in sorted(folder.glob("kcluster40_*.dat"))[:1]:
        solve(load_problem(path), "branch", proof=True, workers=0)


def measure(path: Path, edges: float | None, limit: float, threads: int | None) -> Measured:
    """Solve and check; what is published is held against it."""
    problem = load_problem(path)
    assert isinstance(problem, RowProblem)
    solution = solve(problem, "branch", proof=True, workers=0, time_limit=limit, threads=threads)
    assert solution.proof is not None
    began = time.perf_counter()
    check_proof(problem, solution.proof)
    checking = time.perf_counter() - began
    verify(problem, solution, require="checked")
    proven = solution.status[0] is Status.OPTIMAL
    value = problem.value(float(solution.objective[0]))
    if edges is not None and (value > edges or (proven and value != edges)):
        raise SystemExit(f"{path.stem}: {value} edges, published {edges}")
    bound = problem.value(float(solution.lower_bound[0]))
    nodes = int(solution.trace.columns(1)["nodes"][0])
    megabytes = sum(tree.nbytes for tree in solution.proof if tree is not None) / 1e6
    return Measured(proven, value, bound, solution.seconds, nodes, checking, megabytes)


def line(n: int, found: list[Measured]) -> str:
    seconds = [f.seconds for f in found]
    nodes, share = [f.nodes for f in found], [f.checking / f.seconds for f in found]
    return (
        f"| {n} | {sum(f.proven for f in found)} of {len(found)} | {statistics.median(seconds):.2f} s "
        f"| {max(seconds):.1f} s | {statistics.median(nodes):.0f} | {max(nodes)} "
        f"| {max(f.checking for f in found):.2f} s at most | {max(share):.0%} at most "
        f"| {max(f.megabytes for f in found):.2g} MB at most |"
    )


if __name__ == "__main__":
    main()

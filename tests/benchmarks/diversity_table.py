"""Maximum diversity after the recipes of MDPLIB: searches, bounds, Gurobi: diversity.csv.

    python tests/benchmarks/diversity_table.py --sizes 100 200 300 500 --time-limit 60

One tenth of the elements is chosen (m = n/10), one instance of each recipe and size. Values are in the units
of the distances; the gap is bound/value − 1. Gurobi has the same time, where its licence takes the size.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from machine import machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from diversity import RECIPES, diversity

from maskopt import RowProblem, Solution, lower_bound, solve, verify
from maskopt.errors import SolverError, SolverUnavailableError

#: of tabu search
MOVES = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 200, 300, 500])
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds of each method")
    parser.add_argument("--cuts", type=int, default=16, help="rounds of triangle inequalities")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    solve(diversity("GKD", 20, 5, 0), "tabu")  # compile what is compiled on first use
    print(machine())
    print("| instance | tabu | s | memetic | s | bound | s | gap | Gurobi | its bound | s |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for recipe in RECIPES:
        for n in args.sizes:
            print(line(diversity(recipe, n, n // 10, args.seed), args), flush=True)


def line(problem: RowProblem, args: argparse.Namespace) -> str:
    found = [
        solve(problem, "tabu", moves=MOVES),
        solve(problem, "memetic", time_limit=args.time_limit),
    ]
    began = time.perf_counter()
    bound = lower_bound(problem, "sdp", cuts=args.cuts, time_limit=args.time_limit)
    seconds = time.perf_counter() - began
    for solution in found:
        verify(problem, solution)
    values = [problem.value(float(s.objective[0])) for s in found]
    above = problem.value(float(bound.value[0]))
    searched = " | ".join(f"{v:.1f} | {s.seconds:.1f}" for v, s in zip(values, found, strict=True))
    return (
        f"| {problem.name.split(',')[0]} | {searched} | {above:.1f} | {seconds:.0f} "
        f"| {above / max(values) - 1:.2%} | {other(problem, args.time_limit)} |"
    )


def other(problem: RowProblem, limit: float) -> str:
    """Gurobi's value, bound and seconds, or why there are none."""
    try:
        solution: Solution = solve(problem, "gurobi", time_limit=limit)
    except SolverUnavailableError:
        return "not installed | |"
    except SolverError:
        return "beyond this licence | |"
    value, bound = solution.objective[0], solution.lower_bound[0]
    return (
        f"{problem.value(float(value)):.1f} | {problem.value(float(bound)):.1f} "
        f"| {solution.seconds:.0f}"
    )


if __name__ == "__main__":
    main()

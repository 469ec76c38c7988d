"""The figures of exact.csv, bounds.csv and certified_gaps.csv: real rows, every solver, every bound.

    python tests/benchmarks/exact_table.py collect 5.q.npz 10.gate.npz 17.down.npz [--text valid.txt]
    python tests/benchmarks/exact_table.py table LAYER.npz … [--only branch,scip] [--sizes 64,96]
    python tests/benchmarks/exact_table.py PART LAYER.npz … [--rows 3] [--seconds 60] [--n 64]

`collect` writes layers of the demo model (block, then q, o, gate or down), their inputs 32 windows of 512
tokens of --text, by default the demo's, which begin as --bos says; other layers come from
`LayerProblem.save`. `table` runs PLAN, the whole comparison of exact solvers, and prints it as Markdown;
--only and --sizes take a part of it, where no single run may last for hours. PART is one of

- `branch`, `scip`, `gurobi`, `highs`, and SCIP's other formulations `factored` and `linear`:
  rows restricted to --n random inputs, --rows of each layer;
- `bounds`: box, sdp and sdp with --cuts rounds on full rows, those of a layer together, gaps of 1-swap from
  Wanda and of the mask of `memetic` after --generations;
- `small`: the sdp bound, plain and with --cuts rounds, beside the proven optimum;
- `layer`: box and sdp of all rows of the first instance;
- `penalty`: the sdp bound by --penalties and --sweeps.

Solvers run on one thread. It prints one line a row, the medians, and the machine.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_layers import collect, name_of
from machine import machine_now

from maskopt import LayerProblem, RowProblem, Status, lower_bound, solve
from maskopt.core.pattern import parse_sparsity
from maskopt.experiments.compare import draw_rows, sample_rows
from maskopt.instances.formats import load_problem
from maskopt.models.checkpoints.bos import BOS
from maskopt.protocol.trace import Trace
from maskopt.solvers.convex.mixing import Mixing, ScaledRow, certify_row, default_rank, penalty_of
from maskopt.solvers.exact.tasks import tabu_row


def warm_up() -> None:
    """Compile before the clock runs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=generator, dtype=torch.float64)
    tiny = LayerProblem(x[:2, :16], x.T @ x, parse_sparsity("0.6"))
    solve(tiny.row(0), "branch")
    solve(tiny.row(0), "memetic")
    single = LayerProblem(x[:1].float(), (x.T @ x).float(), parse_sparsity("0.6"))
    for method in ("box", "sdp"):
        lower_bound(single, method)
        lower_bound(tiny, method)
    big = torch.randn(600, 300, generator=generator)
    lower_bound(LayerProblem(big[:1], big.T @ big, parse_sparsity("0.6")), "sdp", sweeps=2)


def searched(row: RowProblem, mask: torch.Tensor, moves: int) -> torch.Tensor:
    """Tabu search from a mask; kept small where n is large."""
    moves = min(moves, 2_000_000_000 // row.n**2)
    pruned = tabu_row(row.q().numpy(), (~mask).numpy(), row.as_layer().group_size, moves=moves)
    return torch.from_numpy(~pruned)


#: part, sizes, pattern, rows of each layer, seconds a row
PLAN = (
    ("branch", (32, 64, 96, 128, 192), "0.6", 3, 600.0),
    ("branch", (64, 128), "2:4", 3, 600.0),
    ("scip", (32, 64), "0.6", 3, 60.0),
    ("scip", (96, 128), "0.6", 1, 120.0),
    ("factored", (32, 64, 128), "0.6", 1, 20.0),
    ("linear", (32, 64, 128), "0.6", 1, 20.0),
    ("gurobi", (32, 64, 128), "0.6", 1, 20.0),
    ("highs", (32, 64, 128), "0.6", 1, 20.0),
)
SCIP_FORMULATIONS = {"scip": "qcr", "factored": "factored", "linear": "linear"}


def exact(
    part: str,
    layers: list[LayerProblem],
    *,
    n: int,
    pattern: str,
    rows: int,
    seconds: float,
    gap_limit: float,
    seed: int,
) -> str:
    """One line of the table; prints a line a row."""
    name = "scip" if part in SCIP_FORMULATIONS else part
    options: dict[str, Any] = {"formulation": SCIP_FORMULATIONS[part]} if name == "scip" else {}
    spent, cpu, gaps, nodes, roots, proven = [], [], [], [], [], 0
    for row in sample_rows(layers, rows, columns=n, pattern=parse_sparsity(pattern), seed=seed):
        start = searched(row, solve(row, "elimination").mask[0], 3000)
        began = time.process_time()
        solution = solve(row, name, start=start, time_limit=seconds, gap_limit=gap_limit, **options)
        cpu.append(time.process_time() - began)
        trace = solution.trace
        spent.append(solution.seconds)
        gaps.append(solution.gap)
        nodes.append(int(trace.nodes[0]))
        roots.append(1 - float(trace.root_bound[0]) / float(solution.objective[0]))
        proven += solution.status[0] == Status.OPTIMAL
        print(
            f"{part} {row.name} n={row.n} {row.pattern}: {trace.ended[0]}, "
            f"{spent[-1]:.2f} s ({cpu[-1]:.2f} s CPU), {nodes[-1]} nodes, root gap "
            f"{roots[-1]:.2%}, gap {gaps[-1]:.3%}",
            flush=True,
        )
    # gurobi and highs report no root bound
    root = f"{np.median(roots):.1%}" if name in ("scip", "branch") else "–"
    return (
        f"| {part} | {n} | {pattern} | {proven} of {len(spent)} | {np.median(spent):.2f} s | "
        f"{max(spent):.2f} s | {np.median(nodes):.0f} | {max(nodes)} | {root} | "
        f"{np.median(gaps):.2%} | {max(gaps):.2%} |"
    )


def table(layers: list[LayerProblem], args: argparse.Namespace) -> None:
    only = args.only.split(",") if args.only else None
    sizes = [int(n) for n in args.sizes.split(",")] if args.sizes else None
    lines = []
    for part, every, pattern, rows, seconds in PLAN:
        for n in every:
            if (only is None or part in only) and (sizes is None or n in sizes):
                limits = {"rows": rows, "seconds": seconds, "gap_limit": 0.0, "seed": args.seed}
                lines.append(exact(part, layers, n=n, pattern=pattern, **limits))
    print(
        "| | n | pattern | proven | median | worst | nodes, median | worst | root gap | gap, median | worst |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))


def bounds(layers: list[LayerProblem], args: argparse.Namespace) -> None:
    """The drawn rows of a layer are one problem: they share the cores, and the time is that of them all."""
    spent, gaps, pattern = [], [], parse_sparsity(args.pattern)
    for position, whole in enumerate(layers):
        drawn = draw_rows(whole, args.rows, None, seed=[args.seed, position])
        chosen = [index for index, _ in drawn]
        layer = LayerProblem(whole.weight[chosen], whole.gram, pattern)
        wanda, swap = (solve(layer, name).objective for name in ("wanda", "swap"))
        found = solve(layer, "memetic", generations=args.generations)
        each = found.seconds / layer.rows
        parts = [[f"{whole.name}[{index}] n={layer.n}, best mask {each:.2f} s"] for index in chosen]
        for method in args.methods.split(","):
            options: dict[str, Any] = {"cuts": args.cuts} if method == "cuts" else {}
            limit = None if args.bound_seconds is None else args.bound_seconds * layer.rows
            name = "sdp" if method == "cuts" else method
            bound = lower_bound(layer, name, time_limit=limit, **options)
            each, gap = bound.seconds / layer.rows, 1 - bound.value / found.objective
            for row, told in enumerate(parts):
                value = bound.value[row]
                told.append(
                    f"{method} {each:.2f} s, gaps: Wanda {float(1 - value / wanda[row]):.1%}, "
                    f"1-swap {float(1 - value / swap[row]):.1%}, best {float(gap[row]):.1%}"
                )
                told += traced(method, bound.trace, row)
        print("\n".join("; ".join(told) for told in parts), flush=True)
        spent.append(each)
        gaps += gap.tolist()
    print(
        f"{method}: {len(gaps)} rows, gap of the best mask median {np.median(gaps):.1%}, worst "
        f"{max(gaps):.1%}; {np.median(spent):.2f} s a row, worst layer {max(spent):.2f} s"
    )


def traced(method: str, trace: Trace, row: int) -> list[str]:
    """What the bound says of its own work."""
    if method == "sdp":
        assert trace.iterations is not None
        assert trace.correction is not None
        correction = float(trace.correction[row])
        return [f"{int(trace.iterations[row])} sweeps, correction {correction:.2%}"]
    if method == "cuts":
        assert trace.cuts is not None
        return [f"{int(trace.cuts[row])} cuts"]
    return []


def small(layers: list[LayerProblem], args: argparse.Namespace) -> None:
    options: dict[str, dict[str, Any]] = {"sdp": {}, "sdp with cuts": {"cuts": args.cuts}}
    below: dict[str, list[float]] = {name: [] for name in options}
    for row in sample_rows(
        layers, args.rows, columns=args.n, pattern=parse_sparsity(args.pattern), seed=args.seed
    ):
        optimum = solve(row, "branch", time_limit=args.seconds)
        for name, chosen in options.items():
            bound = lower_bound(row, "sdp", **chosen)
            below[name].append(1 - float(bound.value[0]) / float(optimum.objective[0]))
        parts = ", ".join(f"{name} {gaps[-1]:.2%} below" for name, gaps in below.items())
        print(f"{row.name} {optimum.status[0]}: {parts}", flush=True)
    for name, gaps in below.items():
        print(f"{name}, n={args.n}: median {np.median(gaps):.2%}, worst {max(gaps):.2%}")


def penalty(layers: list[LayerProblem], args: argparse.Namespace) -> None:
    """Bound and correction after so many sweeps from the same start, for each ρ."""
    rows = sample_rows(layers, args.rows, pattern=parse_sparsity(args.pattern), seed=args.seed)
    for row in rows:
        problem = row.as_layer()
        default = penalty_of(problem.group_size)
        print(f"{row.name} n={row.n} {row.pattern}: ρ is {default:.3g} by default")
        for times in map(float, args.penalties.split(",")):
            rho, done, parts = times * default, 0, []
            state = Mixing(problem, default_rank(row.n), args.seed)
            scale = float(state.scale[0])
            scaled = ScaledRow.of(problem, problem.gram.double().numpy(), 0, scale)
            for sweeps in map(int, args.sweeps.split(",")):
                state.sweep(sweeps - done, rho)
                done, y = sweeps, state.duals[0].double().numpy()
                found = certify_row(scaled, y, state.inner()[0], rho)
                parts.append(f"{found.value / scale:.5g} (−{found.loss / found.value:.2%})")
            print(f"  × {times:g}, after {args.sweeps} sweeps: {', '.join(parts)}", flush=True)


def collect_layers(args: argparse.Namespace) -> None:
    files = {name_of(Path(file).stem): file for file in args.instances}
    for name, problem in collect(args, list(files), 0.6, args.text):
        problem.save(files[name])
        print(f"{files[name]}: {problem.rows} rows of {problem.n} inputs")


def layer(layers: list[LayerProblem], args: argparse.Namespace) -> None:
    problem = layers[0]
    for method in args.methods.split(","):
        began = time.perf_counter()
        bound = lower_bound(problem, method)
        print(
            f"{method}: {problem.rows} rows, n={problem.n}: {time.perf_counter() - began:.1f} s, "
            f"least bound {float(bound.value.min()):.4g}, {int((bound.value > 0).sum())} positive",
            flush=True,
        )
        if method == "sdp":
            assert bound.trace.correction is not None
            assert bound.trace.iterations is not None
            swap = bound.gap(solve(problem, "swap").objective)
            print(
                f"  worst correction {float(bound.trace.correction.max()):.2%}, at most "
                f"{int(bound.trace.iterations.max())} sweeps; 1-swap gap median {float(swap.median()):.1%}, "
                f"worst {float(swap.max()):.1%}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part")
    parser.add_argument("instances", nargs="+")
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--pattern", default="0.6")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", default="box,sdp")
    parser.add_argument("--cuts", type=int, default=8, help="rounds of method cuts")
    parser.add_argument(
        "--bound-seconds", type=float, help="of one bound, a row; default: no limit"
    )
    parser.add_argument("--generations", type=int, default=300, help="of memetic search")
    parser.add_argument("--gap-limit", type=float, default=0.0)
    parser.add_argument(
        "--penalties", default="1,4,16", help="of penalty: multiples of the default"
    )
    parser.add_argument("--sweeps", default="400,1200,2700", help="of penalty")
    parser.add_argument("--text", help="of collect: calibration text; default: the demo's")
    parser.add_argument("--samples", type=int, default=32, help="of collect: windows")
    parser.add_argument("--bos", choices=BOS, default="auto", help="of collect: their beginning")
    parser.add_argument("--only", help="of the table: parts, separated by commas")
    parser.add_argument("--sizes", help="of the table: n, separated by commas")
    args = parser.parse_args()
    if args.part == "collect":
        collect_layers(args)
        return
    layers = [load_problem(path).as_layer() for path in args.instances]
    warm_up()
    parts = {"table": table, "bounds": bounds, "small": small, "layer": layer, "penalty": penalty}
    if args.part in parts:
        parts[args.part](layers, args)
    else:
        print(
            exact(
                args.part,
                layers,
                n=args.n,
                pattern=args.pattern,
                rows=args.rows,
                seconds=args.seconds,
                gap_limit=args.gap_limit,
                seed=args.seed,
            )
        )
    print(machine_now())


if __name__ == "__main__":
    main()

"""How good are the masks? Writes docs/quality.md and its plot.

    python tests/benchmarks/quality.py            # everything, on Gemma 3 270M (extra `demo`)
    python tests/benchmarks/quality.py --rows 4 --only masks starts

Every finished measurement is a line of a JSONL file beside the figures' source (`--data`); a second run
keeps what is there and measures the rest, so that the studies can be run one at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from maskopt import NM, LayerProblem, Unstructured, collect_problems, lower_bound, solve
from maskopt.model.demo_model import cache_directory, demo_model
from maskopt.model.demo_text import demo_text
from maskopt.pattern import Pattern

ROOT = Path(__file__).parents[2]
PATTERNS: dict[str, Pattern] = {
    "50%": Unstructured(sparsity=0.5),
    "60%": Unstructured(sparsity=0.6),
    "2:4": NM(keep=2, of=4),
}
#: layers of the comparison of masks
LAYERS = ("0.q", "0.o", "2.gate", "2.down", "4.q", "4.o")
KINDS = {
    "q": "self_attn.q_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "down": "mlp.down_proj",
}
#: all layers of the design's table
SIXTEEN = tuple(f"{block}.{kind}" for block in (0, 5, 10, 17) for kind in KINDS)
STEPS = (1, 2, 5, 10, 25, 50, 100)
#: label → solver, warm start, options
METHODS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "magnitude": ("magnitude", None, {}),
    "Wanda": ("wanda", None, {}),
    "RIA": ("ria", None, {}),
    "SparseGPT mask": ("sparsegpt", None, {}),
    "DSnoT": ("dsnot", "wanda", {}),
    "Frank–Wolfe (2000)": ("frank_wolfe", "wanda", {}),
    **{f"1-swap, T = {t}": ("swap", "wanda", {"max_swaps": t}) for t in STEPS},
    "1-swap, T = ∞": ("swap", "wanda", {}),
    "k-swap": ("kswap", "swap", {}),
    "tabu 1000, from 1-swap": ("tabu", "swap", {}),
    "relax": ("relax", None, {}),
    "relax, not hardened": ("relax", None, {"harden": 0}),
    "tabu 1000, from relax": ("tabu", "relax", {}),
    "tabu 10000, from relax": ("tabu", "relax", {"moves": 10000}),
    "portfolio": ("portfolio", None, {}),
    "sdp, rounded": ("sdp", None, {}),
}
STARTS = ("random", "worst", "magnitude", "wanda", "ria", "sparsegpt", "relax", "sdp")
#: what costs seconds a row runs on fewer rows
FEW = 2
#: left out by --cheap, for a first look
SLOW = ("sdp", "frank_wolfe")


class Book:
    """Finished measurements, one JSON line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                record = json.loads(line)
                self.lines[record["key"]] = record

    def measure(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in self.lines:
            record = {"key": key, **make()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            self.lines[key] = record
            print(key, {k: v for k, v in record.items() if isinstance(v, int | float)}, flush=True)
        return self.lines[key]

    def get(self, *parts: Any) -> dict[str, Any] | None:
        return self.lines.get("/".join(map(str, parts)))


def name_of(layer: str) -> str:
    block, kind = layer.split(".")
    return f"model.layers.{block}.{KINDS[kind]}"


def problems(
    layers: tuple[str, ...], samples: int, seed: int
) -> Iterator[tuple[str, LayerProblem]]:
    """The problems of the demo model on the demo's calibration text, 60%."""
    names = {name_of(layer): layer for layer in layers}
    for name, problem in collect_problems(
        demo_model(),
        layers=list(names),
        sparsity=0.6,
        calibration=demo_text().calibration,
        samples=samples,
        seq_len=512,
        seed=seed,
        device="cpu",
    ):
        yield names[name], problem


def sample(problem: LayerProblem, rows: int, seed: int) -> LayerProblem:
    """Some rows, chosen by seed; a prefix of a larger sample is the smaller one."""
    order = torch.randperm(problem.rows, generator=torch.Generator().manual_seed(seed))
    return problem.take(order[:rows].tolist())


def with_pattern(problem: LayerProblem, pattern: Pattern) -> LayerProblem:
    return LayerProblem(
        problem.weight,
        problem.gram,
        pattern,
        name=problem.name,
        mean=problem.mean,
        assume_psd=True,
    )


def ratio(objective: torch.Tensor, base: torch.Tensor) -> list[float]:
    return (objective / base).tolist()


# ------------------------------------------------------------------------------------------------
# studies: each yields nothing and fills the book


def masks(book: Book, args: argparse.Namespace) -> None:
    """Every method on every layer and pattern."""
    for layer, whole in loaded(args, LAYERS):
        rows = sample(whole, args.rows, args.seed)
        for label, pattern in PATTERNS.items():
            problem = with_pattern(rows, pattern)
            base = solve(problem, "wanda").objective
            for method, (solver, start, options) in METHODS.items():
                few = solver == "sdp"
                if few and (label != "60%" or problem.n > 1024):
                    continue
                if args.cheap and (solver in SLOW or options.get("moves", 0) > 1000):
                    continue
                part = problem.take(slice(0, FEW)) if few else problem

                def run(
                    part: LayerProblem = part,
                    solver: str = solver,
                    start: str | None = start,
                    options: dict[str, Any] = options,
                    base: torch.Tensor = base,
                ) -> dict[str, Any]:
                    answer = solve(part, solver, warm_start=start, **options)
                    trace = answer.trace
                    swaps = trace.get("swaps")
                    return {
                        "rows": part.rows,
                        "error": ratio(answer.objective, base[: part.rows]),
                        "seconds_per_row": answer.seconds / part.rows,
                        "swaps": float(torch.as_tensor(swaps).double().mean())
                        if swaps is not None
                        else None,
                    }

                book.measure(f"masks/{label}/{layer}/{method}", run)


def starts(book: Book, args: argparse.Namespace) -> None:
    """Where 1-swap search ends, by where it starts."""
    for layer, whole in loaded(args, LAYERS):
        problem = sample(whole, args.rows, args.seed)
        base = solve(problem, "wanda").objective
        for start in STARTS:
            if start == "sdp" and (problem.n > 1024 or args.cheap):
                continue
            part = problem.take(slice(0, FEW)) if start == "sdp" else problem

            def run(
                part: LayerProblem = part, start: str = start, base: torch.Tensor = base
            ) -> dict[str, Any]:
                raw = {"refine": False} if start in ("relax", "sdp") else {}
                begun = solve(part, start, **raw)
                end = solve(part, "swap", warm_start=begun.mask)
                return {
                    "rows": part.rows,
                    "start": ratio(begun.objective, base[: part.rows]),
                    "error": ratio(end.objective, base[: part.rows]),
                    "swaps": float(torch.as_tensor(end.trace["swaps"]).double().mean()),
                }

            book.measure(f"starts/{layer}/{start}", run)


def interaction(book: Book, args: argparse.Namespace) -> None:
    """1-swap search that is blind to −2 w_u w_p G_up."""
    for layer, whole in loaded(args, LAYERS):
        problem = sample(whole, args.rows, args.seed)

        def run(problem: LayerProblem = problem) -> dict[str, Any]:
            start = solve(problem, "wanda")
            last, best, made = blind_swaps(problem, start.mask, 200)
            full = solve(problem, "swap", warm_start="wanda").objective
            return {
                "error": ratio(last, start.objective),
                "best": ratio(best, start.objective),
                "full": ratio(full, start.objective),
                "swaps": made,
            }

        book.measure(f"interaction/{layer}", run)


def blind_swaps(
    problem: LayerProblem, mask: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Exchange argmin a and argmin b while a + b < 0, as if the interaction were zero.

    Returns the objectives at the end, the least ones on the way, and swaps a row.
    """
    w, gram = problem.weight.double(), problem.gram.double()
    kept, lines = mask.clone(), torch.arange(problem.rows)
    active = torch.ones(problem.rows, dtype=torch.bool)
    best, made = problem.objective(kept), 0
    for _ in range(most):
        c = torch.where(kept, 0.0, w) @ gram
        square, linear = w.square() * gram.diagonal(), 2 * w * c
        a = torch.where(kept, square + linear, torch.inf)
        b = torch.where(kept, torch.inf, square - linear)
        u, p = a.argmin(1), b.argmin(1)
        active &= a[lines, u] + b[lines, p] < 0
        if not bool(active.any()):
            break
        kept[lines[active], u[active]] = False
        kept[lines[active], p[active]] = True
        made += int(active.sum())
        best = best.minimum(problem.objective(kept))
    return problem.objective(kept), best, made / problem.rows


def gaps(book: Book, args: argparse.Namespace) -> None:
    """The best mask known of full rows, beside the certified bound."""
    for layer, whole in loaded(args, LAYERS):
        problem = sample(whole, 2, args.seed)

        def run(problem: LayerProblem = problem) -> dict[str, Any]:
            began = time.perf_counter()
            bound = lower_bound(problem, "sdp", time_limit=args.bound_seconds)
            seconds = time.perf_counter() - began
            swap = solve(problem, "swap", warm_start="wanda")
            ends = {}
            for start in ("swap", "relax"):
                for seed in range(3):
                    long = solve(problem, "tabu", warm_start=start, moves=20000, seed=seed)
                    ends[f"{start} {seed}"] = long.objective
            best = torch.stack(list(ends.values())).min(0).values
            spread = {
                start: float(
                    (torch.stack([v for k, v in ends.items() if k.startswith(start)]) / best).mean()
                )
                - 1
                for start in ("swap", "relax")
            }
            return {
                "n": problem.n,
                "wanda_gap": bound.gap(solve(problem, "wanda").objective).tolist(),
                "swap_gap": bound.gap(swap.objective).tolist(),
                "best_gap": bound.gap(best).tolist(),
                "spread": spread,
                "bound_seconds": seconds / problem.rows,
            }

        book.measure(f"gaps/{layer}", run)


def blame(book: Book, args: argparse.Namespace) -> None:
    """Small rows with a proven optimum: how far is the search above it, and the bound below?"""
    for layer, whole in loaded(args, ("0.q", "0.o", "2.gate", "4.q", "4.o")):
        generator = torch.Generator().manual_seed(args.seed)
        for number in range(3):
            row = int(torch.randint(whole.rows, (1,), generator=generator))
            columns = torch.randperm(whole.n, generator=generator)[:56].sort().values
            problem = whole.row(row).restrict(columns, Unstructured(sparsity=0.6))

            def run(problem: Any = problem) -> dict[str, Any]:
                exact = solve(problem, "scip", time_limit=60)
                optimum = float(exact.objective)
                return {
                    "status": str(exact.status[0]),
                    "swap": float(solve(problem, "swap", warm_start="wanda").objective) / optimum,
                    "relax": float(solve(problem, "relax").objective) / optimum,
                    "tabu": float(solve(problem, "tabu", moves=5000).objective) / optimum,
                    "sdp": float(lower_bound(problem, "sdp").value) / optimum,
                    "box": float(solve(problem, "relax").lower_bound) / optimum,
                }

            book.measure(f"blame/{layer}/{number}", run)


def sixteen(book: Book, args: argparse.Namespace) -> None:
    """Relaxation against Wanda as the start, on all layers of the design's table."""
    for layer, whole in loaded(args, SIXTEEN):
        problem = sample(whole, 64, args.seed)

        def run(problem: LayerProblem = problem) -> dict[str, Any]:
            base = solve(problem, "wanda").objective
            found: dict[str, Any] = {}
            for label, solver, start in (
                ("swap", "swap", "wanda"),
                ("relax", "relax", None),
                ("tabu", "tabu", "swap"),
                ("tabu relax", "tabu", "relax"),
            ):
                answer = solve(problem, solver, warm_start=start)
                found[label] = float((answer.objective / base).mean())
                found[f"{label} seconds"] = answer.seconds
                found[f"{label} swaps"] = float(
                    torch.as_tensor(answer.trace["swaps"]).double().mean()
                )
            return {"n": problem.n, **found}

        book.measure(f"sixteen/{layer}", run)


def whole(book: Book, args: argparse.Namespace) -> None:
    """All rows of one layer: the relaxation's time. All layers: tabu's time against swap's."""
    for layer, problem in loaded(args, ("4.q", "4.o", "2.down")):

        def run(problem: LayerProblem = problem) -> dict[str, Any]:
            solve(problem.take(slice(0, 8)), "relax")
            answer = solve(problem, "relax")
            return {
                "rows": problem.rows,
                "n": problem.n,
                "relax_seconds": answer.trace["relax_seconds"],
                "swap_seconds": answer.trace["swap_seconds"],
                "iterations": answer.trace["iterations"],
                "relaxed_gap": float(answer.trace["relaxed_gap"].mean()),
            }

        book.measure(f"whole/{layer}", run)

    def model() -> dict[str, Any]:
        total: dict[str, float] = {}
        rows = 0
        for _, problem in collect_problems(
            demo_model(),
            sparsity=0.5,
            calibration=demo_text().calibration,
            samples=args.samples,
            seq_len=512,
            seed=args.seed,
            device="cpu",
        ):
            part = problem.take(slice(0, None, args.every))
            rows += part.rows
            base = solve(part, "wanda").objective
            for label, start in (("swap", "wanda"), ("tabu", "swap"), ("relax", None)):
                answer = solve(part, label, warm_start=start)
                for key, value in (
                    (f"{label} seconds", answer.seconds),
                    (f"{label} error", float((answer.objective / base).sum())),
                ):
                    total[key] = total.get(key, 0.0) + value
        result: dict[str, Any] = {k: v / rows if "error" in k else v for k, v in total.items()}
        return {"rows": rows, "every": args.every, **result}

    book.measure("whole/model", model)


def loaded(args: argparse.Namespace, layers: tuple[str, ...]) -> Iterator[tuple[str, LayerProblem]]:
    """The problems of these layers; collected ones are kept as files for the next study."""
    args.problems.mkdir(parents=True, exist_ok=True)
    files = {layer: args.problems / f"{layer}-{args.samples}-{args.seed}.npz" for layer in layers}
    missing = tuple(layer for layer, file in files.items() if not file.exists())
    if missing:
        for layer, problem in problems(missing, args.samples, args.seed):
            problem.save(files[layer])
    for layer, file in files.items():
        yield layer, LayerProblem.load(file)


STUDIES: dict[str, Callable[[Book, argparse.Namespace], None]] = {
    "sixteen": sixteen,
    "masks": masks,
    "starts": starts,
    "interaction": interaction,
    "gaps": gaps,
    "blame": blame,
    "whole": whole,
}


def machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return f"{model}, {os.cpu_count()} cores, torch {torch.__version__}, {platform.system()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16, help="rows of each layer")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--every", type=int, default=4, help="of the whole model, every n-th row")
    parser.add_argument("--bound-seconds", type=float, default=60.0)
    parser.add_argument("--cheap", action="store_true", help="leave the slow methods for later")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--data", type=Path, default=ROOT / "docs" / "figures" / "quality.jsonl")
    parser.add_argument(
        "--problems", type=Path, default=cache_directory() / "quality", help="collected layers"
    )
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "quality.md")
    args = parser.parse_args()
    book = Book(args.data)
    book.measure("about", lambda: {**vars_of(args), "machine": machine()})
    solve(LayerProblem(torch.randn(2, 8), torch.eye(8), Unstructured(0.5)), "tabu", moves=4)
    for study in args.only:
        STUDIES[study](book, args)
    from quality_page import write

    write(book, args.page)
    print(f"wrote {args.page}")


def vars_of(args: argparse.Namespace) -> dict[str, Any]:
    return {"rows": args.rows, "samples": args.samples, "seed": args.seed}


if __name__ == "__main__":
    main()

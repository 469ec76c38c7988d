"""Studies on whole rows of layers: masks by method, starts, moves, time."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from book import PATTERNS, Book
from demo_layers import LAYERS, SIXTEEN, collect, loaded, name_of, ratio, sample

from maskopt import LayerProblem, Solution, solve
from maskopt.demo import demo_model

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
    "tabu 1000, from 1-swap": ("tabu", "swap", {}),
    "hardened start, 1-swap": ("swap", "relax", {}),
    "relax": ("relax", None, {}),
    "relax, not hardened": ("relax", None, {"harden": 0}),
    "tabu 1000, from relax": ("tabu", "relax", {}),
    "tabu 10000, from relax": ("tabu", "relax", {"moves": 10000}),
    "memetic, from relax": ("memetic", "relax", {}),
    "sdp, rounded": ("sdp", None, {}),
}
#: what runs on the whole model
WHOLE_MODEL: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "1-swap": ("swap", "wanda", {}),
    "hardened start, 1-swap": ("swap", "relax", {}),
    "tabu 250, from 1-swap": ("tabu", "swap", {"moves": 250}),
    "tabu 1000, from 1-swap": ("tabu", "swap", {}),
    "tabu 1000, from relax": ("tabu", "relax", {}),
}
#: moves of tabu search
MOVES = (100, 250, 500, 1000, 2000, 5000)
STARTS = ("random", "worst", "magnitude", "wanda", "ria", "sparsegpt", "relax", "sdp")
#: what costs seconds a row runs on fewer rows
FEW = 2
#: left out by --cheap, for a first look
SLOW = ("sdp", "frank_wolfe")


def masks(book: Book, args: argparse.Namespace) -> None:
    """Every method on every layer and pattern."""
    for layer, whole in loaded(args, LAYERS):
        rows = sample(whole, args.rows, args.seed)
        for label, pattern in PATTERNS.items():
            problem = rows.under(pattern)
            base = solve(problem, "wanda").objective
            for method, (solver, start, options) in METHODS.items():
                few = solver == "sdp"
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
                    answer = solve(part, solver, start=start, **options)
                    trace = answer.trace
                    swaps = getattr(trace, "swaps", None)
                    return {
                        "rows": part.rows,
                        "error": ratio(answer.objective, base[: part.rows]),
                        "seconds_per_row": answer.seconds / part.rows,
                        "swaps": float(swaps.double().mean()) if swaps is not None else None,
                    }

                book.measure(f"masks/{label}/{layer}/{method}", run)


def mean_swaps(solution: Solution) -> float:
    return float(solution.trace.swaps.double().mean())


def starts(book: Book, args: argparse.Namespace) -> None:
    """Where 1-swap search ends, by where it starts."""
    for layer, whole in loaded(args, LAYERS):
        problem = sample(whole, args.rows, args.seed)
        base = solve(problem, "wanda").objective
        for start in STARTS:
            if start == "sdp" and args.cheap:
                continue
            part = problem.take(slice(0, FEW)) if start == "sdp" else problem

            def run(
                part: LayerProblem = part, start: str = start, base: torch.Tensor = base
            ) -> dict[str, Any]:
                raw: dict[str, Any] = {"refine": False} if start in ("relax", "sdp") else {}
                begun = solve(part, start, **raw)
                end = solve(part, "swap", start=begun.mask)
                return {
                    "rows": part.rows,
                    "start": ratio(begun.objective, base[: part.rows]),
                    "error": ratio(end.objective, base[: part.rows]),
                    "swaps": mean_swaps(end),
                }

            book.measure(f"starts/{layer}/{start}", run)


def interaction(book: Book, args: argparse.Namespace) -> None:
    """1-swap search that is blind to −2 w_u w_p G_up."""
    for layer, whole in loaded(args, LAYERS):
        problem = sample(whole, args.rows, args.seed)

        def run(problem: LayerProblem = problem) -> dict[str, Any]:
            start = solve(problem, "wanda")
            last, best, made = blind_swaps(problem, start.mask, 200)
            full = solve(problem, "swap", start="wanda").objective
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


def sixteen(book: Book, args: argparse.Namespace) -> None:
    """Relaxation against Wanda as the start, one layer of every kind and depth."""
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
                answer = solve(problem, solver, start=start)
                found[label] = float((answer.objective / base).mean())
                found[f"{label} seconds"] = answer.seconds
                found[f"{label} swaps"] = mean_swaps(answer)
            return {"n": problem.n, **found}

        book.measure(f"sixteen/{layer}", run)


def moves(book: Book, args: argparse.Namespace) -> None:
    """What more moves of tabu search gain, on layers of n = 640 of every depth."""
    for layer, whole in loaded(args, tuple(x for x in SIXTEEN if x.endswith((".q", ".gate")))):
        problem = sample(whole, 64, args.seed)

        def run(problem: LayerProblem = problem) -> dict[str, Any]:
            swap = solve(problem, "swap", start="wanda").objective
            found: dict[str, Any] = {}
            for start in ("swap", "relax"):
                for count in (0, *MOVES):
                    answer = solve(problem, "tabu", start=start, moves=count)
                    found[f"{start} {count}"] = float((answer.objective / swap).mean())
                    found[f"{start} {count} seconds"] = answer.seconds / problem.rows
            return found

        book.measure(f"moves/{layer}", run)


def whole(book: Book, args: argparse.Namespace) -> None:
    """All rows of one layer: the relaxation's time."""
    for layer, problem in loaded(args, ("4.q", "4.o", "2.down")):
        for start, options in {"relax": {}, "hardened start": {"max_iterations": 0}}.items():

            def run(
                problem: LayerProblem = problem, options: dict[str, Any] = options
            ) -> dict[str, Any]:
                answer = solve(problem, "relax", **options)
                return {
                    "rows": problem.rows,
                    "n": problem.n,
                    "threads": torch.get_num_threads(),
                    "relax_seconds": float(answer.trace.relax_seconds.sum()),
                    "swap_seconds": float(answer.trace.swap_seconds.sum()),
                    "iterations": int(answer.trace.iterations.max()),
                    "relaxed_gap": float(answer.trace.relaxed_gap.mean()),
                }

            book.measure(f"whole/{layer}/{start}", run)


def model(book: Book, args: argparse.Namespace) -> None:
    """All rows of all layers, inputs of the dense model, 50%: what the searches take and gain."""
    from transformers import AutoConfig

    blocks = range(AutoConfig.from_pretrained(demo_model()).num_hidden_layers)
    # a block is measured when its last layer is
    missing = [k for k in blocks if f"model/{name_of(f'{k}.down')}" not in book]
    if not missing:
        return
    for name, problem in collect(args, [f"layers.{k}.*" for k in missing], 0.5):

        def run(name: str = name, problem: LayerProblem = problem) -> dict[str, Any]:
            base = solve(problem, "wanda").objective
            methods = {}
            for label, (solver, start, options) in WHOLE_MODEL.items():
                answer = solve(problem, solver, start=start, **options)
                methods[label] = {
                    "seconds": answer.seconds,
                    "error": float((answer.objective / base).mean()),
                }
            return {
                "kind": name.rsplit(".", 1)[1],
                "rows": problem.rows,
                "threads": torch.get_num_threads(),
                "methods": methods,
            }

        book.measure(f"model/{name}", run)

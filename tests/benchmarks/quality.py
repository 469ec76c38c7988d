"""How good are the masks? Writes docs/quality.md and its plot.

    python tests/benchmarks/quality.py            # everything, on Gemma 3 270M (extra `demo`)
    python tests/benchmarks/quality.py --rows 4 --only masks starts
    python tests/benchmarks/quality.py --only model   # all rows of all layers; the rest is samples

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from maskopt import (
    NM,
    LayerProblem,
    RowProblem,
    Unstructured,
    collect_problems,
    lower_bound,
    solve,
    verify,
)
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
#: one layer of every kind and depth
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
    "hardened start, 1-swap": ("swap", "relax", {}),
    "relax": ("relax", None, {}),
    "relax, not hardened": ("relax", None, {"harden": 0}),
    "tabu 1000, from relax": ("tabu", "relax", {}),
    "tabu 10000, from relax": ("tabu", "relax", {"moves": 10000}),
    "portfolio": ("portfolio", None, {}),
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
#: moves of the search for the best mask that can be found
LONG_SEARCH = 100_000
#: inputs of rows whose optimum is proven
PROVEN_N = 80
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
                    swaps = getattr(answer.trace, "swaps", None)
                    return {
                        "rows": part.rows,
                        "error": ratio(answer.objective, base[: part.rows]),
                        "seconds_per_row": answer.seconds / part.rows,
                        "swaps": float(swaps.double().mean()) if swaps is not None else None,
                    }

                book.measure(f"masks/{label}/{layer}/{method}", run)


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
                raw = {"refine": False} if start in ("relax", "sdp") else {}
                begun = solve(part, start, **raw)
                end = solve(part, "swap", warm_start=begun.mask)
                return {
                    "rows": part.rows,
                    "start": ratio(begun.objective, base[: part.rows]),
                    "error": ratio(end.objective, base[: part.rows]),
                    "swaps": float(end.trace.swaps.double().mean()),
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


@dataclass(frozen=True)
class Rows:
    """Two rows of a layer, of all its inputs or of some drawn at random."""

    layer: str
    sparsity: float
    n: int | None = None

    @property
    def label(self) -> str:
        part = "" if self.n is None else f" on {self.n}"
        return f"{self.layer}{part}, {self.sparsity:.0%}"

    def of(self, whole: LayerProblem, seed: int) -> LayerProblem:
        problem = sample(whole, 2, seed)
        if self.n is not None:
            columns = columns_of(whole.n, self.n, seed)
            problem = LayerProblem(
                problem.weight[:, columns].contiguous(),
                problem.gram[columns][:, columns].contiguous(),
                Unstructured(sparsity=self.sparsity),
                assume_psd=True,
            )
        return with_pattern(problem, Unstructured(sparsity=self.sparsity))


def columns_of(n: int, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(n, generator=generator)[:count].sort().values


#: the rows of the certified gaps
CERTIFIED = (
    Rows("10.down", 0.6, 256),
    Rows("5.q", 0.6, 256),
    Rows("10.gate", 0.6),
    Rows("17.gate", 0.6),
    Rows("5.q", 0.6),
    Rows("0.q", 0.6),
    Rows("5.o", 0.6),
    Rows("10.down", 0.6),
    Rows("17.down", 0.5),
)
#: the hard kinds on fewer and fewer inputs: where does the gap come from?
GROWTH = tuple(Rows(layer, 0.6, n) for layer in ("5.o", "0.q") for n in (64, 128, 256, 512))


def gaps(book: Book, args: argparse.Namespace) -> None:
    """The best mask known of full rows, beside the certified bound."""
    lines = CERTIFIED + GROWTH
    for layer, whole in loaded(args, tuple(dict.fromkeys(x.layer for x in lines))):
        for rows in lines:
            if rows.layer == layer:
                problem = rows.of(whole, args.seed)
                book.measure(f"gaps/{rows.label}", lambda problem=problem: certified(problem, args))


def certified(problem: LayerProblem, args: argparse.Namespace) -> dict[str, Any]:
    """The best mask of long searches from three starts, and the bounds below it."""
    plain = solve(problem, "sdp", time_limit=args.bound_seconds)
    verify(problem, plain)
    began = time.perf_counter()
    cut = lower_bound(problem, "sdp", cuts=args.cuts, time_limit=args.cut_seconds)
    cut_seconds = time.perf_counter() - began
    starts = {
        "1-swap": solve(problem, "swap", warm_start="wanda").mask,
        "relax": solve(problem, "relax").mask,
        "sdp": plain.mask,
    }
    ends = {
        f"{start} {seed}": solve(
            problem, "tabu", warm_start=mask, moves=LONG_SEARCH, seed=seed
        ).objective
        for start, mask in starts.items()
        for seed in range(3)
    }
    best = torch.stack(list(ends.values())).min(0).values
    masks = {
        "wanda": solve(problem, "wanda").objective,
        **{start: problem.objective(mask) for start, mask in starts.items()},
        "tabu": solve(problem, "tabu", warm_start="swap").objective,
        "best": best,
    }
    bounds = {"plain": plain.lower_bound, "cut": cut.value}
    return {
        "n": problem.n,
        **{
            name: {mask: (1 - bound / objective).tolist() for mask, objective in masks.items()}
            for name, bound in bounds.items()
        },
        "above_best": {k: float((v / best).mean()) - 1 for k, v in ends.items()},
        "plain_seconds": float(plain.trace.relax_seconds.mean()),
        "cut_seconds": cut_seconds / problem.rows,
    }


def blame(book: Book, args: argparse.Namespace) -> None:
    """Small rows with a proven optimum: how far is the search above it, and the bound below?"""
    for layer, whole in loaded(args, LAYERS):
        problem = sample(whole, 3, args.seed)
        columns = columns_of(problem.n, PROVEN_N, args.seed)
        for row in range(problem.rows):
            small = problem.row(row).restrict(columns, Unstructured(sparsity=0.6))

            def run(small: RowProblem = small) -> dict[str, Any]:
                exact = solve(small, "branch", time_limit=60)
                optimum = float(exact.objective)
                relaxed = solve(small, "relax")
                return {
                    "status": str(exact.status[0]),
                    "swap": float(solve(small, "swap", warm_start="wanda").objective) / optimum,
                    "relax": float(relaxed.objective) / optimum,
                    "tabu": float(solve(small, "tabu").objective) / optimum,
                    "sdp": float(lower_bound(small, "sdp").value) / optimum,
                    "box": float(relaxed.lower_bound) / optimum,
                }

            book.measure(f"blame/{layer}/{row}", run)


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
                found[f"{label} swaps"] = float(answer.trace.swaps.double().mean())
            return {"n": problem.n, **found}

        book.measure(f"sixteen/{layer}", run)


def moves(book: Book, args: argparse.Namespace) -> None:
    """What more moves of tabu search gain, on the n = 640 layers of the design's table."""
    for layer, whole in loaded(args, tuple(x for x in SIXTEEN if x.endswith((".q", ".gate")))):
        problem = sample(whole, 64, args.seed)

        def run(problem: LayerProblem = problem) -> dict[str, Any]:
            swap = solve(problem, "swap", warm_start="wanda").objective
            found: dict[str, Any] = {}
            for start in ("swap", "relax"):
                for count in (0, *MOVES):
                    answer = solve(problem, "tabu", warm_start=start, moves=count)
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

    path = demo_model()
    blocks = range(AutoConfig.from_pretrained(path).num_hidden_layers)
    # a block is measured when its last layer is
    missing = [k for k in blocks if book.get("model", name_of(f"{k}.down")) is None]
    if not missing:
        return
    for name, problem in collect_problems(
        path,
        layers=[f"layers.{k}.*" for k in missing],
        sparsity=0.5,
        calibration=demo_text().calibration,
        samples=args.samples,
        seq_len=512,
        seed=args.seed,
        device="cpu",
    ):

        def run(name: str = name, problem: LayerProblem = problem) -> dict[str, Any]:
            base = solve(problem, "wanda").objective
            methods = {}
            for label, (solver, start, options) in WHOLE_MODEL.items():
                answer = solve(problem, solver, warm_start=start, **options)
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
    "moves": moves,
    "masks": masks,
    "starts": starts,
    "interaction": interaction,
    "gaps": gaps,
    "blame": blame,
    "whole": whole,
    "model": model,
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
    parser.add_argument("--bound-seconds", type=float, default=60.0, help="for two rows")
    parser.add_argument("--cuts", type=int, default=8, help="rounds of triangle inequalities")
    parser.add_argument("--cut-seconds", type=float, default=110.0, help="for two rows")
    parser.add_argument("--note", help="what else the machine did, for the page")
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
    warm_up()
    for study in args.only:
        STUDIES[study](book, args)
    from quality_page import write

    write(book, args.page)
    print(f"wrote {args.page}")


def warm_up() -> None:
    """Compile whatever compiles, so that no figure contains it."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(32, 40, generator=generator)
    weight = torch.randn(4, 32, generator=generator)
    for pattern in PATTERNS.values():
        problem = LayerProblem(weight, factor @ factor.T / 40, pattern, mean=factor.mean(1))
        for solver, start, options in METHODS.values():
            solve(problem, solver, warm_start=start, **options)


def vars_of(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "rows": args.rows,
        "samples": args.samples,
        "seed": args.seed,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "note": args.note,
    }


if __name__ == "__main__":
    main()

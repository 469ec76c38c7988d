"""Whole channels and heads: methods compared on real models. Writes structures.csv and others.

    python tests/benchmarks/structures.py --calibration valid.txt --text test.txt --corpus WikiText-2
    python tests/benchmarks/structures.py … --models smollm2 --only channels

Every finished measurement is a line of a JSONL file (`--data`); a second run keeps what is there and measures
the rest. The models are those of the demo (`maskopt demo --model`).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from book import FIGURES, TABLES, Book
from generalisation import about, judged
from generalisation_cases import calibrated
from machine import machine
from tables import write
from torch import Tensor

from maskopt import Limits, RowProblem, Solution
from maskopt.demo import MODELS, demo_model
from maskopt.models.blockwise.job import Job
from maskopt.models.checkpoints.report import PruneReport
from maskopt.models.evaluation.evaluate import evaluate
from maskopt.models.options.walk import WalkOptions
from maskopt.models.structured import blocks as removal, channels as shrinking
from maskopt.models.structured.blocks import Effects, Left, Measure, remove_blocks
from maskopt.models.structured.channels import shrink_model

#: label → what of it is a solver of ours
METHODS = {
    "swap": "swap",
    "diagonal of Q (Wanda-sp)": "wanda",
    "tabu": "tabu",
    "FLAP's score": "flap",
    "magnitude": "magnitude",
    "random": "random",
}
CHANNELS = {"12.5%": 0.125, "25%": 0.25, "50%": 0.5}
#: of heads, whose choice is proven in any case; what a configuration can say
HEADS = {"smollm2": 0.34, "gemma3": 0.5}
#: windows of the calibration; and models that are evaluated together
WINDOWS, TOGETHER = 32, 4
#: tokens of a window that times a forward pass, tokens that are generated, and repetitions
PREFILL, DECODE, REPEATS = 512, 32, 7


#: label of a line → `update`
UPDATES = {"least squares": "least-squares", "unchanged": "none"}


class Case(NamedTuple):
    """A smaller model, and what its line is called."""

    key: str
    options: dict[str, Any]


def channels(name: str) -> Iterator[Case]:
    for label, share in sorted(CHANNELS.items(), key=lambda item: item[1] != 0.25):
        for method, solver in METHODS.items():
            for weights, update in UPDATES.items():
                key = f"channels/{name}/{label}/{method}/{weights}"
                yield Case(key, {"channels": share, "solver": solver, "update": update})


def heads(name: str) -> Iterator[Case]:
    for weights, update in UPDATES.items():
        yield Case(f"heads/{name}/{weights}", {"heads": HEADS[name], "update": update})


def gaps(name: str) -> Iterator[Case]:
    """How far the choice of channels is from the best, and of heads, with seconds."""
    yield Case(
        f"gaps/{name}", {"channels": 0.25, "heads": HEADS[name], "certify": True, "update": "none"}
    )


#: how many blocks go
COUNTS = (1, 2, 3, 4)
LEAST = "least cost (proven)"
#: label → which of them, by their effects; None: as `remove_blocks` does
CHOICES: dict[str, Callable[[Effects, int], list[int]] | None] = {
    "least as a whole (default)": None,
    LEAST: lambda effects, count: effects.best(count)[0],
    "changing their input least (ShortGPT)": lambda effects, count: effects.most_alike(count),
    "the last ones": lambda effects, count: effects.last(count),
}


STUDIES: dict[str, Callable[[str], Iterator[Case]]] = {
    "channels": channels,
    "heads": heads,
    "gaps": gaps,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", required=True, help="text that choices are fitted to")
    parser.add_argument("--text", required=True, help="text that models are judged on")
    parser.add_argument("--corpus", help="where the two texts are from")
    parser.add_argument("--windows", type=int, default=32, help="of 512 tokens")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    names = [*STUDIES, *APART]
    parser.add_argument("--only", nargs="*", choices=names, default=names)
    parser.add_argument("--data", type=Path, default=FIGURES / "structures.jsonl")
    parser.add_argument("--tables", type=Path, default=TABLES, help="folder for the CSV files")
    args = parser.parse_args()
    book = Book(args.data)
    book.begin(about(args))
    book.check()
    for study in args.only:
        for name in args.models:
            if study in APART:
                APART[study](args, book, name)
                continue
            missing = [case for case in STUDIES[study](name) if case.key not in book]
            for first in range(0, len(missing), TOGETHER):
                measure(args, book, name, missing[first : first + TOGETHER])
    write("structures", book, folder=args.tables)


def measure(args: argparse.Namespace, book: Book, name: str, cases: Sequence[Case]) -> None:
    """Make a demo model smaller in several ways, and hold the results against it on the text."""
    dense = demo_model(name)
    folder = Path(tempfile.mkdtemp(prefix="maskopt-structures-"))
    try:
        found = []
        for number, case in enumerate(cases):
            out = folder / str(number)
            report, diagonal = smaller(dense, args.calibration, out, case.options)
            facts = {"seconds": report.seconds, **figures(report), "diagonal": diagonal}
            found.append((case, out, facts))
        walk = WalkOptions(seq_len=512)
        models = [dense, *(out for _, out, _ in found)]
        first, *others = evaluate(models, args.text, walk, windows=args.windows)
        taken = {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
        for (case, _, facts), other in zip(found, others, strict=True):
            line = judged(first, other)
            del line["losses"]
            book.put(case.key, {**line, **facts, **taken})
    finally:
        shutil.rmtree(folder)


def smaller(
    dense: Path, calibration: str, out: Path, options: dict[str, Any]
) -> tuple[PruneReport, dict[str, float]]:
    """The report, and what the diagonal's choice would have cost in each layer, on the same inputs."""
    how = {**options, **calibrated(WINDOWS)}
    by_score = how.get("solver") == "flap"
    if by_score:
        how["solver"] = "wanda"
    with watched(by_score) as diagonal:
        report = shrink_model(dense, calibration=calibration, output=out, seq_len=512, **how)
    return report, diagonal


@contextmanager
def watched(by_score: bool) -> Iterator[dict[str, float]]:
    """The objective of the diagonal's choice of every layer's problem is noted down; and, where asked for,
    channels are chosen by FLAP's score."""
    solve, diagonal = shrinking.solve, dict[str, float]()

    def noting(problem: RowProblem, solver: str, *, limits: Limits, **options: Any) -> Solution:
        diagonal[problem.name] = float(solve(problem, "wanda", limits=limits).objective)
        if by_score and problem.as_layer().moments is not None:
            return by_variance(problem)
        return solve(problem, solver, limits=limits, **options)

    shrinking.solve = noting  # type: ignore[assignment]
    try:
        yield diagonal
    finally:
        shrinking.solve = solve


def by_variance(problem: RowProblem) -> Solution:
    """FLAP's score (An et al., AAAI 2024, arXiv 2312.11983) in place of a solver: a channel's variance over
    the tokens times the squares of its weights. Its bias that makes up for the mean is left out, since these
    layers have none."""
    layer = problem.as_layer()
    assert layer.moments is not None
    variance = layer.gram.diagonal().double() - layer.moments[0].double().square()
    score: Tensor = variance * layer.weight[0].double().square()
    mask = torch.zeros(1, problem.n, dtype=torch.bool)
    mask[0, score.argsort(descending=True)[: problem.n - layer.pruned]] = True
    return Solution.of(layer, mask)


def figures(report: PruneReport) -> dict[str, Any]:
    """Mean relative errors, fitted and held out, the gaps of the choices, and seconds of solving."""
    layers = report.layers
    kept = [x.error if x.error_kept is None else x.error_kept for x in layers]
    gaps = [1 - x.lower_bound / e for x, e in zip(layers, kept, strict=True) if e]
    told: dict[str, Any] = {
        "fitted": sum(x.relative for x in layers) / len(layers),
        "held": sum(x.relative_held or 0.0 for x in layers) / len(layers),
        "errors": {x.name: e for x, e in zip(layers, kept, strict=True)},
        "solving": sum(x.seconds for x in layers),
        "slowest": max(x.seconds for x in layers),
        "removed": report.sparsity,
    }
    if all(x.lower_bound > 0 for x in layers):
        told["gaps"] = {x.name: g for x, g in zip(layers, gaps, strict=True)}
        told["proven"] = sum("optimal" in x.statuses for x in layers)
    return told


def measure_blocks(args: argparse.Namespace, book: Book, name: str) -> None:
    """Without one to four of its blocks, chosen in several ways out of one measurement of effects; every set
    is evaluated once."""
    keys = [f"blocks/{name}/{count}/{label}" for count in COUNTS for label in CHOICES]
    keys = [key for key in keys if key not in book]
    if not keys:
        return
    dense, known = demo_model(name), list[Effects]()
    outs: dict[tuple[int, ...], Path] = {}
    chosen: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="maskopt-structures-") as home:
        for key in keys:
            count, label = int(key.split("/")[2]), key.split("/")[3]
            out = Path(home) / str(len(chosen))
            began = time.perf_counter()
            with chosen_by(CHOICES[label], known):
                report = remove_blocks(
                    dense, calibration=args.calibration, count=count, output=out,
                    options=WalkOptions(seq_len=512),
                )  # fmt: skip
            gone, effects = tuple(report.removed), report.effects
            facts: dict[str, Any] = {"removed": list(gone), "cost": effects.cost(gone)}
            facts["seconds"] = time.perf_counter() - began
            if label == LEAST:
                facts["status"] = str(report.solution.status[0])
                facts["solving"] = report.solution.seconds
            chosen[key] = gone, facts
            if gone in outs:
                shutil.rmtree(out)
            outs.setdefault(gone, out)
        walk = WalkOptions(seq_len=512)
        first, *others = evaluate([dense, *outs.values()], args.text, walk, windows=args.windows)
    by_set = dict(zip(outs, others, strict=True))
    taken = {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
    for key, (gone, facts) in chosen.items():
        line = judged(first, by_set[gone])
        del line["losses"]
        book.put(key, {**line, **facts, **taken})


@contextmanager
def chosen_by(
    choice: Callable[[Effects, int], list[int]] | None, known: list[Effects]
) -> Iterator[None]:
    """Removal by another rule, where there is one; effects are measured once, and kept in `known`."""
    own = removal.measure_effects, removal.choose

    def measured(job: Job, folder: Path) -> Effects:
        if not known:
            known.append(own[0](job, folder))
        return known[0]

    def other(
        effects: Effects, best: Sequence[int], measure: Measure, sayable: Callable[[Left], bool]
    ) -> dict[Left, float]:
        if choice is None:
            return own[1](effects, best, measure, sayable)
        blocks = choice(effects, len(best))
        return {Left(blocks): effects.cost(blocks)}

    removal.measure_effects, removal.choose = measured, other
    try:
        yield
    finally:
        removal.measure_effects, removal.choose = own


def measure_speed(args: argparse.Namespace, book: Book, name: str) -> None:
    """Sizes, and tokens a second by plain transformers, dense and smaller in turn."""
    key = f"speed/{name}"
    if key in book:
        return
    dense = demo_model(name)
    with tempfile.TemporaryDirectory(prefix="maskopt-structures-") as home:
        out = Path(home) / "out"
        options = {"channels": 0.25, "solver": "wanda", "update": "none"}
        smaller(dense, args.calibration, out, options)
        models = {"dense": load(dense), "smaller": load(out)}
        times: dict[str, dict[str, list[float]]] = {
            m: {"prefill": [], "decode": []} for m in models
        }
        for _ in range(REPEATS):
            for label, model in models.items():
                for kind, run in (("prefill", prefill), ("decode", decode)):
                    times[label][kind].append(run(model))
        line: dict[str, Any] = {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
        for label, folder in (("dense", dense), ("smaller", out)):
            size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
            line[label] = {
                "bytes": size,
                "parameters": sum(p.numel() for p in models[label].parameters()),
                "prefill": PREFILL / statistics.median(times[label]["prefill"]),
                "decode": DECODE / statistics.median(times[label]["decode"]),
            }
        book.put(key, line)


#: studies with measurements of their own
APART: dict[str, Callable[[argparse.Namespace, Book, str], None]] = {
    "blocks": measure_blocks,
    "speed": measure_speed,
}


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def prefill(model: Any) -> float:
    """Seconds of a forward pass through a window."""
    ids = torch.randint(3, 1000, (1, PREFILL), generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    with torch.no_grad():
        model(ids)
    return time.perf_counter() - began


def decode(model: Any) -> float:
    """Seconds in which tokens are generated one after the other."""
    ids = torch.randint(3, 1000, (1, 8), generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    with torch.no_grad():
        model.generate(ids, min_new_tokens=DECODE, max_new_tokens=DECODE, do_sample=False)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()

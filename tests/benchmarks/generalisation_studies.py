"""The studies of docs/results/generalisation.md: of each what is said, and the columns of its table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from book import table
from generalisation_columns import (
    TITLES,
    Column,
    Found,
    Lines,
    alpha,
    by_model,
    crossed,
    divergence,
    figure,
    minutes,
    part,
    ratio,
    ratio_to,
    reported,
)


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
        notes = [
            words
            for word, words in self.of_lines.items()
            if any(word in "/".join(k) for k in found)
        ]
        return (
            "\n".join([f"## {self.title}\n", self.words, *notes])
            + "\n\n"
            + table(list(self.columns), rows)
            + self.more(found)
        )


MODEL = part(0, TITLES)
WITH = {"never": "without", "auto": "with"}
ERRORS = {"error, fitted": reported("fitted"), "held out": reported("held")}
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
            "× Wanda": ratio_to("Wanda"),
            "KL to dense": figure("kl", ".3f"),
            "same top token": figure("agreement", ".1%"),
            **ERRORS,
        },
    ),
    Study(
        "weights",
        "Least-squares updates and shared budgets",
        "32 windows. Kept weights are updated by least squares, damping λ = 0.01, unless stated otherwise;\n"
        "SparseGPT's are its own. *for updates*: masks are chosen for updated weights. *shared budget*: the\n"
        "rows of a layer share one count, without limits, ω by the loss. Errors are those after the update.\n"
        "Minutes are mostly those of one core, with other work on it now and then.",
        {
            "model": MODEL,
            "pattern": part(1),
            "mask": part(2),
            **QUALITY,
            "× SparseGPT": ratio_to("SparseGPT"),
            "× ADMM": ratio_to("ADMM"),
            "KL to dense": figure("kl", ".3f"),
            **ERRORS,
            "solving, min": minutes("solving"),
        },
        {
            "½": "*power ½*: inputs damped by the root of their size (`--damping-exponent 0.5`).",
            "gradient": "*gradient*: `--token-weights gradient`, in these errors, too.",
        },
        best_first=True,
    ),
    Study(
        "draws",
        "Other calibration windows",
        "50%, 32 windows, updated weights as above, by the seed that the windows are drawn with; the\n"
        "windows that are judged on are the same. Rounding has a part in it, too: a line here and its like\n"
        "above may be of different machines, whose masks have the same error and are not the same.",
        {
            "model": MODEL,
            "seed": part(1),
            "mask": part(2),
            **QUALITY,
            "× SparseGPT": ratio_to("SparseGPT"),
            "× ADMM": ratio_to("ADMM"),
            "KL to dense": figure("kl", ".3f"),
            **ERRORS,
        },
        best_first=True,
    ),
    Study(
        "trained",
        "Weights that are trained",
        "50%, 32 windows. Kept weights unchanged, updated by least squares, or trained towards the\n"
        "dense model with the defaults of `--update blockwise`; held-out windows choose the epoch.\n"
        "Errors are those before weights are trained. Minutes were taken with other work on the same cores\n"
        "now and then.",
        {
            "model": MODEL,
            "mask, weights": part(1),
            **QUALITY,
            "× 1-swap, unchanged": ratio_to("1-swap, kept"),
            "× 1-swap for updates, least squares": ratio_to("1-swap on F, refitted"),
            "KL to dense": figure("kl", ".3f"),
            **ERRORS,
            "training, min": minutes("training"),
        },
        {
            "parts trained": f"*parts trained*: {OF_PARTS}.",
            "1-swap, refitted": "*1-swap, least squares*: `--solver portfolio "
            "--solver-options 'members=[\"swap\"]' --start relax`.",
            "on F": "*for updates*: masks and first weights are those of `--update least-squares`;\n"
            "*unchanged*: those masks alone (`maskopt masks apply`). Others: for unchanged weights.",
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
            "× default": ratio_to("default"),
            "KL to dense": figure("kl", ".3f"),
            "training, min": minutes("training"),
        },
        best_first=True,
    ),
    Study(
        "budgets",
        "Allocation",
        "32 windows. Where sparsity may differ, and how errors are weighted (`allocation`, `sensitivity`):\n"
        "uniform: equally; relative: by the inverse of the output energy; fisher: by the squared gradient\n"
        "of the dense model's loss by each output.",
        {
            "model": MODEL,
            "pattern": part(1),
            "sparsity differs": part(2),
            **QUALITY,
            "× uniform": ratio_to("none"),
            "KL to dense": figure("kl", ".3f"),
            **ERRORS,
        },
        {
            "measured": "*kl*: by the KL divergence of the model's output when one block alone is pruned.",
            "±": LIMITED,
        },
        best_first=True,
    ),
    Study(
        "cells",
        "Masks, weights and budgets together",
        "64 windows unless stated otherwise. trained: updated by least squares,\n"
        "damping λ = 0.01, then trained towards the dense model with the defaults of `--update\n"
        "blockwise`. SparseGPT's weights are its own; ADMM's masks are chosen for updated weights.\n"
        "`allocation` and `sensitivity` as above. Errors are those before training. Minutes were\n"
        "taken with other work on the same cores now and then.",
        {
            "model": MODEL,
            "pattern": part(1),
            "sparsity differs": part(2),
            "masks, weights": part(3),
            **QUALITY,
            "× 1-swap, unchanged": ratio_to("1-swap, kept"),
            "× uniform": ratio_to("none", 2),
            "KL to dense": figure("kl", ".3f"),
            **ERRORS,
            "minutes": minutes("seconds"),
        },
        {
            "parts trained": f"parts trained: {OF_PARTS}.",
            "refitted": "least squares: without training.",
            "±": LIMITED,
            "on F": "*for updates*: masks are chosen for updated weights, too.",
            "distilled": "distilled: then trained all together (`maskopt distill`), on the same windows.",
            "other windows": "other windows: on as many others of the same text.",
        },
        best_first=True,
        more=crossed,
    ),
    Study(
        "rates",
        "How fast a whole model is trained",
        "50%, masks of the 1-swap search, blocks trained on 32 windows with the defaults of `--update\n"
        "blockwise`; then all kept weights together on 32 others (`maskopt distill`), with several\n"
        "learning rates. Divergence: from the dense model, in nats a token, on windows of the calibration\n"
        "text that are held out; by it rates are chosen.",
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
            "× that of pruned": ratio_to("pruned"),
        },
    ),
    Study(
        "weighting",
        "Which tokens count",
        "50%, 32 windows. skip-first: the first token of a window does not count; relative: each counts by\n"
        "one over the mean square of its hidden state; gradient: by the norm of the loss's gradient by its\n"
        "hidden state as it leaves the block, in the dense model.",
        {"model": MODEL, "weighting": part(1), **QUALITY, "× uniform": ratio_to("alike")},
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
        "held-out error is within 5% of the least; the 5% was chosen on the lines of 16\n"
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
            "× that of 0.0": ratio_to("0.0"),
        },
    ),
    Study(
        "stopping",
        "Fewer swaps",
        "50%, 16 windows, from Wanda's masks, at most so many swaps of a row; all: to the proven optimum.\n"
        "Stopping early never gained anything, on held-out windows or in perplexity.",
        {"model": MODEL, "swaps": part(1), **ERRORS, **QUALITY, "× that of all": ratio_to("all")},
    ),
)

"""The CSV files of docs/results/tables out of the measurements in docs/results/figures: a row is a case.

    python tests/benchmarks/tables.py

The scripts that measure write their files at their end. Figures have six significant digits; the JSONL files
have all. Files without a line in `FILES` are kept by hand: docs/results/index.md names their commands.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from book import FIGURES, TABLES, TITLES, Book, Record, family
from scipy.stats import spearmanr

from maskopt.models.evaluation.evaluate import exponential, interval

Lines = Mapping[str, Record]
Row = dict[str, Any]


def main() -> None:
    for script, names in BOOKS.items():
        write(script, *(Book(FIGURES / f"{name}.jsonl") for name in names))


def write(script: str, *books: Book, folder: Path = TABLES) -> None:
    """The files of a script; those without measurements are left out."""
    lines: dict[str, Record] = {}
    for book in books:
        taken = {name: book.about[name] for name in ("machine", "date") if name in book.about}
        lines |= {k: {**taken, **record} for k, record in book.lines.items() if k != "about"}
    for name, make in FILES[script].items():
        if rows := list(make(lines)):
            write_csv(folder / f"{name}.csv", rows)
            print(f"wrote {folder / name}.csv")


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Columns in the order in which rows first name them."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        columns = dict.fromkeys(column for row in rows for column in row)
        lines = csv.DictWriter(file, columns, lineterminator="\n")
        lines.writeheader()
        lines.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )


def _taken(record: Record) -> Row:
    return {name: record.get(name) for name in ("machine", "date")}


def _minutes(seconds: float | None) -> float | None:
    return None if seconds is None else seconds / 60


#: a column: the name of a figure in a measurement, or made of the measurement
Column = str | Callable[[Record], Any]


def study(
    prefix: str, parts: Sequence[str], columns: Mapping[str, Column], evaluations: bool = False
) -> Callable[[Lines], Iterator[Row]]:
    """A row for each measurement whose key begins with the prefix: the parts of its key, then the columns."""

    def make(lines: Lines) -> Iterator[Row]:
        for key, record in sorted(family(lines, prefix).items()):
            row: Row = dict(zip(parts, key.split("/"), strict=True))
            if "model" in row:
                row["model"] = TITLES[row["model"]]
            for name, of in columns.items():
                row[name] = of(record) if callable(of) else record.get(of)
            yield {**row, **(evaluated(record) if evaluations else {}), **_taken(record)}

    return make


# --- pruned models: generalisation.py
#: study → names of the parts of a key after the model's, and what holds for all of its cases where it is not
#: the default: 50%, 32 calibration windows, masks of the 1-swap search, weights unchanged
CASES: Mapping[str, tuple[tuple[str, ...], Row]] = {
    "methods": (("sparsity", "masks"), {}),
    "updates": (("sparsity", "masks"), {"update": "least squares"}),
    "seeds": (("seed", "masks"), {"update": "least squares"}),
    "training": (("masks",), {}),
    "training-options": (("training",), {"update": "trained"}),
    "allocation": (("sparsity", "allocation"), {}),
    "combined": (("sparsity", "allocation", "masks"), {"calibration_windows": "64"}),
    "distillation-rates": (("learning_rate",), {"update": "trained, distilled, other windows"}),
    "bos": (("bos_of_calibration", "bos_of_evaluation"), {}),
    "target": (("target",), {}),
    "token-weights": (("token_weights",), {}),
    "windows": (("calibration_windows",), {}),
    "gram-shrinkage": (("sparsity", "gram_shrinkage"), {"calibration_windows": "16"}),
    "swaps": (("max_swaps",), {"calibration_windows": "16", "masks": "1-swap from Wanda"}),
}
DEFAULTS = {"sparsity": "50%", "calibration_windows": "32", "allocation": "uniform"}
DEFAULTS |= {"masks": "1-swap", "update": "unchanged", "setting": ""}
#: ends of the names of masks that say what becomes of kept weights
UPDATES = ("unchanged", "least squares", "trained", "parts trained", "distilled", "other windows")
#: study → pairs of models: the place in the key, and the word that stands there for the other model
PAIRS: Mapping[str, tuple[tuple[int, str], ...]] = {
    "methods": ((-1, "Wanda"),),
    "updates": ((-1, "SparseGPT"), (-1, "ADMM")),
    "seeds": ((-1, "SparseGPT"), (-1, "ADMM")),
    "training": ((-1, "1-swap, unchanged"), (-1, "1-swap for updates, least squares")),
    "training-options": ((-1, "default"),),
    "allocation": ((-1, "uniform"),),
    "combined": ((-1, "1-swap, unchanged"), (-1, "ADMM, least squares"), (-2, "uniform")),
    "target": ((-1, "pruned"),),
    "token-weights": ((-1, "uniform"),),
    "gram-shrinkage": ((-1, "0.0"),),
    "swaps": ((-1, "all"),),
}
SPARSITIES = ("50%", "60%", "70%", "2:4")


def case(key: str) -> Row:
    """What was pruned, and how."""
    study, model, *words = key.split("/")
    names, common = CASES[study]
    found = {"study": study, "model": TITLES[model], **DEFAULTS, **common}
    for name, word in zip(names, words, strict=True):
        found |= {name: word} if name in found else {}
    others = [f"{n}={w}" for n, w in zip(names, words, strict=True) if n not in DEFAULTS]
    found["setting"] = "; ".join(others)
    if windows := re.search(r", (?:once over )?(\d+) windows", "/".join(words)):
        found["calibration_windows"] = windows[1]
    found["sparsity"] = found["sparsity"].split(",")[0]
    label = found["masks"].split(", ")
    if after := [word for word in label if word in UPDATES]:
        found["update"] = ", ".join(after)
    elif found["masks"] == "SparseGPT":
        found["update"] = "SparseGPT's"
    found["masks"] = ", ".join(word for word in label if word not in UPDATES)
    return found


def evaluated(record: Record) -> Row:
    """A pruned model compared with the dense one."""
    ratio, low, high = record["ratio"]
    return {
        "perplexity_dense": record.get("dense"),
        "perplexity": record["perplexity"],
        "perplexity_low": record.get("low"),
        "perplexity_high": record.get("high"),
        "perplexity_ratio_to_dense": ratio,
        "ratio_low": low,
        "ratio_high": high,
        "kl_to_dense_nats": record["kl"],
        "same_top_token_share": record.get("agreement"),
        "relative_error_calibration": record.get("fitted"),
        "relative_error_held_out": record.get("held"),
    }


def of_models(lines: Lines) -> list[str]:
    """Keys, by study, model, sparsity, and then in the order of measuring."""

    def place(key: str) -> tuple[Any, ...]:
        study, model, *_ = key.split("/")
        one = case(key)
        number = int(one["calibration_windows"]) if study in ("windows", "gram-shrinkage") else 0
        return list(CASES).index(study), model, SPARSITIES.index(one["sparsity"]), number

    return sorted(lines, key=place)


def models(lines: Lines) -> Iterator[Row]:
    for key in of_models(lines):
        record = lines[key]
        before, after = record.get("divergence", (None, None))
        hidden = record.get("hidden", (None, None))
        yield {
            **case(key),
            **evaluated(record),
            "hidden_state_change_mean": hidden[0],
            "hidden_state_change_median": hidden[1],
            "gram_shrinkage_mean": record.get("shrink"),
            "solving_minutes": _minutes(record.get("solving")),
            "training_minutes": _minutes(record.get("training")),
            "total_minutes": _minutes(record.get("seconds")),
            "held_out_kl_before_distilling_nats": before,
            "held_out_kl_after_distilling_nats": after,
            **{f"dense_input_error_{name}": record.get(of) for name, of in ERRORS.items()},
            **_taken(record),
        }


#: errors of the final weights on the inputs that layers have in the dense model → their names in a record
ERRORS = {"sum": "raw", "relative_layers": "relative", "relative_rows": "rows", "fisher": "loss"}


def model_pairs(lines: Lines) -> Iterator[Row]:
    """Perplexity divided by that of another model of the study, the interval paired by window."""
    for key in of_models(lines):
        for place, word in PAIRS.get(key.split("/")[0], ()):
            other = key.split("/")
            other[place] = word
            base = lines.get("/".join(other))
            if base is None or base is lines[key]:
                continue
            differences = torch.tensor(lines[key]["losses"]) - torch.tensor(base["losses"])
            low, high = interval(differences)
            yield {
                **case(key),
                "compared_with": word,
                "perplexity_ratio": exponential(float(differences.double().mean())),
                "ratio_low": exponential(low),
                "ratio_high": exponential(high),
            }


#: a figure of a run → where it stands
FIGURES_OF_RUNS: Mapping[str, Callable[[Record], float]] = {
    "error of all layers, summed": lambda run: run["raw"],
    "relative error, mean over layers": lambda run: run["relative"],
    "relative error, mean over rows and layers": lambda run: run["rows"],
    "error of rows weighted by the squared gradient of the loss": lambda run: run["loss"],
    "relative error on held-out windows, mean over layers": lambda run: run["held"],
    "change of the last hidden state, mean over tokens": lambda run: run["hidden"][0],
    "change of the last hidden state, median over tokens": lambda run: run["hidden"][1],
    "KL to dense": lambda run: run["kl"],
}
#: studies whose runs differ in method, sparsity, text, swaps and shrinkage, with errors of one kind
OF_ONE_KIND = ("methods", "windows", "gram-shrinkage", "swaps")


def correlations(lines: Lines) -> Iterator[Row]:
    """Rank correlations of figures of runs with the perplexity."""
    held = "relative error on held-out windows, mean over layers"
    of_one_kind = {k: r for k, r in lines.items() if k.split("/")[0] in OF_ONE_KIND}
    complete = {k: r for k, r in lines.items() if {"hidden", "held"} <= r.keys()}
    for runs, some, figures in (
        (" ".join(OF_ONE_KIND), of_one_kind, {held: FIGURES_OF_RUNS[held]}),
        ("all with every figure", complete, FIGURES_OF_RUNS),
    ):
        for model, title in TITLES.items():
            mine = [r for k, r in some.items() if k.split("/")[1] == model]
            # studies may have a run in common
            found = list({(r["held"], r["perplexity"]): r for r in mine}.values())
            for name, figure in figures.items():
                if len(found) > 2:
                    ratios = [r["ratio"][0] for r in found]
                    statistic = spearmanr([figure(r) for r in found], ratios).statistic
                    yield {
                        "runs_of": runs,
                        "model": title,
                        "figure": name,
                        "runs": len(found),
                        "spearman_with_perplexity_ratio": float(statistic),
                    }


# --- masks: quality.py
def masks(lines: Lines) -> Iterator[Row]:
    """Error of a method's masks; of the layers on which every method has run."""
    split = {tuple(k.split("/")): v for k, v in family(lines, "masks/").items()}
    split = {k: v for k, v in split.items() if (*k[:2], "relax") in split}
    for sparsity in dict.fromkeys(k[0] for k in split):
        for method in dict.fromkeys(k[2] for k in split):
            found = []
            for (_, layer, _), record in _some(split, sparsity, None, method):
                relax = split[(sparsity, layer, "relax")]["error"][: record["rows"]]
                found.append(
                    {
                        "sparsity": sparsity,
                        "method": method,
                        "layer": layer,
                        "rows": record["rows"],
                        "error_ratio_to_wanda": mean(record["error"]),
                        "of_relax_on_the_same_rows": mean(relax),
                        "milliseconds_per_row": 1000 * record["seconds_per_row"],
                        "swaps_per_row": record["swaps"],
                        **_taken(record),
                    }
                )
            yield from (*found, _averaged(found, layer="mean of layers"))


def _some(split: Mapping[tuple[str, ...], Record], *words: str | None) -> list[tuple[Any, Record]]:
    """The measurements with these words in their keys; None: any."""
    return [
        (key, record)
        for key, record in split.items()
        if all(word in (None, part) for word, part in zip(words, key, strict=True))
    ]


def _averaged(rows: list[Row], **words: Any) -> Row:
    """The mean of rows: of floats, where all have them."""

    def one(values: list[Any]) -> Any:
        if all(isinstance(value, float) for value in values):
            return mean(values)
        return values[0] if len(set(values)) == 1 else None

    return {name: words.get(name, one([row[name] for row in rows])) for name in rows[0]}


def mask_starts(lines: Lines) -> Iterator[Row]:
    """Where the 1-swap search ends, by where it starts."""
    split = {tuple(k.split("/")): v for k, v in family(lines, "starts/").items()}
    for start in dict.fromkeys(k[1] for k in split):
        found = []
        for (layer, _), record in _some(split, None, start):
            wanda = split.get((layer, "wanda"))
            found.append(
                {
                    "start": start,
                    "layer": layer,
                    "rows": record["rows"],
                    "start_error_ratio_to_wanda": mean(record["start"]),
                    "error_ratio_to_wanda_after_1_swap": mean(record["error"]),
                    "of_1_swap_from_wanda_on_the_same_rows": mean(wanda["error"][: record["rows"]])
                    if wanda
                    else None,
                    "swaps_per_row": record["swaps"],
                    **_taken(record),
                }
            )
        yield from (*found, _averaged(found, layer="mean of layers"))


def mask_relaxation(lines: Lines) -> Iterator[Row]:
    """64 rows of sixteen layers: searches from Wanda's mask and from the relaxation's."""
    names = {
        "swap": "1-swap from Wanda",
        "relax": "relax",
        "tabu": "tabu 1000, from 1-swap",
        "tabu relax": "tabu 1000, from relax",
    }
    for layer, record in family(lines, "sixteen/").items():
        for name, method in names.items():
            yield {
                "layer": layer,
                "inputs": record["n"],
                "method": method,
                "error_ratio_to_wanda": record[name],
                "seconds_of_64_rows": record[f"{name} seconds"],
                "swaps_per_row": record[f"{name} swaps"],
                **_taken(record),
            }


def mask_moves(lines: Lines) -> Iterator[Row]:
    """Moves of tabu search."""
    for layer, record in family(lines, "moves/").items():
        for name, error in record.items():
            if found := re.fullmatch(r"(swap|relax) (\d+)", name):
                yield {
                    "layer": layer,
                    "start": found[1],
                    "moves": int(found[2]),
                    "error_ratio_to_1_swap": error,
                    "milliseconds_per_row": 1000 * record[f"{name} seconds"],
                    **_taken(record),
                }


def whole_model(lines: Lines) -> Iterator[Row]:
    """All rows of all layers at 50%, by kind of layer."""
    layers = list(family(lines, "model/").values())
    for method in layers[0]["methods"] if layers else ():
        for kind in ("all", *dict.fromkeys(r["kind"] for r in layers)):
            some = [r for r in layers if kind in ("all", r["kind"])]
            rows = sum(r["rows"] for r in some)
            yield {
                "method": method,
                "layers_of_kind": kind,
                "layers": len(some),
                "rows": rows,
                "threads": some[0]["threads"],
                "seconds": sum(r["methods"][method]["seconds"] for r in some),
                "error_ratio_to_wanda": sum(r["rows"] * r["methods"][method]["error"] for r in some)
                / rows,
                **_taken(some[0]),
            }


def long_searches(lines: Lines) -> Iterator[Row]:
    """Certified gaps of single rows, 1 − bound/objective, of masks of long searches."""
    for label, record in sorted(family(lines, "gaps/").items()):
        gap, tight, crossed = (
            record["gap"],
            lines.get(f"tightened/{label}"),
            lines.get(f"crossed/{label}"),
        )
        for row, (wanda, best) in enumerate(zip(gap["wanda"], gap["best"], strict=True)):
            cut = (
                None if tight is None else 1 - (1 - tight["wanda"][row]) * (1 - best) / (1 - wanda)
            )
            ratio = None if crossed is None else crossed["ratio"][row]
            yield {
                "rows": label,
                "inputs": record["n"],
                "row": row,
                **{f"gap_{name.replace('-', '_')}": values[row] for name, values in gap.items()},
                "gap_best_with_cuts": cut,
                "gap_memetic_with_cuts": None
                if cut is None or ratio is None
                else 1 - (1 - cut) / ratio,
                "memetic_objective_ratio_to_best": ratio,
                "bound_seconds": record["seconds"],
                "bound_with_cuts_seconds": None if tight is None else tight["seconds"],
                **_taken(record),
            }


def long_search_runs(lines: Lines) -> Iterator[Row]:
    """How far each of nine runs of tabu search ends above the best, mean of two rows."""
    for label, record in sorted(family(lines, "gaps/").items()):
        for name, above in record["above_best"].items():
            start, seed = name.rsplit(" ", 1)
            yield {
                "rows": label,
                "inputs": record["n"],
                "start": start,
                "seed": seed,
                "objective_above_best_share": above,
            }


# --- least-squares updates of layers: refit.py
def updates(lines: Lines) -> Iterator[Row]:
    found = {tuple(k.split("/", 2)): r for k, r in lines.items() if "kept_held" in r}
    sparsities = list(dict.fromkeys(key[0] for key in found))
    layers = list(dict.fromkeys(key[1] for key in found))
    for key in sorted(found, key=lambda k: (sparsities.index(k[0]), layers.index(k[1]))):
        record, (sparsity, layer, method) = found[key], key
        chosen = "for updates" in method
        yield {
            "sparsity": sparsity.split()[0],
            "shared_budget": "layer" if "per layer" in sparsity else "row",
            "layer": layer,
            "rows": record["rows"],
            "method": method,
            "relative_error_updated_calibration": record["fitted"],
            "relative_error_updated_held_out": record["held"],
            "relative_error_unchanged_calibration": record["kept"],
            "relative_error_unchanged_held_out": record["kept_held"],
            "swaps_per_row": record["swaps"],
            "share_of_pairs_formed_per_scan": record["formed"] if chosen else None,
            "rows_proven_1_swap_optimal_share": record["proven"] if chosen else None,
            "seconds": record["seconds"],
            "damping": record["damping"],
            "damping_exponent": record.get("power", 0.0),
            **_taken(record),
        }


def updates_small_rows(lines: Lines) -> Iterator[Row]:
    """Rows with few inputs at 50%: objectives above the proven optimum, and the bound below."""
    for key, record in family(lines, "toy/").items():
        inputs, layer = key.split("/")
        for row in range(len(record["gap"])):
            yield {
                "inputs": inputs,
                "layer": layer,
                "row": row,
                "proven": record["gap"][row] <= 1e-6,
                "1_swap_for_updates_above_share": record["swap"][row],
                "admm_above_share": record["admm"][row],
                "1_swap_updated_above_share": record["kept"][row],
                "perspective_bound_below_share": record["root"][row],
                "nodes": record["nodes"][row],
                "seconds": record["seconds"][row],
                **_taken(record),
            }


# --- structures.py
def structure_gaps(lines: Lines) -> Iterator[Row]:
    """25% of the channels by `swap`, and heads: certified gaps of the choices."""
    for model, record in sorted(family(lines, "gaps/").items()):
        for layer, gap in record["gaps"].items():
            yield {
                "model": TITLES[model],
                "layer": layer,
                "gap": gap,
                "proven_optimal": gap <= 1e-6,
                "slowest_layer_of_model_seconds": record["slowest"],
                **_taken(record),
            }


def structure_speed(lines: Lines) -> Iterator[Row]:
    for model, record in sorted(family(lines, "speed/").items()):
        for name in ("dense", "smaller"):
            yield {
                "model": TITLES[model],
                "size": name,
                "parameters_millions": record[name]["parameters"] / 1e6,
                "file_megabytes": record[name]["bytes"] / 1e6,
                "tokens_per_second_window_of_512": record[name]["prefill"],
                "tokens_per_second_generating": record[name]["decode"],
                **_taken(record),
            }


#: without the term −2 w_u w_p G_up
mask_interaction = study(
    "interaction/",
    ("layer",),
    {
        "error_ratio_to_wanda_with_the_term": lambda r: mean(r["full"]),
        "without_at_the_end": lambda r: mean(r["error"]),
        "without_best_on_the_way": lambda r: mean(r["best"]),
        "swaps_per_row_without": "swaps",
    },
)
relaxation_time = study(
    "whole/",
    ("layer", "start"),
    {
        "rows": "rows",
        "inputs": "n",
        "threads": "threads",
        "steps_before_hardening": "iterations",
        "gap_of_relaxation": lambda r: r["relaxed_gap"] if r["iterations"] else None,
        "relaxation_seconds": "relax_seconds",
        "swap_seconds": "swap_seconds",
    },
)
#: rows of 80 inputs at 60%
small_rows = study(
    "blame/",
    ("layer", "row"),
    {
        "status": "status",
        "1_swap_ratio_to_optimum": "swap",
        "relax_ratio_to_optimum": "relax",
        "tabu_ratio_to_optimum": "tabu",
        "sdp_bound_ratio_to_optimum": "sdp",
        "box_bound_ratio_to_optimum": "box",
    },
)
#: memetic search compared with the 1-swap optima that it starts from, at 50%
updates_memetic = study(
    "beyond/",
    ("layer",),
    {
        "rows": "count",
        "objective_ratio": "least",
        "held_out_error_ratio": "held",
        "held_out_standard_error": "about",
    },
)
least_squares_time = study(
    "pace/",
    ("layer",),
    {
        "inputs": "n",
        "seconds_per_row": "ours",
        "seconds_per_row_shared_budget": "trading",
        "seconds_per_row_plain_loop": "loop",
    },
)
CHOICES: Mapping[str, Column] = {
    "layers": lambda r: len(r["errors"]),
    "layers_cheaper_than_wanda_sp": lambda r: (
        sum(r["errors"][layer] < cost for layer, cost in r["diagonal"].items())
        if "diagonal" in r
        else None
    ),
    "layers_proven_optimal": "proven",
    "slowest_layer_seconds": "slowest",
}
channels = study(
    "channels/",
    ("model", "removed", "chosen_by", "update"),
    {"structure": lambda r: "channels of the MLP", **CHOICES},
    evaluations=True,
)
heads = study(
    "heads/",
    ("model", "update"),
    {"structure": lambda r: "heads", "removed": lambda r: f"{r['removed']:.1%}", **CHOICES},
    evaluations=True,
)
blocks = study(
    "blocks/",
    ("model", "blocks", "chosen_by"),
    {
        "removed": lambda r: " ".join(map(str, r["removed"])),
        "quadratic_cost_on_calibration": "cost",
        "proving_seconds": "solving",
    },
    evaluations=True,
)

#: script → its JSONL files
BOOKS: Mapping[str, tuple[str, ...]] = {
    "generalisation": ("generalisation",),
    "quality": ("quality", "quality-gaps"),
    "refit": ("refit",),
    "structures": ("structures",),
}
#: script → file → its rows
FILES: Mapping[str, Mapping[str, Callable[[Lines], Iterable[Row]]]] = {
    "generalisation": {"models": models, "model_pairs": model_pairs, "correlations": correlations},
    "quality": {
        "masks": masks,
        "mask_starts": mask_starts,
        "mask_relaxation": mask_relaxation,
        "mask_moves": mask_moves,
        "mask_interaction": mask_interaction,
        "relaxation_time": relaxation_time,
        "whole_model": whole_model,
        "long_searches": long_searches,
        "long_search_runs": long_search_runs,
        "small_rows": small_rows,
    },
    "refit": {
        "updates": updates,
        "updates_small_rows": updates_small_rows,
        "updates_memetic": updates_memetic,
        "least_squares_time": least_squares_time,
    },
    "structures": {
        "structures": lambda lines: chain(channels(lines), heads(lines)),
        "structure_gaps": structure_gaps,
        "blocks": blocks,
        "structure_speed": structure_speed,
    },
}

if __name__ == "__main__":
    main()

"""What generalisation.py measures: of every study the prunes of a model, and how each is called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from book import PATTERNS

from maskopt import NM, Unstructured
from maskopt.core.pattern import Pattern
from maskopt.models.calibration.tokens import TOKEN_WEIGHTS

#: label → solver, start
METHODS = {
    "Wanda": ("wanda", None),
    "1-swap from Wanda": ("swap", "wanda"),
    "1-swap (default)": ("swap", None),
}
#: label → solver, start, `update`, `allocation`, other options
WEIGHTS: dict[str, tuple[str, str | None, str, str, dict[str, Any]]] = {
    "1-swap for updates": ("swap", None, "least-squares", "uniform", {}),
    "ADMM": ("admm", None, "least-squares", "uniform", {}),
    "SparseGPT": (
        "sparsegpt",
        None,
        "least-squares",
        "uniform",
        {"solver_options": {"update": True}},
    ),
    "1-swap for updates, λ = 0.1": ("swap", None, "least-squares", "uniform", {"damping": 0.1}),
    "ADMM, λ = 0.1": ("admm", None, "least-squares", "uniform", {"damping": 0.1}),
    "ADMM, λ = 0.1, power ½": (
        "admm",
        None,
        "least-squares",
        "uniform",
        {"damping": 0.1, "damping_exponent": 0.5},
    ),
    "1-swap for updates, gradient": (
        "swap",
        None,
        "least-squares",
        "uniform",
        {"token_weights": "gradient"},
    ),
    "ADMM, gradient": ("admm", None, "least-squares", "uniform", {"token_weights": "gradient"}),
    "Wanda": ("wanda", None, "least-squares", "uniform", {}),
    "1-swap for updates, shared budget": (
        "swap",
        None,
        "least-squares",
        "rows",
        {"max_deviation": 1},
    ),
    "1-swap, unchanged": ("swap", None, "none", "uniform", {}),
    "1-swap, shared budget, unchanged": ("swap", None, "none", "rows", {"max_deviation": 1}),
}
#: of WEIGHTS, those that are looked at with some patterns only
ONLY = {
    "1-swap for updates, λ = 0.1": ("50%",),
    "ADMM, λ = 0.1": ("50%",),
    "ADMM, λ = 0.1, power ½": ("50%", "2:4"),
    "1-swap for updates, gradient": ("50%", "2:4"),
    "ADMM, gradient": ("50%", "2:4"),
}
#: masks that are fitted to several draws of windows
DRAWN = ("SparseGPT", "ADMM", "1-swap for updates")
#: seeds of the windows that masks are fitted to
DRAWS = (0, 1, 2)
#: what becomes of kept weights → options
AFTER: dict[str, dict[str, Any]] = {
    "unchanged": {},
    "least squares": {"update": "least-squares"},
    "trained": {"update": "blockwise"},
}
#: label → other options: the same mask before and after its kept weights are updated
TRAINED: dict[str, dict[str, Any]] = {
    **{
        f"1-swap, {after}": {"solver": "swap", **AFTER[after]}
        for after in AFTER
        if after != "least squares"
    },
    # `swap` itself would choose for updated weights; `relax` ends with it
    "1-swap, least squares": {"solver": "relax", "update": "least-squares"},
    "1-swap for updates, least squares": {"solver": "swap", "update": "least-squares"},
    "1-swap for updates, trained": {
        "solver": "swap",
        "update": "blockwise",
        "training": {"begin": "least-squares"},
    },
    **{
        f"{label}, {after}": {"solver": solver, **own}
        for label, solver in (("Wanda", "wanda"), ("magnitude", "magnitude"), ("random", "random"))
        for after, own in AFTER.items()
    },
}
#: label → windows, options of `training`; windows times epochs are as many
RECIPES: dict[str, tuple[int, dict[str, Any]]] = {
    "default": (32, {}),
    "default, once over 128 windows": (128, {"epochs": 1}),
}
#: label → other options: masks, and what becomes of the kept weights
CELLS: dict[str, dict[str, Any]] = {
    "ADMM, trained": {
        "solver": "admm",
        "update": "blockwise",
        "training": {"begin": "least-squares"},
    },
    "ADMM, least squares": {"solver": "admm", "update": "least-squares"},
    "1-swap, unchanged": {"solver": "swap"},
    "SparseGPT": {
        "solver": "sparsegpt",
        "update": "least-squares",
        "solver_options": {"update": True},
    },
    "Wanda, unchanged": {"solver": "wanda"},
}
#: of them, those of every pattern and budget
EVERYWHERE = ("ADMM, trained", "ADMM, least squares", "1-swap, unchanged")
#: label → other options: where sparsity may differ, and how errors are weighted
ALLOCATIONS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "rows, uniform": {"allocation": "rows", "sensitivity": "uniform", "max_deviation": 1},
    "rows, fisher": {"allocation": "rows", "sensitivity": "fisher", "max_deviation": 1},
    "layers, uniform": {"allocation": "layers", "sensitivity": "uniform"},
    "layers, relative": {"allocation": "layers", "sensitivity": "relative"},
    "layers, fisher": {"allocation": "layers", "sensitivity": "fisher"},
    "rows, fisher, ± 0.05": {"allocation": "rows", "sensitivity": "fisher", "max_deviation": 0.05},
    "rows, fisher, ± 0.1": {"allocation": "rows", "sensitivity": "fisher", "max_deviation": 0.1},
    "rows, fisher, ± 0.2": {"allocation": "rows", "sensitivity": "fisher", "max_deviation": 0.2},
    "layers and rows, fisher": {"allocation": "both", "sensitivity": "fisher"},
}
#: other methods that choose the sparsity of blocks
SHARES = ("OWL", "DLP")
#: pattern → which of them
ALLOCATED: dict[str, tuple[str, ...]] = {
    "50%": (
        *("uniform", "rows, fisher", "rows, fisher, ± 0.1"),
        *("layers, fisher", "layers and rows, fisher"),
    ),
    "60%": ("uniform", "layers, fisher"),
    "70%": tuple(ALLOCATIONS),
}
UNSTRUCTURED = {
    "50%": Unstructured(sparsity=0.5),
    "60%": Unstructured(sparsity=0.6),
    "70%": Unstructured(sparsity=0.7),
}
#: of `distill`
RATES = (1e-4, 3e-4, 1e-3)
SIZES = (4, 8, 16, 32, 64, 128, 256)
SHRINK = (0.0, 0.1, 0.3)
#: pattern and windows, where masks may be fitted too closely
SCARCE: dict[str, tuple[Pattern, int]] = {
    "70%": (Unstructured(sparsity=0.7), 16),
    "2:4": (NM(keep=2, of=4), 16),
    "50%, 4 windows": (Unstructured(sparsity=0.5), 4),
    "50%, 32 windows": (Unstructured(sparsity=0.5), 32),
}
#: most swaps of a row
STOPS = (0, 10, 40, 160, None)
#: more windows, for held-out errors
HELD = 8


class Case(NamedTuple):
    """A prune of a model, and how its evaluations are called, by what their windows begin with.

    `shares` names another method, which says how much each block prunes; `masks_alone` puts the masks onto
    the dense model's weights afterwards; `distilled` has options of `distill_model`, where kept weights are
    trained together afterwards.
    """

    options: dict[str, Any]
    keys: dict[str, str]
    shares: str | None = None
    masks_alone: bool = False
    distilled: dict[str, Any] | None = None


def calibrated(fitted: int) -> dict[str, Any]:
    """On so many windows, HELD more held out."""
    return {"samples": fitted + HELD, "holdout": (HELD + 0.5) / (fitted + HELD)}


def methods(name: str) -> Iterator[Case]:
    for pattern, value in PATTERNS.items():
        for label, (solver, start) in METHODS.items():
            how = {"sparsity": value, "solver": solver, "start": start, **calibrated(32)}
            yield Case(how, {"auto": f"methods/{name}/{pattern}/{label}"})


def updates(name: str) -> Iterator[Case]:
    for pattern, value in {**PATTERNS, "70%": Unstructured(sparsity=0.7)}.items():
        for label, (solver, start, after, budget, own) in WEIGHTS.items():
            if pattern not in ONLY.get(label, (pattern,)) or (
                budget == "rows" and isinstance(value, NM)
            ):
                continue
            how = {"sparsity": value, "solver": solver, "start": start, **calibrated(32)}
            how |= {"update": after, "allocation": budget, **own}
            yield Case(how, {"auto": f"updates/{name}/{pattern}/{label}"})


def seeds(name: str) -> Iterator[Case]:
    for seed in DRAWS:
        for label in DRAWN:
            solver, _, after, _, own = WEIGHTS[label]
            how = {"sparsity": 0.5, **calibrated(32), "seed": seed, "solver": solver}
            yield Case({**how, "update": after, **own}, {"auto": f"seeds/{name}/{seed}/{label}"})


def training(name: str) -> Iterator[Case]:
    for label, own in TRAINED.items():
        how = {"sparsity": 0.5, **calibrated(32), **own}
        yield Case(how, {"auto": f"training/{name}/{label}"})
        # next to it: one prune does for both
        if label == "1-swap for updates, least squares":
            yield Case(
                how, {"auto": f"training/{name}/1-swap for updates, unchanged"}, masks_alone=True
            )


def training_options(name: str) -> Iterator[Case]:
    for label, (fitted, own) in RECIPES.items():
        how = {"sparsity": 0.5, **calibrated(fitted), "solver": "swap", "update": "blockwise"}
        yield Case({**how, "training": own}, {"auto": f"training-options/{name}/{label}"})


def allocation(name: str) -> Iterator[Case]:
    for label, pattern in UNSTRUCTURED.items():
        for where in ALLOCATED[label]:
            how = {"sparsity": pattern, **calibrated(32), **ALLOCATIONS[where]}
            yield Case(how, {"auto": f"allocation/{name}/{label}/{where}"})
    for method in SHARES:
        how = {"sparsity": UNSTRUCTURED["70%"], **calibrated(32), "allocation": "layers"}
        yield Case(how, {"auto": f"allocation/{name}/70%/blocks, {method}"}, method)


def combined(name: str) -> Iterator[Case]:
    for label, pattern in UNSTRUCTURED.items():
        for where in ("layers, fisher", "uniform", "rows, fisher, ± 0.1"):
            yield from (cell(name, label, pattern, where, weights) for weights in EVERYWHERE)
    for weights in ("ADMM, least squares", "1-swap, unchanged"):
        yield cell(name, "50%", UNSTRUCTURED["50%"], "rows, fisher", weights)
    two = NM(keep=2, of=4)
    yield from (cell(name, "2:4", two, "uniform", weights) for weights in EVERYWHERE)
    yield cell(name, "50%", UNSTRUCTURED["50%"], "uniform", "Wanda, unchanged")
    others = cell(name, "50%", UNSTRUCTURED["50%"], "uniform", "SparseGPT")
    yield from (others, distilled(others))
    half = cell(name, "50%", UNSTRUCTURED["50%"], "uniform", "ADMM, trained")
    yield distilled(half, ", other windows", seed=1)
    best: dict[str, tuple[Pattern, str]] = {
        "50%": (UNSTRUCTURED["50%"], "layers, fisher"),
        "2:4": (two, "uniform"),
    }
    for label, how in best.items():
        yield distilled(cell(name, label, *how, "ADMM, trained"), ", other windows", seed=1)


def distilled(one: Case, windows: str = "", seed: int = 0) -> Case:
    """The same, its kept weights trained together afterwards; on the same windows if `seed` is theirs."""
    how = windows_of(one.options)
    key = f"{one.keys['auto']}, distilled{windows}"
    return Case(one.options, {"auto": key}, distilled={**how, "epochs": 2, "seed": seed})


def windows_of(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("samples", "holdout")}


def cell(name: str, label: str, pattern: Pattern, where: str, weights: str) -> Case:
    how = {"sparsity": pattern, **calibrated(64), **ALLOCATIONS[where], **CELLS[weights]}
    return Case(how, {"auto": f"combined/{name}/{label}/{where}/{weights}"})


def distillation_rates(name: str) -> Iterator[Case]:
    """The same model, trained as a whole at several rates."""
    blocks = {"sparsity": 0.5, **calibrated(32), **TRAINED["1-swap, trained"]}
    for rate in RATES:
        how = {**windows_of(blocks), "epochs": 2, "seed": 1, "learning_rate": rate}
        yield Case(blocks, {"auto": f"distillation-rates/{name}/{rate}"}, distilled=how)


def bos(name: str) -> Iterator[Case]:
    for begin in ("never", "auto"):
        keys = {judged: f"bos/{name}/{begin}/{judged}" for judged in ("never", "auto")}
        yield Case({"sparsity": 0.5, **calibrated(32), "bos": begin}, keys)


def token_weights(name: str) -> Iterator[Case]:
    for label in TOKEN_WEIGHTS:
        how = {"sparsity": 0.5, **calibrated(32), "token_weights": label}
        yield Case(how, {"auto": f"token-weights/{name}/{label}"})


def windows(name: str) -> Iterator[Case]:
    for size in SIZES:
        how = {"sparsity": 0.5, **calibrated(size)}
        yield Case(how, {"auto": f"windows/{name}/{size}"})


def gram_shrinkage(name: str) -> Iterator[Case]:
    for label, (pattern, size) in SCARCE.items():
        for alpha in (*SHRINK, "auto"):
            how = {"sparsity": pattern, **calibrated(size), "gram_shrinkage": alpha}
            yield Case(how, {"auto": f"gram-shrinkage/{name}/{label}/{alpha}"})


def swaps(name: str) -> Iterator[Case]:
    for most in STOPS:
        how = {"sparsity": 0.5, **calibrated(16), "solver": "swap", "start": "wanda"}
        how |= {"solver_options": {"max_swaps": most}}
        yield Case(how, {"auto": f"swaps/{name}/{'all' if most is None else most}"})


STUDIES = {
    "methods": methods,
    "updates": updates,
    "seeds": seeds,
    "training": training,
    "training-options": training_options,
    "allocation": allocation,
    "combined": combined,
    "distillation-rates": distillation_rates,
    "bos": bos,
    "token-weights": token_weights,
    "windows": windows,
    "gram-shrinkage": gram_shrinkage,
    "swaps": swaps,
}

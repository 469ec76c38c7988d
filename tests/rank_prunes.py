"""Prunes of tiny models by the processes of `torchrun … rank_prunes.py FOLDER`; `pruned` makes them in one.

Each case is a folder's model, and options that lead through other code.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from tiny_models import FAMILIES, patched, save, tiny, tokens

from maskopt import NM, Unstructured, prune_model
from maskopt.model.gram_store import collect_grams
from maskopt.model.ranks import ALONE, Ranks, joined

FAMILIES["tall"] = (
    "LlamaConfig",
    {**FAMILIES["llama"][1], "hidden_size": 144, "intermediate_size": 300, "num_hidden_layers": 2},
)
MODELS = ("tall", "mixtral", "overflowing")
COMMON: dict[str, Any] = {"pattern": Unstructured(sparsity=0.5), "min_tokens": 1, "threads": 1}
#: name → model, options: the rows of `tall` are shared out, tile by tile; those that trade are not
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "kept": ("tall", {}),
    "refitted": ("tall", {"weights": "refit", "solver": "admm"}),
    "refitted, swapped": ("tall", {"weights": "refit", "include": "q_proj,down_proj"}),
    "2:4, in files": (
        "tall",
        {"pattern": NM(keep=2, of=4), "solver": "wanda", "activation_memory": 0},
    ),
    "rows trade": (
        "tall",
        {"pattern": Unstructured(sparsity=0.5, per="layer"), "importance": "loss"},
    ),
    "layers trade": ("tall", {"budget": "model", "importance": "loss", "solver": "wanda"}),
    "to the dense output": (
        "tall",
        {"target": "dense", "weighting": "gradient", "holdout": 0.3, "solver": "elimination"},
    ),
    "held out": ("tall", {"holdout": 0.3, "shrink": "auto", "solver": "wanda"}),
    "one after the other": ("tall", {"true_sequential": True, "solver": "wanda"}),
    "experts": ("mixtral", {"all_experts": True}),
    "a bad sample": (
        "overflowing",
        {"skip_bad_samples": True, "include": ("q_proj",), "solver": "wanda"},
    ),
}
#: as many as are divided by no number of processes
WINDOWS = 7


def windows() -> torch.Tensor:
    """The second of them overflows in the model of that name."""
    data = tokens(WINDOWS)
    data[data == 5] = 6
    data[1, 2] = 5
    return data


def save_models(folder: Path) -> None:
    for name in MODELS:
        model = tiny("llama" if name == "overflowing" else name)
        if name == "overflowing":  # only token 5 reaches the first input of an enormous weight
            patched(model, "model.embed_tokens.weight", _reach)
            patched(model, "model.layers.0.self_attn.o_proj.weight", lambda p: p[0].zero_())
            patched(model, "model.layers.0.mlp.up_proj.weight", lambda p: p[0, 0].fill_(3e38))
        save(model, folder / name, shard="200KB")


def _reach(table: torch.Tensor) -> None:
    table[:, 0] = 0
    table[5, 0] = 10


def pruned(models: Path, out: Path, ranks: Ranks = ALONE) -> None:
    """Every case in a folder of its own, and the Gram matrices of one model with a prune from them."""
    for name, (model, options) in CASES.items():
        prune_model(
            models / model, windows(), output=out / name, ranks=ranks, **{**COMMON, **options}
        )
    collect_grams(
        models / "tall", windows(), output=out / "grams", holdout=0.3, threads=1, ranks=ranks
    )
    prune_model(
        models / "tall", grams=out / "grams", output=out / "from grams", ranks=ranks, **COMMON
    )


def threads_named(word: str) -> int:
    """Of this process, as Linux lists them."""
    found = 0
    for thread in Path("/proc/self/task").iterdir():
        try:
            found += word in (thread / "comm").read_text()
        except OSError:
            continue  # it has ended meanwhile
    return found


if __name__ == "__main__":
    with joined() as all_of_us:
        pruned(Path(sys.argv[1]), Path(sys.argv[2]), all_of_us)
        assert threads_named("gloo")
    patience = time.monotonic() + 30  # a thread that was joined may be listed a moment longer
    while threads_named("gloo"):
        assert time.monotonic() < patience, "gloo's threads outlive the group"
        time.sleep(0.01)

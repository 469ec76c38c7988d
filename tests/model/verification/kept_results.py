"""Tiny results of each kind, kept as this version wrote them: later versions must still verify them.

`python tests/model/verification/kept_results.py NAME…` (with `PYTHONPATH=tests:.`) writes archives of these
names anew. An archive is replaced only where a format changes on purpose; a new kind of result gets its own.
"""

import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers
from prunes import prune, smaller
from tiny_models import save

from maskopt import distill_model
from maskopt.models.verification.verify import Verified, verify_model

ARCHIVES = Path(__file__).parent / "results"
_VOCABULARY = 16
_SIZES = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}
_TRAINED = {"update": "blockwise", "training": {"epochs": 1}, "holdout": 0.34}
_DISTILLED = {"distillation": {"epochs": 1, "learning_rate": 0.001}}
_SHARED = {"allocation": "both", "sensitivity": "relative", "sparsity": 0.5}
#: options of `prune_model`, by the name of an archive
PRUNED: dict[str, dict[str, Any]] = {
    "prune": {"solver": "swap"},
    "prune-rows": {"allocation": "rows", "sparsity": 0.5, "max_deviation": 0.2},
    "prune-both": _SHARED,
    "prune-2-4-least-squares": {"sparsity": "2:4", "update": "least-squares"},
    "prune-2-4-rewritten": {"sparsity": "2:4", "transform": "free"},
    "prune-trained": {**_TRAINED, **_DISTILLED},
}
#: arguments of `smaller`, by the name of an archive
SMALLER: dict[str, dict[str, Any]] = {
    "structures": {"channels": 0.5, "update": "least-squares"},
    "experts": {"share": 0.5},
    "blocks": {"count": 1},
}
#: of a version whose `prune-structured` took no blocks together with channels: its manifest names none
EARLIER = "structures-before-blocks"
NAMES = (*PRUNED, *SMALLER, "distill", EARLIER)


def windows() -> torch.Tensor:
    """Return the calibration tokens of every kept result, int64 [6, 8]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, _VOCABULARY, (6, 8), generator=generator)


def verify_kept(name: str, home: Path) -> Verified:
    """Unpack an archive and verify its result against everything that the archive holds."""
    with zipfile.ZipFile(ARCHIVES / f"{name}.zip") as archive:
        archive.extractall(home)
    result, original = home / "result", home / "original"
    if name == "distill":
        return verify_model(result, masks=home / "pruned")
    again = windows() if name in PRUNED and name != "prune-trained" else None
    return verify_model(result, original, calibration=again)


def _write(name: str) -> None:
    torch.manual_seed(1)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        result, original = home / "result", save(_model(name), home / "original")
        if name in PRUNED:
            prune(original, result, windows(), **PRUNED[name])
        elif name in SMALLER:
            smaller(original, result, windows(), **SMALLER[name])
        else:
            prune(original, home / "pruned", windows())
            distilled = {"holdout": 0.34, "epochs": 1}
            distill_model(home / "pruned", original, windows(), output=result, **distilled)
        ARCHIVES.mkdir(exist_ok=True)
        with zipfile.ZipFile(ARCHIVES / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(home.rglob("*")):
                archive.write(file, file.relative_to(home))


def _model(name: str) -> Any:
    if name == "experts":
        sizes = {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES))


if __name__ == "__main__":
    if EARLIER in sys.argv:
        sys.exit(f"{EARLIER}: this version writes no such result; keep the archive")
    for chosen in sys.argv[1:]:
        _write(chosen)

"""Prunes that are interrupted go on to the same bytes, whatever they choose masks and weights by."""

import pytest
import torch
from forging import fails
from outputs import contents
from resuming import interrupted
from tiny_models import save, tiny, tokens

from maskopt import prune_model
from maskopt.errors import ModelError
from maskopt.models.pruning import prune
from maskopt.models.verification.verify import verify_model

COMMON = {"sparsity": 0.5, "min_tokens": 1, "solver": "wanda", "start": None}
REFIT = {"update": "least-squares", "solver": "swap"}
HELD = {"holdout": 0.4}
MEASURED = {
    "allocation": "layers",
    "sensitivity": "kl",
    "token_weights": "gradient",
    "holdout": 0.25,
}
FREE = {"allocation": "rows", "sensitivity": "uniform", "max_deviation": 1}
#: options, the stage of the second block that is the last to be done, and blocks
RUNS = [
    (MEASURED, "solve", 3),
    ({"update": "least-squares", **HELD, "dtype": torch.bfloat16}, "calibrate", 3),
]
MORE = [
    ({**FREE, "update": "least-squares"}, "solve", 2),
    ({"allocation": "both", "sensitivity": "fisher"}, "solve", 2),
    ({"allocation": "layers", "update": "least-squares"}, "solve", 2),
    ({"allocation": "layers", "target": "dense"}, "solve", 2),
    ({**FREE, "solver": "swap"}, "solve", 2),
    ({"allocation": "rows", "sensitivity": "fisher"}, "calibrate", 2),
    ({**REFIT, **HELD}, "calibrate", 2),
    ({**REFIT, **HELD, "dtype": torch.bfloat16}, "solve", 2),
    ({"target": "dense", **HELD}, "solve", 2),
    ({"target": "dense", **HELD, "solver": "swap"}, "calibrate", 2),
]


@pytest.mark.parametrize(
    ("options", "stage", "layers"),
    [*RUNS, *(pytest.param(*run, marks=pytest.mark.slow) for run in MORE)],
)
def test_resumed_runs_write_the_same_bytes(options, stage, layers, tmp_path, monkeypatch):
    more = {**COMMON, **options}
    model = tiny("llama", layers=layers, dtype=more.pop("dtype", torch.float32))
    dense = save(model, tmp_path / "model", shard="20KB")
    whole, out = tmp_path / "whole", tmp_path / "out"
    prune_model(dense, tokens(), output=whole, **more)
    interrupted(dense, out, 1, stage, **more)
    monkeypatch.setattr(prune, "allocate", lambda *_, **__: pytest.fail("chosen a second time"))
    for _ in range(2):  # unfinished, and finished
        prune_model(dense, tokens(), output=out, resume=True, **more)
        assert contents(out) == contents(whole)
    assert len(verify_model(out, dense, calibration=tokens()).checked_layers) == 7 * layers


def test_a_changed_file_of_new_weights_is_not_gone_on_with(small, tmp_path):
    more, out = {**COMMON, "update": "least-squares"}, tmp_path / "out"
    interrupted(small, out, 1, "solve", **more)
    (file,) = out.rglob("00000.weights.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    said = r"00000\.weights\.safetensors: does not match the journal"
    fails(ModelError, said, prune_model, small, tokens(), output=out, resume=True, **more)

"""Prunes that are interrupted go on to the same bytes, whatever they choose masks and weights by."""

import pytest
import torch
from outputs import contents
from resuming import interrupted
from tiny_models import save, tiny, tokens

from maskopt import prune_model
from maskopt.errors import ModelError
from maskopt.model import prune
from maskopt.model.verify import verify_output

COMMON = {"sparsity": 0.5, "min_tokens": 1, "solver": "wanda", "warm_start": None}
REFIT = {"weights": "refit", "solver": "swap"}
HELD = {"holdout": 0.4}
MEASURED = {"budget": "model", "importance": "measured", "weighting": "gradient", "holdout": 0.25}
FREE = {"budget": "layer", "importance": "alike", "spread": 1}
#: options, and the block and stage that is the last to be done
RUNS = [
    ({**FREE, "weights": "refit"}, 2, "solve"),
    ({"budget": "both", "importance": "loss"}, 2, "solve"),
    (MEASURED, 2, "solve"),
    ({"weights": "refit", **HELD, "dtype": torch.bfloat16}, 1, "calibrate"),
]
#: of two blocks
MORE = [
    ({"budget": "model", "weights": "refit"}, 1, "solve"),
    ({"budget": "model", "target": "dense"}, 1, "solve"),
    ({**FREE, "solver": "swap"}, 1, "solve"),
    ({"budget": "layer", "importance": "loss"}, 1, "calibrate"),
    ({**REFIT, **HELD}, 1, "calibrate"),
    ({**REFIT, **HELD, "dtype": torch.bfloat16}, 1, "solve"),
    ({"target": "dense", **HELD}, 1, "solve"),
    ({"target": "dense", **HELD, "solver": "swap"}, 1, "calibrate"),
]


@pytest.mark.parametrize(
    ("options", "block", "stage", "layers"),
    [*((*x, 3) for x in RUNS), *(pytest.param(*x, 2, marks=pytest.mark.slow) for x in MORE)],
)
def test_resumed_runs_write_the_same_bytes(options, block, stage, layers, tmp_path, monkeypatch):
    more = {**COMMON, **options}
    model = tiny("llama", layers=layers, dtype=more.pop("dtype", torch.float32))
    dense = save(model, tmp_path / "model", shard="20KB")
    whole, out = tmp_path / "whole", tmp_path / "out"
    prune_model(dense, tokens(), output=whole, **more)
    interrupted(dense, out, block, stage, **more)
    monkeypatch.setattr(prune, "allocate", lambda *_, **__: pytest.fail("chosen a second time"))
    for _ in range(2):  # unfinished, and finished
        prune_model(dense, tokens(), output=out, resume=True, **more)
        assert contents(out) == contents(whole)
    assert len(verify_output(out, dense, calibration=tokens()).checked_layers) == 7 * layers


def test_a_changed_file_of_new_weights_is_not_gone_on_with(dense_folder, tmp_path):
    more, out = {**COMMON, "weights": "refit"}, tmp_path / "out"
    interrupted(dense_folder, out, 2, "solve", **more)
    (file,) = out.rglob("00000.weights.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    said = r"00000\.weights\.safetensors: does not match the journal"
    with pytest.raises(ModelError, match=said):
        prune_model(dense_folder, tokens(), output=out, resume=True, **more)

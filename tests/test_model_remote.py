"""Code that comes with a model runs only when asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import save, tiny, tokens

from maskopt import prune_model
from maskopt.errors import ModelError
from maskopt.model.verify import verify_output

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).write_text("yes")


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_remote_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    dense = save(tiny("llama"), tmp_path / "dense")
    marker = tmp_path / "ran"
    (dense / "modeling_own.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((dense / "config.json").read_text())
    config["model_type"] = "own_llama"
    config["auto_map"] = {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    (dense / "config.json").write_text(json.dumps(config))
    options = {"sparsity": 0.5, "solver": "wanda", "min_tokens": 1}
    with pytest.raises(ModelError, match="not run unless `trust_remote_code`"):
        prune_model(dense, tokens(), output=tmp_path / "out", **options)
    assert not marker.exists()
    prune_model(dense, tokens(), output=tmp_path / "out", trust_remote_code=True, **options)
    assert marker.exists()
    verify_output(tmp_path / "out", against=dense)

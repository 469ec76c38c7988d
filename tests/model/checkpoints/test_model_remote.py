"""Code that comes with a model runs only when asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects
from tiny_models import save, save_with_own_code, tiny, tokens
from typer.testing import CliRunner

from maskopt import prune_model
from maskopt.cli import app
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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the hub would have of `owner/own`; a fetch copies what it asks for to `tmp_path / fetched`."""
    stored = save_with_own_code(tmp_path / "stored")
    (stored / "consolidated.safetensors").write_bytes(b"the same weights")
    (stored / "fp16").mkdir()
    (stored / "fp16" / "model.safetensors").write_bytes(b"the same weights")
    (stored / "qwen.tiktoken").write_text("IQ== 0")
    (stored / "weights.bin").write_bytes(b"pickled")

    def snapshot_download(name: str, **patterns: list[str]) -> str:
        assert name == "owner/own"
        names = (str(f.relative_to(stored)) for f in stored.rglob("*") if f.is_file())
        for file in filter_repo_objects(names, **patterns):
            (tmp_path / "fetched" / file).parent.mkdir(exist_ok=True)
            shutil.copy(stored / file, tmp_path / "fetched" / file)
        return str(tmp_path / "fetched")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return stored


def test_of_a_model_on_the_hub_code_is_fetched_only_when_asked_for(
    hub: Path, tmp_path: Path
) -> None:
    options = {"sparsity": 0.5, "solver": "wanda", "min_tokens": 1}
    with pytest.raises(ModelError, match="not run unless `trust_remote_code`"):
        prune_model("owner/own", tokens(), output=tmp_path / "out", **options)
    fetched = {file.name for file in (tmp_path / "fetched").rglob("*")}
    assert {"config.json", "model.safetensors", "qwen.tiktoken"} <= fetched
    assert not fetched & {"modeling_own.py", "weights.bin", "consolidated.safetensors", "fp16"}
    prune_model("owner/own", tokens(), output=tmp_path / "out", trust_remote_code=True, **options)
    assert (tmp_path / "fetched" / "modeling_own.py").exists()
    shutil.rmtree(tmp_path / "fetched")
    verify = ["verify", str(tmp_path / "out"), "--against", "owner/own", "--trust-remote-code"]
    held = CliRunner().invoke(app, verify)
    assert held.exit_code == 0, held.output
    assert "every kept weight is that of owner/own" in " ".join(held.output.split())

"""Code that comes with a model runs only when asked for."""

import shutil

import pytest
from commands import run
from huggingface_hub.utils import filter_repo_objects
from tiny_models import edit_json, save, save_with_own_code, tiny, tokens

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
CLASSES = {
    "AutoConfig": "modeling_own.OwnConfig",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}
OPTIONS = {"sparsity": 0.5, "solver": "wanda", "min_tokens": 1}


def test_remote_code(tmp_path, monkeypatch):
    cache = "transformers.dynamic_module_utils.HF_MODULES_CACHE"
    monkeypatch.setattr(cache, str(tmp_path / "modules"))
    dense, marker = save(tiny("llama"), tmp_path / "dense"), tmp_path / "ran"
    (dense / "modeling_own.py").write_text(CODE.format(marker=str(marker)))
    edit_json(dense / "config.json", lambda c: c.update(model_type="own_llama", auto_map=CLASSES))
    with pytest.raises(ModelError, match="not run unless `trust_remote_code`"):
        prune_model(dense, tokens(), output=tmp_path / "out", **OPTIONS)
    assert not marker.exists()
    prune_model(dense, tokens(), output=tmp_path / "out", trust_remote_code=True, **OPTIONS)
    assert marker.exists()
    verify_output(tmp_path / "out", against=dense)


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """Where a fetch from the hub copies what it asks for of the model `owner/own`."""
    stored, fetched = save_with_own_code(tmp_path / "stored"), tmp_path / "fetched"
    (stored / "fp16").mkdir()
    for name in ("consolidated.safetensors", "fp16/model.safetensors"):
        (stored / name).write_bytes(b"the same weights")
    (stored / "qwen.tiktoken").write_text("IQ== 0")
    (stored / "weights.bin").write_bytes(b"pickled")

    def snapshot_download(name, **patterns):
        assert name == "owner/own"
        names = (str(f.relative_to(stored)) for f in stored.rglob("*") if f.is_file())
        for file in filter_repo_objects(names, **patterns):
            (fetched / file).parent.mkdir(exist_ok=True)
            shutil.copy(stored / file, fetched / file)
        return str(fetched)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return fetched


def test_of_a_model_on_the_hub_code_is_fetched_only_when_asked_for(fetched, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ModelError, match="not run unless `trust_remote_code`"):
        prune_model("owner/own", tokens(), output=out, **OPTIONS)
    found = {file.name for file in fetched.rglob("*")}
    assert {"config.json", "model.safetensors", "qwen.tiktoken"} <= found
    assert not found & {"modeling_own.py", "weights.bin", "consolidated.safetensors", "fp16"}
    prune_model("owner/own", tokens(), output=out, trust_remote_code=True, **OPTIONS)
    assert (fetched / "modeling_own.py").exists()
    shutil.rmtree(fetched)
    said = run("verify", out, "--against", "owner/own", "--trust-remote-code")
    assert "every kept weight is that of owner/own" in " ".join(said.split())

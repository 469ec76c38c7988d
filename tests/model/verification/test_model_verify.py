"""What `maskopt verify` takes for right: honest folders of many kinds, and what of them is claimed."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from commands import run
from forging import copied, edit, forge_manifest, prune_by, shuffled
from test_verify_forgeries import TRAIN, WANDA
from tiny_models import FAMILIES, edit_json, save, tiny, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from maskopt import NM, prune_model
from maskopt.errors import VerificationError
from maskopt.model.report import read_manifest
from maskopt.model.verify import semi_structured, verify_output
from maskopt.model.workspace import MANIFEST


def test_masks_of_another_run_are_claims(dense_folder, pruned_folder, tmp_path):
    """Random masks under the errors of a real run: nobody can know without calibration."""
    for name in ("README.md", "LICENSE", ".gitattributes"):
        (copied(pruned_folder, tmp_path / name) / name).write_text("no loader takes it")
        verified = verify_output(tmp_path / name / "out", against=dense_folder)
        assert verified.rows == 3 * (32 * 2 + 16 * 2 + 48 * 2 + 32)
    result = copied(pruned_folder, tmp_path)
    prune_by(result, dense_folder, shuffled)
    verified = verify_output(result, against=dense_folder)
    assert {"errors", "statuses", "bounds"} <= set(verified.claimed)
    assert not verified.checked_layers


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_two_four_needs_a_gpu_to_be_converted(dense_folder, tmp_path):
    out = tmp_path / "out"
    prune_model(dense_folder, tokens(), pattern=NM(keep=2, of=4), solver="wanda", output=out)
    with pytest.raises(VerificationError, match="CUDA"):
        semi_structured(out)
    assert "skipped, there is no CUDA device" in run("verify", out)
    assert "skipped" not in run("verify", out, "--no-semi-structured")
    run("verify", out, "--semi-structured", fails=VerificationError)


@pytest.mark.cuda
def test_pytorch_accepts_two_four(tmp_path):
    config = LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    dense = save(LlamaForCausalLM(config), tmp_path / "dense")
    prune_model(dense, tokens(), pattern=NM(keep=2, of=4), solver="wanda", output=tmp_path / "out")
    assert len(semi_structured(tmp_path / "out")) == 7


def test_what_lies_beside_a_model_never_fails_its_prune(tmp_path, caplog):
    """Names that not every system takes, and what a loader could take for weights: not copied."""
    dense = save(tiny("llama"), tmp_path / "dense")
    odd = ["notes 10:30.txt", "what?.json", "shot\u202fAM.md"]
    more = ["LICENSE.docx", "LICENSE.safetensors", "adapter_notes.txt"]
    for name in (*odd, *more, "LICENSE", "NOTICE.md"):
        (dense / name).write_text("{}")
    prune_model(dense, tokens(), output=tmp_path / "out", sparsity=0.5, solver="wanda")
    verify_output(tmp_path / "out", dense)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "NOTICE.md"} < names
    assert not names & {*odd, *more}
    assert all(f"{name}: is not copied" in caplog.text for name in odd)


def test_a_model_that_was_pruned_in_memory(dense, tmp_path):
    """Its configuration must mean the same; that its tokenizer does is claimed."""
    out, original = tmp_path / "saved", Path(shutil.copytree(dense, tmp_path / "dense"))
    model, tokenizer = (x.from_pretrained(dense) for x in (AutoModelForCausalLM, AutoTokenizer))
    text = {"calibration": ["some text " * 40], "samples": 4, "seq_len": 16}
    prune_model(model, tokenizer, output=out, **WANDA, **text)
    more = {"transformers_version": "5.0.0"}
    edit_json(original / "config.json", lambda c: c.update(torch_dtype=c.pop("dtype"), **more))
    claimed = verify_output(out, against=original).claimed
    assert "configuration and tokenizer" in claimed
    assert "kept weights" not in claimed
    for key, value in (
        ("rope_theta", 3.0),
        ("hidden_act", "gelu"),
        ("auto_map", {"AutoModel": "x.Y"}),
    ):
        changed = copied(out, tmp_path / key)
        edit_json(changed / "config.json", edit(key, to=value))
        forge_manifest(changed)
        with pytest.raises(VerificationError, match=r"config\.json"):
            verify_output(changed, against=original)


def test_leaving_the_digest_out_hides_nothing(dense, tmp_path):
    """Without the model's digest a result counts as saved from memory: what may differ is claimed."""
    out = tmp_path / "out"
    prune_model(dense, tokens(), output=out, **WANDA)
    sound = verify_output(out, against=dense)
    forge_manifest(out, lambda m: m["fingerprint"].pop("model"))
    assert verify_output(out, against=dense) == sound
    edit_json(out / "tokenizer.json", lambda t: t["model"]["vocab"].update(x=1))
    forge_manifest(out)
    assert "configuration and tokenizer" in verify_output(out, against=dense).claimed
    edit_json(out / "tokenizer_config.json", lambda t: t.update(auto_map={"AutoTokenizer": "x"}))
    forge_manifest(out)
    with pytest.raises(VerificationError, match="asks to run code"):
        verify_output(out, against=dense)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX links")
def test_a_result_in_the_hubs_cache(dense_folder, pruned_folder, tmp_path):
    """There the files are links into a folder of blobs."""
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in Path(shutil.copytree(pruned_folder, tmp_path / "blobs")).iterdir():
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    verify_output(snapshot, against=dense_folder)


@pytest.mark.parametrize("weights", ["refit", "reconstruct"])
def test_bounds_of_masks_that_were_found_for_kept_weights(weights, dense_folder, tmp_path):
    """New weights cost less than any mask could whose weights are kept."""
    out, more = tmp_path / "out", {**WANDA, "solver": "sdp", "weights": weights}
    more["include"] = ["layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"]
    if weights == "reconstruct":
        more |= {"holdout": 0.34, "reconstruct": {"epochs": 1, "begin": "refit"}}
    report = prune_model(dense_folder, tokens(), output=out, **more)
    assert any(layer.lower_bound > layer.error for layer in report.layers)
    verify_output(out, dense_folder)
    forge_manifest(
        out, lambda m: m["layers"][0].update(lower_bound=1.1 * m["layers"][0]["error_kept"])
    )
    with pytest.raises(VerificationError, match="lower bound above its error"):
        verify_output(out, dense_folder)


def test_refitted_weights_have_no_bound(dense_folder, tmp_path):
    """It would be of the damped error, and the reported one is without the damping."""
    report = prune_model(
        dense_folder, tokens(), output=tmp_path / "out", solver="branch", weights="refit",
        damping=1.0, include=["layers.0.self_attn.k_proj"], solver_options={"node_limit": 3},
        sparsity=0.5, min_tokens=1,
    )  # fmt: skip
    assert {layer.chosen_for for layer in report.layers} == {"refitted"}
    assert {layer.lower_bound for layer in report.layers} == {0.0}
    verify_output(tmp_path / "out", dense_folder)


#: LongCat's blocks have two attentions in one child
PAIRS = [(f, g) for f in FAMILIES for g in ("block", "part") if (f, g) != ("longcat_flash", "part")]
MAIN = [("llama", "block"), ("mixtral", "part"), ("gpt2", "part")]


@pytest.mark.parametrize(
    ("family", "granularity"),
    [*MAIN, *(pytest.param(*x, marks=pytest.mark.slow) for x in PAIRS if x not in MAIN)],
)
def test_trained_folders_of_every_family_hold(family, granularity, tmp_path):
    dense, out = save(tiny(family), tmp_path / "dense"), tmp_path / "out"
    how = {"reconstruct": {**TRAIN, "granularity": granularity}, "weights": "reconstruct"}
    prune_model(dense, tokens(8), output=out, **{**WANDA, "min_tokens": 8}, **how, holdout=0.25)
    assert any(part["epoch"] for part in read_manifest(out / MANIFEST)["parts"])
    verify_output(out, dense)

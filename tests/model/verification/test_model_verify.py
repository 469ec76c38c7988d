"""What `maskopt verify` takes for right, what of it is claimed, and what the prune's text checks again."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from commands import run, shows
from forging import copied, edit, fails, forge_manifest, prune_by, says, shuffled
from prunes import but_slow, manifest_of, prune, slow
from test_verify_forgeries import TRAIN
from tiny_models import FAMILIES, SHARED, edit_json, patched, save, tiny, tokens
from transformers import LlamaConfig, LlamaForCausalLM

from maskopt import NM
from maskopt.errors import MaskoptError, ModelError, OptionError, VerificationError
from maskopt.models.checkpoints.schema import INDEX
from maskopt.models.verification import manifest
from maskopt.models.verification.verify import semi_structured, verify_model

SWAP, TWO_FOUR = {"solver": "swap", "start": "wanda"}, {"sparsity": NM(keep=2, of=4)}
DATA = tokens()
IN_ORDER = {"true_sequential": True}
EVERY = [{**TWO_FOUR, "calibrate_on": "dense", "gram_shrinkage": 0.1}]
EVERY += [{**IN_ORDER, "dtype": "bfloat16", "threads": 1}]
EVERY += [slow({"include": ["mlp"], "exclude": ["layers.1"]})]
#: LongCat's blocks have two attentions in one child
PAIRS = [(x, "part" if x != "longcat_flash" else "block") for x in FAMILIES]
# by whole blocks where these have another name or form than Llama's
WHOLE = "llama mixtral gpt2 opt gpt_neox falcon bloom mamba bamba gemma3"
PAIRS += [(x, "block") for x in WHOLE.split()]
MAIN = [("llama", "block"), ("mixtral", "part"), ("gpt2", "part")]
OTHERS = [("gpt2", "true_sequential"), ("llama4", "true_sequential"), ("mixtral", "all_experts")]
OTHERS += [slow(x, "true_sequential") for x in ("mixtral", "deepseek_v3", "bamba")]
OTHERS += [slow("deepseek_v3", "all_experts")]


def test_masks_of_another_run_are_claims(dense_folder, pruned_folder, tmp_path):
    """Random masks under the errors of a real run: nobody can know without calibration."""
    result = copied(pruned_folder, tmp_path)
    for name in ("README.md", "LICENSE", ".gitattributes"):
        (result / name).write_text("no loader takes it")
        verified = verify_model(result, original=dense_folder)
        assert verified.rows == 3 * (32 * 2 + 16 * 2 + 48 * 2 + 32)
    prune_by(result, dense_folder, shuffled)
    verified = verify_model(result, original=dense_folder)
    assert {"errors", "statuses", "bounds"} <= set(verified.claimed)
    assert not verified.checked_layers
    # in the hub's cache files are links to blobs
    (snapshot := tmp_path / "snapshots" / "abc").mkdir(parents=True)
    for file in Path(shutil.copytree(pruned_folder, tmp_path / "blobs")).iterdir():
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    verify_model(snapshot, original=dense_folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_two_four_needs_a_gpu_to_be_converted(dense_folder, tmp_path):
    prune(dense_folder, out := tmp_path / "out", **TWO_FOUR)
    fails(VerificationError, "CUDA", semi_structured, out)
    assert "skipped, there is no CUDA device" in run("verify", out)
    assert "skipped" not in run("verify", out, "--no-semi-structured")
    run("verify", out, "--semi-structured", fails=VerificationError)


@pytest.mark.cuda
def test_pytorch_accepts_two_four(tmp_path):
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    dense = save(LlamaForCausalLM(LlamaConfig(**SHARED | wide)), tmp_path / "dense")
    prune(dense, tmp_path / "out", **TWO_FOUR)
    assert len(semi_structured(tmp_path / "out")) == 7


def test_what_lies_beside_a_model_never_fails_its_prune(tmp_path, caplog):
    dense = save(tiny("llama"), tmp_path / "dense")
    odd = ["notes 10:30.txt", "what?.json", "shot\u202fAM.md"]
    more = ["LICENSE.docx", "LICENSE.safetensors", "adapter_notes.txt"]
    # a loader would look for what indices of other weights name
    more += ["pytorch_model.bin.index.json", "model.fp16.safetensors.index.json", INDEX]
    for name in (*odd, *more, "LICENSE", "NOTICE.md"):
        (dense / name).write_text('{"metadata": {}, "weight_map": {}}')
    prune(dense, tmp_path / "out")
    verify_model(tmp_path / "out", dense)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "NOTICE.md"} < names
    assert not names & {*odd, *more}
    assert all(f"{name}: is not copied" in caplog.text for name in odd)


def test_configuration_and_tokenizer_are_those_of_the_original(dense, tmp_path):
    prune(dense, out := tmp_path / "out")
    auto_map = {"AutoModel": "x.Y"}
    for key, value in (("rope_theta", 3.0), ("hidden_act", "gelu"), ("auto_map", auto_map)):
        changed = copied(out, tmp_path / key)
        edit_json(changed / "config.json", edit(key, to=value))
        forge_manifest(changed)
        fails(VerificationError, r"config\.json", verify_model, changed, original=dense)
    assert "configuration and tokenizer" in verify_model(out, original=dense).checked
    without = copied(out, tmp_path / "without")
    forge_manifest(without, lambda m: m["fingerprint"].pop("model"))
    fails(VerificationError, "damaged or was changed", verify_model, without, original=dense)
    edit_json(out / "tokenizer.json", lambda t: t["model"]["vocab"].update(x=1))
    forge_manifest(out)
    said = r"tokenizer\.json: differs from the original"
    fails(VerificationError, said, verify_model, out, original=dense)
    edit_json(out / "tokenizer_config.json", lambda t: t.update(auto_map={"AutoTokenizer": "x"}))
    forge_manifest(out)
    fails(VerificationError, "asks to run code", verify_model, out)


@pytest.mark.parametrize("update", ["least-squares", "blockwise"])
def test_bounds_of_masks_that_were_found_for_kept_weights(update, dense_folder, tmp_path):
    """New weights cost less than any mask could whose weights are kept."""
    more = {"solver": "sdp", "update": update, "include": ["layers.0.self_attn.v_proj"]}
    if update == "blockwise":
        more |= {"holdout": 0.34, "training": {"epochs": 1, "begin": "least-squares"}}
    report = prune(dense_folder, out := tmp_path / "out", **more)
    assert any(layer.lower_bound > layer.error for layer in report.layers)
    verify_model(out, dense_folder)
    forge_manifest(out, edit("layers", 0, "lower_bound", to=1.1 * report.layers[0].error_kept))
    fails(VerificationError, "lower bound above its error", verify_model, out, dense_folder)
    if update == "least-squares":  # with a damping, of which the reported error is without
        how = {"solver": "branch", "solver_options": {"node_limit": 1}, "damping": 1.0}
        more |= {"include": ["layers.0.self_attn.k_proj"], **how}
        report = prune(dense_folder, out, overwrite=True, **more)
        assert {(x.objective, x.lower_bound) for x in report.layers} == {(update, 0.0)}
        verify_model(out, dense_folder)


@pytest.mark.parametrize("family", but_slow(["mixtral", "gpt2"], FAMILIES))
def test_trained_folders_of_every_family_hold(family, tmp_path):
    dense, out = save(tiny(family, layers=2), tmp_path / "dense"), tmp_path / "out"
    prune(dense, out, min_tokens=8, holdout=0.34, training=TRAIN, update="blockwise")
    assert any(block["epoch"] for block in manifest_of(out)["trained"])
    verify_model(out, dense)


def refused(out, dense, said="", data=DATA, **options):
    fails(VerificationError, said or None, verify_model, out, dense, calibration=data, **options)


def check(out, dense, data=DATA, **options):
    verified = verify_model(out, dense, calibration=data, **options)
    assert len(verified.checked_layers) == verified.layers
    return verified


@pytest.fixture(scope="module")
def swapped(dense_folder, tmp_path_factory):
    prune(dense_folder, out := tmp_path_factory.mktemp("swapped") / "out", **SWAP)
    return out


def test_what_a_run_states_holds(swapped, dense_folder):
    verified = check(swapped, dense_folder)
    assert verified.layers == 21
    assert {"errors", "statuses"} <= set(verified.checked)
    assert set(verified.claimed) == {"options"}
    refused(swapped, dense_folder, "is not what the model was calibrated on", tokens(seed=1))
    fails(VerificationError, "needs `original`", verify_model, swapped, calibration=DATA)
    fails(VerificationError, "give both", verify_model, swapped, dense_folder, layers=["mlp"])
    given = {"calibration": DATA, "layers": ["mpl"]}
    fails(ModelError, "no layer matches", verify_model, swapped, dense_folder, **given)


@pytest.mark.parametrize("options", EVERY)
def test_under_every_option(options, dense_folder, tmp_path):
    prune(dense_folder, tmp_path / "out", **SWAP, **options)
    check(tmp_path / "out", dense_folder, threads=2)


def test_training_that_began_from_the_weights_of_a_solver(small, tmp_path):
    given = {"solver": "sparsegpt", "solver_options": {"update": True}, "update": "blockwise"}
    given |= {"holdout": 0.3, "training": {"epochs": 1, "begin": "least-squares"}}
    for name, more in (("blocks", {}), ("rounds", IN_ORDER)):
        prune(small, tmp_path / name, **given, **more)
    assert "errors" in check(tmp_path / "blocks", small).claimed
    refused(tmp_path / "rounds", small, "it cannot be checked on text")
    forge_manifest(tmp_path / "blocks", edit("layers", 3, "error_kept", to=1e-3))
    refused(tmp_path / "blocks", small, "before its weights were updated")


@pytest.mark.parametrize(("family", "how"), OTHERS)
def test_other_families(family, how, tmp_path):
    """Fused, split and transposed experts; some layers saw too few tokens."""
    dense = save(tiny(family, layers=2), tmp_path / "dense")
    prune(dense, tmp_path / "out", min_tokens=48, **{how: True})
    check(tmp_path / "out", dense)


def test_experts_that_are_excluded_or_pruned_by_magnitude(tmp_path):
    dense, out = save(tiny("mixtral", layers=2), tmp_path / "dense"), tmp_path / "out"
    prune(dense, out, exclude=["experts.0"])
    check(out, dense)
    forge_manifest(out, edit("fingerprint", "options", "exclude", to=[]))
    fails(VerificationError, r"experts\.0", verify_model, out, dense)
    prune(dense, out, overwrite=True, min_tokens=48)
    layers = manifest_of(out)["layers"]
    fallbacks = [x["name"] for x in layers if x["fallback"]]
    assert 0 < len(fallbacks) < len(layers)
    assert sorted(verify_model(out, dense).checked_layers) == sorted(fallbacks)
    assert verify_model(out).checked_layers == ()
    first = next(i for i, x in enumerate(layers) if x["fallback"])
    forge_manifest(out, edit("layers", first, "error", to=lambda x: 0.99 * x))
    fails(VerificationError, "pruned by magnitude, states an error of", verify_model, out, dense)
    # other masks, with the error that is theirs
    prune_by(out, dense, shuffled)
    with pytest.raises(VerificationError, match="add up to") as refusal:
        verify_model(out, dense)
    stated, true = re.findall(r"\d[\d.e-]*\d", str(refusal.value).partition("an error of")[2])
    forge_manifest(
        out, edit("layers", first, "error", to=lambda x: x + float(true) - float(stated))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "SUM_TOLERANCE", 1e-6)
        fails(VerificationError, "is not pruned by magnitude as it says", verify_model, out, dense)


def test_a_status_that_does_not_hold(dense_folder, pruned_folder, tmp_path):
    out, name = copied(pruned_folder, tmp_path), "model.layers.1.mlp.up_proj"
    (index,) = (i for i, layer in enumerate(manifest_of(out)["layers"]) if layer["name"] == name)
    forge_manifest(out, edit("layers", index, "statuses", to={"swap-optimal": 48}))
    verify_model(out, dense_folder, calibration=tokens(), layers=["layers.0", "down_proj"])
    refused(out, dense_folder, rf"\A.*{name}.*keeping input.*\Z", layers=["up_proj"])


def test_optima_stay_claims_and_the_precision_sets_the_tolerance(swapped, dense_folder, tmp_path):
    """Half precision is believed of a forger, and the result says that it was."""
    result = copied(swapped, tmp_path)
    layer = manifest_of(result)["layers"][0]
    optimal = {"statuses": {"optimal": layer["rows"]}, "lower_bound": layer["error"]}
    forge_manifest(result, edit("layers", 0, to={**layer, **optimal}))
    verified = check(result, dense_folder)
    assert {"bounds", "optima"} <= set(verified.claimed)
    assert {"errors", "statuses"} <= set(verified.checked)
    assert verified.tolerance == 1e-5
    forge_manifest(result, edit("fingerprint", "dtype", to="bfloat16"))
    assert check(result, dense_folder).tolerance == 1e-2


#: where and how the manifest is forged
EDITS = [
    ("fingerprint", "device", "cuda"), ("fingerprint", "device", "tpu"),
    ("fingerprint", "dtype", "float31"), ("fingerprint", "options", "calibrate_on", "dense"),
    ("fingerprint", "options", "true_sequential", True),
    ("fingerprint", "options", "gram_shrinkage", 0.5), ("fingerprint", "calibration", "length", "x"),
    ("fingerprint", "calibration", "sha256", "0" * 64), ("layers", 5, "error", 1e-3),
    ("layers", 5, "error", lambda x: x * (1 + 3e-5)), ("layers", 5, "energy", lambda x: 2 * x),
    ("layers", 5, "energy_held", 1.0), ("layers", 5, "tokens", 97),
]  # fmt: skip
#: how to forge, and what is said when errors are computed again; values of no kind are refused at once
SAID = {"cuda": "was on a GPU", "float31": "damaged or was changed", "x": "damaged or was changed"}
FORGED = [(says(edit(*x[:-1], to=x[-1])), SAID.get(str(x[-1]), "")) for x in EDITS]
FORGED.append((lambda out, dense: prune_by(out, dense, shuffled), "states an error of"))


@pytest.mark.parametrize(("forge", "said"), FORGED)
def test_a_forged_run_is_refused(forge, said, swapped, dense_folder, tmp_path):
    if "GPU" in said and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    forge(result := copied(swapped, tmp_path), dense_folder)
    if "damaged" not in said:
        assert "errors" in verify_model(result, dense_folder).claimed
    refused(result, dense_folder, said)


def test_bad_samples_are_left_out_again(tmp_path):
    """Gemma multiplies embeddings by the root of their width: token 7 becomes infinite."""
    huge = patched(tiny("gemma", layers=2), "model.embed_tokens.weight", lambda p: p[7].fill_(3e38))
    dense, out, data = save(huge, tmp_path / "dense"), tmp_path / "out", tokens()
    data[data == 7] = 8
    data[2, 3] = 7
    report = prune(dense, out, data, **SWAP, skip_bad_samples=True)
    assert [bad["sample"] for bad in report.bad_samples] == [2]
    check(out, dense, data)
    forge_manifest(out, edit("bad_samples", 0, "sample", to=3))
    refused(out, dense, "other samples", data)
    # the dense model walks along while blocks are trained, and not while they are checked
    data, out = tokens(12), tmp_path / "trained"
    token = int(data[3, 2])
    huge = patched(tiny("gpt2", layers=2), "transformer.wte.weight", lambda p: p[token].fill_(3e38))
    save(huge, dense := tmp_path / "gpt2")
    options = {**SWAP, "skip_bad_samples": True, "holdout": 0.25}
    report = prune(dense, out, data, **options, update="blockwise", training={"epochs": 1})
    assert {bad["layer"] for bad in report.bad_samples} == {"transformer.h.0 (dense)"}
    verified = verify_model(out, dense, calibration=data)
    assert "errors" in verified.checked
    assert "windows left out" in verified.claimed


def test_from_the_command_line(dense, tmp_path):
    text, other, out = tmp_path / "text.txt", tmp_path / "other.txt", tmp_path / "out"
    text.write_text("Pack my box with five dozen liquor jugs. " * 40)
    other.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    how = "--sparsity 0.5 --start wanda --samples 4 --seq-len 32 --min-tokens 8 --seed 3"
    run("prune", dense, *how.split(), "--calibration", text, "--output", out)
    verify = ["verify", out, "--original", dense]
    claimed = "(checked); errors, statuses, Wanda's errors, bounds, options: claimed"
    shows(run(*verify), "sparsity 0.5000, every kept weight is that of", claimed)
    errors, on = "errors (to 1e-05) and statuses of", [*verify, "--calibration", text]
    assert f"{errors} 21 layers (checked); options: claimed" in run(*on)
    shown = run(*on, "--include", "q_proj,layers.0.mlp")
    others = "of the other 15, Wanda's errors, options: claimed"
    shows(shown, f"{errors} 6 layers (checked); errors and statuses of", others)
    shown = run(*on, "--include", "layers.0.mlp", "--include", "layers.1.mlp.up_proj,q_proj")
    assert "of 7 layers (checked)" in shown
    said = run("verify", out, "--include", "mlp", fails=MaskoptError)
    assert "--include chooses what --calibration" in said
    said = run(*verify, "--calibration", other, fails=MaskoptError)
    assert "other.txt: is not what the model was calibrated on" in said
    said = run("verify", out, "--strict", fails=OptionError)
    assert said == "--strict does not apply to a pruned model"
    names = ("--original", "--calibration", "--include", "--text-field")
    flags = [["--semi-structured"], ["--no-semi-structured"], ["--threads", 1]]
    for given in (*flags, *([name, "x"] for name in names)):
        said = run("verify", "a.npz", "solution.npz", *given, fails=OptionError)
        assert said == f"{given[0].replace('--no-', '--')} does not apply to a solution"

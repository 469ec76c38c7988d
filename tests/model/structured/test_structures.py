"""Channels, heads, blocks and experts removed: a folder that computes what is left, or a refusal."""

import itertools
import json
import shutil
from functools import partial

import forging
import pytest
import tiny_models
import torch
import transformers
from commands import run, shows
from forging import fails, record_of
from prunes import but_slow, contents, files, slow, smaller
from safetensors.torch import load_file
from tiny_models import edit_json, inputs_of, logits_of, logs, reload, save, tiny, tokens
from transformers import AutoModelForCausalLM

from maskopt import LayerProblem, Unstructured, distill_model, open_job, verify
from maskopt.core.gram import Gram
from maskopt.errors import MaskoptError, ModelError, OptionError, VerificationError
from maskopt.models.architecture.blocks import mixtures_of
from maskopt.models.blockwise import activations
from maskopt.models.blockwise.activations import _reserved
from maskopt.models.checkpoints.checkpoint import open_checkpoint, open_safe
from maskopt.models.checkpoints.schema import INDEX, MANIFEST
from maskopt.models.checkpoints.workspace import HIDDEN
from maskopt.models.options.walk import WalkOptions
from maskopt.models.structured import blocks as removal, channels as shrinking
from maskopt.models.structured.blocks import Effects, exchanges, place, search_sets
from maskopt.models.structured.experts import costs
from maskopt.models.verification.verify import verify_model

KEPT = {"channels": 0.2, "update": "none"}
ALONE = {"solver": "tabu", "solver_options": {"seed": 1}, "certify": True}
WALKS = {"holdout": 0.5, "include": ["q_proj"], "skip_bad_samples": True, "samples": 8, "seed": 1}


def check_same(less, model, **close):
    found, expected = (logits_of(x, tokens(3, seed=5)) for x in (less, model))
    torch.testing.assert_close(found, expected, **{"rtol": 1e-4, "atol": 1e-5, **close})


def set_zeros(model, less, record):
    """The consumers' removed columns become zero, their kept ones as they were written."""
    for consumer, kept in record["kept"].items():
        weight, left = (m.get_submodule(consumer).weight.data for m in (model, less))
        width = left.shape[1] // len(kept)
        stays = torch.zeros(weight.shape[1] // width, dtype=torch.bool)
        stays[kept] = True
        columns = stays.repeat_interleave(width)
        assert left.shape[1] == int(columns.sum())
        weight.zero_()
        weight[:, columns] = left


def pass_on(model, gone):
    for index in gone:
        model.model.layers[index].forward = lambda hidden_states, *_, **__: hidden_states
    return model


def reroute(model, record):
    """Routers choose among the kept experts alone: tokens go to the next best of them."""
    for name, module in model.named_modules():
        if f"{name}.experts" in record["kept"]:
            stays = torch.tensor(record["kept"][f"{name}.experts"])

            def choose(gate, _, output, stays=stays):
                value, place = output[0][:, stays].float().softmax(-1).topk(gate.top_k, dim=-1)
                return output[0], value / value.sum(-1, keepdim=True), stays[place]

            module.gate.register_forward_hook(choose)


CHANNELS, HEADS = {"channels": 0.25}, {"heads": 0.5}
#: what is removed: families of the default run, and all others
KINDS = {
    "channels and heads": ({**CHANNELS, **HEADS}, "llama phi3", "gemma3 qwen2 qwen3 phi cohere glm"),
    "channels": (CHANNELS, "opt", "gemma gpt_neox falcon olmo2 stablelm"),
    "heads": (HEADS, "mixtral", "llama4"),
    "blocks": (
        {"count": 1, "windows": 2}, "llama gpt2 qwen3_moe bamba",
        "gemma3 qwen2 qwen3 opt phi3 gpt_neox falcon bloom cohere olmo2 glm mixtral llama4",
    ),
    "experts": ({"share": 0.25}, "mixtral gpt_oss", "qwen3_moe"),
}  # fmt: skip
for kind, first in (("channels and heads", "llama"), ("channels", "")):  # with unchanged weights
    what, *families = KINDS[kind]
    KINDS[f"{kind}, kept"] = ({**what, "update": "none"}, first, " ".join(families))
EACH = [(kind, family) for kind, case in KINDS.items() for family in case[1].split()]
ALL = [(kind, x) for kind, case in KINDS.items() for x in " ".join(case[1:]).split()]


@pytest.mark.parametrize(("kind", "family"), but_slow(EACH, dict.fromkeys(ALL)))
def test_what_is_written_computes_what_is_left(kind, family, tmp_path):
    layers, out = 3 if kind in ("blocks", "experts") else 2, tmp_path / "out"
    dense = save(tiny(family, layers=layers), tmp_path / "dense", shard="30KB")
    report = smaller(dense, out, **KINDS[kind][0])
    model, less, record, close = reload(dense), reload(out), record_of(out), {}
    config = less.config.get_text_config()
    sizes = [sum(p.numel() for p in m.parameters()) for m in (less, model)]
    assert sizes[0] < sizes[1]
    found = verify_model(out, dense)
    assert "kept weights" in found.checked
    assert verify_model(out).claimed[found.updated > 0] == "weights"
    if kind == "blocks":
        if family == "bamba" or not hasattr(getattr(model, "model", None), "layers"):
            return  # Bamba without its one attention is not called as the others are
        pass_on(model, report.removed)
        close = {"rtol": 1e-3, "atol": 1e-4}
    elif kind == "experts":
        assert config.num_local_experts == 3
        for layer in report.layers:
            assert (layer.pattern, layer.statuses) == ("3 of 4 experts", {"optimal": 1})
            assert layer.lower_bound == pytest.approx(layer.error_kept, rel=1e-5, abs=1e-12)
            assert 0 <= layer.relative < 1  # 0: an expert that no token is sent to
        assert any(layer.relative > 0 for layer in report.layers)
        if family != "mixtral":
            return
        reroute(model, record)
    else:
        set_zeros(model, less, record)
        assert len(record["kept"]) == (4 if "and" in kind else 2)
        assert found.updated == (0 if "kept" in kind else len(record["kept"]))
        if "heads" in kind:
            assert 2 * config.num_attention_heads == model.config.num_attention_heads
    check_same(less, model, **close)


#: blocks together with channels and heads, in one folder; the families of the default run, and others
BOTH = ["llama", "gemma3"], ["phi3", "qwen2", "qwen3", "phi", "cohere", "glm"]


@pytest.mark.parametrize("family", but_slow(BOTH[0], BOTH[0] + BOTH[1]))
def test_several_kinds_of_cut_in_one_folder(family, tmp_path, monkeypatch):
    if family == "llama":  # a block between others, so that those after it have new names
        monkeypatch.setattr(shrinking, "_choose_blocks", lambda *_: [1])
    dense, out = save(tiny(family, layers=3), tmp_path / "dense", shard="30KB"), tmp_path / "out"
    report = smaller(dense, out, **CHANNELS, **HEADS, blocks=1, windows=2)
    (gone,) = report.fingerprint["options"]["removed"]
    model, less, record = reload(dense), reload(out), record_of(out)
    assert less.config.num_hidden_layers == 2
    assert len(report.layers) == len(record["kept"]) == 4
    verified = verify_model(out, dense)
    assert "kept weights" in verified.checked
    assert verified.updated == 4
    place = {old: old for old in record["kept"]}
    for old in place:
        index = int(old.split(".")[2])
        assert index != gone
        place[old] = old.replace(f".{index}.", f".{index - (index > gone)}.", 1)
    for old, kept in record["kept"].items():
        weight = model.get_submodule(old).weight.data
        left = less.get_submodule(place[old]).weight.data
        columns = torch.zeros(weight.shape[1] * len(kept) // left.shape[1], dtype=torch.bool)
        columns[kept] = True
        columns = columns.repeat_interleave(weight.shape[1] // len(columns))
        weight.zero_()
        weight[:, columns] = left
    check_same(less, pass_on(model, {gone}), rtol=1e-3, atol=1e-4)
    # and trained
    distill_model(out, dense, tokens(16), output=tmp_path / "trained", **TRAINING)
    assert verify_model(tmp_path / "trained", dense).checked == verified.checked
    for change, said in (
        (forging.options(removed=[]), "is only in the folder|what stays of"),
        (
            forging.options(removed=[(gone + 1) % 3]),
            "is no layer|what stays of|is not the original's",
        ),
    ):
        forged = shutil.copytree(out, tmp_path / "forged", dirs_exist_ok=True)
        forging.forge_manifest(forged, change)
        fails(VerificationError, said, verify_model, forged, dense)


def test_several_kinds_of_cut_resume_to_the_same_bytes(dense_folder, data, tmp_path):
    what = {**CHANNELS, **HEADS, "blocks": 1, "windows": 2}
    smaller(dense_folder, tmp_path / "whole", **what)

    solved = []

    def halt(event):
        if event.stage == "solve" and event.done == 2:
            solved.append(event.block)
            if len(solved) == 2:
                raise KeyboardInterrupt

    out = tmp_path / "out"
    fails(KeyboardInterrupt, None, smaller, dense_folder, out, on_progress=halt, **what)
    smaller(dense_folder, out, resume=True, **what)
    assert contents(out) == contents(tmp_path / "whole")
    smaller(dense_folder, out, resume=True, **what)
    another = {**what, "channels": 0.5}
    fails(ModelError, "another run", smaller, dense_folder, out, resume=True, **another)
    # the command, and its manifest as the configuration of another run
    words = ["--calibration", data, "--output"]
    cut = ["--channels", 0.25, "--heads", 0.5, "--blocks", 1]
    shows(
        run("prune-structured", dense_folder, *cut, *words, tmp_path / "one"), "36 of 48 channels"
    )
    again = ["--config", tmp_path / "one" / MANIFEST]
    run("prune-structured", dense_folder, *again, *words, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert "removed whole blocks" in (tmp_path / "one" / "README.md").read_text()


TRAINING = {"epochs": 2, "learning_rate": 0.001, "holdout": 0.25}
TRAINED = [("channels and heads", x) for x in ("llama", "phi3")] + [("experts", "mixtral")]
TRAINED += [("blocks", "gpt2")]


@pytest.mark.parametrize(("kind", "family"), but_slow(TRAINED, dict.fromkeys(ALL)))
def test_a_smaller_model_is_trained_towards_the_dense_one(kind, family, tmp_path):
    layers = 3 if kind in ("blocks", "experts") else 2
    dense = save(tiny_models.loud(family, layers=layers), tmp_path / "dense", shard="30KB")
    small, out = tmp_path / "small", tmp_path / "out"
    smaller(dense, small, **KINDS[kind][0])
    found = distill_model(small, dense, tokens(48), output=out, **TRAINING)
    assert found.after.held < found.before.held or not found.epoch
    assert found.epoch or family in ("llama4", "deepseek_v3")
    shapes = [{n: p.shape for n, p in reload(x).named_parameters()} for x in (small, out)]
    assert shapes[0] == shapes[1]
    verified = verify_model(out, dense)
    assert "trained weights" in verified.claimed
    assert {"sizes", "files", "configuration"} <= set(verified.checked)
    old, new = (
        {n: open_checkpoint(x).read(n) for n in open_checkpoint(x).where} for x in (small, out)
    )
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed <= set(record_of(out)["updated"])
    assert len(changed) > 0.8 * verified.updated
    assert not any("embed" in name or "lm_head" in name for name in changed)


def test_training_of_a_smaller_model_resumes_to_the_same_bytes(tmp_path, data):
    dense = save(tiny_models.loud("llama", layers=2), tmp_path / "dense")
    small, whole, out = tmp_path / "small", tmp_path / "whole", tmp_path / "out"
    smaller(dense, small, **CHANNELS)
    words = ["distill", small, "--teacher", dense, "--calibration", data, "--learning-rate", 0.001]
    words += ["--epochs", 2, "--holdout", 0.25, "--samples", 8, "--seq-len", 16]
    assert "time, estimated" in run(*words, "--dry-run")
    run(*words, "--output", whole)
    train = partial(distill_model, small, dense, calibration=data, output=out, **TRAINING)
    train = partial(train, samples=8, seq_len=16)

    def halt(what, done, total):
        if what == "train" and done == 10:
            raise KeyboardInterrupt

    fails(KeyboardInterrupt, None, train, on_progress=halt, save_every=1e-9)
    found = train(resume=True)
    assert contents(out) == contents(whole)
    again = train(resume=True)
    assert (again.before, again.after, again.epoch) == (found.before, found.after, found.epoch)
    fails(ModelError, "another run: distillation.options.epochs", train, resume=True, epochs=3)
    assert "trained weights" in run("verify", out, "--original", dense)
    readme = (out / "README.md").read_text()
    assert "trained together towards its predictions" in readme
    assert "$ maskopt distill AGAIN --teacher MODEL" in readme
    run("report", out, "--output", tmp_path / "page.html")
    # trained once more
    twice = tmp_path / "twice"
    distill_model(out, dense, tokens(16), output=twice, **TRAINING)
    assert "trained weights" in verify_model(twice, dense).claimed


def test_forged_smaller_models_are_not_trained_and_forged_training_does_not_hold(tmp_path):
    dense = save(tiny_models.loud("llama", layers=3), tmp_path / "dense")
    small, out = tmp_path / "small", tmp_path / "out"
    smaller(dense, small, **CHANNELS)

    def refused(forge, said, folder=small):
        given = shutil.copytree(folder, tmp_path / "forged", dirs_exist_ok=True)
        forge(given)
        if folder == small:
            fails(ModelError, said, distill_model, given, dense, tokens(16), output=out, **TRAINING)
            assert not out.exists()
        else:
            forging.forge_manifest(given)
            fails(VerificationError, said, verify_model, given, dense)
        shutil.rmtree(given)

    def redrawn(name):
        return lambda folder: forging.redraw(folder, name)

    def moved_embedding(folder):
        forging.redraw(folder, "model.embed_tokens.weight")
        forging.forge_manifest(folder)

    down = "model.layers.0.mlp.down_proj.weight"
    refused(lambda x: (x / MANIFEST).unlink(), "holds no .* and no ")
    refused(lambda x: edit_json(x / MANIFEST, lambda m: m.update(kind="blocks")), "damaged")
    refused(redrawn(down), "not what its manifest describes: model.safetensors was changed")
    refused(moved_embedding, "no prune changes it")
    other = save(tiny_models.loud("gpt2"), tmp_path / "other")
    fails(ModelError, "was not made of", distill_model, small, other, tokens(16), output=out)
    distill_model(small, dense, tokens(48), output=out, **TRAINING)
    trained = tmp_path / "trained"
    out.rename(trained)
    for change, said in (
        (lambda m: m.update(distillation=None), "losses of a distillation and no options"),
        (lambda m: m["distillation"].update(epoch=7), "longer than the options"),
        (lambda m: m["distillation"].update(epoch=0), "its epoch is not what its losses say"),
        (lambda m: m["fingerprint"].pop("distillation"), "losses of a distillation and no options"),
        (lambda m: m["fingerprint"]["distillation"].pop("teacher"), "damaged"),
        (lambda m: m["shrunk"]["updated"].remove(down), "is not the original"),
        (lambda m: m["shrunk"]["updated"].append("model.norm.weight"), "unlike a training"),
    ):
        refused(lambda x, change=change: forging.forge_manifest(x, change), said, trained)
    refused(redrawn("model.embed_tokens.weight"), "is not the original's", trained)
    refused(redrawn("model.norm.weight"), "is not the original's", trained)
    wide = {down: torch.zeros(32, 48)}
    change = lambda x: forging.change_tensors(x / "model.safetensors", lambda t: t.update(wide))  # noqa: E731
    refused(change, "in the shards", trained)
    refused(forging.config(intermediate_size=48), "intermediate_size was", trained)


def test_groups_that_are_too_few_lose_heads_and_blocks_keep_their_buffers(tmp_path, monkeypatch):
    dense, out = save(one_group("gemma3"), tmp_path / "dense"), tmp_path / "out"
    report = smaller(dense, out, heads=0.5)
    assert report.layers[0].pattern == "2 of 4 heads"
    assert all(layer.statuses == {"optimal": layer.rows} for layer in report.layers)
    model, less = reload(dense), reload(out)
    assert (less.config.num_attention_heads, less.config.num_key_value_heads) == (2, 1)
    set_zeros(model, less, record_of(out))
    check_same(less, model)
    # buffers that are stored go along with their blocks
    monkeypatch.setattr(removal, "choose", lambda *_: {frozenset({1}): 0.0})
    model = tiny("deepseek_v3", layers=4)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_()
    dense, out = save(model, tmp_path / "deepseek"), tmp_path / "shallow"
    smaller(dense, out, count=1, windows=1)
    model = pass_on(reload(dense), {1})
    torch.testing.assert_close(logs(reload(out), tokens(2)), logs(model, tokens(2)))
    verify_model(out, dense)


def one_group(family):
    model = tiny(family)
    return type(model)(type(model.config)(**{**model.config.to_dict(), "num_key_value_heads": 1}))


def configured(name, **options):
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**tiny_models.SHARED, "pad_token_id": 0, **options})
    return AutoModelForCausalLM.from_config(config)


LATENT = {**tiny_models.FAMILIES["deepseek_v3"][1], "first_k_dense_replace": 0, "n_group": 2}
LATENT["topk_method"] = "group_limited_greedy"
MODELS = {
    "one group": lambda: one_group("llama"),
    # a head of the first half and one of the second are one
    "DiffLlama": lambda: configured(
        "DiffLlamaConfig", num_attention_heads=8, num_key_value_heads=4, head_dim=4,
    ),
    # a norm over all heads, as wide as the hidden states
    "BitNet": lambda: configured("BitNetConfig"),
    "DeepSeek 2": lambda: configured("DeepseekV2Config", **LATENT),
}  # fmt: skip
NO_MODEL = "cannot describe the smaller model"
OWN = {"options": WalkOptions(trust_remote_code=True)}
CANNOT = [
    ("gpt2", {"channels": 0.25}, "of a known form"),
    ("olmo2", {"heads": 0.5}, f"{NO_MODEL}: parameter .*k_norm"),
    ("gpt_oss", {"heads": 0.5}, f"{NO_MODEL}: parameter .*sinks"),
    ("opt", {"heads": 0.5}, NO_MODEL),
    ("mixtral", {"channels": 0.25}, "of a known form"),
    ("llama", {"heads": 0.25}, "`heads` 0.5 takes one"),
    ("llama", {"channels": 0.01}, "take a larger `channels`"),
    ("llama", {"channels": 0.25, "round_to": 64}, "smaller `round_to`"),
    ("one group", {"heads": 0.25}, "cannot describe .*not a multiple"),
    ("own code", {"channels": 0.5, "trust_remote_code": True}, "code is not copied"),
    ("own code", {"count": 1, **OWN}, "code is not copied"),
    ("DiffLlama", {"heads": 0.5}, "is off by"),
    ("BitNet", {"heads": 0.5}, "does not run"),
    ("llama", {"share": 0.25}, "has no experts"),
    ("llama4", {"share": 0.25}, "is not given a routing"),
    ("deepseek_v3", {"share": 0.25}, "keeps 'gate.e_score_correction_bias' in addition"),
    ("mixtral", {"share": 0.2}, "a share of 0.2 of 4 experts is none"),
    ("mixtral", {"share": 0.75}, "leaves 1 of 4 experts, and a token goes to 2"),
    ("DeepSeek 2", {"share": 0.25}, "chooses among 2 groups of experts first"),
]


@pytest.mark.parametrize(("of", "what", "said"), CANNOT)
def test_what_cannot_be_cut_is_refused_before_anything_is_written(of, what, said, tmp_path):
    dense, out = tmp_path / "dense", tmp_path / "out"
    if of == "own code":
        tiny_models.save_with_own_code(dense)
    else:
        save(MODELS[of]() if of in MODELS else tiny(of), dense, shard="30KB")
    fails(ModelError, said, smaller, dense, out, **what)
    assert not (out / MANIFEST if "off by" in said or "run" in said else out).exists()


def test_options_that_cannot_be(dense_folder, data, tmp_path):
    for options, error, said in (
        ({}, OptionError, "nothing is to be removed"),
        ({"channels": 1.0}, MaskoptError, "channels"),
        ({"channel": 0.25}, OptionError, "no option is called 'channel'; did you mean 'channels'"),
        ({"heads": -0.1}, MaskoptError, "heads"),
        ({"channels": 0.2, "include": "q_proj"}, OptionError, "no option is called 'include'"),
        *(({**HEADS, k: x}, OptionError, f"`{k}` needs `channels`") for k, x in ALONE.items()),
        ({"channels": 0.2, "solver": "swop"}, MaskoptError, "did you mean"),
        ({"channels": 0.2, "update": "blockwise"}, MaskoptError, "update"),
        ({**KEPT, "damping": 0.1}, OptionError, "`damping` needs `update` least-squares"),
        *(({"count": count}, OptionError, "must be 1 to 2") for count in (0, 3, 9)),
        *(
            ({"count": 1, "options": WalkOptions(**{name: x})}, OptionError, f"leave out `{name}`")
            for name, x in WALKS.items()
        ),
        ({"share": 0.25, "options": WalkOptions(holdout=0.5)}, OptionError, "leave out `holdout`"),
        ({"count": 1, "overwrite": True}, ModelError, "is the model itself"),
    ):
        before, out = files(dense_folder), tmp_path / "out"
        given = dense_folder if "overwrite" in options else out
        fails(error, said, smaller, dense_folder, given, **options)
        assert not out.exists()
        assert before == files(dense_folder)
    for options, said in {
        "--channels 0.25 --experts 0.25": "second `maskopt prune-structured`",
        "--experts 0.25 --blocks 1": "second `maskopt prune-structured`",
        "--windows 2 --channels 0.25": "--windows needs --blocks",
        "--blocks 1 --solver tabu": "says nothing of --blocks",
        "--blocks 1 --certify": "says nothing of --blocks",
        "--blocks 1 --solver-options seed=1": "says nothing of --blocks",
        "--blocks 1 --resume": "in one go",
    }.items():
        text = ["--calibration", data, "--output", out, *options.split()]
        assert said in run("prune-structured", dense_folder, *text, fails=OptionError)


#: kind → (family, options, what the command says, what card and page say, options of a second run)
COMMANDS = {
    "channels and heads": (
        "llama", ["--channels", 0.25, "--heads", 0.5, "--certify"],
        ["36 of 48 channels", "1 of 2 key–value groups"],
        "kept 1 of 2 key–value groups and 36 of 48 channels of 2 blocks",
        ["--channels", 0.2, "--round-to", 4],
    ),
    "blocks": (
        "llama", ["--blocks", 2], ["of least cost by pairs", "optimal"], "removed 2 whole blocks",
        ["--channels", 0.25],
    ),
    "experts": (
        "mixtral", ["--experts", 0.25], ["3 of 4 experts", "routing unchanged"],
        "kept 3 of 4 experts", ["--heads", 0.5],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*COMMANDS][:1] + [slow(kind) for kind in [*COMMANDS][1:]])
def test_the_command_and_what_comes_after(kind, data, tmp_path):
    family, options, said, card, second = COMMANDS[kind]
    model, out = tiny(family, layers=4 if kind == "blocks" else 2), tmp_path / "out"
    dense, twice = save(model, tmp_path / "dense"), tmp_path / "twice"
    text = ["--calibration", data, "--output"]
    shown = run("prune-structured", dense, *options, *text, out)
    assert all(x in shown for x in said)
    assert "holds" in run("verify", out, "--original", dense)
    readme = (out / "README.md").read_text()
    assert card in readme
    assert "$ maskopt prune-structured MODEL --config" in readme
    run("prune-structured", dense, "--config", out / MANIFEST, *text, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(out)
    run("report", out, "--output", tmp_path / "page.html")
    assert card.removeprefix("kept ") in (tmp_path / "page.html").read_text()
    run("prune-structured", out, *second, *text, twice)
    words = ["--sparsity", "2:4" if kind == "channels and heads" else 0.5]
    words += ["--solver", "wanda", "--min-tokens", 1]
    run("prune", twice, *words, *text, tmp_path / "pruned")
    if kind == "channels and heads":
        assert "perplexity" in run("eval", dense, out, "--text", data)
        said = run("verify", out, "--masks", out, fails=MaskoptError)
        shows(said.lower(), "maskopt-masks.bits", "no such file")
        assert "holds" in run("verify", twice, "--original", out)
        assert "another model" in run("verify", twice, "--original", dense, fails=VerificationError)
        assert (twice / "README-original.md").read_text() == readme
        run("verify", tmp_path / "pruned", "--original", twice)


# --- choices
def check_costs(costs, dense, data, **every):
    """They are divergences of the model's predictions from those of it without some blocks."""
    full = logs(reload(dense), data, **every)
    for gone, cost in costs.items():
        other = logs(pass_on(reload(dense), gone), data, **every)
        kl = float((full.exp() * (full - other)).sum(-1).mean())
        assert cost == pytest.approx(kl, rel=1e-3, abs=1e-7)


def test_effects_are_divergences_of_models_without_blocks(tmp_path):
    dense = save(tiny("llama", layers=4), tmp_path / "dense")
    report = smaller(dense, tmp_path / "out", tokens(3), count=2, windows=3)
    sets = [{i} for i in range(4)] + [set(pair) for pair in itertools.combinations(range(4), 2)]
    assert set(report.effects.kl) == {frozenset(s) for s in sets}
    check_costs(report.effects.kl, dense, tokens(3))
    pairs = {s: kl for s, kl in report.effects.kl.items() if len(s) == 2}
    assert set(report.removed) == min(pairs, key=lambda s: pairs[s])
    assert str(report.solution.status[0]) == "optimal"
    assert report.effects.cost(report.removed) == pytest.approx(min(pairs.values()))
    assert verify(report.effects.problem(2), report.solution).checked


@pytest.mark.slow
@pytest.mark.parametrize("judged", [16, slow(3)])
def test_sets_of_three_are_searched_and_measured_on_all_tokens(judged, tmp_path, monkeypatch):
    """Of many candidates of a round, the best ones on a sample of tokens are tried."""
    monkeypatch.setattr(removal, "JUDGED", judged)
    dense, out = save(tiny("llama", layers=6), tmp_path / "dense"), tmp_path / "out"
    report = smaller(dense, out, tokens(2), count=3, windows=2)
    costs = {s: report.effects.cost(s) for s in itertools.combinations(range(6), 3)}
    least = min(costs, key=lambda s: costs[s])
    assert tuple((~report.solution.mask[0]).nonzero()[:, 0].tolist()) == least
    assert str(report.solution.status[0]) == "optimal"
    near = {frozenset(report.removed) - {a} | {b} for a in report.removed for b in range(6)}
    if judged >= 9:
        assert {left for left in near if len(left) == 3} <= set(report.measured)
    assert {frozenset(least), frozenset({3, 4, 5})} < set(report.measured)
    assert frozenset(report.effects.most_alike(3)) in report.measured
    check_costs(report.measured, dense, tokens(2), every=1)
    assert report.measured[frozenset(report.removed)] == min(report.measured.values())
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 3
    assert verify_model(out, dense).tensors > 0


def summing(costs):
    kl = {frozenset({i}): cost for i, cost in enumerate(costs)}
    pairs = itertools.combinations(range(len(costs)), 2)
    kl |= {frozenset(p): costs[p[0]] + costs[p[1]] for p in pairs}
    return Effects(kl, [0.5] * len(costs))


def test_exchanges_of_least_cost_by_pairs_come_first_and_yardsticks():
    found = exchanges(summing([5.0, 1.0, 2.0, 9.0, 3.0, 4.0]), frozenset({1, 2, 4}))
    assert len(found) == len(set(found)) == 9
    assert all(len(left & {1, 2, 4}) == 2 for left in found)
    assert found[:2] == [frozenset({1, 2, 5}), frozenset({0, 1, 2})]
    assert found[-1] == frozenset({2, 3, 4})
    kl = {frozenset({i}): 1.0 + i for i in range(4)}
    kl |= {frozenset(p): 9.0 for p in itertools.combinations(range(4), 2)}
    effects = Effects(kl, [0.1, 0.9, 0.5, 0.8])
    assert (effects.last(2), effects.most_alike(2)) == ([2, 3], [1, 3])
    assert [effects.cost(gone) for gone in ([0, 1], [2])] == pytest.approx([9.0, 3.0])


@pytest.mark.parametrize("seed", range(20))
def test_a_search_ends_where_no_exchange_is_better(seed, monkeypatch):
    """Of costs that pairs do not foretell; a set is measured when it is asked for, and only then."""
    generator = torch.Generator().manual_seed(seed)
    sets = [frozenset(s) for s in itertools.combinations(range(8), 3)]
    costs = dict(zip(sets, torch.rand(len(sets), generator=generator).tolist(), strict=True))
    effects, asked = summing([1.0] * 8), []

    def measure(some):
        asked.extend(some)
        return {left: costs[left] for left in some}

    first = [frozenset({0, 1, 2}), frozenset({5, 6, 7})]
    known = search_sets(measure, effects, first)
    assert len(asked) == len(set(asked)) == len(known)
    assert known == {left: costs[left] for left in asked}
    least = min(known, key=lambda left: known[left])
    assert costs[least] <= min(costs[left] for left in first)
    assert all(costs[least] < costs[left] for left in exchanges(effects, least))
    # a round may answer for a few: what it leaves out is not asked for again; none asks for more than it may
    monkeypatch.setattr(removal, "EXCHANGES", 5)
    effects, rounds = summing([9.0, 8.0, 7.0, 1.0, 2.0, 3.0, 4.0]), []

    def few(some):
        rounds.append(list(some))
        return {left: effects.cost(sorted(left)) for left in some[: 1 if rounds[1:] else None]}

    known = search_sets(few, effects, [frozenset({0, 1, 2})])
    assert min(known, key=lambda left: known[left]) == frozenset({3, 4, 5})
    assert all(len(some) <= 5 for some in rounds)
    every = list(itertools.chain(*rounds))
    assert len(set(every)) == len(every)


def test_states_may_lie_in_one_file(dense_folder, tmp_path, monkeypatch):
    """A file for each of hundreds of variants would be more than a process may open."""
    made, effects = [], []
    listed = lambda folder, size: made.append(folder) or _reserved(folder, size)  # noqa: E731
    monkeypatch.setattr(activations, "_reserved", listed)
    for memory, threads in ((0, 2), (2**30, 1)):
        how = {"options": WalkOptions(activation_memory=memory, threads=threads)}
        report = smaller(dense_folder, tmp_path / str(memory), tokens(3), count=1, windows=2, **how)
        effects.append(report.effects.kl)
    assert effects[0] == effects[1]
    assert set(made[:2]) == {tmp_path / "0" / HIDDEN}  # the model's, and those of all variants
    # variants count where memory is limited
    with open_job(dense_folder, tokens(4), WalkOptions(max_memory="1200MB"), whole=True) as job:
        assert place(job, 10, tmp_path) is None
        assert place(job, 300_000, tmp_path) == tmp_path
    with open_job(dense_folder, tokens(4), WalkOptions(), whole=True) as job:
        assert place(job, 300_000, tmp_path) is None


def test_lists_of_the_configuration_indices_and_vision_towers(tmp_path):
    # `moe_layers` names blocks by their index; three ends of text are no list of three blocks
    dense = save(tiny("llama"), tmp_path / "lists")
    lists = {"eos_token_id": [1, 2, 3], "moe_layers": [0, 2], "flags": ["a", "b", "c"]}
    edit_json(dense / "config.json", lambda c: c.update(lists))
    with open_job(dense, tokens(2), WalkOptions(), whole=True) as job:
        for gone, stays in ([0], [1]), ([1], [0, 1]), ([2], [0]), ([0, 1], [0]):
            settings = removal._check_family(job.source, gone)
            assert settings["moe_layers"] == stays
            assert settings["flags"] == [x for i, x in enumerate("abc") if i not in gone]
            assert "eos_token_id" not in settings
    # one file with an index
    dense, name = save(tiny("llama"), tmp_path / "llama"), "model-00001-of-00001.safetensors"
    (dense / "model.safetensors").rename(dense / name)
    where = dict.fromkeys(open_safe(dense / name).entries, name)
    (dense / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    for what in ({"count": 1, "windows": 2}, {"channels": 0.5, "solver": "wanda"}):
        smaller(dense, out := tmp_path / min(what), tokens(4), **what)
        verify_model(out, dense)
    size = json.loads((out / INDEX).read_text())
    stored = open_safe(out / name).entries.values()
    assert size["metadata"]["total_size"] == sum(entry.size for entry in stored)
    # blocks of a vision tower have the names of the decoder's, behind another beginning
    dense, out = save(tiny_models.tiny_vision(), tmp_path / "dense"), tmp_path / "out"
    smaller(dense, out, tokens(2), count=1, windows=2)
    verify_model(out, dense)
    names = [sorted(n for n in open_checkpoint(x).where if "vision" in n) for x in (dense, out)]
    assert names[0] == names[1]


@pytest.mark.parametrize("count", [1, slow(2), 3])
def test_blocks_that_a_configuration_needs_stay(count, tmp_path):
    """The first block, dense by its number, is the cheapest to leave out, and cannot be."""
    model = tiny_models.loud("deepseek_v3", layers=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.0." in name and ("o_proj" in name or "down_proj" in name):
                parameter.zero_()
    dense, out = save(model, tmp_path / "dense"), tmp_path / "out"
    report = smaller(dense, out, tokens(2), count=count, windows=1)
    assert 0 in (~report.solution.mask[0]).nonzero()[:, 0] or count == 3
    assert all(0 not in left for left in report.measured)
    assert len(report.removed) == count
    assert report.measured[frozenset(report.removed)] == min(report.measured.values())
    if count <= 2:
        others = [s for s in report.effects.kl if len(s) == count and 0 not in s]
        assert frozenset(report.removed) == min(others, key=lambda s: report.effects.kl[s])
    verify_model(out, dense)


def test_costs_are_what_the_outputs_miss():
    model = tiny("mixtral", layers=2)
    with open_job(model, tokens(3), WalkOptions(threads=2)) as job, torch.no_grad():
        for block in job.blocks():
            (mixture,) = mixtures_of(job.source.blocks, block.index)
            q, count = costs(block, mixture)
            module, calls = model.get_submodule(mixture.name), []
            handle = module.register_forward_hook(lambda *call, calls=calls: calls.append(call[1:]))
            for sample in range(3):
                block.run(sample, block.samples.states)
            handle.remove()
            assert count == sum(len(args[0]) for args, _ in calls)
            for stays in itertools.product((0.0, 1.0), repeat=mixture.count):
                p, missed = 1 - torch.tensor(stays, dtype=torch.float64), 0.0
                for (hidden, index, weights), out in calls:
                    left = torch.tensor(stays)[index] * weights
                    missed += float((module(hidden, index, left) - out).double().square().sum())
                assert float(p @ q @ p) == pytest.approx(missed / count, rel=1e-4, abs=1e-12)
            block.advance()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_choice_is_the_best_by_enumeration(family, tmp_path):
    dense = save(tiny(family, layers=2), tmp_path / "dense", shard="30KB")
    for threads in (1, 3):
        walk, out = WalkOptions(threads=threads), tmp_path / str(threads)
        report = smaller(dense, out, share=0.5, options=walk)
    assert contents(tmp_path / "1") == contents(out)
    with open_job(dense, tokens(6), WalkOptions()) as job, torch.no_grad():
        block = next(iter(job.blocks()))
        (mixture,) = mixtures_of(job.source.blocks, 0)
        q, _ = costs(block, mixture)
    every = itertools.combinations(range(4), 2)
    by_cost = {gone: float(q[list(gone)][:, list(gone)].sum()) for gone in every}
    best = min(by_cost, key=by_cost.__getitem__)
    assert record_of(out)["kept"][mixture.name] == sorted({0, 1, 2, 3} - set(best))
    assert report.layers[0].error_kept == pytest.approx(by_cost[best], rel=1e-6)


@pytest.mark.parametrize("sample", [0, 2])
def test_samples_that_are_left_out_are_reported(sample, tmp_path):
    """The products of the first experts are beyond float32 for one token."""
    model = tiny("mixtral")
    with torch.no_grad():
        embedding, block = model.get_input_embeddings().weight, model.model.layers[0]
        embedding[:, 0], embedding[5] = 0, 0
        embedding[5, 0] = 1
        block.self_attn.o_proj.weight[0] = 0
        block.mlp.experts.gate_up_proj[:, :, 0] = 1e38
    dense, data = save(model, tmp_path / "dense"), tokens(4)
    data[data == 5] = 6
    data[sample, 3] = 5
    skip = WalkOptions(skip_bad_samples=True)
    report = smaller(dense, tmp_path / "out", data, share=0.25, options=skip)
    assert [sample["sample"] for sample in report.bad_samples] == [sample]
    assert report.fingerprint["options"]["skip_bad_samples"]
    said = f"sample {sample} has NaN"
    fails(ModelError, said, smaller, dense, tmp_path / "again", data, share=0.25)


def test_a_model_that_changes_meanwhile_is_refused(tmp_path):
    dense, out = save(tiny("mixtral", layers=2), tmp_path / "dense"), tmp_path / "out"

    change = {"on_progress": lambda _: (dense / "generation_config.json").write_text("{}")}
    for what in ({"count": 1, "windows": 1}, {"share": 0.25}):
        (dense / "generation_config.json").write_text("{ }")
        said = "generation_config.*changed while the run was under way"
        fails(ModelError, said, smaller, dense, out, tokens(2), **change, **what)
        assert not out.exists()


def test_the_choice_of_the_first_block_is_the_optimum_and_keeps_its_dtype(dense_folder, tmp_path):
    report = smaller(dense_folder, tmp_path / "out", heads=0.5, update="none")
    model, name = tiny("llama"), "model.layers.0.self_attn.o_proj"
    weight = model.get_submodule(name).weight.detach()
    n = weight.shape[1]
    gram = Gram(n)
    gram.add(inputs_of(model, name, tokens(6)).float())
    problem = LayerProblem(weight, gram.value(), Unstructured(keep=n // 2))
    masks = [torch.arange(n) // (n // 2) == kept for kept in (0, 1)]
    errors = [float(problem.objective(m.expand(len(weight), n)).sum()) for m in masks]
    assert record_of(tmp_path / "out")["kept"][name] == [errors.index(min(errors))]
    layer = next(x for x in report.layers if x.name == name)
    assert [layer.error, layer.lower_bound] == pytest.approx([min(errors)] * 2, rel=1e-6)
    # bfloat16 stays bfloat16
    dense, out = save(tiny("llama", dtype=torch.bfloat16), tmp_path / "dense"), tmp_path / "half"
    smaller(dense, out, channels=0.25)
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    verify_model(out, dense)


@pytest.mark.slow
def test_errors_bounds_and_counts_of_channels(dense_folder, tmp_path):
    def shrink(name, **options):
        return smaller(dense_folder, tmp_path / name, tokens(12), **options).layers

    layers = shrink("held", channels=0.5, heads=0.5, holdout=0.34)
    for layer in layers:
        assert 0 < layer.error < layer.error_kept < layer.energy
        assert layer.relative_held is not None
    assert any(layer.name.endswith("down_proj") for layer in layers)
    layers = shrink("certified", channels=0.5, solver="wanda", certify=True)
    assert all(0 < layer.lower_bound <= layer.error_kept for layer in layers)
    shrink("rounded", channels=0.3, round_to=8)
    assert json.loads((tmp_path / "rounded" / "config.json").read_text())["intermediate_size"] == 40
    how, solvers = {"channels": 0.5, "update": "none"}, ("tabu", "swap", "wanda", "magnitude")
    errors = [shrink(solver, solver=solver, **how)[0].error for solver in solvers]
    assert all(one <= other * (1 + 1e-12) for one, other in itertools.pairwise(errors[:3]))


def test_interrupted_runs_resume_to_the_same_bytes(dense_folder, tmp_path):
    def shrink(out, **options):
        return smaller(dense_folder, tmp_path / out, **{**CHANNELS, **HEADS, **options})

    shrink("whole")
    for stop in range(3):

        def halt(event, stop=stop):
            if event.block == stop and event.stage == "solve" and event.done == 2:
                raise KeyboardInterrupt

        out = f"stopped in {stop}"
        fails(KeyboardInterrupt, None, shrink, out, on_progress=halt)
        if stop == 0:
            assert not (tmp_path / out).exists()
            continue
        report = shrink(out, resume=True)
        assert len(report.layers) == 6
        assert contents(tmp_path / out) == contents(tmp_path / "whole")
    assert [x.error for x in shrink(out, resume=True).layers] == [x.error for x in report.layers]
    fails(ModelError, "another run", shrink, out, resume=True, channels=0.5, heads=0.0)


@pytest.mark.parametrize("what", [{"channels": 0.25}, {"heads": 0.5}])
def test_zeros_of_a_pruned_model_are_not_filled(what, pruned_folder, tmp_path):
    small = tmp_path / "small"
    fails(OptionError, "least squares would fill its zeros", smaller, pruned_folder, small, **what)
    assert not small.exists()
    smaller(pruned_folder, small, update="none", **what)
    block = reload(small).model.layers[0]
    for layer in (block.mlp.down_proj, block.self_attn.o_proj):
        assert float((layer.weight == 0).float().mean()) > 0.3

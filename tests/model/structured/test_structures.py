"""Channels, heads, blocks and experts removed: a folder that computes what is left, or a refusal."""

import json

import pytest
import torch
import transformers
from commands import run
from forging import fails
from outputs import contents, files
from tiny_models import SHARED, logs, save, save_with_own_code, tiny, tokens
from transformers import AutoModelForCausalLM

from maskopt import open_job, remove_blocks, remove_experts, shrink_model
from maskopt.errors import MaskoptError, ModelError, OptionError, VerificationError
from maskopt.models.checkpoints.workspace import MANIFEST
from maskopt.models.options.walk import WalkOptions
from maskopt.models.structured import blocks as removal
from maskopt.models.verification.verify import verify_model


def make(dense, out, **what):
    """Remove blocks (`count`), experts (`share`), or channels and heads."""
    how = remove_blocks if "count" in what else remove_experts if "share" in what else shrink_model
    return how(dense, tokens(6), output=out, **what)


def pair(folder, out):
    return [AutoModelForCausalLM.from_pretrained(x) for x in (folder, out)]


def logits(model):
    with torch.no_grad():
        return model(tokens(3, seed=5), use_cache=False).logits


def record_of(out):
    return json.loads((out / MANIFEST).read_text())["shrunk"]


def set_zeros(model, smaller, record):
    """The consumers' removed columns become zero, their kept ones as they were written."""
    for consumer, kept in record["kept"].items():
        weight, left = (m.get_submodule(consumer).weight.data for m in (model, smaller))
        step = next(s for s in record["tensors"][f"{consumer}.weight"] if s["by"] == consumer)
        ((length, width),) = step["parts"]
        stays = torch.zeros(length // width, dtype=torch.bool)
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
                chances = output[0][:, stays].float().softmax(-1)
                value, place = chances.topk(gate.top_k, dim=-1)
                return output[0], value / value.sum(-1, keepdim=True), stays[place]

            module.gate.register_forward_hook(choose)


CHANNELS, HEADS = {"channels": 0.25}, {"heads": 0.5}
#: what is removed: families of the default run, and all others
KINDS = {
    "channels and heads": ({**CHANNELS, **HEADS}, "llama phi3", "gemma3 qwen2 qwen3 phi cohere glm"),
    "channels": (CHANNELS, "opt", "gemma gpt_neox falcon olmo2 stablelm"),
    "heads": (HEADS, "mixtral", "llama4"),
    "channels and heads, kept": (
        {**CHANNELS, **HEADS, "update": "none"},
        "llama", "phi3 gemma3 qwen2 qwen3 phi cohere glm",
    ),
    "channels, kept": (
        {**CHANNELS, "update": "none"}, "", "opt gemma gpt_neox falcon olmo2 stablelm",
    ),
    "blocks": (
        {"count": 1, "windows": 2},
        "llama gpt2 qwen3_moe bamba",
        "gemma3 qwen2 qwen3 opt phi3 gpt_neox falcon bloom cohere olmo2 glm mixtral llama4",
    ),
    "experts": ({"share": 0.25}, "mixtral gpt_oss", "qwen3_moe"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        pytest.param(kind, family, marks=[pytest.mark.slow] * more)
        for kind, (_, *families) in KINDS.items()
        for more in (0, 1)
        for family in families[more].split()
    ],
)
def test_what_is_written_computes_what_is_left(kind, family, tmp_path):
    layers, out = 3 if kind in ("blocks", "experts") else 2, tmp_path / "out"
    dense = save(tiny(family, layers=layers), tmp_path / "dense", shard="30KB")
    report = make(dense, out, **KINDS[kind][0])
    (model, smaller), record, close = pair(dense, out), record_of(out), {"rtol": 1e-4, "atol": 1e-5}
    config = smaller.config.get_text_config()
    sizes = [sum(p.numel() for p in m.parameters()) for m in (smaller, model)]
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
            assert layer.pattern == "3 of 4 experts"
            assert layer.statuses == {"optimal": 1}
            assert layer.lower_bound == pytest.approx(layer.error_kept, rel=1e-5, abs=1e-12)
            assert 0 <= layer.relative < 1  # 0: an expert that no token is sent to
        assert any(layer.relative > 0 for layer in report.layers)
        if family != "mixtral":
            return
        reroute(model, record)
    else:
        set_zeros(model, smaller, record)
        assert len(record["kept"]) == (4 if "and" in kind else 2)
        assert found.updated == (0 if "kept" in kind else len(record["kept"]))
        if "heads" in kind:
            assert 2 * config.num_attention_heads == model.config.num_attention_heads
    torch.testing.assert_close(logits(smaller), logits(model), **close)


def test_where_groups_are_too_few_every_group_loses_heads(tmp_path):
    dense, out = save(one_group("gemma3"), tmp_path / "dense"), tmp_path / "out"
    report = make(dense, out, heads=0.5)
    assert report.layers[0].pattern == "2 of 4 heads"
    assert all(layer.statuses == {"optimal": layer.rows} for layer in report.layers)
    model, smaller = pair(dense, out)
    assert (smaller.config.num_attention_heads, smaller.config.num_key_value_heads) == (2, 1)
    set_zeros(model, smaller, record_of(out))
    torch.testing.assert_close(logits(smaller), logits(model), rtol=1e-4, atol=1e-5)


def test_buffers_that_are_stored_go_along_with_their_blocks(tmp_path, monkeypatch):
    """The biases of routers, which differ between blocks."""
    monkeypatch.setattr(removal, "choose", lambda *_: {frozenset({1}): 0.0})
    model = tiny("deepseek_v3", layers=4)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_()
    dense, out = save(model, tmp_path / "dense"), tmp_path / "out"
    make(dense, out, count=1, windows=1)
    model, smaller = pair(dense, out)
    torch.testing.assert_close(logs(smaller, tokens(2)), logs(pass_on(model, {1}), tokens(2)))
    verify_model(out, dense)


# Refusals -------------------------------------------------------------------------------------


def one_group(family):
    model = tiny(family)
    return type(model)(type(model.config)(**{**model.config.to_dict(), "num_key_value_heads": 1}))


def configured(name, **options):
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SHARED, "pad_token_id": 0, **options})
    return AutoModelForCausalLM.from_config(config)


LATENT = {
    "moe_intermediate_size": 16, "first_k_dense_replace": 0, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "topk_method": "group_limited_greedy",
}  # fmt: skip
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
    ("gpt2", {"channels": 0.25}, "of a form that is known"),
    ("olmo2", {"heads": 0.5}, f"{NO_MODEL}: parameter .*k_norm"),
    ("gpt_oss", {"heads": 0.5}, f"{NO_MODEL}: parameter .*sinks"),
    ("opt", {"heads": 0.5}, NO_MODEL),
    ("mixtral", {"channels": 0.25}, "of a form that is known"),
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
        save_with_own_code(dense)
    else:
        save(MODELS[of]() if of in MODELS else tiny(of), dense, shard="30KB")
    fails(ModelError, said, make, dense, out, **what)
    assert not (out / MANIFEST if "off by" in said or "run" in said else out).exists()


WALKS = {"holdout": 0.5, "include": ["q_proj"], "skip_bad_samples": True, "samples": 8, "seed": 1}
OPTIONS = [
    ({}, OptionError, "nothing is to be removed"),
    ({"channels": 1.0}, MaskoptError, "channels"),
    ({"channel": 0.25}, OptionError, "no option is called 'channel'; did you mean 'channels'"),
    ({"heads": -0.1}, MaskoptError, "heads"),
    ({"channels": 0.2, "include": "q_proj"}, OptionError, "leave out `include`"),
    ({"heads": 0.5, "solver": "tabu"}, OptionError, "`solver` needs `channels`"),
    (
        {"heads": 0.5, "solver_options": {"seed": 1}},
        OptionError,
        "`solver_options` needs `channels`",
    ),
    ({"heads": 0.5, "certify": True}, OptionError, "`certify` needs `channels`"),
    ({"channels": 0.2, "solver": "swop"}, MaskoptError, "did you mean"),
    ({"channels": 0.2, "update": "blockwise"}, MaskoptError, "update"),
    (
        {"channels": 0.2, "update": "none", "damping": 0.1},
        OptionError,
        "`damping` needs `update` least-squares",
    ),
    *(({"count": count}, OptionError, "must be 1 to 2") for count in (0, 3, 9)),
    *(
        ({"count": 1, "options": WalkOptions(**{name: x})}, OptionError, f"leave out `{name}`")
        for name, x in WALKS.items()
    ),
    ({"share": 0.25, "options": WalkOptions(holdout=0.5)}, OptionError, "leave out `holdout`"),
    ({"count": 1, "overwrite": True}, ModelError, "is the model itself"),
]


@pytest.mark.parametrize(("options", "error", "said"), OPTIONS)
def test_options_that_cannot_be(options, error, said, dense_folder, tmp_path):
    before = files(dense_folder)
    out = dense_folder if "overwrite" in options else tmp_path / "out"
    fails(error, said, make, dense_folder, out, **options)
    assert not (tmp_path / "out").exists()
    assert before == files(dense_folder)


def test_a_family_that_cannot_say_it_is_refused(tmp_path):
    """Its first block is dense by its number."""
    dense = save(tiny("deepseek_v3"), tmp_path / "dense")
    with (
        open_job(dense, tokens(2), WalkOptions(), whole=True) as job,
        pytest.raises(ModelError, match=NO_MODEL),
    ):
        removal._check_family(job.source, [0])


# The command ----------------------------------------------------------------------------------

KEPT = "kept 1 of 2 key–value groups and 36 of 48 channels of 2 blocks"
#: kind → (family, options, what the command says, what card and page say, options of a second run)
COMMANDS = {
    "channels and heads": (
        "llama", ["--channels", 0.25, "--heads", 0.5, "--certify"],
        ["36 of 48 channels", "1 of 2 key–value groups"], KEPT,
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


@pytest.mark.parametrize("kind", COMMANDS)
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
    sparse = ["--sparsity", "2:4"] if kind == "channels and heads" else ["--sparsity", 0.5]
    few = ["--solver", "wanda", "--min-tokens", 1]
    run("prune", twice, *sparse, *few, *text, tmp_path / "pruned")
    if kind == "channels and heads":
        assert "perplexity" in run("eval", dense, out, "--text", data)
        of_masks = (
            ["masks", "pack", out, "--output", tmp_path / "x"],
            ["verify", out, "--masks", out],
        )
        for command in of_masks:
            said = run(*command, fails=MaskoptError).lower()
            assert "maskopt-masks.bits" in said
            assert "no such file" in said
        assert "holds" in run("verify", twice, "--original", out)
        assert "another model" in run("verify", twice, "--original", dense, fails=VerificationError)
        assert (twice / "README-original.md").read_text() == readme
        run("verify", tmp_path / "pruned", "--original", twice)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--channels", 0.25, "--blocks", 1], "second `maskopt prune-structured`"),
        (["--experts", 0.25, "--blocks", 1], "second `maskopt prune-structured`"),
        (["--windows", 2, "--channels", 0.25], "--windows need --blocks"),
        (["--blocks", 1, "--solver", "tabu"], "says nothing of --blocks"),
        (["--blocks", 1, "--certify"], "says nothing of --blocks"),
        (["--blocks", 1, "--solver-options", "seed=1"], "says nothing of --blocks"),
        (["--blocks", 1, "--resume"], "in one go"),
    ],
)
def test_options_of_the_command_that_cannot_be(options, said, dense_folder, data, tmp_path):
    text = ["--calibration", data, "--output", tmp_path / "out"]
    assert said in run("prune-structured", dense_folder, *options, *text, fails=OptionError)

"""Every family evaluated and pruned: streamed from a folder, in memory, and against the definition."""

import copy
import math
import re

import pytest
import tiny_models
import torch
from forging import fails
from prunes import WANDA, but_slow, prune, slow
from tiny_models import FAMILIES, cross_entropy, inputs_of, logits_of, reload, save, tiny, tokens
from torch import nn

from maskopt import NM, collect_problems, perplexity, prune_model
from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Blocks, matrix
from maskopt.models.pruning.prune_layer import DAMPING_GRID
from maskopt.models.verification.verify import verify_model

#: blocks of Llama's form, for --slow
PLAIN = "qwen2 qwen3 mistral gemma phi gpt_neox falcon_alibi cohere olmo2 stablelm glm"


@pytest.mark.parametrize("family", [slow(x) if x in PLAIN.split() else x for x in FAMILIES])
def test_every_family_streamed_and_in_memory(family, tmp_path):
    model, data, out = tiny(family, layers=2), tokens(5, 12), tmp_path / "out"
    expected = cross_entropy(model, data)
    dense = save(model, tmp_path / "dense", shard="40KB")
    streamed = perplexity(dense, data, threads=2)
    assert streamed.cross_entropy == pytest.approx(expected, rel=1e-5)
    assert streamed.value == pytest.approx(math.exp(expected), rel=1e-4)
    assert streamed == perplexity(model, data, threads=1)
    assert streamed == perplexity(dense, data, threads=3, activation_memory=0)
    assert cross_entropy(model, data) == pytest.approx(expected, rel=1e-6)  # runs as before
    report = prune(dense, out, threads=2)
    original = copy.deepcopy(model.state_dict())
    in_memory = prune(model, threads=1)
    pruned, written = model.state_dict(), reload(out).state_dict()
    assert pruned.keys() == written.keys()
    assert all(torch.equal(pruned[k], written[k]) for k in pruned)
    assert report.sparsity == in_memory.sparsity
    assert [layer.error for layer in report.layers] == [layer.error for layer in in_memory.layers]
    verified = verify_model(out, original=dense, calibration=tokens())
    assert verified.sparsity == pytest.approx(0.5, abs=0.02)
    assert len(verified.checked_layers) == len(report.layers)
    blocks = Blocks(model)
    for layer in blocks.all_layers():
        assert bool(((matrix(model, layer) == 0).sum(1) >= layer.n // 2).all()), layer.name
        assert in_memory.masks[layer.name].shape == (layer.rows, layer.n)
    outside = [key for key in original if not key.startswith(blocks.name)]
    assert all(torch.equal(original[key], pruned[key]) for key in outside)


REFIT, IN_ORDER = {"update": "least-squares"}, {"true_sequential": True}
SWAP = {"solver": "swap", "start": "wanda"}
#: options by pairs: for every family, and for one
EVERY = {
    "layers and rows by the loss, refitted": {"allocation": "both", **REFIT},
    "layers by errors": {
        "allocation": "layers",
        "sensitivity": "relative",
        "calibrate_on": "dense",
    },
}
#: two thirds are not 0.6667, to whoever prunes and to whoever checks
THIRDS = {"sparsity": 2 / 3}
ONE = {
    ("llama", "trained"): {"update": "blockwise", "holdout": 0.34, "training": {"epochs": 1}},
    ("llama", "layers and rows without limits, refitted"): {
        "allocation": "both", "max_deviation": 1, "sensitivity": "relative", "holdout": 0.4, **REFIT,
        "damping": "auto",
    },
    ("llama", "layers by the loss, damped"): {"allocation": "layers", "damping": 0.1, **REFIT},
    ("mixtral", "rows by the loss"): {
        **THIRDS, "allocation": "rows", "max_deviation": 1 / 7, "sensitivity": "fisher", "all_experts": True,
    },
    ("mixtral", "layers and rows in one pass"): {
        "allocation": "both", "sensitivity": "uniform", "calibrate_on": "dense", "activation_memory": 0,
    },
    ("mixtral", "2:4, refitted, one after the other"): {"sparsity": NM(2, 4), **REFIT, **IN_ORDER},
    ("gpt2", "layers one after the other"): {
        **THIRDS, **IN_ORDER, "allocation": "layers", "sensitivity": "relative", "gram_shrinkage": 0.1,
    },
    ("gpt2", "swapped"): {**THIRDS, **SWAP},
}  # fmt: skip
BY_LOSS, BY_ERRORS = EVERY
PAIRS = [(x, name) for name in EVERY for x in FAMILIES]
PAIRS = [*ONE, *but_slow([("gpt2", BY_LOSS), ("mixtral", BY_ERRORS)], PAIRS)]


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_options_are_written_as_in_memory_and_verified(family, name, tmp_path):
    """The same logits (experts are called in another order there), and nothing that verify finds."""
    options = {**WANDA, "min_tokens": 8, **(ONE.get((family, name)) or EVERY[name])}
    model = tiny(family, layers=2)
    updated, data = options.get("update") == "least-squares", tokens(5)
    folder, out = save(model, tmp_path / "model"), tmp_path / "out"
    report = prune_model(folder, data, output=out, **options)
    if "damping" in options:
        found = {layer.damping for layer in report.layers}
        assert found == {0.1} if options["damping"] == 0.1 else found <= {*DAMPING_GRID}
    verified = verify_model(out, folder, calibration=data)
    assert len(verified.checked_layers) == verified.layers
    assert ("updated weights" in verified.checked) == updated
    assert ("kept weights" in {*verified.checked, *verified.claimed}) == (not updated)
    prune_model(model, data, **options)
    found, expected = (logits_of(m, data[:2]) for m in (reload(out), model))
    torch.testing.assert_close(expected, found, rtol=1e-5, atol=1e-6)


def lost(model, name, weight, data):
    """Mean square of what these weights of a layer add to its output in the model, over the tokens."""
    x = inputs_of(model, name, data)
    return pytest.approx(float((weight.double() @ x.T).square().sum() / len(x)), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "falcon"])
def test_gram_matrices_are_those_of_the_pruned_prefix(family):
    half, pruned, data = tiny(family), tiny(family), tokens(3, 16)
    report = prune_model(pruned, data, **WANDA)
    blocks = Blocks(half)
    last = blocks.prefix(2)  # which alone stays dense
    done = {k: v for k, v in pruned.state_dict().items() if not k.startswith(last)}
    half.load_state_dict({**half.state_dict(), **done})
    errors = {layer.name: layer.error for layer in report.layers}
    for place in blocks.layers(2):
        gone = matrix(half, place) * ~report.masks[place.name]
        assert errors[place.name] == lost(half, place.name, gone, data)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_gram_matrices_inside_a_block(family):
    model, data = tiny(family, layers=1), tokens(4, 16)
    inside = copy.deepcopy(model)
    usual = prune_model(copy.deepcopy(model), data, **WANDA)
    careful = prune_model(inside, data, true_sequential=True, **WANDA)
    errors = {layer.name: layer.error for layer in careful.layers}
    first, output = (next(n for n in errors if n.endswith(end)) for end in ("q_proj", "o_proj"))
    assert torch.equal(usual.masks[first], careful.masks[first])
    assert any(a.error != errors[a.name] for a in usual.layers if a.name != first)
    gone = model.get_parameter(output + ".weight") * ~careful.masks[output]
    assert errors[output] == lost(inside, output, gone, data)


def test_a_pass_that_collects_ends_with_the_last_inputs():
    """The last product is computed once, to learn that it is the last; where there are experts, always."""
    for family, name, expected in [("llama", "mlp", 1), ("mixtral", "mlp", 6), ("opt", "fc2", 1)]:
        model, count = tiny(family, layers=1), [0, 0]
        module = Blocks(model).modules[0].get_submodule(name)
        module.register_forward_pre_hook(lambda *_, c=count: c.__setitem__(0, c[0] + 1))
        module.register_forward_hook(lambda *_, c=count: c.__setitem__(1, c[1] + 1))
        prune_model(model, tokens(6, 16), threads=1, **WANDA)
        assert count == [6, expected]


def test_a_weight_may_stand_on_the_left():
    """Mamba multiplies Δ's projection as W xᵀ: its inputs are seen all the same."""
    model, data = tiny("mamba"), tokens(3, 16)
    report = prune_model(copy.deepcopy(model), data, **WANDA)
    assert [x.kind for x in report.layers if x.kind.endswith("dt_proj")] == ["mixer.dt_proj"] * 3
    assert all(x.tokens == data.numel() for x in report.layers)
    problems = dict(collect_problems(model, data, sparsity=0.5))
    mixer, seen = model.backbone.layers[0].mixer, []
    mixer.x_proj.register_forward_hook(lambda _, args, output: seen.append(output))
    for row in data:
        logits_of(model, row[None])
    x = torch.cat(seen).flatten(0, 1)[:, : mixer.dt_proj.in_features].double()
    gram = problems["backbone.layers.0.mixer.dt_proj"].gram
    assert torch.allclose(gram.double(), x.T @ x / len(x), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_each_expert_sees_the_tokens_routed_to_it(family):
    model, data = tiny(family, layers=1), tokens(4, 16)
    routed = dict(collect_problems(model, data, sparsity=0.5))
    report = prune_model(copy.deepcopy(model), data, **WANDA)
    first = [x for x in report.layers if "gate_up" in x.name and ".layers.0." in x.name]
    assert sum(x.tokens for x in first) == 2 * data.numel()  # two experts a token
    everything = prune_model(copy.deepcopy(model), data, all_experts=True, **WANDA)
    assert all(layer.tokens == data.numel() for layer in everything.layers)
    one, two = (next(x for x in r.layers if "q_proj" in x.name) for r in (report, everything))
    assert one.error == two.error  # what the block computes is the same
    assert set(routed) == {layer.name for layer in report.layers if layer.tokens}
    if family == "mixtral":  # experts with too few tokens are pruned by magnitude
        report = prune_model(copy.deepcopy(model), data, **{**WANDA, "min_tokens": 10_000})
        assert report.fallbacks == [layer.name for layer in report.layers]
        place = next(x for x in Blocks(model).all_layers() if "down_proj" in x.name)
        weight = matrix(model, place).abs()
        threshold = weight.sort(1).values[:, place.n // 2]
        assert torch.equal(report.masks[place.name], weight >= threshold[:, None])


class ListModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(96, 16)
        blocks = [tiny_models.Routed(nn.Linear(16, 16), 16, 4) for _ in range(2)]
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(16, 96)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache=False):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_what_is_taken_for_experts():
    said = "Llama4TextExperts is not given a routing .* leave out `all_experts`"
    fails(ModelError, said, prune_model, tiny("llama4"), tokens(), all_experts=True, **WANDA)
    model = tiny("llama", layers=1)
    model.model.layers[0].table = nn.Module()
    model.model.layers[0].table.bias = nn.Parameter(torch.ones(3, 4, 4))
    said = "'model.layers.0.table.bias' looks like experts, but no token was multiplied"
    with pytest.raises(ModelError, match=re.escape(said)) as caught:
        prune_model(model, tokens(), **WANDA)
    pattern = str(caught.value).rsplit("`exclude` ", 1)[1].strip("'")
    assert len(prune_model(model, tokens(), exclude=[pattern], **WANDA).layers) == 7
    # a list of modules
    model, data = ListModel(), tokens(4, 16)
    report = prune_model(copy.deepcopy(model), data, **WANDA)
    experts = [x for x in report.layers if x.name.startswith("blocks.0.experts")]
    assert sum(x.tokens for x in experts) == data.numel()
    everything = prune_model(model, data, all_experts=True, **WANDA)
    assert all(x.tokens == data.numel() for x in everything.layers)
    one, two = ({x.name: x.error for x in r.layers}["blocks.0.gate"] for r in (report, everything))
    assert one == two

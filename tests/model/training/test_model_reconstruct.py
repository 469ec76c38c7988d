"""Kept weights trained towards the dense model: better, never worse, and the same bytes every time."""

import itertools
from dataclasses import replace

import pytest
import torch
from commands import run
from forging import change_tensors, fails, forge_manifest
from prunes import WANDA, but_slow, contents, interrupted, manifest_of, prune, slow
from safetensors.torch import load_file
from tiny_models import Routed, save, tiny, tokens
from transformers import AutoModelForCausalLM

from maskopt import open_job, prune_model
from maskopt.errors import OptionError, VerificationError
from maskopt.models.blockwise import forward, job as walk
from maskopt.models.blockwise.activations import Activations
from maskopt.models.checkpoints.schema import MASKS
from maskopt.models.options.prune import prune_options
from maskopt.models.training import tasks as reconstruct, trainer as training
from maskopt.models.verification.verify import verify_model

HOW = {"epochs": 6, "learning_rate": 0.1}
OPTIONS = {**WANDA, "holdout": 0.25, "update": "blockwise"}
KEEP = {"update": "none", "training": {}}
SIX = ("llama", "mixtral", "gemma3", "gpt2", "bloom", "gpt_neox")
TRAINED = itertools.product(SIX, ("part", "block"))
PARTS = but_slow([("llama", "part"), ("mixtral", "block")], TRAINED)
BEGUN = itertools.product(("llama", "gemma3"), ("least-squares", "none"))
NORMS = {"gpt2": "ln_1.weight", "gemma3": "input_layernorm.weight", "qwen2": "layernorm.weight"}
ALL = but_slow([("gpt2", "part"), ("qwen2", "block")], itertools.product(NORMS, ("part", "block")))
# of OPT's parts, attention and both layers of the MLP, one gives four times the width of a hidden state
STATES = [("llama", "pruned", 3), slow("llama", "dense", 4)]
STATES += [slow("opt", "pruned", 10), ("opt", "dense", 12)]
ROUNDS = {"true_sequential": True, "solver": "magnitude"}
RUNS = [({"begin": "least-squares"}, ROUNDS)]
RUNS += [({"granularity": "part", "loss": "relative"}, {"target": "dense"})]
LATE = {}, {"train": "all"}, {"begin": "least-squares"}, {"inputs": "dense"}
RUNS += [slow(x, {}) for x in (*LATE, {"granularity": "part", "loss": "cosine"})]


def trained(model, data=None, **more):
    how = {**HOW, **more.pop("how", {})}
    data = tokens(12) if data is None else data
    return prune_model(model, data, **{**OPTIONS, "training": how, **more})


def copied_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def read_weights(folder):
    files = folder.glob("*.safetensors")
    return {k: v for f in files if f.name != MASKS for k, v in load_file(f).items()}


SIX = ("llama", "mixtral", "gemma3", "gpt2", "bloom", "gpt_neox")


@pytest.mark.parametrize("family", but_slow(["mixtral"], SIX))
def test_blocks_come_nearer_to_the_dense_model(family):
    model = tiny(family, layers=2)
    before = copied_state(model)
    report = trained(model)
    assert [block.block for block in report.trained] == [0, 1]
    for block in report.trained:
        assert block.held_after <= block.held_before
        assert not block.diverged
    assert min(block.held_after / block.held_before for block in report.trained) < 0.97
    # nothing but kept weights of pruned layers is another
    after = model.state_dict()
    pruned = {name for name in before if not torch.equal(before[name], after[name])}
    assert pruned
    assert not any("norm" in name or "embed" in name or "bias" in name for name in pruned)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("family", "begin"), but_slow([("llama", "least-squares")], BEGUN))
def test_epochs_are_judged_as_their_weights_are_stored(family, begin, tmp_path, monkeypatch):
    """A rate so small that bfloat16 rounds away what was gained."""
    dense = save(tiny(family, layers=2, dtype=torch.bfloat16), tmp_path / "dense")
    losses, train = [], training.train

    def again(task, *rest):
        found = train(task, *rest)
        exact = {p: (name, p.data) for name, p in task.module.named_parameters()}
        for parameter, (name, value) in exact.items():
            parameter.data = value.to(task.stored.get(name, value.dtype)).float()
        losses.append(training._mean(task, task.held))
        for parameter, (_, value) in exact.items():
            parameter.data = value
        return found

    monkeypatch.setattr(reconstruct, "train", again)
    how = {"training": {"begin": begin, "learning_rate": 1e-4}}
    report = trained(dense, output=tmp_path / "out", dtype="float32", **how)
    assert losses == [pytest.approx(one.held_after, rel=1e-12) for one in report.trained]
    assert all(one.held_after <= one.held_before for one in report.trained)


def test_what_training_did_not_better_keeps_its_weights(tmp_path):
    model, other = tiny("llama", layers=2), tiny("llama", layers=2)
    report = trained(model, how={"epochs": 2, "learning_rate": 1000.0})
    kept = trained(other, **KEEP)
    assert kept.trained == []
    assert all(one.diverged and one.epoch == 0 for one in report.trained)
    assert all(one.held_after == one.held_before for one in report.trained)
    after = other.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in model.state_dict().items())
    assert [layer.error for layer in kept.layers] == [layer.error for layer in report.layers]
    # one that gives what it should has not diverged: AdamW makes full steps of rounding
    report = trained(model, solver="magnitude", training={"epochs": 2})
    assert all(one.held_before < 1e-6 for one in report.trained)
    assert len(report.trained) == 2
    assert not any(one.diverged for one in report.trained)
    # passes in bfloat16 do not round what a float32 folder stores
    how, model = {"epochs": 1, "learning_rate": 0.0}, tiny("llama", layers=2)
    dense = save(model, tmp_path / "dense")
    report = trained(dense, how={**how, "train": "all"}, dtype="bfloat16", output=tmp_path / "out")
    assert [one.epoch for one in report.trained] == [0, 0]
    old, new = (read_weights(folder) for folder in (dense, tmp_path / "out"))
    assert all(torch.equal(new[name], torch.where(new[name] == 0, 0, old[name])) for name in old)
    assert any(bool((new[name] == 0).any()) for name in old)


def test_weights_that_a_window_does_not_come_by_and_a_norm_that_blocks_share():
    model = tiny("llama", layers=2)
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = Routed(layer.mlp, 32, 8)
    before = copied_state(model)
    report = trained(model, tokens(12, 8))
    assert len(report.trained) == 2
    assert any(one.epoch for one in report.trained)
    after = model.state_dict()
    experts = [name for name in before if "experts" in name]
    moved = [bool(((after[n] != before[n]) & (after[n] != 0)).any()) for n in experts]
    assert sum(moved) > 3
    # a norm that blocks share is left alone
    model = tiny("llama")
    layers = model.model.layers
    layers[2].input_layernorm = layers[0].input_layernorm
    before = layers[0].input_layernorm.weight.clone()
    report = trained(model, how={"train": "all"})
    assert all(one.epoch for one in report.trained)
    assert torch.equal(layers[0].input_layernorm.weight, before)
    assert not torch.equal(layers[1].input_layernorm.weight, torch.ones(32))


@pytest.mark.slow
def test_weights_that_are_decayed_become_smaller(monkeypatch):
    sizes = []
    for decay, seed in ((0.0, 2**62), (3.0, 2**63 - 1)):  # every seed orders windows
        model, how = tiny("llama", layers=1), {"learning_rate": 0.003, "weight_decay": decay}
        report = trained(model, how=how, seed=seed)
        assert report.trained[0].epoch
        weights = [p.detach() for p in model.model.layers[0].parameters() if p.ndim == 2]
        sizes.append(sum(float(weight.square().sum()) for weight in weights))
    assert sizes[1] < sizes[0]
    # experts that are left out are not decayed, though all are one parameter: the loss by which an epoch was
    # chosen is of the weights that stay
    losses, real = [], training.train

    def train(task, *rest):
        found = real(task, *rest)
        if found.epoch:
            losses.append((found.after.held, training._mean(task, task.held)))
        return found

    monkeypatch.setattr(reconstruct, "train", train)
    how = {"epochs": 2, "learning_rate": 0.003, "weight_decay": 30.0}
    trained(tiny("mixtral", layers=2), include=("*.experts.0.*", "self_attn"), how=how)
    assert losses
    assert all(said == pytest.approx(true, rel=1e-6) for said, true in losses)


def test_hidden_states_that_blocks_are_trained_by_are_counted(monkeypatch):
    made, data, most = [], tokens(12), 0

    class Seen(Activations):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(self)

    for module in (forward, walk):
        monkeypatch.setattr(module, "Activations", Seen)

    def look(event):
        nonlocal most
        most = max(most, sum(x.nbytes for one in made for x in one._memory.values()))

    trained(tiny("llama", layers=2), data, on_progress=look, how={"epochs": 1})
    job = open_job(tiny("llama", layers=2), data, prune_options(None, {**OPTIONS, "training": HOW}))
    assert job.options.copies == 2  # of the pruned model and of the dense one
    assert most == 2 * data.numel() * 32 * 4


def recorded(states):
    found = Activations(range(len(states)), states[0].shape, states.dtype)
    for window, state in enumerate(states):
        found[window] = state
    return found


def test_the_error_of_a_channel_counts_by_its_own_size():
    states = torch.randn(3, 1, 50, 32, generator=torch.Generator().manual_seed(0))
    states[..., 5] = 30.0  # as hidden states of real models have
    by = reconstruct._scales(recorded(states), [0, 1])
    wanted, found = states[2], states[2].clone()
    others = [channel for channel in range(32) if channel != 5]
    found[..., others] *= 0.9
    assert float(reconstruct._distance(found, wanted)) < 5e-4
    assert float(reconstruct._distance(found * by, wanted * by)) > 8e-3
    # and all are measured likewise: of every fitted token, in parts of its length
    shares = states[:2].square() / states[:2].square().sum(-1, keepdim=True)
    torch.testing.assert_close(by, (shares.mean((0, 1, 2)) / shares.mean()).clamp(min=1e-3).rsqrt())
    # neither the unit of the states nor the order of the channels matters
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(reconstruct._scales(recorded(7 * states), [0, 1]), by)
    torch.testing.assert_close(reconstruct._scales(recorded(states[..., order]), [0, 1]), by[order])
    # channels and tokens of zeros have a scale
    states = torch.ones(1, 1, 4, 8)
    states[..., 3] = 0
    states[0, 0, 2] = 0
    by = reconstruct._scales(recorded(states), [0])
    assert torch.isfinite(by).all()
    assert by[3] == by.max()
    zeros = torch.zeros(1, 4, 8)
    assert torch.isfinite(reconstruct._scales(recorded(zeros[None]), [0])).all()
    assert float(reconstruct._distance(zeros, zeros)) == 0


ROUNDS = {"true_sequential": True, "solver": "magnitude"}
RUNS = [({"begin": "least-squares"}, ROUNDS), ({}, {})]
RUNS += [slow(x, {}) for x in ({"train": "all"}, {"begin": "least-squares"})]


@pytest.mark.parametrize(("how", "more"), RUNS)
def test_a_run_by_other_threads_is_resumed_and_verified(how, more, small, tmp_path):
    """Killed three times in its second block."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = {**OPTIONS, **more, "training": {**HOW, "epochs": 3, **how}}
    report = prune(small, whole, threads=1, **options)
    options["threads"] = 3
    for stage in ("targets", "solve", "train"):
        interrupted(small, out, 1, stage, resume=stage != "targets", **options)
    again = prune(small, out, resume=True, **options)
    assert contents(out) == contents(whole)
    blocks = [[replace(x, seconds=0.0) for x in one.trained] for one in (report, again)]
    assert blocks[0] == blocks[1]
    found = verify_model(whole, small, calibration=tokens())
    assert len(found.checked_layers) == 14
    assert "trained weights" in found.claimed
    assert "kept weights" not in found.checked


NORMS = {"gpt2": "ln_1.weight", "gemma3": "input_layernorm.weight", "qwen2": "layernorm.weight"}


@pytest.mark.parametrize("family", but_slow(["gpt2", "qwen2"], NORMS))
def test_norms_and_biases_are_trained_where_asked_for(family, tmp_path):
    model, out = tiny(family, layers=2, dtype=torch.bfloat16), tmp_path / "out"
    dense = save(model, tmp_path / "dense")
    report = trained(dense, output=out, how={"learning_rate": 0.03, "train": "all"})
    assert max(one.held_after / one.held_before for one in report.trained) < 1
    verify_model(out, dense, calibration=tokens(12))  # of every zero, its bits
    AutoModelForCausalLM.from_pretrained(out)
    before, after = read_weights(dense), read_weights(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    vectors = {name for name in changed if before[name].ndim == 1}
    assert vectors
    assert not {name for name in vectors if not {"0", "1"} & set(name.split("."))}
    assert [name for name in vectors if name.endswith(NORMS[family])]
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}


def test_norms_of_a_model_in_memory_are_trained_to_the_same_values(tmp_path):
    how, out = {"epochs": 2, "train": "all"}, tmp_path / "out"
    model = tiny("gemma3", layers=2)
    dense = save(model, tmp_path / "dense")
    trained(model, how=how)
    trained(dense, how=how, output=out)
    stored, named = read_weights(out), dict(model.named_parameters())
    assert all(torch.equal(stored[name], named[name]) for name in stored if name in named)
    # and one outside the blocks is never trained
    change_tensors(out / "model.safetensors", lambda found: found["model.norm.weight"].add_(1))
    forge_manifest(out)
    fails(VerificationError, "it is not pruned and differs", verify_model, out, dense)


def test_bad_input_gets_one_line():
    for more, message in (
        ({"holdout": 0.0}, "needs windows that judge it"),
        ({"calibrate_on": "dense"}, "not with `calibrate_on` dense"),
        ({"update": "none"}, "`training` needs `update` blockwise"),
        ({"how": {"epoch": 3}}, "epochs"),
        ({"how": {"epochs": 0}}, "epochs must be"),
        ({"how": {"train": "norms"}}, "weights, all"),
    ):
        fails(OptionError, rf"\A.*{message}.*\Z", trained, tiny("llama"), **more)  # in one line


def test_the_command_trains_and_says_what_became_of_it(dense, data, tmp_path):
    out = tmp_path / "out"
    words = "--sparsity 0.5 --solver wanda --min-tokens 1 --holdout 0.34 --seq-len 16 --samples 6"
    words += " --update blockwise --training epochs=2 --training batch=1"
    said = run("prune", dense, "--calibration", data, "--output", out, *words.split())
    assert "mean of 3 blocks" in " ".join(said.split())
    held = " ".join(run("verify", out, "--original", dense).split())
    assert "every weight that is neither pruned nor trained is that of" in held
    assert manifest_of(out)["fingerprint"]["options"]["training"]["batch"] == 1

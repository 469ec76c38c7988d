"""Kept weights trained together: nearer to the dense model, never worse, not a zero lost, the same bytes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import run
from forging import change_tensors, copied
from outputs import read_masks
from safetensors.torch import load_file
from tiny_models import tokens
from torch.nn import functional
from transformers import AutoModelForCausalLM

from maskopt import Unstructured, distill_model
from maskopt.errors import DataError, ModelError, OptionError
from maskopt.model.distill_options import DistillOptions
from maskopt.model.distill_output import RECORD
from maskopt.model.divergence import divergence
from maskopt.model.job import open_job
from maskopt.model.maskfile import MaskFile, TensorMask, write_masks
from maskopt.model.memory import autograd_memory
from maskopt.model.options import PruneOptions
from maskopt.model.verify_masks import verify_masks
from maskopt.model.workspace import MASKS

HOW = {"epochs": 3, "learning_rate": 0.003, "holdout": 0.25}
#: the last quarter judges
WINDOWS = tokens(32)


def mean_divergence(dense, other, windows):
    """KL(dense ‖ other) over all that predict a token of the windows, by transformers and torch only."""
    models = [AutoModelForCausalLM.from_pretrained(x, dtype=torch.float32) for x in (dense, other)]
    total = []
    with torch.no_grad():
        for window in windows:
            logits = (model(window[None]).logits[0, :-1] for model in models)
            one, two = (x.double().log_softmax(1) for x in logits)
            total.append((one.exp() * (one - two)).sum(1).mean())
    return float(torch.stack(total).mean())


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {}),
        ("llama", {"dtype": torch.bfloat16}),
        slow("mixtral", {"exclude": ("experts.1.*",)}),
        *(slow(family, {}) for family in ("gemma3", "gpt2", "bloom", "gpt_neox", "mixtral")),
    ],
)
def test_it_comes_nearer_to_the_dense_model(family, more, made, tmp_path):
    dense, pruned = made(family, **more)
    out = tmp_path / "out"
    found = distill_model(pruned, dense, WINDOWS, output=out, **HOW)
    assert found.epoch > 0
    assert not found.diverged
    assert found.after.held < 0.95 * found.before.held
    assert found.after.fitted < 0.95 * found.before.fitted
    assert json.loads((out / RECORD).read_text())["after"]["held"] == found.after.held
    # the figures are those of the folders
    for folder, losses in ((pruned, found.before), (out, found.after)):
        assert mean_divergence(dense, folder, WINDOWS[24:]) == pytest.approx(losses.held, rel=1e-3)
        assert mean_divergence(dense, folder, WINDOWS[:8]) == pytest.approx(losses.fitted, rel=1e-3)
    held = verify_masks(out, pruned)
    assert held.changed == 0 < held.others
    assert (out / MASKS).read_bytes() == (pruned / MASKS).read_bytes()
    # every masked tensor is another and no other one is; zeros keep their bits, tensors their dtype
    old, new = (load_file(x / "model.safetensors") for x in (pruned, out))
    assert list(old) == list(new)
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    spared = [name for name in old if "exclude" in more and "experts.1." in name]
    assert bool(spared) == ("exclude" in more)
    assert not set(spared) & set(changed)
    assert len(changed) == held.tensors - len(spared)
    for name, tensor in new.items():
        gone = old[name] == 0
        assert tensor.dtype == old[name].dtype == more.get("dtype", torch.float32)
        bits = torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32
        assert torch.equal(tensor[gone].view(bits), old[name][gone].view(bits))


def test_threads_and_what_is_computed_again_change_nothing(made, tmp_path):
    dense, pruned = made("gemma3")
    before, results = torch.get_num_threads(), []
    for threads, recompute in ((1, False), (3, True)):
        out = tmp_path / str(threads)
        how = {**HOW, "epochs": 2, "threads": threads, "recompute": recompute}
        distill_model(pruned, dense, WINDOWS[:8], output=out, **how)
        assert torch.get_num_threads() == before
        results.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert results[0] == results[1]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mixtral"])
def test_what_autograd_keeps_is_estimated(family, made):
    """Of a window; what enters each block and nothing else where it is computed again."""
    job = open_job(made(family)[1], WINDOWS, DistillOptions(threads=1))
    with job, job.in_memory() as states:
        found = kept_bytes(job.source.model, lambda: states(0))
    with job, job.in_memory(recompute=True) as states:
        entered = kept_bytes(job.source.model, lambda: states(0))
    blocks, width = len(job.source.blocks), job.source.model.config.hidden_size
    assert entered == blocks * 4 * job.length * width
    load = replace(job.load, together=True)
    assert 0.8 * found < autograd_memory(load) < 3 * found
    again = autograd_memory(replace(load, recompute=True))
    assert again == autograd_memory(load) // blocks + entered


def kept_bytes(model, compute):
    """Of storages that autograd keeps for a result's gradient, those of parameters left out."""
    model.requires_grad_(True)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}  # the storages live as long, so that no address is used twice

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(("rate", "diverged"), [(10.0, False), (1e30, True), (1e300, True)])
def test_weights_that_would_get_worse_are_not_changed(rate, diverged, made, tmp_path):
    dense, pruned = made("llama")
    how = {**HOW, "learning_rate": rate}
    found = distill_model(pruned, dense, WINDOWS[:12], output=tmp_path / "out", **how)
    assert found.diverged is diverged
    assert found.epoch == 0
    assert found.after == found.before
    old, new = (x / "model.safetensors" for x in (pruned, tmp_path / "out"))
    assert old.read_bytes() == new.read_bytes()


def test_the_gradient_is_that_of_the_whole_model(made, tmp_path):
    """One step of plain torch, from the same place, by the same optimiser."""
    dense, pruned = made("llama")
    how = {**HOW, "epochs": 1, "batch": 24, "learning_rate": 0.001, "max_memory": "3GiB"}
    found = distill_model(pruned, dense, WINDOWS, output=tmp_path / "out", **how)
    assert found.epoch == 1
    model, taught = (AutoModelForCausalLM.from_pretrained(x) for x in (pruned, dense))
    new = load_file(tmp_path / "out" / "model.safetensors")
    masked = MaskFile(pruned / MASKS).names
    weights = [model.get_parameter(name) for name in masked]
    with torch.no_grad():
        wanted = taught(WINDOWS[:24]).logits[:, :-1].log_softmax(-1)
    logs = model(WINDOWS[:24]).logits[:, :-1].log_softmax(-1)
    loss = functional.kl_div(logs, wanted, reduction="sum", log_target=True)
    gradients = torch.autograd.grad(loss / wanted[..., 0].numel(), weights)
    for name, weight, gradient in zip(masked, weights, gradients, strict=True):
        kept = weight.detach() != 0
        size = float(weight.detach()[kept].square().mean().sqrt())
        expected = weight.detach() - 0.001 * size * gradient / (gradient.abs() + 1e-8)
        strong = kept & (gradient.abs() > 1e-4 * float(gradient.abs().max()))
        assert bool(strong.any())
        torch.testing.assert_close(new[name][strong], expected[strong], rtol=1e-3, atol=1e-6)


def test_what_cannot_be(made, tmp_path):
    dense, pruned = made("llama")
    out, number = tmp_path / "out", iter(range(9))

    def refused(kind, words, *models, windows=WINDOWS, **more):
        with pytest.raises(kind, match=words):
            distill_model(*(models or (pruned, dense)), windows, **{"output": out, **HOW, **more})
        assert not out.exists()

    def forged(change):
        change(folder := copied(pruned, tmp_path / str(next(number))))
        return folder

    def moved(name):
        return forged(lambda x: change_tensors(x / "model.safetensors", lambda t: t[name].add_(1)))

    def all_kept(folder):
        masks = read_masks(folder / MASKS)
        kept = {n: TensorMask(torch.ones_like(x.kept), x.input_axis) for n, x in masks.items()}
        write_masks(folder / MASKS, kept)

    refused(ModelError, "holds no maskopt-masks", dense, dense)
    refused(ModelError, "was not made of", pruned, made("gpt2")[0])
    refused(ModelError, "prune nothing", forged(all_kept), dense)
    refused(ModelError, "no prune changes it", moved("model.embed_tokens.weight"), dense)
    refused(ModelError, "its mask prunes", moved("model.layers.0.mlp.up_proj.weight"), dense)
    refused(DataError, "holdout", holdout=0.0)
    refused(DataError, "keeps 0 aside", holdout=0.01)
    refused(DataError, "calibration", windows=None)
    refused(OptionError, "leave out `include`", include=("q_proj",))
    refused(OptionError, "epochs", epochs=0)
    refused(OptionError, "no option is called 'epoch'.*epochs", epoch=2)
    refused(ModelError, "is the model", output=pruned, overwrite=True)
    memory = r"estimated .* GiB are needed, `max_memory` allows 0\.10 .*, or `recompute`"
    refused(ModelError, memory, max_memory="100MiB")
    model = AutoModelForCausalLM.from_pretrained(pruned)
    refused(ModelError, "folders, not of a LlamaForCausalLM", model, dense)


def test_the_command_the_record_and_the_card(made, tmp_path):
    dense, pruned = made("llama")
    out, text, again = tmp_path / "out", tmp_path / "tokens.npy", tmp_path / "again"
    np.save(text, WINDOWS.numpy())
    how = ["--calibration", text, "--epochs", 3, "--learning-rate", 0.003, "--holdout", 0.25]
    said = run("distill", pruned, "--teacher", dense, *how, "--output", out)
    assert "on windows kept aside" in said
    assert "trained model" in said
    checked = run("verify", out, "--masks", pruned)
    assert "holds" in checked
    assert "without a mask, 0 changed" in checked
    fingerprint = json.loads((out / RECORD).read_text())["fingerprint"]
    assert fingerprint["options"]["epochs"] == 3
    assert fingerprint["model"] != fingerprint["teacher"]
    card = (out / "README.md").read_text()
    assert card.startswith((pruned / "README.md").read_text().rstrip())
    assert card.count("Trained after pruning") == 1
    distill_model(out, dense, WINDOWS[:8], output=again, **HOW)
    assert (again / "README.md").read_text() == card
    assert not (out / "maskopt-manifest.json").exists()
    # crops of a text are others than those of a prune
    assert DistillOptions().seed != PruneOptions(Unstructured(0.5)).seed


@pytest.mark.parametrize("positions", [1, 4, 11])
def test_divergence_and_its_derivative_are_those_of_torch(positions):
    generator = torch.Generator().manual_seed(0)
    wanted, found = (5 * torch.randn(positions, 300, generator=generator) for _ in range(2))
    exact = found.double().requires_grad_()
    p = wanted.double().log_softmax(1)
    loss = functional.kl_div(exact.log_softmax(1), p, reduction="sum", log_target=True)
    (derivative,) = torch.autograd.grad(loss, exact)
    slope = torch.empty_like(found)
    value = divergence(wanted, found, slope)
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    assert torch.allclose(slope.double(), derivative, atol=1e-6)
    assert torch.equal(divergence(wanted, found, None), value)
    # a model is at no distance from itself
    assert float(divergence(wanted, wanted.clone(), slope)) == 0.0
    assert float(slope.abs().max()) == 0.0

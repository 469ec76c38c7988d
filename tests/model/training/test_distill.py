"""Kept weights trained together: nearer to the dense model, never worse, not a zero lost, the same bytes."""

import itertools
import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from commands import run, shows
from forging import change_masks, change_tensors, copied, fails
from prunes import Stop, files, slow
from safetensors.torch import load_file
from tiny_models import edit_json, tokens
from torch.nn import functional
from transformers import AutoModelForCausalLM

from maskopt import PruneOptions, Unstructured, distill_model, open_job
from maskopt.errors import DataError, ModelError, OptionError
from maskopt.models.blockwise.memory import autograd_memory
from maskopt.models.checkpoints.result import MaskFile
from maskopt.models.checkpoints.schema import MASKS
from maskopt.models.checkpoints.workspace import CARD, HIDDEN, JOURNAL, Journal, earlier_files
from maskopt.models.distillation import RECORD
from maskopt.models.options.walk import DistillOptions
from maskopt.models.pruning import run as running
from maskopt.models.training import trainer as training
from maskopt.models.training.tasks import divergence
from maskopt.models.training.trainer import FolderKeeper
from maskopt.models.verification.verify import verify_model

HOW = {"epochs": 3, "learning_rate": 0.003, "holdout": 0.25}
WORDS = ("--epochs", 3, "--learning-rate", 0.003, "--holdout", 0.25)
#: the last quarter judges
WINDOWS = tokens(32)
#: of 16 windows 12 are fitted, so that an epoch has six steps
STEPS = 6
only_llama = pytest.mark.parametrize("given", ["llama-float32"], indirect=True)
#: after so many steps, of which so many were saved: in the first epoch, around its judgement, at the end
KILLS = [(1, {k: k for k in (1, STEPS - 1, STEPS, STEPS + 1, 3 * STEPS)}, 3 * STEPS)]
KILLS += [(5, {7: 5, 11: 8}, 7 + 6 + 3 * STEPS - 8)]
TRAINED = [slow("llama", {}), ("llama", {"dtype": torch.bfloat16})]
TRAINED += [slow(x, {}) for x in ("gemma3", "gpt2", "bloom", "gpt_neox", "mixtral")]
TRAINED += [slow("mixtral", {"exclude": ("experts.1.*",)})]


def mean_divergence(dense, other, windows):
    """KL(dense ‖ other) over all that predict a token of the windows, by transformers and torch only."""
    models = (AutoModelForCausalLM.from_pretrained(x, dtype=torch.float32) for x in (dense, other))
    with torch.no_grad():
        one, two = (x(windows).logits[:, :-1].double().log_softmax(-1) for x in models)
    return float((one.exp() * (one - two)).sum(-1).mean())


@pytest.mark.parametrize(("family", "more"), TRAINED)
def test_it_comes_nearer_to_the_dense_model(family, more, pairs, tmp_path):
    dense, pruned = pairs(family, **more)
    out = tmp_path / "out"
    found = distill_model(pruned, dense, WINDOWS, output=out, **HOW)
    assert found.epoch > 0
    assert not found.diverged
    for part in ("held", "fitted"):
        assert getattr(found.after, part) < 0.95 * getattr(found.before, part)
    assert json.loads((out / RECORD).read_text())["after"]["held"] == found.after.held
    # the figures are those of the folders
    for folder, losses in ((pruned, found.before), (out, found.after)):
        for windows, loss in ((WINDOWS[24:], losses.held), (WINDOWS[:8], losses.fitted)):
            assert mean_divergence(dense, folder, windows) == pytest.approx(loss, rel=1e-3)
    held = verify_model(out, masks=pruned)
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


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mixtral"])
def test_what_autograd_keeps_is_estimated(family, pairs):
    """Of a window; what enters each block and nothing else where it is computed again."""
    job, kept = open_job(pairs(family)[1], WINDOWS, DistillOptions(threads=1).walk), []
    for recompute in (False, True):
        with job:
            states = job.in_memory(recompute=recompute)
            kept.append(kept_bytes(job.source.model, lambda states=states: states(0)))
    found, entered = kept
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
def test_weights_that_would_get_worse_are_not_changed(rate, diverged, pairs, tmp_path):
    dense, pruned = pairs("llama")
    how = {**HOW, "learning_rate": rate}
    found = distill_model(pruned, dense, WINDOWS[:12], output=tmp_path / "out", **how)
    assert (found.diverged, found.epoch, found.after) == (diverged, 0, found.before)
    old, new = (x / "model.safetensors" for x in (pruned, tmp_path / "out"))
    assert old.read_bytes() == new.read_bytes()


def test_the_gradient_is_that_of_the_whole_model(pairs, tmp_path):
    """One step of plain torch, from the same place, by the same optimiser."""
    dense, pruned = pairs("llama")
    how = {**HOW, "epochs": 1, "batch": 24, "learning_rate": 0.001, "max_memory": "3GiB"}
    assert distill_model(pruned, dense, WINDOWS, output=tmp_path / "out", **how).epoch == 1
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


def test_what_cannot_be(pairs, tmp_path):
    dense, pruned = pairs("llama")
    out = tmp_path / "out"

    def refused(kind, words, *models, windows=WINDOWS, **more):
        given = models or (pruned, dense)
        fails(kind, words, distill_model, *given, windows, **{"output": out, **HOW, **more})
        assert not out.exists()

    def moved(name):
        folder = copied(pruned, tmp_path / name)
        change_tensors(folder / "model.safetensors", lambda tensors: tensors[name].add_(1))
        return folder

    kept = copied(pruned, tmp_path / "kept")
    change_masks(kept, lambda masks: [mask.kept.fill_(True) for mask in masks.values()])
    refused(ModelError, "holds no maskopt-masks", dense, dense)
    refused(ModelError, "was not made of", pruned, pairs("gpt2")[0])
    refused(ModelError, "prune nothing", kept, dense)
    refused(ModelError, "no prune changes it", moved("model.embed_tokens.weight"), dense)
    refused(ModelError, "its mask prunes", moved("model.layers.0.mlp.up_proj.weight"), dense)
    refused(DataError, "holdout", holdout=0.0)
    refused(DataError, "holds out none; take at least 100 windows", holdout=0.01)
    refused(DataError, "calibration", windows=None)
    refused(OptionError, "no option is called .include.", include=("q_proj",))
    refused(OptionError, "epochs", epochs=0)
    refused(OptionError, "no option is called 'epoch'.*epochs", epoch=2)
    refused(ModelError, "is the model", output=pruned, overwrite=True)
    memory = r"estimated .* GiB are needed, `max_memory` allows 0\.10 .* distill --recompute`"
    refused(ModelError, memory, max_memory="100MiB")
    model = AutoModelForCausalLM.from_pretrained(pruned)
    refused(ModelError, "folders, not of a LlamaForCausalLM", model, dense)


def test_the_command_the_record_and_the_card(pairs, tmp_path):
    dense, pruned = pairs("llama")
    out, text, again = tmp_path / "out", tmp_path / "tokens.npy", tmp_path / "again"
    np.save(text, WINDOWS.numpy())
    how = ["--calibration", text, *WORDS, "--output", out]
    words = ("distill", pruned, "--teacher", dense, *how)
    shows(run(*words, "--dry-run"), "memory at the peak", "disk: ", "time, estimated: about")
    said = run(*words)  # the output does not exist yet
    shows(said, "on held-out windows", "trained model")
    shows(run("verify", out, "--masks", pruned), "holds", "without a mask, 0 changed")
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


@pytest.fixture(scope="module", params=["llama-float32", slow("gpt2-bfloat16")])
def given(request, pairs, tmp_path_factory):
    family, dtype = request.param.split("-")
    dense, pruned = pairs(family, dtype=getattr(torch, dtype))
    whole = tmp_path_factory.mktemp("whole") / "out"
    np.save(text := whole.with_name("tokens.npy"), tokens(16).numpy())
    distil = partial(distill_model, pruned, dense, calibration=text, save_every=1e-9, **HOW)
    assert distil(output=whole).epoch == 3
    return distil, files(whole)


def interrupted(distil, out, step, **how):
    def stop(what, done, total):
        assert total == 2 * 3 * STEPS or what != "train"
        if what == "train" and done == 2 * step:
            raise Stop

    fails(Stop, None, distil, output=out, on_progress=stop, **how)


@pytest.fixture
def steps(monkeypatch):
    taken, plain = [], training._set_gradients
    monkeypatch.setattr(training, "_set_gradients", lambda *a: (taken.append(1), plain(*a)))
    return taken


@pytest.mark.parametrize(("every", "kills", "taken"), KILLS)
def test_the_same_bytes(every, kills, taken, given, tmp_path, steps, monkeypatch):
    (distil, whole), out, before = given, tmp_path / "out", torch.get_num_threads()
    asked = itertools.count(1)
    monkeypatch.setattr(FolderKeeper, "due", lambda _: next(asked) % every == 0)
    for threads, (step, kept) in enumerate(kills.items(), 1):
        more = {"threads": threads, "recompute": threads % 2 == 0}
        interrupted(distil, out, step, resume=threads > 1, **more)
        assert torch.get_num_threads() == before
        assert [entry.name for entry in out.iterdir()] == [HIDDEN]
        (saved,) = (out / HIDDEN / "blocks").glob("step-*")
        assert saved.name == f"step-{kept:08}.safetensors"
        fails(ModelError, "unfinished run; go on with `resume`", distil, output=out)
    results = []
    for _ in range(2):  # at the second time nothing is left to do
        found = distil(output=out, resume=True)
        results.append((found.before, found.after, found.epoch))
        assert files(out) == whole
        assert len(steps) == taken
    assert results[0] == results[1]
    assert found.epoch == 3


@only_llama
def test_killed_while_it_saves(given, tmp_path, monkeypatch, steps):
    """A dead process leaves a file that no line of the journal counts, and half of another."""
    (distil, whole), out, dead = given, tmp_path / "out", tmp_path / "dead"
    plain = Journal.add

    def dies(self, kind, **record):
        if record.get("step") == 4:
            shutil.copytree(out, dead)
        plain(self, kind, **record)

    monkeypatch.setattr(Journal, "add", dies)
    interrupted(distil, out, 5)
    (dead / HIDDEN / "blocks" / ".step-00000005.safetensors.x.tmp").write_bytes(b"half")
    saved = sorted(x.name for x in (dead / HIDDEN / "blocks").glob("step-*"))
    assert saved == [f"step-0000000{step}.safetensors" for step in (3, 4)]
    steps.clear()
    monkeypatch.setattr(Journal, "add", plain)
    (pruned, dense), text = distil.args, distil.keywords["calibration"]
    how = ["--calibration", text, *WORDS, "--output", dead, "--resume", "--save-every", 0]
    assert "trained model" in run("distill", pruned, "--teacher", dense, *how)
    assert json.loads((dead / RECORD).read_text())["epoch"] == 3
    assert len(steps) == 3 * STEPS - 3
    assert files(dead) == whole


@only_llama
def test_the_best_epoch_is_kept_though_later_ones_are_worse(given, tmp_path, monkeypatch):
    distil, _ = given
    plain, judged = training._mean, []

    def worse(task, windows):
        """From the second epoch on: held windows are judged at the start, and after every epoch."""
        loss = plain(task, windows)
        if list(windows) == list(task.held):
            judged.append(1)
            return loss * max(1, len(judged) - 1)
        return loss

    monkeypatch.setattr(training, "_mean", worse)
    found = distil(output=tmp_path / "whole")
    assert found.epoch == 1
    judged.clear()
    interrupted(distil, tmp_path / "out", 2 * STEPS + 3)
    again = distil(output=tmp_path / "out", resume=True)
    assert (again.before, again.after, again.epoch) == (found.before, found.after, 1)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@only_llama
def test_what_cannot_be_gone_on_with(given, tmp_path, monkeypatch):
    (distil, whole), out = given, tmp_path / "out"
    for every in (0.0, 10.0):  # nothing is saved: ten minutes, the default, are not over
        interrupted(distil, out, STEPS + 1, save_every=every)
        assert not out.exists()
        fails(ModelError, "nothing to resume", distil, output=out, resume=True)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(running.shutil, "disk_usage", lambda _: usage._replace(free=2**20))
        fails(ModelError, r"free on the disk; `save_every` 0 takes less", distil, output=out)
    assert not out.exists()
    interrupted(distil, out, 3)

    def refused(words, kind=ModelError, **more):
        fails(kind, words, distil, output=out, resume=True, **more)

    refused(r"the unfinished part of another run: options\.epochs was 3, is 2", epochs=2)
    refused(r"calibration\.sha256", calibration=tokens(16, seed=1))
    refused("goes on with what `overwrite` drops", overwrite=True)
    refused("save_every", OptionError, save_every=-1)
    path = out / HIDDEN / JOURNAL
    right, journal = path.read_bytes(), Journal(path)
    odd = {"file": "../x", "step": -1, "before": [1.0], "held": None, "digest": 7}
    for forged in ({"step": True}, *({name: value} for name, value in odd.items())):
        journal.add(**{**journal.progress, **forged})
        refused("not a journal of maskopt")
    path.write_bytes(right)
    (saved,) = (out / HIDDEN / "blocks").glob("step-*")
    right = saved.read_bytes()
    for wrong in (right[:-1] + bytes([right[-1] ^ 1]), right[:100], None):
        saved.unlink() if wrong is None else saved.write_bytes(wrong)
        refused("does not match the journal")
    # nothing was lost meanwhile
    saved.write_bytes(right)
    distil(output=out, resume=True)
    assert files(out) == whole
    refused(r"holds the result of another run: options\.batch was 2, is 3", batch=3)
    assert earlier_files(out) == {file.name for file in out.iterdir()}
    (weights, *_) = sorted(out.glob("*.safetensors"))
    good = weights.read_bytes()
    weights.write_bytes(good[:-7])
    refused(f"{weights.name} was changed since; `overwrite`")
    weights.write_bytes(good)
    (out / CARD).write_text("edited")
    distil(output=out, resume=True)
    edit_json(out / RECORD, lambda record: record.pop("after"))
    refused("is damaged; start over with `overwrite`")

"""Kept weights trained together: nearer to the dense model, never worse, not a zero lost, the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run
from forging import change_tensors, copied
from outputs import read_masks
from safetensors.torch import load_file
from tiny_models import loud, save, tokens
from transformers import AutoModelForCausalLM

from maskopt import Unstructured, distill_model, prune_model
from maskopt.errors import DataError, MaskoptError, ModelError, OptionError
from maskopt.model.distill_options import DistillOptions
from maskopt.model.distill_output import RECORD
from maskopt.model.job import open_job
from maskopt.model.maskfile import MaskFile, TensorMask, write_masks
from maskopt.model.memory import autograd_memory
from maskopt.model.options import PruneOptions
from maskopt.model.verify_masks import verify_masks
from maskopt.model.workspace import MASKS

OPTIONS: dict[str, Any] = {"sparsity": 0.5, "solver": "wanda", "min_tokens": 1}
HOW: dict[str, Any] = {"epochs": 3, "learning_rate": 0.003, "holdout": 0.25}
#: the last quarter is kept aside
WINDOWS = tokens(32)
Made = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A tiny model of a family, and that model pruned; nobody may change them."""
    home = tmp_path_factory.mktemp("made")

    def of(family: str, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
        dense, pruned = home / f"{family}-{dtype}-dense", home / f"{family}-{dtype}"
        if not pruned.exists():
            save(loud(family, dtype), dense)
            prune_model(dense, tokens(6), output=pruned, **OPTIONS)
        return dense, pruned

    return of


def mean_divergence(dense: Path, other: Path, windows: torch.Tensor) -> float:
    """KL(dense ‖ other) over all that predict a token of the windows, by transformers and torch alone."""
    total = []
    for window in windows:
        logits = [
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(window[None]).logits
            for folder in (dense, other)
        ]
        one, two = (x[0, :-1].detach().double().log_softmax(1) for x in logits)
        total.append((one.exp() * (one - two)).sum(1).mean())
    return float(torch.stack(total).mean())


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bloom", "gpt_neox", "mixtral"])
def test_it_comes_nearer_to_the_dense_model(family: str, made: Made, tmp_path: Path) -> None:
    dense, pruned = made(family)
    found = distill_model(pruned, dense, WINDOWS, output=tmp_path / "out", **HOW)
    assert found.epoch > 0
    assert not found.diverged
    assert found.after.held < 0.95 * found.before.held
    assert found.after.fitted < 0.95 * found.before.fitted
    # the figures are those of the folders
    for folder, losses in ((pruned, found.before), (tmp_path / "out", found.after)):
        assert mean_divergence(dense, folder, WINDOWS[24:]) == pytest.approx(losses.held, rel=1e-3)
        assert mean_divergence(dense, folder, WINDOWS[:8]) == pytest.approx(losses.fitted, rel=1e-3)
    held = verify_masks(tmp_path / "out", pruned)
    assert held.changed == 0 < held.others
    assert (tmp_path / "out" / MASKS).read_bytes() == (pruned / MASKS).read_bytes()
    old, new = (load_file(x / "model.safetensors") for x in (pruned, tmp_path / "out"))
    assert list(old) == list(new)
    assert sum(not torch.equal(old[name], new[name]) for name in old) == held.tensors


def test_zeros_stay_zeros_bit_for_bit_and_the_dtype_stays(made: Made, tmp_path: Path) -> None:
    dense, pruned = made("llama", torch.bfloat16)
    found = distill_model(pruned, dense, WINDOWS, output=tmp_path / "out", **HOW)
    assert found.epoch > 0
    old, new = (load_file(x / "model.safetensors") for x in (pruned, tmp_path / "out"))
    for name, tensor in new.items():
        assert tensor.dtype == old[name].dtype == torch.bfloat16
        gone = old[name] == 0
        assert torch.equal(tensor[gone].view(torch.int16), old[name][gone].view(torch.int16))
    # judged as it is stored
    after = mean_divergence(dense, tmp_path / "out", WINDOWS[24:])
    assert after == pytest.approx(found.after.held, rel=1e-3)


def test_experts_without_a_mask_stay_as_they_are(tmp_path: Path) -> None:
    dense = save(loud("mixtral"), tmp_path / "dense")
    prune_model(dense, tokens(6), output=tmp_path / "pruned", exclude=("experts.1.*",), **OPTIONS)
    distill_model(tmp_path / "pruned", dense, WINDOWS, output=tmp_path / "out", **HOW)
    held = verify_masks(tmp_path / "out", tmp_path / "pruned")
    assert held.changed == 0
    old, new = (load_file(tmp_path / x / "model.safetensors") for x in ("pruned", "out"))
    spared = [name for name in old if "experts.1." in name]
    assert spared
    assert all(torch.equal(old[name], new[name]) for name in spared)


def test_threads_and_what_is_computed_again_change_nothing(made: Made, tmp_path: Path) -> None:
    dense, pruned = made("gemma3")
    before, results = torch.get_num_threads(), []
    for threads, recompute in ((1, False), (3, False), (2, True)):
        out = tmp_path / str(threads)
        how = {**HOW, "threads": threads, "recompute": recompute}
        distill_model(pruned, dense, WINDOWS, output=out, **how)
        assert torch.get_num_threads() == before
        results.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mixtral"])
def test_what_autograd_keeps_is_estimated(family: str, made: Made) -> None:
    """Of a window; what enters each block and nothing else where it is computed again."""
    _, pruned = made(family)
    job = open_job(pruned, WINDOWS, DistillOptions(threads=1))
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


def kept_bytes(model: torch.nn.Module, compute: Callable[[], torch.Tensor]) -> int:
    """Of storages that autograd keeps for a result's gradient, those of parameters left out."""
    model.requires_grad_(True)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute()
    return sum(kept.values())


def test_a_limit_of_memory_is_held_before_anything_is_read(made: Made, tmp_path: Path) -> None:
    dense, pruned = made("llama")
    message = r"estimated .* GiB are needed, `max_memory` allows 0\.10 .*, or `recompute`"
    with pytest.raises(ModelError, match=message):
        distill_model(pruned, dense, WINDOWS, output=tmp_path / "out", max_memory="100MiB", **HOW)
    assert not (tmp_path / "out").exists()
    distill_model(pruned, dense, WINDOWS, output=tmp_path / "out", max_memory="3GiB", **HOW)


def test_crops_of_a_text_are_others_than_those_of_a_prune() -> None:
    assert DistillOptions().seed != PruneOptions(Unstructured(0.5)).seed


@pytest.mark.parametrize(("rate", "diverged"), [(10.0, False), (1e30, True), (1e300, True)])
def test_what_would_get_worse_stays_as_it_is(
    rate: float, diverged: bool, made: Made, tmp_path: Path
) -> None:
    dense, pruned = made("llama")
    out = tmp_path / "out"
    how = {**HOW, "learning_rate": rate}
    found = distill_model(pruned, dense, WINDOWS, output=out, **how)
    assert found.diverged is diverged
    assert found.epoch == 0
    assert found.after == found.before
    assert (out / "model.safetensors").read_bytes() == (pruned / "model.safetensors").read_bytes()


def test_the_gradient_is_that_of_the_whole_model(made: Made, tmp_path: Path) -> None:
    """One step of plain torch, from the same place, by the same optimiser."""
    dense, pruned = made("llama")
    how = {"epochs": 1, "batch": 24, "learning_rate": 0.001, "holdout": 0.25}
    found = distill_model(pruned, dense, WINDOWS, output=tmp_path / "out", **how)
    assert found.epoch == 1
    model, taught = (AutoModelForCausalLM.from_pretrained(x) for x in (pruned, dense))
    new = load_file(tmp_path / "out" / "model.safetensors")
    masked = MaskFile(pruned / MASKS).names
    weights = [model.get_parameter(name) for name in masked]
    loss = sum(
        torch.nn.functional.kl_div(
            model(w[None]).logits[0, :-1].log_softmax(1),
            taught(w[None]).logits[0, :-1].detach().log_softmax(1),
            reduction="sum",
            log_target=True,
        )
        / (len(w) - 1)
        for w in WINDOWS[:24]
    )
    gradients = torch.autograd.grad(loss / 24, weights)
    for name, weight, gradient in zip(masked, weights, gradients, strict=True):
        kept = weight.detach() != 0
        size = float(weight.detach()[kept].square().mean().sqrt())
        expected = weight.detach() - 0.001 * size * gradient / (gradient.abs() + 1e-8)
        strong = kept & (gradient.abs() > 1e-4 * float(gradient.abs().max()))
        assert bool(strong.any())
        torch.testing.assert_close(new[name][strong], expected[strong], rtol=1e-3, atol=1e-6)


def test_the_record_and_the_card(made: Made, tmp_path: Path) -> None:
    dense, pruned = made("llama")
    found = distill_model(pruned, dense, WINDOWS, output=tmp_path / "out", **HOW)
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["after"]["held"] == found.after.held
    assert record["fingerprint"]["options"]["epochs"] == 3
    assert record["fingerprint"]["model"] != record["fingerprint"]["teacher"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith((pruned / "README.md").read_text().rstrip())
    assert card.count("Trained after pruning") == 1
    again = tmp_path / "again"
    distill_model(tmp_path / "out", dense, WINDOWS, output=again, **HOW)
    assert (again / "README.md").read_text() == card
    assert not (tmp_path / "out" / "maskopt-manifest.json").exists()


def test_zeros_are_checked_against_a_packed_folder(made: Made, tmp_path: Path) -> None:
    _, pruned = made("llama")
    run("pack", str(pruned), "--output", str(tmp_path / "packed"))
    held = verify_masks(pruned, tmp_path / "packed")
    assert held.pruned > 0
    assert held.others == 0


def test_what_cannot_be(made: Made, tmp_path: Path) -> None:
    dense, pruned = made("llama")
    other, _ = made("gpt2")
    out = tmp_path / "out"

    def refused(kind: type[MaskoptError], words: str, *models: Path, **more: Any) -> None:
        with pytest.raises(kind, match=words):
            distill_model(*models, WINDOWS, **{"output": out, **HOW, **more})
        assert not out.exists()

    refused(ModelError, "holds no maskopt-masks", dense, dense)
    refused(ModelError, "was not made of", pruned, other)
    refused(DataError, "holdout", pruned, dense, holdout=0.0)
    refused(DataError, "keeps 0 aside", pruned, dense, holdout=0.01)
    refused(OptionError, "leave out `include`", pruned, dense, include=("q_proj",))
    refused(OptionError, "epochs", pruned, dense, epochs=0)
    refused(OptionError, "no option is called 'epoch'.*epochs", pruned, dense, epoch=2)
    refused(ModelError, "is the model", pruned, dense, output=pruned, overwrite=True)
    whole = copied(pruned, tmp_path / "whole")
    masks = read_masks(whole / MASKS)
    all_kept = {
        name: TensorMask(torch.ones_like(x.kept), x.input_axis) for name, x in masks.items()
    }
    write_masks(whole / MASKS, all_kept)
    refused(ModelError, "prune nothing", whole, dense)
    with pytest.raises(DataError, match="calibration"):
        distill_model(pruned, dense, output=out)
    model: Any = AutoModelForCausalLM.from_pretrained(pruned)
    with pytest.raises(ModelError, match="folders, not of a LlamaForCausalLM"):
        distill_model(model, dense, WINDOWS, output=out)


def test_a_changed_embedding_or_lost_zeros_are_refused(made: Made, tmp_path: Path) -> None:
    dense, pruned = made("llama")
    for name, words in (
        ("model.embed_tokens.weight", "no prune changes it"),
        ("model.layers.0.mlp.up_proj.weight", "its mask prunes"),
    ):
        forged = copied(pruned, tmp_path / name)
        change_tensors(forged / "model.safetensors", lambda found, name=name: found[name].add_(1))
        with pytest.raises(ModelError, match=words):
            distill_model(forged, dense, WINDOWS, output=tmp_path / "out", **HOW)
        assert not (tmp_path / "out").exists()


def test_the_command(made: Made, tmp_path: Path) -> None:
    dense, pruned = made("llama")
    text = tmp_path / "tokens.npy"
    np.save(text, WINDOWS.numpy())
    how = ["--calibration", str(text), "--epochs", "3", "--learning-rate", "0.003"]
    how += ["--holdout", "0.25", "--output", str(tmp_path / "out")]
    said = run("distill", str(pruned), "--teacher", str(dense), *how)
    assert "on windows kept aside" in said
    assert "trained model" in said
    checked = run("verify", str(tmp_path / "out"), "--masks", str(pruned))
    assert "holds" in checked
    assert "without a mask, 0 changed" in checked

"""Perplexity, streamed block by block, against the definition on the model as a whole."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run
from tiny_models import FAMILIES, SHARED, WordTokenizer, patched, save, tiny, tokens
from typer.testing import CliRunner

import maskopt
from maskopt.cli import app
from maskopt.errors import DataError, ModelError, OptionError
from maskopt.model import evaluate as evaluation
from maskopt.model import perplexity as module
from maskopt.model import walk_block
from maskopt.model.parts import first
from maskopt.model.source import FolderSource
from maskopt.model.walk_options import WalkOptions


def cross_entropy(model: Any, data: torch.Tensor) -> float:
    """By definition: one forward pass of the whole model, float64."""
    with torch.no_grad():
        logits = model(data, use_cache=False).logits.double().log_softmax(-1)
    return float(-logits[:, :-1].gather(-1, data[:, 1:, None]).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_and_in_memory_agree_with_the_definition(family: str, tmp_path: Path) -> None:
    model, data = tiny(family), tokens(5, 12)
    expected = cross_entropy(model, data)
    dense = save(model, tmp_path / "dense", shard="40KB")
    streamed = maskopt.perplexity(dense, data, threads=2)
    assert streamed.cross_entropy == pytest.approx(expected, rel=1e-5)
    assert streamed.value == pytest.approx(float(torch.tensor(expected).exp()), rel=1e-4)
    assert streamed == maskopt.perplexity(model, data, threads=1)
    assert streamed == maskopt.perplexity(dense, data, threads=3, activation_memory=0)
    assert cross_entropy(model, data) == pytest.approx(expected, rel=1e-6)  # runs as before


@pytest.mark.parametrize("family", ["llama", "gemma3"])  # with a head of its own, and without
def test_one_block_in_memory_at_a_time(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = save(tiny(family), tmp_path / "dense")
    opened: list[FolderSource] = []
    resident: list[set[str]] = []

    def look() -> None:
        named = opened[0].model.named_parameters()
        resident.append({name for name, p in named if not p.is_meta})

    class Watched(FolderSource):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            opened.append(self)

    monkeypatch.setattr("maskopt.model.opening.FolderSource", Watched)
    pass_on, last = walk_block.pass_on, module.cross_entropy
    monkeypatch.setattr(walk_block, "pass_on", lambda *a: (look(), pass_on(*a)))
    monkeypatch.setattr(module, "cross_entropy", lambda *a: (look(), last(*a))[1])
    maskopt.perplexity(dense, tokens(1, 8))
    assert len(resident) == 4
    for index, names in enumerate(resident[:3]):
        prefixes = {name.split(".")[2] for name in names if ".layers." in name}
        assert prefixes == {str(index)}
        assert "model.embed_tokens.weight" in names
        assert "lm_head.weight" not in names
    head = "lm_head.weight" if family == "llama" else "model.embed_tokens.weight"
    assert resident[3] == {head, "model.norm.weight"}


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_of_several_models_only_hidden_states_are_kept_and_equal_heads_once(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = "lm_head.weight" if family == "llama" else "model.embed_tokens.weight"
    models = [save(tiny(family), tmp_path / name) for name in "ab"]
    other = patched(tiny(family), head, lambda p: p[3].mul_(1.5))
    models.append(save(other, tmp_path / "c"))
    opened: list[FolderSource] = []
    resident: list[list[set[str]]] = []
    heads: list[list[int]] = []

    def look() -> None:
        named = [source.model.named_parameters() for source in opened]
        resident.append([{name for name, p in model if not p.is_meta} for model in named])
        heads.append([source.model.get_parameter(head).data_ptr() for source in opened])

    class Watched(FolderSource):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            opened.append(self)

    monkeypatch.setattr("maskopt.model.opening.FolderSource", Watched)
    pass_on, compare = walk_block.pass_on, evaluation._compare
    monkeypatch.setattr(walk_block, "pass_on", lambda *a: (look(), pass_on(*a)))
    monkeypatch.setattr(evaluation, "_compare", lambda *a: (look(), compare(*a))[1])
    found = evaluation.evaluate([str(m) for m in models], tokens(1, 8), WalkOptions(threads=1))
    walking = [0, 0, 0, 1, 1, 1, 2, 2, 2]  # three blocks of each, then two comparisons
    for number, held in zip(walking, resident[:-2], strict=True):
        assert [names for other, names in enumerate(held) if other != number] == [set(), set()]
    assert resident[-2:] == 2 * [3 * [{head, "model.norm.weight"}]]
    first, same, different = heads[-1]
    assert first == same != different
    look()
    assert resident[-1] == [set(), set(), set()]
    assert found[1].change is not None
    assert (found[1].change.ratio, found[1].change.kl) == (1.0, pytest.approx(0, abs=1e-6))
    assert found[0].perplexity == found[1].perplexity == perplexity_alone(models[1])
    assert found[2].perplexity == perplexity_alone(models[2]) != found[0].perplexity


def perplexity_alone(model: Path) -> maskopt.Perplexity:
    return maskopt.perplexity(model, tokens(1, 8), threads=1)


@pytest.mark.parametrize("size", [{"vocab_size": 100}, {"hidden_size": 64}])
def test_models_of_other_sizes_are_refused_before_they_are_walked(
    size: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    other = AutoModelForCausalLM.from_config(LlamaConfig(**{**SHARED, **size}))
    models = [save(tiny("llama"), tmp_path / "a"), save(other, tmp_path / "b")]
    monkeypatch.setattr(evaluation, "walk_whole", None)
    with pytest.raises(DataError, match=f"differ in {next(iter(size))}"):
        evaluation.evaluate(models, tokens(2, 8), WalkOptions())


def test_progress_and_a_bad_model_of_several(tmp_path: Path) -> None:
    dense, bad = save(tiny("llama"), tmp_path / "dense"), tiny("llama")
    told: list[tuple[str, int, int]] = []
    evaluation.evaluate(
        [dense, dense], tokens(2, 8), WalkOptions(threads=1),
        on_progress=lambda model, done, total: told.append((model, done, total)),
    )  # fmt: skip
    name = str(dense)
    walked = [(name, done, 8) for done in range(1, 7)]
    assert told == 2 * walked + [(name, 7, 8), (name, 7, 8), (name, 8, 8), (name, 8, 8)]
    patched(bad, "model.norm.weight", lambda p: p.fill_(1e38))
    save(patched(bad, "lm_head.weight", lambda p: p.fill_(1e3)), tmp_path / "bad")
    with pytest.raises(ModelError, match="/bad: window 0 of token tensor: NaN or infinite logits"):
        evaluation.evaluate([dense, tmp_path / "bad"], tokens(2, 8), WalkOptions())


def test_how_far_the_last_hidden_states_have_moved(tmp_path: Path) -> None:
    """Against one forward pass of each whole model, by definition."""
    less = patched(tiny("llama"), "model.layers.1.mlp.down_proj.weight", lambda p: p.mul_(0.5))
    models, data = [tiny("llama"), less], tokens(3, 10)
    folders = [save(model, tmp_path / str(i)) for i, model in enumerate(models)]
    states = []
    for model in models:
        block = model.model.layers[-1]
        taken = block.register_forward_hook(lambda m, a, out: states.append(first(out).double()))
        with torch.no_grad():
            model(data, use_cache=False)
        taken.remove()
    one, two = (state[:, :-1] for state in states)
    moved = ((two - one).square().sum(-1) / one.square().sum(-1)).flatten()
    _, found = evaluation.evaluate(folders, data, WalkOptions(threads=2))
    assert found.change is not None
    assert found.change.hidden_mean == pytest.approx(float(moved.mean()), rel=1e-4)
    assert found.change.hidden_median == pytest.approx(float(moved.median()), rel=1e-4)


def test_a_change_beyond_all_numbers_is_infinite(tmp_path: Path) -> None:
    """Logits of a million make a cross-entropy of which no float64 is the exponential."""
    dense, worse = save(tiny("llama"), tmp_path / "dense"), tiny("llama")
    save(patched(worse, "lm_head.weight", lambda p: p.mul_(1e6)), tmp_path / "worse")
    _, found = evaluation.evaluate([dense, tmp_path / "worse"], tokens(2, 8), WalkOptions())
    assert found.perplexity.value == math.inf
    assert found.change is not None
    assert found.change.ratio == math.inf


def test_windows_are_counted_and_told(tmp_path: Path) -> None:
    model, data = tiny("llama"), tokens(4, 12)
    told: list[tuple[int, int]] = []
    result = maskopt.perplexity(
        model, data, windows=2, threads=1, on_progress=lambda *event: told.append(event)
    )
    assert (result.windows, result.length, result.targets) == (2, 12, 22)
    assert told == [(i, 8) for i in range(1, 9)]  # three blocks and the head, two windows
    assert result.cross_entropy == pytest.approx(cross_entropy(model, data[:2]), rel=1e-5)


def test_figures_are_told_before_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a file that cannot be is refused before there are any."""
    dense = save(tiny("llama"), tmp_path / "dense")
    np.save(tmp_path / "t.npy", tokens(2, 8).numpy())
    asked = ["eval", dense, "--text", tmp_path / "t.npy", "--json"]
    (tmp_path / "folder").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("maskopt.model.evaluate.evaluate", None)  # nothing is walked
        assert "is a folder; name a file" in run(*asked, tmp_path / "folder", fails=OptionError)
        assert "no such folder" in run(*asked, tmp_path / "none" / "a.json", fails=OptionError)
        (tmp_path / "b.json").write_text("mine")
        assert "exists; pass --overwrite" in run(*asked, tmp_path / "b.json", fails=OptionError)
        for name in ("config.json", "model.safetensors"):
            said = run(*asked, dense / name, "--overwrite", fails=OptionError)
            assert "is a file of a model folder" in said
        said = run(*asked, tmp_path / "t.npy", "--overwrite", fails=OptionError)
        assert "is the text itself" in said

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("maskopt.cli.evaluate.atomic_write", full)
    words = [str(word) for word in (*asked, tmp_path / "b.json", "--overwrite")]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, OSError)
    assert "perplexity" in result.output


def test_a_model_in_training_stays_so() -> None:
    model = tiny("llama").train()
    maskopt.perplexity(model, tokens(1, 8))
    assert model.training


def test_half_precision() -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    result = maskopt.perplexity(model, tokens(3, 12))
    assert result.cross_entropy == pytest.approx(cross_entropy(model, tokens(3, 12)), rel=1e-2)


def test_what_is_refused() -> None:
    model, data = tiny("llama"), tokens(4, 12)
    with pytest.raises(DataError, match="two tokens"):
        maskopt.perplexity(model, data[:, :1])
    with pytest.raises(DataError, match="needs text"):
        maskopt.perplexity(model, WordTokenizer())
    with pytest.raises(DataError, match="token id 96 does not exist"):
        maskopt.perplexity(model, torch.full((1, 4), 96))
    for count in (0, -1, True):
        with pytest.raises(OptionError, match="`windows` must be a whole number"):
            maskopt.perplexity(model, data, windows=count)
    patched(model, "model.norm.weight", lambda p: p.fill_(float("nan")))
    with pytest.raises(ModelError, match="window 0 of token tensor: NaN or infinite logits"):
        maskopt.perplexity(model, data)
    model = patched(tiny("llama"), "model.embed_tokens.weight", lambda p: p[5].fill_(torch.inf))
    data[data == 5] = 6
    data[3, 1] = 5
    with pytest.raises(ModelError, match=r"'model\.layers\.0', token tensor: sample 3 has"):
        maskopt.perplexity(model, data)

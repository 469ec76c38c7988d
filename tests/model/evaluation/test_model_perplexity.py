"""Models evaluated block by block: what is in memory, what several have in common, what is refused."""

import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from commands import run
from forging import fails
from prunes import prune
from tiny_models import SHARED, WordTokenizer, cross_entropy, logits_of, patched, save, tiny, tokens
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

import maskopt
from maskopt.cli import app
from maskopt.errors import DataError, ModelError, OptionError
from maskopt.models.architecture.source import FolderSource
from maskopt.models.blockwise import job as walk
from maskopt.models.evaluation import evaluate as evaluation
from maskopt.models.options.walk import WalkOptions
from maskopt.models.structured.experts import first

HEADS = {"llama": "lm_head.weight", "gemma3": "model.embed_tokens.weight"}  # of its own, and none


@pytest.mark.parametrize(("family", "head"), HEADS.items())
def test_one_block_in_memory_at_a_time_and_equal_heads_once(family, head, tmp_path, monkeypatch):
    models = [save(tiny(family), tmp_path / name) for name in "ab"]
    other = patched(tiny(family), head, lambda p: p[3].mul_(1.5))
    models.append(save(other, tmp_path / "c"))
    opened, resident, heads = [], [], []  # the folders that are walked, and what is in memory

    class Watched(FolderSource):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            opened.append(self)

    def look():
        parameters = [source.model.named_parameters() for source in opened]
        resident.append([{name for name, p in each if not p.is_meta} for each in parameters])
        heads.append([source.model.get_parameter(head).data_ptr() for source in opened])

    def watch(patch):
        """Look before each block that states pass, and before logits are judged."""
        for owner, name in ((walk, "pass_on"), (evaluation, "_judged")):
            real = getattr(owner, name)
            patch.setattr(owner, name, lambda *a, f=real: (look(), f(*a))[1])
        patch.setattr("maskopt.models.architecture.source.FolderSource", Watched)

    with monkeypatch.context() as patch:
        watch(patch)
        maskopt.perplexity(models[0], tokens(1, 8))
    assert len(resident) == 4
    for index, (names,) in enumerate(resident[:3]):
        assert {name.split(".")[2] for name in names if ".layers." in name} == {str(index)}
        assert "model.embed_tokens.weight" in names
        assert "lm_head.weight" not in names
    assert resident[3] == [{head, "model.norm.weight"}]
    for found in (opened, resident, heads):
        found.clear()
    with monkeypatch.context() as patch:
        watch(patch)
        found = evaluation.evaluate([str(m) for m in models], tokens(1, 8), WalkOptions(threads=1))
    walking = [0, 0, 0, 1, 1, 1, 2, 2, 2]  # three blocks of each, then three judgements
    for number, held in zip(walking, resident[:-3], strict=True):
        assert [names for other, names in enumerate(held) if other != number] == [set(), set()]
    assert resident[-3:] == 3 * [3 * [{head, "model.norm.weight"}]]
    first, same, different = heads[-1]
    assert first == same != different
    look()
    assert resident[-1] == [set(), set(), set()]
    assert found[1].change is not None
    assert (found[1].change.ratio, found[1].change.kl) == (1.0, pytest.approx(0, abs=1e-6))
    alone = [maskopt.perplexity(model, tokens(1, 8), threads=1) for model in models]
    assert [each.perplexity for each in found] == alone
    assert alone[0] == alone[1] != alone[2]


def test_progress_and_models_of_several_that_cannot_be(dense_folder, tmp_path, monkeypatch):
    said, name = [], str(dense_folder)
    listen = {"on_progress": lambda *event: said.append(event)}
    evaluation.evaluate([dense_folder] * 2, tokens(2, 8), WalkOptions(threads=1), **listen)
    walked = [(name, done, 8) for done in range(1, 7)]
    assert said == 2 * walked + [(name, 7, 8), (name, 7, 8), (name, 8, 8), (name, 8, 8)]
    bad = patched(tiny("llama"), "model.norm.weight", lambda p: p.fill_(1e38))
    save(patched(bad, "lm_head.weight", lambda p: p.fill_(1e3)), tmp_path / "bad")
    given, words = (tokens(2, 8), WalkOptions()), "window 0 of token tensor: NaN or infinite logits"
    models = [dense_folder, tmp_path / "bad"]
    fails(ModelError, f"/bad: {words}", evaluation.evaluate, models, *given)
    # of other sizes: refused before anything is walked
    monkeypatch.setattr(evaluation, "walk_whole", None)
    for size, value in (("vocab_size", 100), ("hidden_size", 64)):
        other = AutoModelForCausalLM.from_config(LlamaConfig(**{**SHARED, size: value}))
        models = [dense_folder, save(other, tmp_path / size)]
        fails(DataError, f"differ in {size}", evaluation.evaluate, models, *given)


def test_how_far_the_last_hidden_states_have_moved(dense_folder, tmp_path):
    less = patched(tiny("llama"), "model.layers.1.mlp.down_proj.weight", lambda p: p.mul_(0.5))
    models, data, states = [tiny("llama"), less], tokens(3, 10), []
    for model in models:
        block = model.model.layers[-1]
        block.register_forward_hook(lambda m, a, out: states.append(first(out).double()))
        logits_of(model, data)
    one, two = (state[:, :-1] for state in states)
    moved = ((two - one).square().sum(-1) / one.square().sum(-1)).flatten()
    folders = [dense_folder, save(less, tmp_path / "less")]
    _, found = evaluation.evaluate(folders, data, WalkOptions(threads=2))
    assert found.change is not None
    assert found.change.hidden_mean == pytest.approx(float(moved.mean()), rel=1e-4)
    assert found.change.hidden_median == pytest.approx(float(moved.median()), rel=1e-4)
    # logits of a million make a cross-entropy of which no float64 is the exponential
    worse = patched(tiny("llama"), "lm_head.weight", lambda p: p.mul_(1e6))
    models = [dense_folder, save(worse, tmp_path / "worse")]
    _, found = evaluation.evaluate(models, tokens(2, 8), WalkOptions())
    assert found.change is not None
    assert found.perplexity.value == found.change.ratio == math.inf


def test_the_mean_over_texts_pairs_windows_and_weighs_texts_alike():
    dense, pruned = [[1.0, 2.0], [3.0, 1.0, 2.0]], [[1.5, 2.5], [3.1, 1.1, 2.1]]
    [mean] = evaluation.panel_ratios([dense, pruned])
    # windows of a text differ, but each moved as the others did: nothing is uncertain
    expected = pytest.approx(math.exp((0.5 + 0.1) / 2))
    assert (mean.ratio, mean.low, mean.high) == (expected, expected, expected)
    pruned[0][0] = 1.0
    [mean] = evaluation.panel_ratios([dense, pruned])
    assert mean.ratio == pytest.approx(math.exp((0.25 + 0.1) / 2))
    assert mean.low < mean.ratio < mean.high
    fails(DataError, "numbers of windows", evaluation.panel_ratios, [dense, pruned[:1]])


def test_windows_are_counted_and_half_precision_in_training_stays_so():
    model, data, said = tiny("llama"), tokens(4, 12), []
    how = {"windows": 2, "threads": 1, "on_progress": lambda *event: said.append(event)}
    result = maskopt.perplexity(model, data, **how)
    assert (result.windows, result.length, result.targets) == (2, 12, 22)
    assert said == [(i, 8) for i in range(1, 9)]  # three blocks and the head, two windows
    assert result.cross_entropy == pytest.approx(cross_entropy(model, data[:2]), rel=1e-5)
    model = tiny("llama", dtype=torch.bfloat16).train()
    result = maskopt.perplexity(model, data[:3])
    assert model.training
    assert result.cross_entropy == pytest.approx(cross_entropy(model, data[:3]), rel=1e-2)


@pytest.mark.parametrize("family", ["falcon", "gpt2", "mixtral"])
def test_a_model_of_a_single_block(family):
    """Falcon takes the first of the values that a block returns, which no second block shows beforehand."""
    model, data = tiny(family, layers=1), tokens(3, 12)
    found = maskopt.perplexity(model, data, threads=1)
    assert found.cross_entropy == pytest.approx(cross_entropy(model, data), rel=1e-5)
    report = prune(model, data=data, allocation="rows", sensitivity="fisher")
    assert len({layer.pruned / layer.rows / layer.n for layer in report.layers}) == 1


def test_figures_are_printed_before_they_are_written(dense_folder, tmp_path, monkeypatch):
    """And a file that cannot be is refused before there are any."""
    np.save(text := tmp_path / "t.npy", tokens(2, 8).numpy())
    (tmp_path / "folder").mkdir()
    (tmp_path / "b.json").write_text("mine")
    asked = ["eval", dense_folder, "--text", text, "--json"]
    weights, again = next(dense_folder.glob("*.safetensors")), "--overwrite"
    with monkeypatch.context() as patch:
        patch.setattr("maskopt.models.evaluation.evaluate.evaluate", None)  # nothing is walked
        for message, *words in (
            ("is a folder; name a file", tmp_path / "folder"),
            ("no such folder", tmp_path / "none" / "a.json"),
            ("exists; pass --overwrite", tmp_path / "b.json"),
            ("is a file of a model folder", dense_folder / "config.json", again),
            ("is a file of a model folder", weights, again),
            ("is the text itself", text, again),
        ):
            assert message in run(*asked, *words, fails=OptionError)
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr("maskopt.cli.models.atomic_write", full)
    result = CliRunner().invoke(app, [str(word) for word in (*asked, tmp_path / "b.json", again)])
    assert isinstance(result.exception, OSError)
    assert "perplexity" in result.output


def test_what_is_refused():
    model, data = tiny("llama"), tokens(4, 12)

    def refused(error, message, *given, **options):
        fails(error, message, maskopt.perplexity, *given, **options)

    refused(DataError, "two tokens", model, data[:, :1])
    refused(DataError, "needs text", model, WordTokenizer())
    refused(DataError, "token id 96 does not exist", model, torch.full((1, 4), 96))
    for count in (0, -1, True):
        refused(OptionError, "`windows` must be a whole number", model, data, windows=count)
    refused(OptionError, "`threads`", model, data, threads=0)
    said, text = "`seq_len` must be a whole number of at least 2", {"text": ["abc" * 9]}
    refused(OptionError, said, model, WordTokenizer(), seq_len=1, **text)
    refused(OptionError, "no option is called 'samples'", model, data, samples=3)
    patched(model, "model.norm.weight", lambda p: p.fill_(float("nan")))
    refused(ModelError, "window 0 of token tensor: NaN or infinite logits", model, data)
    model = patched(tiny("llama"), "model.embed_tokens.weight", lambda p: p[5].fill_(torch.inf))
    data[data == 5] = 6
    data[3, 1] = 5
    refused(ModelError, r"'model\.layers\.0', token tensor: sample 3 has", model, data)

"""Whole blocks left out: effects by definition, the exact choice, and a folder that computes what is left."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run
from outputs import contents
from test_shrink import forge
from tiny_models import FAMILIES, logs, loud, save, save_with_own_code, tiny, tokens
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3Config

from maskopt import open_job, prune_model, remove_blocks, shrink_model, verify
from maskopt.errors import ModelError, OptionError, VerificationError
from maskopt.model import activations, block_search
from maskopt.model import remove_blocks as removal
from maskopt.model.activations import _make
from maskopt.model.block_effects import Effects
from maskopt.model.block_search import exchanges, search_sets
from maskopt.model.checkpoint import open_checkpoint
from maskopt.model.safefile import open_safe
from maskopt.model.side_by_side import place
from maskopt.model.source import FolderSource
from maskopt.model.verify_smaller import verify_smaller
from maskopt.model.walk_options import WalkOptions
from maskopt.model.workspace import HIDDEN, MANIFEST

DEEP = [
    "llama", "qwen2", "qwen3", "gemma3", "gpt2", "opt", "phi3", "gpt_neox", "falcon", "bloom", "cohere",
    "olmo2", "glm", "mixtral", "qwen3_moe",
]  # fmt: skip


def without(folder: Path, gone: set[int]) -> nn.Module:
    """The dense model with blocks that give what they are given."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for index in gone:
        block = model.model.layers[index]
        block.forward = lambda hidden_states, *_, **__: hidden_states
    return model


def test_effects_are_divergences_of_models_without_blocks(tmp_path: Path) -> None:
    dense = save(tiny("llama", layers=4), tmp_path / "dense")
    report = remove_blocks(dense, tokens(3), count=2, output=tmp_path / "out", windows=3)
    full = logs(AutoModelForCausalLM.from_pretrained(dense), tokens(3))
    sets = [{i} for i in range(4)] + [set(pair) for pair in itertools.combinations(range(4), 2)]
    assert set(report.effects.kl) == {frozenset(s) for s in sets}
    for gone in sets:
        other = logs(without(dense, gone), tokens(3))
        kl = float((full.exp() * (full - other)).sum(-1).mean())
        assert report.effects.kl[frozenset(gone)] == pytest.approx(kl, rel=1e-3, abs=1e-7)
    pairs = {s: kl for s, kl in report.effects.kl.items() if len(s) == 2}
    assert set(report.removed) == min(pairs, key=lambda s: pairs[s])
    assert str(report.solution.status[0]) == "optimal"
    assert report.effects.cost(report.removed) == pytest.approx(min(pairs.values()))
    assert verify(report.effects.problem(2), report.solution).checked


@pytest.mark.parametrize("family", DEEP)
def test_what_is_written_is_the_model_without_them(family: str, tmp_path: Path) -> None:
    dense = save(tiny(family), tmp_path / "dense", shard="30KB")
    report = remove_blocks(dense, tokens(3), count=1, output=tmp_path / "out", windows=2)
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(dense)
    lost = sum(p.numel() for p in before.parameters()) - sum(
        p.numel() for p in smaller.parameters()
    )
    assert lost > 0
    if hasattr(before, "model") and hasattr(before.model, "layers"):
        torch.testing.assert_close(
            logs(smaller, tokens(2)), logs(without(dense, set(report.removed)), tokens(2)),
            rtol=1e-3, atol=1e-4,
        )  # fmt: skip
    found = verify_smaller(tmp_path / "out", dense)
    assert "kept weights" in found.checked


@pytest.mark.parametrize("judged", [16, 3])
def test_sets_of_three_are_searched_and_measured_on_all_tokens(
    judged: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many that a round leaves out, those that look best on some tokens."""
    monkeypatch.setattr("maskopt.model.remove_blocks.JUDGED", judged)
    dense = save(tiny("llama", layers=6), tmp_path / "dense")
    report = remove_blocks(dense, tokens(2), count=3, output=tmp_path / "out", windows=2)
    costs = {s: report.effects.cost(s) for s in itertools.combinations(range(6), 3)}
    least = min(costs, key=lambda s: costs[s])
    assert tuple((~report.solution.mask[0]).nonzero()[:, 0].tolist()) == least
    assert str(report.solution.status[0]) == "optimal"
    full = logs(AutoModelForCausalLM.from_pretrained(dense), tokens(2), every=1)
    near = {frozenset(report.removed) - {a} | {b} for a in report.removed for b in range(6)}
    if judged >= 9:
        assert {left for left in near if len(left) == 3} <= set(report.measured)
    assert {frozenset(least), frozenset({3, 4, 5})} < set(report.measured)
    assert frozenset(report.effects.most_alike(3)) in report.measured
    for gone, cost in report.measured.items():
        other = logs(without(dense, set(gone)), tokens(2), every=1)
        kl = float((full.exp() * (full - other)).sum(-1).mean())
        assert cost == pytest.approx(kl, rel=1e-3, abs=1e-7)
    assert report.measured[frozenset(report.removed)] == min(report.measured.values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 3
    assert verify_smaller(tmp_path / "out", dense).tensors > 0


def summing(costs: list[float]) -> Effects:
    """Blocks without interactions."""
    kl = {frozenset({i}): cost for i, cost in enumerate(costs)}
    pairs = itertools.combinations(range(len(costs)), 2)
    kl |= {frozenset(p): costs[p[0]] + costs[p[1]] for p in pairs}
    return Effects(kl, [0.5] * len(costs))


def test_exchanges_of_least_cost_by_pairs_come_first() -> None:
    effects = summing([5.0, 1.0, 2.0, 9.0, 3.0, 4.0])
    found = exchanges(effects, frozenset({1, 2, 4}))
    assert len(found) == len(set(found)) == 9
    assert all(len(left & {1, 2, 4}) == 2 for left in found)
    assert found[:2] == [frozenset({1, 2, 5}), frozenset({0, 1, 2})]
    assert found[-1] == frozenset({2, 3, 4})


@pytest.mark.parametrize("seed", range(20))
def test_a_search_ends_where_no_exchange_is_better(seed: int) -> None:
    """Of costs that pairs do not foretell, every set being measured when it is asked for, and only then."""
    generator = torch.Generator().manual_seed(seed)
    sets = [frozenset(s) for s in itertools.combinations(range(8), 3)]
    costs = dict(zip(sets, torch.rand(len(sets), generator=generator).tolist(), strict=True))
    effects, asked = summing([1.0] * 8), list[frozenset[int]]()

    def measure(some: Sequence[frozenset[int]]) -> dict[frozenset[int], float]:
        asked.extend(some)
        return {left: costs[left] for left in some}

    first = [frozenset({0, 1, 2}), frozenset({5, 6, 7})]
    known = search_sets(measure, effects, first)
    assert len(asked) == len(set(asked)) == len(known)
    assert known == {left: costs[left] for left in asked}
    least = min(known, key=lambda left: known[left])
    assert costs[least] <= min(costs[left] for left in first)
    assert all(costs[least] < costs[left] for left in exchanges(effects, least))


def test_a_round_of_a_search_may_answer_for_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left out of an answer is not asked for again, and no round asks for more than it may."""
    monkeypatch.setattr(block_search, "EXCHANGES", 5)
    effects, rounds = summing([9.0, 8.0, 7.0, 1.0, 2.0, 3.0, 4.0]), list[list[frozenset[int]]]()

    def measure(some: Sequence[frozenset[int]]) -> dict[frozenset[int], float]:
        rounds.append(list(some))
        return {left: effects.cost(sorted(left)) for left in some[: 1 if rounds[1:] else None]}

    known = search_sets(measure, effects, [frozenset({0, 1, 2})])
    assert min(known, key=lambda left: known[left]) == frozenset({3, 4, 5})
    assert all(len(some) <= 5 for some in rounds)
    every = list(itertools.chain(*rounds))
    assert len(set(every)) == len(every)


def test_the_yardsticks() -> None:
    kl = {frozenset({i}): 1.0 + i for i in range(4)}
    kl |= {frozenset(p): 9.0 for p in itertools.combinations(range(4), 2)}
    effects = Effects(kl, [0.1, 0.9, 0.5, 0.8])
    assert effects.last(2) == [2, 3]
    assert effects.most_alike(2) == [1, 3]
    assert effects.cost([0, 1]) == pytest.approx(9.0)
    assert effects.cost([2]) == pytest.approx(3.0)


def test_states_may_lie_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file for each of hundreds of variants would be more than a process may open."""
    made = list[Path]()

    def make(folder: Path, size: int) -> tuple[int, str]:
        made.append(folder)
        return _make(folder, size)

    monkeypatch.setattr(activations, "_make", make)
    dense = save(tiny("llama", layers=4), tmp_path / "dense")
    some = [
        remove_blocks(
            dense, tokens(3), count=1, output=tmp_path / str(memory), windows=2,
            options=WalkOptions(activation_memory=memory, threads=1 + (memory == 0)),
        )
        for memory in (0, 2**30)
    ]  # fmt: skip
    assert some[0].effects.kl == some[1].effects.kl
    assert set(made[:2]) == {tmp_path / "0" / HIDDEN}  # the model's, and those of all variants


def test_variants_count_where_memory_is_limited(tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    with open_job(dense, tokens(4), WalkOptions(max_memory="1200MB"), whole=True) as job:
        assert place(job, 10, tmp_path) is None
        assert place(job, 300_000, tmp_path) == tmp_path
    with open_job(dense, tokens(4), WalkOptions(), whole=True) as job:
        assert place(job, 300_000, tmp_path) is None


@pytest.mark.parametrize(
    "option",
    [
        {"holdout": 0.5},
        {"include": ["q_proj"]},
        {"skip_bad_samples": True},
        {"samples": 8},
        {"seed": 1},
    ],
)
def test_options_that_mean_nothing_here(option: dict[str, Any], tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    with pytest.raises(OptionError, match=f"leave out `{next(iter(option))}`"):
        remove_blocks(
            dense, tokens(2), count=1, output=tmp_path / "out", options=WalkOptions(**option)
        )


@pytest.mark.parametrize(("gone", "stays"), [([0], [1]), ([1], [0, 1]), ([2], [0]), ([0, 1], [0])])
def test_lists_of_the_configuration_follow_the_blocks(
    gone: list[int], stays: list[int], tmp_path: Path
) -> None:
    """`moe_layers` names blocks by their index; three ends of text are no list of three blocks."""
    dense = save(tiny("llama"), tmp_path / "dense")
    config = json.loads((dense / "config.json").read_text())
    config |= {"eos_token_id": [1, 2, 3], "moe_layers": [0, 2], "flags": ["a", "b", "c"]}
    (dense / "config.json").write_text(json.dumps(config))
    with open_job(dense, tokens(2), WalkOptions(), whole=True) as job:
        assert isinstance(job.source, FolderSource)
        settings = removal._check_family(job.source, gone)
    assert settings["moe_layers"] == stays
    assert settings["flags"] == [x for i, x in enumerate("abc") if i not in gone]
    assert "eos_token_id" not in settings


@pytest.mark.parametrize("count", [0, 3, 9])
def test_counts_that_leave_nothing_are_refused(count: int, tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    with pytest.raises(OptionError, match="must be 1 to 2"):
        remove_blocks(dense, tokens(2), count=count, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_model_is_never_written_over(tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    before = {file.name: file.read_bytes() for file in dense.iterdir()}
    with pytest.raises(ModelError, match="is the model itself"):
        remove_blocks(dense, tokens(2), count=1, output=dense, overwrite=True)
    assert before == {file.name: file.read_bytes() for file in dense.iterdir()}


def test_one_file_with_an_index(tmp_path: Path) -> None:
    """As some models on the hub are stored."""
    dense = save(tiny("llama", layers=4), tmp_path / "dense")
    name = "model-00001-of-00001.safetensors"
    (dense / "model.safetensors").rename(dense / name)
    where = dict.fromkeys(open_safe(dense / name).entries, name)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (dense / "model.safetensors.index.json").write_text(json.dumps(index))
    remove_blocks(dense, tokens(2), count=1, output=tmp_path / "out", windows=2)
    verify_smaller(tmp_path / "out", dense)
    shrink_model(dense, tokens(4), output=tmp_path / "narrow", channels=0.5, solver="wanda")
    verify_smaller(tmp_path / "narrow", dense)
    size = json.loads((tmp_path / "narrow" / "model.safetensors.index.json").read_text())
    stored = open_safe(tmp_path / "narrow" / name).entries.values()
    assert size["metadata"]["total_size"] == sum(entry.size for entry in stored)


def test_a_vision_tower_keeps_its_blocks(tmp_path: Path) -> None:
    """Their names are those of the decoder's, behind another beginning."""
    text = {**FAMILIES["gemma3"][1], "num_hidden_layers": 4}
    text["layer_types"] = ["sliding_attention", "full_attention"] * 2
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    dense = save(AutoModelForCausalLM.from_config(config), tmp_path / "dense")
    remove_blocks(dense, tokens(2), count=1, output=tmp_path / "out", windows=2)
    verify_smaller(tmp_path / "out", dense)
    before, after = (
        [name for name in open_checkpoint(folder).where if "vision" in name]
        for folder in (dense, tmp_path / "out")
    )
    assert sorted(before) == sorted(after)


def test_code_of_the_models_own_is_refused_before_anything_heavy(tmp_path: Path) -> None:
    dense = save_with_own_code(tmp_path / "dense")
    walk = WalkOptions(trust_remote_code=True)
    with pytest.raises(ModelError, match="code is not copied"):
        remove_blocks(dense, tokens(2), count=1, output=tmp_path / "out", options=walk)
    assert not (tmp_path / "out").exists()


def test_buffers_that_are_stored_go_along_with_their_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The biases of routers, which differ between blocks."""
    monkeypatch.setattr("maskopt.model.remove_blocks.choose", lambda *_: {frozenset({1}): 0.0})
    model = tiny("deepseek_v3", layers=4)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_()
    dense = save(model, tmp_path / "dense")
    remove_blocks(dense, tokens(2), count=1, output=tmp_path / "out", windows=1)
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logs(smaller, tokens(2)), logs(without(dense, {1}), tokens(2)))
    verify_smaller(tmp_path / "out", dense)


def test_a_family_that_cannot_say_it_is_refused(tmp_path: Path) -> None:
    """Its first block is dense by its number."""
    dense = save(tiny("deepseek_v3"), tmp_path / "dense")
    with open_job(dense, tokens(2), WalkOptions(), whole=True) as job:
        assert isinstance(job.source, FolderSource)
        with pytest.raises(ModelError, match="cannot describe the smaller model"):
            removal._check_family(job.source, [0])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_blocks_that_a_configuration_needs_stay(count: int, tmp_path: Path) -> None:
    """The first block, dense by its number, is the cheapest to leave out, and cannot be."""
    model = loud("deepseek_v3", layers=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.0." in name and ("o_proj" in name or "down_proj" in name):
                parameter.zero_()
    dense = save(model, tmp_path / "dense")
    report = remove_blocks(dense, tokens(2), count=count, output=tmp_path / "out", windows=1)
    assert 0 in (~report.solution.mask[0]).nonzero()[:, 0] or count == 3
    assert all(0 not in left for left in report.measured)
    assert len(report.removed) == count
    assert report.measured[frozenset(report.removed)] == min(report.measured.values())
    if count <= 2:
        others = [s for s in report.effects.kl if len(s) == count and 0 not in s]
        assert frozenset(report.removed) == min(others, key=lambda s: report.effects.kl[s])
    verify_smaller(tmp_path / "out", dense)


@pytest.mark.parametrize("family", ["bamba", "qwen3_moe", "llama4"])
def test_lists_of_numbers_of_blocks_are_checked(family: str, tmp_path: Path) -> None:
    dense = save(tiny(family), tmp_path / "dense")
    remove_blocks(dense, tokens(2), count=1, output=tmp_path / "out", windows=1)
    assert "kept weights" in verify_smaller(tmp_path / "out", dense).checked


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda m: m["shrunk"]["blocks"].__setitem__(0, 3),
            "is of no removed block|not the original's",
        ),
        (lambda m: m["shrunk"]["gone"].pop(), "in only one of the two"),
        (lambda m: m["shrunk"]["names"].clear(), "in only one of the two|twice"),
        (lambda m: m["shrunk"]["settings"].update(num_hidden_layers=2), "is not the 2"),
        (lambda m: m["shrunk"]["settings"].clear(), "in more than the sizes"),
    ],
)
def test_forged_manifests_are_refused(change: Any, said: str, tmp_path: Path) -> None:
    dense = save(tiny("llama", layers=4), tmp_path / "dense")
    remove_blocks(dense, tokens(2), count=1, output=tmp_path / "out", windows=1)
    record = json.loads((tmp_path / "out" / MANIFEST).read_text())["shrunk"]
    if record["blocks"] == [3]:
        pytest.skip("the last block went, and nothing is renamed")
    forge(tmp_path / "out", change)
    with pytest.raises(VerificationError, match=said):
        verify_smaller(tmp_path / "out", dense)


def test_the_command_and_what_comes_after(tmp_path: Path) -> None:
    dense = save(tiny("llama", layers=4), tmp_path / "dense")
    np.save(tmp_path / "tokens.npy", tokens(6).numpy())
    text = ["--calibration", tmp_path / "tokens.npy"]
    said = run("shrink", dense, "--blocks", 2, *text, "--output", tmp_path / "out")
    assert "of least cost by pairs" in said
    assert "optimal" in said
    assert "holds" in run("verify", tmp_path / "out", "--against", dense)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "removed 2 whole blocks" in card
    assert "$ maskopt shrink MODEL --config" in card
    same = ["--config", tmp_path / "out" / MANIFEST, *text, "--output", tmp_path / "again"]
    run("shrink", dense, *same)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    run("report", tmp_path / "out", "--output", tmp_path / "page.html")
    assert "removed 2 whole blocks" in (tmp_path / "page.html").read_text()
    both = ["--channels", 0.25, "--blocks", 1, *text, "--output", tmp_path / "both"]
    assert "second `maskopt shrink`" in run("shrink", dense, *both, fails=OptionError)
    idle = ["--windows", 2, "--channels", 0.25, *text, "--output", tmp_path / "both"]
    assert "give --blocks, too" in run("shrink", dense, *idle, fails=OptionError)
    for option in (["--solver", "tabu"], ["--certify"], ["--option", "seed=1"]):
        said = run("shrink", dense, *option, "--blocks", 1, *idle[4:], fails=OptionError)
        assert "says nothing of --blocks" in said
    again = ["--blocks", 1, "--resume", *text, "--output", tmp_path / "both"]
    assert "in one go" in run("shrink", dense, *again, fails=OptionError)
    run("shrink", tmp_path / "out", "--channels", 0.25, *text, "--output", tmp_path / "twice")
    prune_model(
        tmp_path / "twice", tokens(6), output=tmp_path / "pruned", sparsity=0.5, solver="wanda",
        min_tokens=1,
    )  # fmt: skip

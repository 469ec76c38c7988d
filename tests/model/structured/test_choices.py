"""Structures that are chosen: costs by definition, the exact choice and its search, errors, bounds, resumed
runs."""

import itertools
import json

import pytest
import torch
from forging import fails
from outputs import contents
from safetensors.torch import load_file
from test_structures import pass_on, record_of
from tiny_models import edit_json, inputs_of, logs, loud, save, tiny, tiny_vision, tokens
from transformers import AutoModelForCausalLM

from maskopt import (
    LayerProblem,
    Unstructured,
    open_job,
    remove_blocks,
    remove_experts,
    shrink_model,
    verify,
)
from maskopt.core.gram import Gram
from maskopt.errors import ModelError, OptionError
from maskopt.models.blockwise import activations
from maskopt.models.blockwise.activations import _reserved
from maskopt.models.blockwise.divergence import place
from maskopt.models.checkpoints.checkpoint import open_checkpoint
from maskopt.models.checkpoints.safefile import open_safe
from maskopt.models.checkpoints.workspace import HIDDEN, MANIFEST
from maskopt.models.options.walk import WalkOptions
from maskopt.models.structured import blocks as removal
from maskopt.models.structured.blocks import Effects, exchanges, search_sets
from maskopt.models.structured.experts import costs, mixtures_of
from maskopt.models.verification.verify import verify_model


def check_costs(costs, dense, data, **every):
    """They are divergences of the model's predictions from those of it without some blocks."""
    full = logs(AutoModelForCausalLM.from_pretrained(dense), data, **every)
    for gone, cost in costs.items():
        other = logs(pass_on(AutoModelForCausalLM.from_pretrained(dense), gone), data, **every)
        kl = float((full.exp() * (full - other)).sum(-1).mean())
        assert cost == pytest.approx(kl, rel=1e-3, abs=1e-7)


def test_effects_are_divergences_of_models_without_blocks(tmp_path):
    dense = save(tiny("llama", layers=4), tmp_path / "dense")
    report = remove_blocks(dense, tokens(3), count=2, output=tmp_path / "out", windows=3)
    sets = [{i} for i in range(4)] + [set(pair) for pair in itertools.combinations(range(4), 2)]
    assert set(report.effects.kl) == {frozenset(s) for s in sets}
    check_costs(report.effects.kl, dense, tokens(3))
    pairs = {s: kl for s, kl in report.effects.kl.items() if len(s) == 2}
    assert set(report.removed) == min(pairs, key=lambda s: pairs[s])
    assert str(report.solution.status[0]) == "optimal"
    assert report.effects.cost(report.removed) == pytest.approx(min(pairs.values()))
    assert verify(report.effects.problem(2), report.solution).checked


@pytest.mark.parametrize("judged", [16, pytest.param(3, marks=pytest.mark.slow)])
def test_sets_of_three_are_searched_and_measured_on_all_tokens(judged, tmp_path, monkeypatch):
    """Of many that a round leaves out, those that look best on some tokens."""
    monkeypatch.setattr(removal, "JUDGED", judged)
    dense, out = save(tiny("llama", layers=6), tmp_path / "dense"), tmp_path / "out"
    report = remove_blocks(dense, tokens(2), count=3, output=out, windows=2)
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
    assert effects.last(2) == [2, 3]
    assert effects.most_alike(2) == [1, 3]
    assert effects.cost([0, 1]) == pytest.approx(9.0)
    assert effects.cost([2]) == pytest.approx(3.0)


@pytest.mark.parametrize("seed", range(20))
def test_a_search_ends_where_no_exchange_is_better(seed):
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


def test_a_round_of_a_search_may_answer_for_a_few(monkeypatch):
    """What is left out of an answer is not asked for again, and no round asks for more than it may."""
    monkeypatch.setattr(removal, "EXCHANGES", 5)
    effects, rounds = summing([9.0, 8.0, 7.0, 1.0, 2.0, 3.0, 4.0]), []

    def measure(some):
        rounds.append(list(some))
        return {left: effects.cost(sorted(left)) for left in some[: 1 if rounds[1:] else None]}

    known = search_sets(measure, effects, [frozenset({0, 1, 2})])
    assert min(known, key=lambda left: known[left]) == frozenset({3, 4, 5})
    assert all(len(some) <= 5 for some in rounds)
    every = list(itertools.chain(*rounds))
    assert len(set(every)) == len(every)


def test_states_may_lie_in_one_file(dense_folder, tmp_path, monkeypatch):
    """A file for each of hundreds of variants would be more than a process may open."""
    made = []
    monkeypatch.setattr(
        activations,
        "_reserved",
        lambda folder, size: made.append(folder) or _reserved(folder, size),
    )
    effects = []
    for memory, threads in ((0, 2), (2**30, 1)):
        walk = WalkOptions(activation_memory=memory, threads=threads)
        how = {"count": 1, "output": tmp_path / str(memory), "windows": 2, "options": walk}
        effects.append(remove_blocks(dense_folder, tokens(3), **how).effects.kl)
    assert effects[0] == effects[1]
    assert set(made[:2]) == {tmp_path / "0" / HIDDEN}  # the model's, and those of all variants
    # variants count where memory is limited
    with open_job(dense_folder, tokens(4), WalkOptions(max_memory="1200MB"), whole=True) as job:
        assert place(job, 10, tmp_path) is None
        assert place(job, 300_000, tmp_path) == tmp_path
    with open_job(dense_folder, tokens(4), WalkOptions(), whole=True) as job:
        assert place(job, 300_000, tmp_path) is None


def test_lists_of_the_configuration_follow_the_blocks(tmp_path):
    """`moe_layers` names blocks by their index; three ends of text are no list of three blocks."""
    dense = save(tiny("llama"), tmp_path / "dense")
    lists = {"eos_token_id": [1, 2, 3], "moe_layers": [0, 2], "flags": ["a", "b", "c"]}
    edit_json(dense / "config.json", lambda c: c.update(lists))
    with open_job(dense, tokens(2), WalkOptions(), whole=True) as job:
        for gone, stays in ([0], [1]), ([1], [0, 1]), ([2], [0]), ([0, 1], [0]):
            settings = removal._check_family(job.source, gone)
            assert settings["moe_layers"] == stays
            assert settings["flags"] == [x for i, x in enumerate("abc") if i not in gone]
            assert "eos_token_id" not in settings


def test_one_file_with_an_index(tmp_path):
    """As some models on the hub are stored."""
    dense, name = save(tiny("llama"), tmp_path / "dense"), "model-00001-of-00001.safetensors"
    (dense / "model.safetensors").rename(dense / name)
    where = dict.fromkeys(open_safe(dense / name).entries, name)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (dense / "model.safetensors.index.json").write_text(json.dumps(index))
    remove_blocks(dense, tokens(2), count=1, output=tmp_path / "out", windows=2)
    verify_model(tmp_path / "out", dense)
    narrow = tmp_path / "narrow"
    shrink_model(dense, tokens(4), output=narrow, channels=0.5, solver="wanda")
    verify_model(narrow, dense)
    size = json.loads((narrow / "model.safetensors.index.json").read_text())
    stored = open_safe(narrow / name).entries.values()
    assert size["metadata"]["total_size"] == sum(entry.size for entry in stored)


def test_a_vision_tower_keeps_its_blocks(tmp_path):
    """Their names are those of the decoder's, behind another beginning."""
    dense, out = save(tiny_vision(), tmp_path / "dense"), tmp_path / "out"
    remove_blocks(dense, tokens(2), count=1, output=out, windows=2)
    verify_model(out, dense)
    names = [sorted(n for n in open_checkpoint(x).where if "vision" in n) for x in (dense, out)]
    assert names[0] == names[1]


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_blocks_that_a_configuration_needs_stay(count, tmp_path):
    """The first block, dense by its number, is the cheapest to leave out, and cannot be."""
    model = loud("deepseek_v3", layers=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.0." in name and ("o_proj" in name or "down_proj" in name):
                parameter.zero_()
    dense, out = save(model, tmp_path / "dense"), tmp_path / "out"
    report = remove_blocks(dense, tokens(2), count=count, output=out, windows=1)
    assert 0 in (~report.solution.mask[0]).nonzero()[:, 0] or count == 3
    assert all(0 not in left for left in report.measured)
    assert len(report.removed) == count
    assert report.measured[frozenset(report.removed)] == min(report.measured.values())
    if count <= 2:
        others = [s for s in report.effects.kl if len(s) == count and 0 not in s]
        assert frozenset(report.removed) == min(others, key=lambda s: report.effects.kl[s])
    verify_model(out, dense)


# Experts ----------------------------------------------------------------------------------------


def test_costs_are_what_the_outputs_miss():
    """Against each mixture called with the weights of removed experts at zero."""
    model = tiny("mixtral", layers=2)
    with open_job(model, tokens(3), WalkOptions(threads=2)) as job, torch.no_grad():
        for block in job.blocks():
            (mixture,) = mixtures_of(job.source.blocks, block.index)
            q, count = costs(block, mixture)
            module, calls = model.get_submodule(mixture.name), []
            handle = module.register_forward_hook(lambda *call, calls=calls: calls.append(call[1:]))
            for sample in range(3):
                block.opened.run(sample, block.opened.samples.states)
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
        report = remove_experts(dense, tokens(6), output=out, share=0.5, options=walk)
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
    report = remove_experts(dense, data, share=0.25, output=tmp_path / "out", options=skip)
    assert [sample["sample"] for sample in report.bad_samples] == [sample]
    assert report.fingerprint["options"]["skip_bad_samples"]
    with pytest.raises(ModelError, match=f"sample {sample} has NaN"):
        remove_experts(dense, data, share=0.25, output=tmp_path / "again")


def test_a_model_that_changes_meanwhile_is_refused(tmp_path):
    dense, out = save(tiny("mixtral", layers=2), tmp_path / "dense"), tmp_path / "out"

    def change(event):
        (dense / "generation_config.json").write_text("{}")

    removals = ((remove_blocks, {"count": 1, "windows": 1}), (remove_experts, {"share": 0.25}))
    for remove, what in removals:
        (dense / "generation_config.json").write_text("{ }")
        said = "generation_config.*changed while the run was under way"
        fails(ModelError, said, remove, dense, tokens(2), output=out, on_progress=change, **what)
        assert not out.exists()


# Channels and heads ------------------------------------------------------------------------------


def test_the_choice_of_the_first_block_is_the_optimum_of_what_it_is_given(dense_folder, tmp_path):
    """By a layer's own objective, over all ways to remove one of its groups; and errors are as reported."""
    shrink_model(dense_folder, tokens(6), output=tmp_path / "out", heads=0.5, update="none")
    model, name = tiny("llama"), "model.layers.0.self_attn.o_proj"
    weight = model.get_submodule(name).weight.detach()
    n = weight.shape[1]
    gram = Gram(n)
    gram.add(inputs_of(model, name, tokens(6)).float())
    problem = LayerProblem(weight, gram.value(), Unstructured(keep=n // 2))
    masks = [torch.arange(n) // (n // 2) == kept for kept in (0, 1)]
    errors = [float(problem.objective(m.expand(len(weight), n)).sum()) for m in masks]
    record = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert record["shrunk"]["kept"][name] == [errors.index(min(errors))]
    layer = next(x for x in record["layers"] if x["name"] == name)
    assert layer["error"] == pytest.approx(min(errors), rel=1e-6)
    assert layer["lower_bound"] == pytest.approx(min(errors), rel=1e-6)


def test_errors_bounds_and_counts_of_channels(dense_folder, tmp_path):
    """Refitted errors are lower, held-out ones are reported, and a certified choice has a bound below it."""

    def shrink(name, **options):
        return shrink_model(dense_folder, tokens(12), output=tmp_path / name, **options).layers

    layers = shrink("held", channels=0.5, heads=0.5, holdout=0.34)
    for layer in layers:
        assert 0 < layer.error < layer.error_kept < layer.energy
        assert layer.relative_held is not None
    assert any(layer.name.endswith("down_proj") for layer in layers)
    layers = shrink("certified", channels=0.5, solver="wanda", certify=True)
    assert all(0 < layer.lower_bound <= layer.error_kept for layer in layers)
    shrink("rounded", channels=0.3, round_to=8)
    config = json.loads((tmp_path / "rounded" / "config.json").read_text())
    assert config["intermediate_size"] == 40
    errors = [
        shrink(solver, channels=0.5, solver=solver, update="none")[0].error
        for solver in ("tabu", "swap", "wanda", "magnitude")
    ]
    assert all(one <= other * (1 + 1e-12) for one, other in itertools.pairwise(errors[:3]))


def test_interrupted_runs_resume_to_the_same_bytes(dense_folder, tmp_path):
    def shrink(out, **options):
        given = {"channels": 0.25, "heads": 0.5, **options}
        return shrink_model(dense_folder, tokens(6), output=tmp_path / out, **given)

    shrink("whole")
    for stop in range(3):

        def halt(event, stop=stop):
            if event.block == stop and event.stage == "solve" and event.done == 2:
                raise KeyboardInterrupt

        out = f"stopped in {stop}"
        with pytest.raises(KeyboardInterrupt):
            shrink(out, on_progress=halt)
        if stop == 0:
            assert not (tmp_path / out).exists()
            continue
        report = shrink(out, resume=True)
        assert len(report.layers) == 6
        assert contents(tmp_path / out) == contents(tmp_path / "whole")
    finished = shrink(out, resume=True)
    assert [x.error for x in finished.layers] == [x.error for x in report.layers]
    fails(ModelError, "another run", shrink, out, resume=True, channels=0.5, heads=0.0)


def test_bfloat16_stays_bfloat16(tmp_path):
    dense, out = save(tiny("llama", dtype=torch.bfloat16), tmp_path / "dense"), tmp_path / "out"
    shrink_model(dense, tokens(6), output=out, channels=0.25)
    found = load_file(out / "model.safetensors")
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    verify_model(out, dense)


@pytest.mark.parametrize("what", [{"channels": 0.25}, {"heads": 0.5}])
def test_zeros_of_a_pruned_model_are_not_filled(what, pruned_folder, tmp_path):
    small = tmp_path / "small"
    with pytest.raises(OptionError, match="least squares would fill its zeros"):
        shrink_model(pruned_folder, tokens(6), output=small, **what)
    assert not small.exists()
    shrink_model(pruned_folder, tokens(6), output=small, update="none", **what)
    block = AutoModelForCausalLM.from_pretrained(small).model.layers[0]
    for layer in (block.mlp.down_proj, block.self_attn.o_proj):
        assert float((layer.weight == 0).float().mean()) > 0.3

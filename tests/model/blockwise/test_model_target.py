"""`target` dense: a layer is to give on the pruned model's inputs what it gives in the dense model."""

import pytest
import torch
from tiny_models import inputs_of, tiny, tokens

from maskopt import prune_model
from maskopt.model.blocks import matrix
from maskopt.model.job import open_job
from maskopt.model.options import prune_options
from maskopt.model.plan import _forward_operations, plan_prune
from maskopt.model.problems import layer_problem
from maskopt.model.walk_block import Block

OPTIONS = {"sparsity": 0.5, "min_tokens": 1, "target": "dense"}


@pytest.mark.parametrize("more", [{}, {"activation_memory": 0, "threads": 3}])
def test_errors_are_those_of_the_outputs_in_the_dense_model(more):
    data, original = tokens(10), tiny("llama", layers=2)
    given = {**OPTIONS, "holdout": 0.4, "warm_start": "wanda"}
    report = prune_model(tiny("llama", layers=2), data, **given, **more)
    before = tiny("llama", layers=2)
    prune_model(before, data, include=("layers.0.*",), **given)
    second = [layer for layer in report.layers if layer.block == 1]
    assert len(second) == 7
    for layer in second:
        weight = original.get_submodule(layer.name).weight.detach().double()
        pruned = weight * report.masks[layer.name]
        for windows, error, energy in (
            (data[:6], layer.error, layer.energy),
            (data[6:], layer.error_held, layer.energy_held),
        ):
            wanted = inputs_of(original, layer.name, windows) @ weight.T
            there = inputs_of(before, layer.name, windows) @ pruned.T
            assert error == pytest.approx(float((wanted - there).square().mean(0).sum()), rel=1e-4)
            assert energy == pytest.approx(float(wanted.square().mean(0).sum()), rel=1e-4)


@pytest.mark.parametrize("block", [0, 2])
def test_where_nothing_before_is_pruned_both_targets_are_the_same(block):
    """In the first block, and in the last if no layer of another is chosen."""
    given = {**OPTIONS, "include": (f"layers.{block}.*",)}
    one = prune_model(tiny("llama"), tokens(), **given)
    other = prune_model(tiny("llama"), tokens(), **{**given, "target": "pruned"})
    assert all(torch.equal(mask, other.masks[name]) for name, mask in one.masks.items())
    for layer, same in zip(one.layers, other.layers, strict=True):
        assert layer.error == pytest.approx(same.error, rel=1e-9)


def test_the_moments_of_a_shrunk_problem_are_still_those_of_something(monkeypatch):
    problems, rounds = [], Block.rounds

    def look(block):
        for layers, grams in rounds(block):
            for layer in layers:
                weight = matrix(block.job.source.model, layer).clone()
                gram, moved = grams.of(layer.name), grams.moved(layer.name)
                pattern = block.job.options.pattern
                problems.append(layer_problem(layer, weight, gram, pattern, 0.3, moved))
            yield layers, grams

    monkeypatch.setattr(Block, "rounds", look)
    prune_model(tiny("llama"), tokens(2), shrink=0.3, solver="wanda", **OPTIONS)
    for problem in problems:
        assert problem.linear is not None
        gram = problem.gram.double()
        problem.linear.check_moments(gram, 1e-6 * float(gram.trace()), "")
    assert len(problems) == 21


def test_plans_count_the_dense_model_that_goes_along(dense_folder):
    """Its moments, its states and its passes."""
    options = [prune_options(None, {**OPTIONS, "target": t}) for t in ("pruned", "dense")]
    alone, both = (plan_prune(dense_folder, tokens(), how).memory for how in options)
    assert both.grams == 3 * alone.grams
    assert both.activations == 2 * alone.activations
    alone, both = (_forward_operations(open_job(dense_folder, tokens(), x), x) for x in options)
    assert 1.4 * alone < both < 2 * alone

"""`target` dense: a layer is to give on the pruned model's inputs what it gives in the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from outputs import contents
from resuming import interrupted
from tiny_models import inputs_of, save, tiny, tokens

from maskopt import prune_model
from maskopt.errors import OptionError
from maskopt.model.blocks import matrix
from maskopt.model.job import open_job
from maskopt.model.options import prune_options
from maskopt.model.plan import _forward_operations, plan_prune
from maskopt.model.problems import layer_problem
from maskopt.model.verify import verify_output
from maskopt.model.walk_block import Block

OPTIONS: dict[str, Any] = {"sparsity": 0.5, "min_tokens": 1, "target": "dense"}


@pytest.mark.parametrize("more", [{}, {"activation_memory": 0, "threads": 3}])
def test_errors_are_those_of_the_outputs_in_the_dense_model(more: dict[str, Any]) -> None:
    data = tokens(10)
    model = tiny("llama")
    report = prune_model(model, data, holdout=0.4, **OPTIONS, **more)
    before = tiny("llama")
    prune_model(before, data, holdout=0.4, include=("layers.0.*",), **OPTIONS)
    original = tiny("llama")
    checked = 0
    for layer in report.layers:
        if layer.block != 1:
            continue
        weight = original.get_submodule(layer.name).weight.detach().double()
        pruned = weight * report.masks[layer.name]
        for windows, error, energy in (
            (data[:6], layer.error, layer.energy),
            (data[6:], layer.error_held, layer.energy_held),
        ):
            wanted = inputs_of(original, layer.name, windows) @ weight.T
            given = inputs_of(before, layer.name, windows) @ pruned.T
            assert error == pytest.approx(float((wanted - given).square().mean(0).sum()), rel=1e-4)
            assert energy == pytest.approx(float(wanted.square().mean(0).sum()), rel=1e-4)
        checked += 1
    assert checked == 7


def test_the_first_block_has_the_same_target_either_way() -> None:
    first = {"include": ("layers.0.*",)}
    one = prune_model(tiny("llama"), tokens(), **OPTIONS, **first)
    other = prune_model(tiny("llama"), tokens(), **{**OPTIONS, "target": "pruned"}, **first)
    for name, mask in one.masks.items():
        assert torch.equal(mask, other.masks[name])


def test_blocks_without_chosen_layers_carry_the_dense_states_on() -> None:
    """Nothing before the last block is pruned: its inputs are the dense ones."""
    last = {"include": ("layers.2.*",)}
    one = prune_model(tiny("llama"), tokens(), **OPTIONS, **last)
    other = prune_model(tiny("llama"), tokens(), **{**OPTIONS, "target": "pruned"}, **last)
    for name, mask in one.masks.items():
        assert torch.equal(mask, other.masks[name])
    for layer, same in zip(one.layers, other.layers, strict=True):
        assert layer.error == pytest.approx(same.error, rel=1e-9)


@pytest.mark.parametrize(("family", "more"), [("gpt2", {}), ("mixtral", {"all_experts": True})])
def test_other_families(family: str, more: dict[str, Any], tmp_path: Path) -> None:
    folder = save(tiny(family), tmp_path / "model")
    prune_model(folder, tokens(), output=tmp_path / "out", **OPTIONS, **more)
    verified = verify_output(tmp_path / "out", folder, calibration=tokens())
    assert len(verified.checked_layers) == verified.layers


@pytest.mark.parametrize("stage", ["calibrate", "solve"])
def test_resumed_runs_write_the_same_bytes(dense: Path, tmp_path: Path, stage: str) -> None:
    prune_model(dense, tokens(), output=tmp_path / "whole", holdout=0.4, **OPTIONS)
    more = {**OPTIONS, "solver": "swap", "warm_start": None, "holdout": 0.4}
    interrupted(dense, tmp_path / "out", 2, stage, **more)
    prune_model(dense, tokens(), output=tmp_path / "out", resume=True, holdout=0.4, **OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert verify_output(tmp_path / "out", dense, calibration=tokens()).checked_layers


def test_the_moments_of_a_shrunk_problem_are_still_those_of_something(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problems = []
    rounds = Block.rounds

    def look(block: Block) -> Any:
        for layers, grams in rounds(block):
            for layer in layers:
                weight = matrix(block.job.source.model, layer).clone()
                gram, moved = grams.of(layer.name), grams.moved(layer.name)
                pattern = block.job.options.pattern  # type: ignore[attr-defined]
                problems.append(layer_problem(layer, weight, gram, pattern, 0.3, moved))
            yield layers, grams

    monkeypatch.setattr(Block, "rounds", look)
    prune_model(tiny("llama"), tokens(2), shrink=0.3, **OPTIONS)
    for problem in problems:
        assert problem.linear is not None
        gram = problem.gram.double()
        ridge = 1e-6 * float(gram.trace())
        problem.linear.check_moments(gram, ridge, "")
    assert len(problems) == 21


def test_plans_count_the_dense_model_that_goes_along(dense: Path) -> None:
    alone, beside = (
        plan_prune(dense, tokens(), **{**OPTIONS, "target": target}).memory
        for target in ("pruned", "dense")
    )
    assert beside.grams == 3 * alone.grams
    assert beside.activations == 2 * alone.activations


def test_plans_count_its_passes(dense: Path) -> None:
    alone, beside = (
        _forward_operations(open_job(dense, tokens(), options), options)
        for options in (prune_options(None, {**OPTIONS, "target": t}) for t in ("pruned", "dense"))
    )
    assert 1.4 * alone < beside < 2 * alone


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"target": "both"}, "`target` must be text pruned or dense, not 'both'"),
        ("llama", {"one_pass": True}, "`target` dense and `one_pass` exclude each other"),
        ("llama", {"true_sequential": True}, "`target` dense and `true_sequential` exclude"),
        ("mixtral", {}, "`target` dense needs `all_experts` there"),
    ],
)
def test_bad_input_gets_one_line(family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        prune_model(tiny(family), tokens(), **{**OPTIONS, **options})

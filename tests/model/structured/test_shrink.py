"""Fewer channels and heads: the optimal choice, its errors and bounds, and runs that are taken up again."""

import itertools
import json

import pytest
import torch
from forging import fails
from outputs import contents
from safetensors.torch import load_file
from tiny_models import inputs_of, save, tiny, tokens
from transformers import AutoModelForCausalLM

from maskopt import LayerProblem, Unstructured, shrink_model
from maskopt.core.gram import Gram
from maskopt.errors import ModelError, OptionError
from maskopt.models.checkpoints.workspace import MANIFEST
from maskopt.models.verification.verify import verify_model


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

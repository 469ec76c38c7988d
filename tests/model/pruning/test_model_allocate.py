"""`budget` model: layers share out what the model prunes, as the loss, their errors or measurements say."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
import torch
from commands import run
from outputs import contents
from tiny_models import inputs_of, logs, tiny, tokens

from maskopt import LayerProblem, Unstructured, collect_problems, prune_model, shrink_model, solve
from maskopt.certify import certify_model
from maskopt.errors import ModelError, OptionError
from maskopt.model import plan as planning
from maskopt.model import prune
from maskopt.model.allocate import allocate
from maskopt.model.block_curves import measured_curves
from maskopt.model.blocks import Layer
from maskopt.model.importance import GRADIENT_WINDOWS, VARIANT_WINDOWS, VARIANTS
from maskopt.model.job import open_job
from maskopt.model.options import PruneOptions, prune_options
from maskopt.model.plan import plan_prune
from maskopt.model.report import read_manifest
from maskopt.model.share_out import Curve, Moves, share_out
from maskopt.model.solving import DAMPING_GRID
from maskopt.model.windows import held_out
from maskopt.model.workspace import MANIFEST

OPTIONS = {"sparsity": 0.5, "min_tokens": 1, "budget": "model", "solver": "wanda"}
WHOLE = PruneOptions(Unstructured(sparsity=0.5), budget="model", min_tokens=1)
MEASURED = dataclasses.replace(WHOLE, importance="measured", spread=0.25)


# What an error costs ------------------------------------------------------------------------------


def squares(family, data):
    """Of the loss's gradients by what every layer's module gives, a mean over the targets."""
    model, outputs, found = tiny(family), {}, {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter):
            module.register_forward_hook(lambda _, x, out, name=name: outputs.update({name: out}))
    for window in data:
        outputs.clear()
        logits = model(window[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum")
        names = [name for name in outputs if outputs[name].requires_grad]
        gradients = torch.autograd.grad(loss, [outputs[x] for x in names], allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                square = gradient.reshape(-1, gradient.shape[-1]).square().sum(0)
                found[name] = found.get(name, 0) + square
    targets = data.shape[0] * (data.shape[1] - 1)
    return {name: value.double() / targets for name, value in found.items()}


def walked(family, data, **options):
    """The squares that a walk finds, and the layers."""
    job = open_job(tiny(family), data, prune_options(WHOLE, {"one_pass": True, **options}))
    with job, torch.no_grad():
        for block in job.blocks():
            block.advance()
    assert job.gradients is not None
    return job.gradients.squares, job.layers


@pytest.mark.parametrize(
    ("family", "threads", "windows", "holdout"),
    [
        *(("llama", 1, 5, 0.0), ("gpt2", 3, 5, 0.0), ("bloom", 1, 5, 0.0), ("gemma3", 3, 5, 0.0)),
        *(("llama", 3, GRADIENT_WINDOWS + 8, 0.0), ("llama", 1, GRADIENT_WINDOWS + 8, 0.5)),
    ],
)
def test_squares_are_those_of_the_whole_model(family, threads, windows, holdout):
    """On a few of the windows that masks are fitted to."""
    data, held = tokens(windows), held_out(windows, holdout)
    assert bool(held) == bool(holdout)
    found, layers = walked(family, data, threads=threads, holdout=holdout)
    used = [window for window in range(windows) if window not in held][:GRADIENT_WINDOWS]
    expected = squares(family, data[used])
    assert set(found) == {layer.name for layer in layers}
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-9)


def test_squares_of_experts_count_what_their_tokens_say():
    """A layer's squares foretell to second order what noise in its outputs does to Fisher's quadratic form:
    they are those of the gradient by a weight whose input is one."""
    squares, layers = walked("mixtral", tokens(4))
    experts = [layer for layer in layers if layer.expert is not None]
    assert experts
    for layer in experts:
        found = squares.get(layer.name)
        assert found is None or (found.shape == (layer.rows,) and bool((found >= 0).all()))
    assert sum(float(squares[x.name].sum()) > 0 for x in experts) > len(experts) // 2


@pytest.mark.parametrize("importance", ["relative", "loss"])
def test_rows_count_as_the_importance_says(importance):
    given = {"sparsity": 0.5, "min_tokens": 1, "budget": "layer", "importance": importance}
    expected = squares("llama", tokens())
    for name, problem in collect_problems(tiny("llama"), tokens(), **given):
        size = expected[name] if importance == "loss" else 1 / problem.output_energy()
        omega = (size / size.mean()).clamp(min=1e-3)
        torch.testing.assert_close(problem.omega, omega, rtol=1e-3, atol=1e-6)


def test_costs_are_divergences_of_models_with_one_block_pruned():
    job = open_job(tiny("llama"), tokens(), MEASURED)
    before = {name: p.clone() for name, p in job.source.model.named_parameters()}
    curves = measured_curves(job, MEASURED)
    assert all(torch.equal(p, before[name]) for name, p in job.source.model.named_parameters())
    small = dataclasses.replace(MEASURED, activation_memory=1, threads=1)
    assert measured_curves(open_job(tiny("llama"), tokens(), small), small) == curves
    assert [len(curve.layers) for curve in curves] == [7, 7, 7]
    ids = tokens()[:VARIANT_WINDOWS]
    full = logs(tiny("llama"), ids)
    for block, curve in enumerate(curves):
        n = curve.layers[0].n
        assert curve.pruned == (n // 2 - n // 4, n // 2, n // 2 + n // 4)
        for pruned, cost in zip(curve.pruned, curve.costs, strict=True):
            model, masks = tiny("llama"), {}
            for layer in curve.layers:
                assert layer.block == block
                weight = model.get_parameter(layer.parameter).detach()
                x = inputs_of(model, layer.name, ids)
                keep = Unstructured(keep=layer.n - layer.n * pruned // n)
                problem = LayerProblem(weight, x.T @ x / len(x), keep)
                masks[layer.parameter] = solve(problem, "wanda").mask
            for name, mask in masks.items():
                model.get_parameter(name).data *= mask
            other = logs(model, ids)
            kl = float((full.exp() * (full - other)).sum(-1).mean())
            assert cost == pytest.approx(kl, rel=2e-2, abs=1e-7)


# Counts from curves -------------------------------------------------------------------------------


def curves(costs):
    layers = open_job(tiny("llama"), None, WHOLE).layers[: len(costs)]
    grid = {x.n: tuple(range(x.n // 4, 3 * x.n // 4 + 1)) for x in layers}
    made = [
        Curve((x,), grid[x.n], tuple(cost * (k / x.n) ** 2 for k in grid[x.n]))
        for x, cost in zip(layers, costs, strict=True)
    ]
    return list(layers), made


def test_it_is_the_cheapest_of_all_counts():
    layers, made = curves([1.0, 3.0, 0.2])
    counts = share_out(layers, made, dataclasses.replace(WHOLE, spread=0.1))
    ranges = [range(x.n // 2 - x.n // 10, x.n // 2 + x.n // 10 + 1) for x in layers]
    total = sum(x.rows * (x.n // 2) for x in layers)

    def cost(counts):
        return sum(float(c.at([k])[0]) for c, k in zip(made, counts, strict=True))

    every = [
        cost(ks)
        for ks in itertools.product(*ranges)
        if sum(x.rows * k for x, k in zip(layers, ks, strict=True)) == total
    ]
    assert cost([counts[x.name] for x in layers]) == pytest.approx(min(every))


def test_a_layer_that_counts_more_prunes_less():
    layers, made = curves([1.0, 1.0, 1.0, 1.0])
    _, more = curves([30.0, 1.0, 1.0, 1.0])
    name = layers[0].name
    assert share_out(layers, more, WHOLE)[name] < share_out(layers, made, WHOLE)[name]
    scaled = [Curve(c.layers, c.pruned, tuple(7.0 * x for x in c.costs)) for c in made]
    assert share_out(layers, scaled, WHOLE) == share_out(layers, made, WHOLE)


def test_layers_without_a_curve_have_the_models_sparsity():
    layers, made = curves([1.0, 5.0, 1.0])
    assert share_out(layers, made[:2], WHOLE)[layers[2].name] == layers[2].n // 2
    assert share_out(layers, [], WHOLE) == {x.name: x.n // 2 for x in layers}


@pytest.mark.parametrize("costs", [(0.0, 0.0, 0.0), (0.0, 1.0, 2.0)])
def test_curves_that_reach_nothing_have_a_logarithm(costs):
    layers, _ = curves([1.0])
    found = Curve((layers[0],), (4, 8, 12), costs).at([4, 6, 12])
    assert bool(np.isfinite(found).all())
    assert bool((np.diff(found) >= 0).all())


def test_between_nothing_and_what_was_measured_costs_grow_by_the_cube():
    """On a logarithmic scale all but the last of it would be free."""
    layer = Layer("l", 0, "l", "", "l.weight", None, 1, 10, 100)
    curve = Curve((layer,), (0, 20, 40), tuple(float(k**3) for k in (0, 20, 40)))
    inside = [*range(21), 40]
    np.testing.assert_allclose(curve.at(inside), [k**3 for k in inside], rtol=1e-12)
    assert bool((np.diff(curve.at(list(range(41)))) > 0).all())


def test_layers_that_may_prune_nothing_share_out_what_is_best():
    layers = [Layer(f"l{i}", 0, "l", "", f"l{i}.weight", None, 1, 1, 128) for i in range(3)]
    scale = (1.0, 2.0, 8.0)
    options = PruneOptions(Unstructured(sparsity=0.125), budget="model", spread=0.125)
    made = [
        Curve((layer,), (0, 16, 32), tuple(s * k**3 for k in (0, 16, 32)))
        for layer, s in zip(layers, scale, strict=True)
    ]

    def cost(counts):
        return sum(s * k**3 for s, k in zip(scale, counts, strict=True))

    mine = tuple(share_out(layers, made, options).values())
    assert sum(mine) == 48
    every = (c for c in itertools.product(range(33), repeat=3) if sum(c) == 48)
    assert cost(mine) <= 1.05 * min(map(cost, every))


def test_the_block_that_matters_less_prunes_more():
    layers = open_job(tiny("llama"), None, MEASURED).layers
    blocks = [tuple(x for x in layers if x.block == index) for index in range(3)]
    n = blocks[0][0].n
    made = [
        Curve(block, (n // 4, n // 2, 3 * n // 4), (cost / 4, cost, 4 * cost))
        for block, cost in zip(blocks, (1.0, 5.0, 0.2), strict=True)
    ]
    counts = share_out(layers, made, MEASURED)
    assert sum(x.rows * counts[x.name] for x in layers) == sum(x.rows * x.n // 2 for x in layers)
    for block in blocks:  # together
        assert len({counts[x.name] / x.n for x in block}) == 1
    part = [counts[block[0].name] / n for block in blocks]
    assert part[1] < part[0] < part[2] <= 0.75


def test_moves_keep_all_of_their_layers_within_the_spread():
    layers = open_job(tiny("llama"), None, MEASURED).layers[:7]
    half = {x.name: x.n // 2 for x in layers}
    move = Moves.of(layers, half, 0.3)
    for index, layer in enumerate(layers):
        counts = move.counts(index)
        assert half[layer.name] in counts
        assert all(abs(count - half[layer.name]) <= 0.3 * layer.n for count in counts)
    assert move.sizes()[move.moves.index(0)] == sum(x.rows * half[x.name] for x in layers)


def test_widths_without_a_step_in_common_are_refused(dense_folder, tmp_path):
    """Of 32 and 34 inputs the step in common is a half."""
    narrow, out = tmp_path / "narrow", tmp_path / "out"
    shrink_model(dense_folder, tokens(), output=narrow, channels=0.3, solver="wanda")
    with pytest.raises(OptionError, match="32, 34 inputs have no step in common"):
        prune_model(narrow, tokens(), output=out, importance="measured", **OPTIONS)
    # of one layer every count is a step
    prune_model(narrow, tokens(), output=out, importance="relative", **OPTIONS)


# Prunes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", ["alike", "relative", "loss"])
def test_layers_differ_and_the_model_keeps_its_count(importance):
    dense = tiny("llama")
    before = {name: x.clone() for name, x in dense.state_dict().items()}
    options = dataclasses.replace(WHOLE, importance=importance)
    counts = allocate(open_job(dense, tokens(), options), options)
    assert all(torch.equal(before[name], x) for name, x in dense.state_dict().items())
    alone = dataclasses.replace(options, threads=1)
    assert counts == allocate(open_job(tiny("llama"), tokens(), alone), alone)
    report = prune_model(dense, tokens(), importance=importance, **OPTIONS)
    assert len({layer.sparsity for layer in report.layers}) > 1
    assert report.sparsity == 0.5
    for layer in report.layers:
        assert layer.pruned == layer.rows * counts[layer.name]
        assert bool(((~report.masks[layer.name]).sum(1) == counts[layer.name]).all())
        assert abs(layer.sparsity - 0.5) <= 0.2
        assert layer.pattern == f"keep {layer.n - counts[layer.name]}"
    assert report.fingerprint["options"]["counts"] == counts


@pytest.mark.parametrize(
    ("budget", "more"),
    [("model", {"damping": 0.1}), ("both", {"damping": "auto", "holdout": 0.3})],
)
def test_refitted_layers_differ_under_any_damping(budget, more):
    given = {**OPTIONS, "budget": budget, "weights": "refit", **more}
    report = prune_model(tiny("llama", layers=2), tokens(), **given)
    found = {layer.damping for layer in report.layers}
    assert found == {0.1} if more["damping"] == 0.1 else found <= {*DAMPING_GRID}


def test_what_can_be_refused_is_refused_before_layers_are_compared(
    dense_folder, tmp_path, monkeypatch
):
    def refused(message, **more):
        with monkeypatch.context() as patch:
            patch.setattr(prune, "allocate", lambda *_: pytest.fail("began"))
            with pytest.raises(ModelError, match=message):
                prune_model(dense_folder, tokens(), output=out, **{**OPTIONS, **more})

    out = tmp_path / "out"
    prune_model(dense_folder, tokens(), output=out, **{**OPTIONS, "budget": "row"})
    refused("exists and is not empty")
    refused(r"the result of another run: options\.budget was", resume=True)
    prune_model(dense_folder, tokens(), output=out, overwrite=True, **OPTIONS)
    refused(r"the result of another run: options\.pattern", resume=True, sparsity=0.7)


def test_counts_of_the_users_own(dense_folder, tmp_path):
    layers = open_job(dense_folder, None, WHOLE).layers
    counts = {x.name: x.n // 2 for x in layers}
    one, two = (x for x in layers if x.kind == "mlp.up_proj" and x.block < 2)
    counts[one.name] += 5
    with pytest.raises(OptionError, match=r"at sparsity 0\.5 it must be"):
        prune_model(tiny("llama"), tokens(), counts=counts, **OPTIONS)
    counts[two.name] -= 5
    given, out = {name: np.int64(count) for name, count in counts.items()}, tmp_path / "out"
    with pytest.raises(OptionError, match=r"further from 0.5 than `spread` 0.05"):
        prune_model(dense_folder, tokens(), counts=given, spread=0.05, output=out, **OPTIONS)
    assert not out.exists()
    report = prune_model(dense_folder, tokens(), counts=given, output=out, **OPTIONS)
    assert {x.name: x.pruned // x.rows for x in report.layers} == counts
    problems = dict(collect_problems(dense_folder, tokens(), counts=counts, **OPTIONS))
    assert problems[one.name].pruned_per_group == counts[one.name]
    gaps = certify_model(dense_folder, out, calibration=tokens(), rows_per_layer=1)
    assert {r.instance: r.pattern for r in gaps}[one.name] == f"keep {one.n - counts[one.name]}"
    assert all(0 <= record.gap <= 1 for record in gaps)
    with pytest.raises(ModelError, match="shared out by a prune; give its `counts`"):
        collect_problems(tiny("llama"), tokens(), **OPTIONS)


def test_plans_count_what_is_pruned_and_the_passes_before(dense, monkeypatch):
    monkeypatch.setattr(planning, "_speed", lambda *_: 1e9)  # operations, not this machine

    def plan(budget, importance="loss"):
        return plan_prune(dense, **{**OPTIONS, "budget": budget, "importance": importance})

    row, layer, both = plan("row"), plan("layer", "alike"), plan("both", "alike")
    loss, measured, free = plan("model"), plan("model", "measured"), plan("model", "alike")
    assert loss.pruned == measured.pruned == free.pruned == row.pruned
    assert loss.memory.gradients > row.memory.gradients == 0
    assert measured.forward_seconds > free.forward_seconds
    assert both.forward_seconds > layer.forward_seconds
    assert sum(both.pruned.values()) == sum(layer.pruned.values())
    job = open_job(dense, None, MEASURED)
    assert job.load.variants == VARIANTS * VARIANT_WINDOWS * len(job.source.blocks)
    odd = {**OPTIONS, "sparsity": 0.37, "budget": "layer", "importance": "alike", "spread": 1}
    report = prune_model(tiny("llama"), tokens(), **odd)
    assert sum(plan_prune(dense, **odd).pruned.values()) == sum(x.pruned for x in report.layers)


def test_the_command_takes_budgets_and_a_file_of_counts(dense, data, tmp_path):
    out, again, counts = tmp_path / "out", tmp_path / "again", tmp_path / "counts.json"
    common = ("prune", dense, *["--sparsity", "0.5", "--solver", "wanda", "--min-tokens", "8"])
    common = (*common, "--calibration", data)

    def recorded(out):
        run("verify", out, "--against", dense)
        return read_manifest(out / MANIFEST)["fingerprint"]["options"]

    shown = run(*common, "--budget", "model", "--output", out)
    assert re.search(r"mlp\.up_proj .* [0-9]+(–[0-9]+)?% ", shown)
    counts.write_text(json.dumps(recorded(out)["counts"]))
    given = (*common, "--budget", "model", "--counts", counts)
    run(*given, "--output", again)
    assert contents(out) == contents(again)
    for words in ("[1]", "{", "{}"):
        counts.write_text(words)
        assert "must be JSON" in run(*given, "--output", out, fails=OptionError)
    counts.unlink()
    assert "cannot be read" in run(*given, "--output", out, fails=OptionError)
    run(*common, "--budget", "both", "--spread", 0.05, "--output", tmp_path / "both")
    options = recorded(tmp_path / "both")
    assert (options["budget"], options["spread"]) == ("both", 0.05)
    run(*common, "--budget", "layer", "--output", tmp_path / "layer")
    options = recorded(tmp_path / "layer")
    assert (options["budget"], options["pattern"]["per"]) == ("layer", "layer")

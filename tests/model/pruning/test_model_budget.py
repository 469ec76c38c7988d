"""Allocations: layers, their rows, or both share out what is pruned, by the loss, errors or measurements."""

import itertools
import json
import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from commands import run
from forging import fails, forge_manifest, options
from pooled_layers import pool
from prunes import contents, manifest_of, prune, read_masks, slow
from tiny_models import loud, save, tiny, tokens

from maskopt import LayerProblem, Unstructured, collect_problems, open_job, prune_model
from maskopt.errors import ModelError, OptionError, VerificationError
from maskopt.models.architecture.blocks import Layer
from maskopt.models.calibration.tokens import held_out
from maskopt.models.checkpoints.schema import MASKS
from maskopt.models.evaluation.bound import certify_model
from maskopt.models.options.prune import PruneOptions
from maskopt.models.options.walk import GRADIENT_WINDOWS
from maskopt.models.pruning import plan as planning, prune as pruning
from maskopt.models.pruning.allocate import Curve, allocate, levels_of, share_out
from maskopt.models.pruning.card import options_again
from maskopt.models.pruning.plan import plan_prune
from maskopt.models.verification.verify import verify_model

EQUAL = {"sparsity": 0.5, "min_tokens": 1}
FREE = {**EQUAL, "allocation": "rows", "sensitivity": "uniform", "max_deviation": 1}
LAYER = {**FREE, "max_deviation": 0.1}
BOTH = {**LAYER, "allocation": "both"}
OPTIONS = {**EQUAL, "allocation": "layers", "solver": "wanda"}
WHOLE = PruneOptions(Unstructured(sparsity=0.5), allocation="layers", min_tokens=1)
FEW = [slow("rows", "fisher"), ("both", "relative")]
MANY = GRADIENT_WINDOWS + 8
SQUARES = [("gpt2", 3, 5, 0.0), ("bloom", 1, 5, 0.0), ("gemma3", 3, 5, 0.0)]
SQUARES += [("llama", 3, MANY, 0.0), ("llama", 1, MANY, 0.5)]


def squares(family, data):
    """Of the loss's gradients by what every layer's module gives, a mean over the targets."""
    model, outputs, found = tiny(family, layers=2), {}, {}
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
    job = open_job(tiny(family, layers=2), data, replace(WHOLE, calibrate_on="dense", **options))
    with job, torch.no_grad():
        for block in job.blocks():
            block.advance()
    assert job.gradients is not None
    return job.gradients.squares, job.layers


@pytest.mark.parametrize(("family", "threads", "windows", "holdout"), SQUARES)
def test_squares_are_those_of_the_whole_model(family, threads, windows, holdout):
    data, held = tokens(windows), held_out(windows, holdout)
    assert bool(held) == bool(holdout)
    found, layers = walked(family, data, threads=threads, holdout=holdout)
    used = [window for window in range(windows) if window not in held][:GRADIENT_WINDOWS]
    expected = squares(family, data[used])
    assert set(found) == {layer.name for layer in layers}
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-9)


def test_squares_of_experts_and_rows_that_count_as_the_sensitivity_says():
    found, layers = walked("mixtral", tokens(4))
    experts = [layer for layer in layers if layer.expert is not None]
    seen = [(found[layer.name], layer.rows) for layer in experts if layer.name in found]
    assert all(len(x) == rows and bool((x >= 0).all()) for x, rows in seen)
    assert 2 * sum(float(x.sum()) > 0 for x, _ in seen) > len(experts)
    # rows count as the sensitivity says
    expected, rows = squares("llama", tokens()), {**EQUAL, "allocation": "rows"}
    for sensitivity in ("relative", "fisher"):
        given = {**rows, "sensitivity": sensitivity}
        for name, problem in collect_problems(tiny("llama", layers=2), tokens(), **given):
            size = expected[name] if sensitivity == "fisher" else 1 / problem.output_energy()
            omega = (size / size.mean()).clamp(min=1e-3)
            torch.testing.assert_close(problem.omega, omega, rtol=1e-3, atol=1e-6)


def curves(costs):
    layers, made = list(open_job(tiny("llama"), None, WHOLE).layers[: len(costs)]), []
    for x, cost in zip(layers, costs, strict=True):
        grid = tuple(range(x.n // 4, 3 * x.n // 4 + 1))
        made.append(Curve(x, grid, tuple(cost * (k / x.n) ** 2 for k in grid)))
    return layers, made


def plain_layer(name, n):
    return Layer(name, 0, name, "", f"{name}.weight", None, 1, 1, n)


def check_counts(layers, made, slack, **options):
    how = replace(WHOLE, **options)
    counts = share_out(layers, made, how)
    half = [how.pattern.pruned_per_group(x.n) for x in layers]
    reach = [int(how.max_deviation * x.n) for x in layers]
    near = [range(h - r, h + r + 1) for h, r in zip(half, reach, strict=True)]

    def weights(numbers):
        return sum(x.rows * k for x, k in zip(layers, numbers, strict=True))

    def cost(numbers):
        return sum(float(c.at([k])[0]) for c, k in zip(made, numbers, strict=True))

    mine = [counts[x.name] for x in layers]
    assert weights(mine) == weights(half)
    others = (x for x in itertools.product(*near) if weights(x) == weights(half))
    assert cost(mine) <= slack * min(map(cost, others))


def test_counts_are_the_cheapest_of_all_and_blocks_prune_by_their_cost():
    check_counts(*curves([1.0, 3.0, 0.2]), 1 + 1e-6, max_deviation=0.1)
    # layers that may prune nothing
    layers, made = [plain_layer(f"l{i}", 128) for i in range(3)], []
    for layer, cost in zip(layers, (1.0, 2.0, 8.0), strict=True):
        made.append(Curve(layer, (0, 16, 32), (0.0, cost * 16**3, cost * 32**3)))
    check_counts(layers, made, 1.05, max_deviation=0.125, sparsity=0.125)
    # a layer that counts more prunes less, one without a curve as the model
    same, more = ([cost, 1.0, 1.0, 1.0] for cost in (1.0, 30.0))
    (layers, made), (_, more), (_, scaled) = map(curves, (same, more, [7.0 * x for x in same]))
    name = layers[0].name
    assert share_out(layers, more, WHOLE)[name] < share_out(layers, made, WHOLE)[name]
    assert share_out(layers, scaled, WHOLE) == share_out(layers, made, WHOLE)
    assert share_out(layers, made[:2], WHOLE)[layers[2].name] == layers[2].n // 2
    assert share_out(layers, [], WHOLE) == {x.name: x.n // 2 for x in layers}
    # between what was measured: from nothing they grow by the cube, on a logarithmic scale all but the
    # last of it would be free
    for costs in ((0.0, 0.0, 0.0), (0.0, 1.0, 2.0)):
        found = Curve(plain_layer("l", 16), (4, 8, 12), costs).at([4, 6, 12])
        assert bool(np.isfinite(found).all())
        assert bool((np.diff(found) >= 0).all())
    curve = Curve(plain_layer("l", 100), (0, 20, 40), tuple(float(k**3) for k in (0, 20, 40)))
    inside = [*range(21), 40]
    np.testing.assert_allclose(curve.at(inside), [k**3 for k in inside], rtol=1e-12)
    assert bool((np.diff(curve.at(list(range(41)))) > 0).all())
    # levels stay within `max_deviation`, and the model's own is among them
    for layer in layers:
        levels = levels_of(layer, replace(WHOLE, max_deviation=0.3))
        assert layer.n // 2 in levels
        assert all(abs(level - layer.n / 2) <= 0.3 * layer.n for level in levels)
        assert max(levels) - min(levels) >= 0.5 * layer.n


@pytest.mark.parametrize("sensitivity", ["uniform", "relative", "fisher"])
def test_layers_differ_and_the_model_keeps_its_count(sensitivity):
    dense = tiny("llama", layers=2)
    before = {name: x.clone() for name, x in dense.state_dict().items()}
    options = replace(WHOLE, sensitivity=sensitivity)
    counts = allocate(open_job(dense, tokens(), options), options)
    assert all(torch.equal(before[name], x) for name, x in dense.state_dict().items())
    alone = replace(options, threads=1)
    assert counts == allocate(open_job(tiny("llama", layers=2), tokens(), alone), alone)
    report = prune_model(dense, tokens(), sensitivity=sensitivity, **OPTIONS)
    assert len({layer.sparsity for layer in report.layers}) > 1
    assert report.sparsity == 0.5
    for layer in report.layers:
        assert layer.pruned == layer.rows * counts[layer.name]
        assert bool(((~report.masks[layer.name]).sum(1) == counts[layer.name]).all())
        assert abs(layer.sparsity - 0.5) <= 0.2
        assert layer.pattern == f"keep {layer.n - counts[layer.name]}"
    assert report.fingerprint["options"]["counts"] == counts


def test_counts_of_ones_own_and_early_refusals(small, tmp_path, monkeypatch):
    layers = open_job(small, None, WHOLE).layers
    counts = {x.name: x.n // 2 for x in layers}
    one, two = (x for x in layers if x.kind == "mlp.up_proj" and x.block < 2)
    counts[one.name] += 5
    said, model = r"at sparsity 0\.5 it must be", tiny("llama", layers=2)
    fails(OptionError, said, prune, model, counts=counts, **OPTIONS)
    counts[two.name] -= 5
    given, out = {name: np.int64(count) for name, count in counts.items()}, tmp_path / "out"
    said, how = r"further from 0.5 than `max_deviation` 0.05", {"counts": given, **OPTIONS}
    fails(OptionError, said, prune, small, out, max_deviation=0.05, **how)
    assert not out.exists()
    assert {x.name: x.pruned // x.rows for x in prune(small, out, **how).layers} == counts
    problems = dict(collect_problems(small, tokens(), counts=counts, **OPTIONS))
    assert problems[one.name].pruned_per_group == counts[one.name]
    gaps = certify_model(small, out, calibration=tokens(), rows_per_layer=1)
    assert {r.instance: r.pattern for r in gaps}[one.name] == f"keep {one.n - counts[one.name]}"
    assert all(0 <= record.gap <= 1 for record in gaps)
    said = "is computed by a prune; give its `counts`"
    fails(ModelError, said, collect_problems, model, tokens(), **OPTIONS)
    # what can be refused is refused before layers are compared
    monkeypatch.setattr(pruning, "allocate", lambda *_: pytest.fail("began"))
    fails(ModelError, "exists and is not empty", prune, small, out, **OPTIONS)
    said, how = "the result of another run: options", {"resume": True, **OPTIONS}
    fails(ModelError, rf"{said}\.sparsity", prune, small, out, **{**how, "sparsity": 0.7})
    prune(small, out, overwrite=True)
    fails(ModelError, rf"{said}\.allocation was", prune, small, out, **how)


def test_plans_count_what_is_pruned_and_the_passes_before(dense, monkeypatch):
    monkeypatch.setattr(planning, "_speed", lambda *_: 1e9)  # operations, not this machine

    def plan(allocation, sensitivity="fisher"):
        how = {"allocation": allocation, "sensitivity": sensitivity}
        return plan_prune(dense, **{**OPTIONS, **how})

    equal, layer, both = plan("uniform"), plan("rows", "uniform"), plan("both", "uniform")
    loss, free = plan("layers"), plan("layers", "uniform")
    assert loss.pruned == free.pruned == equal.pruned
    assert loss.memory.gradients > equal.memory.gradients == 0
    assert loss.forward_seconds > free.forward_seconds > equal.forward_seconds
    assert both.forward_seconds > layer.forward_seconds
    assert sum(both.pruned.values()) == sum(layer.pruned.values())
    odd = {**FREE, "sparsity": 0.37, "solver": "wanda"}
    report = prune_model(tiny("llama"), tokens(), **odd)
    assert sum(plan_prune(dense, **odd).pruned.values()) == sum(x.pruned for x in report.layers)


def test_the_command_takes_an_allocation_and_a_file_of_counts(dense, data, tmp_path):
    out, again, counts = tmp_path / "out", tmp_path / "again", tmp_path / "counts.json"
    common = ["prune", dense, "--calibration", data]
    common += ["--sparsity", 0.5, "--solver", "wanda", "--min-tokens", 8]

    def recorded(out):
        run("verify", out, "--original", dense)
        return manifest_of(out)["fingerprint"]["options"]

    shown = run(*common, "--allocation", "layers", "--output", out)
    assert re.search(r"mlp\.up_proj .* [0-9]+(–[0-9]+)?% ", shown)
    counts.write_text(json.dumps(recorded(out)["counts"]))
    given = (*common, "--allocation", "layers", "--counts", counts)
    run(*given, "--output", again)
    assert contents(out) == contents(again)
    for words in ("[1]", "{", "{}"):
        counts.write_text(words)
        assert "must be JSON" in run(*given, "--output", out, fails=OptionError)
    counts.unlink()
    assert "cannot be read" in run(*given, "--output", out, fails=OptionError)
    for allocation, max_deviation in (("both", 0.05), ("rows", 0.1)):
        more = ["--max-deviation", max_deviation] if allocation == "both" else []
        run(*common, "--allocation", allocation, *more, "--output", tmp_path / allocation)
        said, how = "its rows share a budget, and bounds need an equal", {"rows_per_layer": 1}
        made = (dense, tmp_path / allocation)
        fails(ModelError, said, certify_model, *made, calibration=tokens(), **how)
        options = recorded(tmp_path / allocation)
        assert (options["allocation"], options["max_deviation"]) == (allocation, max_deviation)
        assert ("per layer" in options["sparsity"]) == (allocation == "rows")


def row_counts(mask):
    return (~mask).sum(1).tolist()


@cache
def pruned(**options):
    return prune_model(tiny("llama", layers=2), tokens(10), calibrate_on="dense", **options)


@pytest.mark.parametrize("update", ["none", slow("least-squares")])
def test_rows_differ_within_limits_and_the_layer_keeps_its_count(update):
    free, near, equal = (pruned(**given, update=update) for given in (FREE, LAYER, EQUAL))
    felt = []
    for one, two, three in zip(free.layers, near.layers, equal.layers, strict=True):
        counts = [row_counts(report.masks[one.name]) for report in (free, near)]
        assert sum(counts[0]) == sum(counts[1]) == one.pruned == two.pruned == one.rows * one.n // 2
        assert max(counts[0]) > min(counts[0])
        least, most = -(-4 * one.n // 10), 6 * one.n // 10
        assert least <= min(counts[1])
        assert max(counts[1]) <= most
        felt.append((min(counts[1]), max(counts[1])) == (least, most))
        assert {*one.statuses} == {*two.statuses} == {"swap-optimal"}
        assert (one.pattern, two.pattern) == ("0.5 per layer", "0.5 per layer ± 0.1")
        assert one.error_wanda == pytest.approx(three.error_wanda, rel=1e-9)
        if update == "none":  # else it is the damped error that is lowered
            assert one.error < three.error * (1 + 1e-6)
    assert any(felt)
    one, two, three = (sum(x.relative for x in r.layers) for r in (free, near, equal))
    assert one < two < three
    assert one < 0.98 * three
    half = prune_model(tiny("llama", layers=1, dtype=torch.bfloat16), tokens(), **FREE)
    assert all(set(layer.statuses) == {"swap-optimal"} for layer in half.layers)
    # layers differ and then their rows
    given = {**BOTH, "sensitivity": "relative", "update": update}
    both, model = pruned(**given), pruned(**{**given, "allocation": "layers"})
    for layer, other in zip(both.layers, model.layers, strict=True):
        assert layer.pruned == other.pruned
        mean = layer.pruned // layer.rows
        assert other.pattern == f"keep {layer.n - mean}"
        assert layer.pattern == f"keep {layer.n - mean} per layer ± 0.1"
        counts = row_counts(both.masks[layer.name])
        assert all(abs(count - mean) <= 0.1 * layer.n for count in counts)
        assert layer.error_wanda == pytest.approx(other.error_wanda, rel=1e-9)
    assert len({layer.pattern for layer in both.layers}) > 2


@pytest.mark.slow
@pytest.mark.parametrize(("allocation", "sensitivity"), FEW)
def test_layers_of_few_tokens_are_ranked_by_magnitude_alone(allocation, sensitivity, tmp_path):
    folder, data = save(loud("mixtral", layers=2), tmp_path / "model"), tokens(8)
    more = {"allocation": allocation, "sensitivity": sensitivity, "solver": "wanda"}
    runs = {"out": {**FREE, **more, "min_tokens": 60}, "all": {**LAYER, "min_tokens": 10**6}}
    for name, given in runs.items():
        report = prune_model(folder, data, output=tmp_path / name, **given)
        few = len(report.fallbacks)
        assert few == len(report.layers) if name == "all" else 0 < few < len(report.layers)
        verified = verify_model(tmp_path / name, folder, calibration=data)
        assert set(report.fallbacks) <= set(verified.checked_layers)


def test_problems_have_the_patterns_of_their_allocation():
    def found(**given):
        model = tiny("llama", layers=2)
        return dict(collect_problems(model, tokens(), layers="layers.0.*", **given))

    def patterns(**given):
        return {problem.pattern for problem in found(**given).values()}

    given = {"sparsity": 0.5, "allocation": "rows"}
    assert patterns(sparsity=pool(0.5)) == patterns(**given, max_deviation=1) == {pool(0.5)}
    assert patterns(sparsity=pool(0.5, 0.1)) == patterns(**given) == {pool(0.5, 0.1)}
    layer = found(**LAYER)
    counts = {name: problem.n // 2 for name, problem in layer.items()}
    for name, problem in found(**BOTH, counts=counts).items():
        keep = problem.n - counts[name]
        assert problem.pattern == Unstructured(keep=keep, per="layer", max_deviation=0.1)
        assert problem.pruned == layer[name].pruned
        assert problem.row_limits == layer[name].row_limits


@pytest.mark.parametrize("family", ["llama", slow("mixtral")])
def test_rows_that_count_differently_are_proven_together(family, tmp_path):
    model = tiny(family, layers=1)
    dense, out = save(model, tmp_path / "model"), tmp_path / "out"
    report = prune_model(dense, tokens(), output=out, **FREE | {"sensitivity": "fisher"})
    equal = prune_model(model, tokens(), **FREE)
    assert [x.error for x in report.layers] != [x.error for x in equal.layers]
    verify_model(out, dense, calibration=tokens())
    forge_manifest(out, options(sensitivity="uniform"))
    said = "its rows are swap-optimal together; keeping"
    fails(VerificationError, said, verify_model, out, dense, calibration=tokens())


@pytest.mark.slow
@pytest.mark.parametrize("allocation", ["both", slow("rows")])
def test_limits_that_a_manifest_does_not_name_are_none(allocation, small, tmp_path):
    out = tmp_path / "out"
    prune_model(small, tokens(), output=out, **{**FREE, "allocation": allocation})
    kept = [mask.kept for mask in read_masks(out / MASKS).values()]
    assert any(max(row_counts(mask)) > 0.7 * mask.shape[1] for mask in kept)
    forge_manifest(out, options(max_deviation=None))
    assert verify_model(out, small, calibration=tokens()).checked_layers
    for change in (lambda _: None, lambda m: m["fingerprint"]["options"].pop("max_deviation")):
        forge_manifest(out, change)
        assert options_again("prune", manifest_of(out)["fingerprint"], out)["max_deviation"] == 1


# --- yardsticks
@pytest.mark.parametrize("method", ["OWL", "DLP"])
def test_blocks_that_count_more_keep_more_and_the_model_prunes_as_many(benchmarks, method):
    from judges import Judge
    from yardsticks import METHODS, blocks_keep, shared_out

    pattern = Unstructured(sparsity=0.7)
    generator, judges = torch.Generator().manual_seed(0), {}
    for block, outliers in enumerate((0, 3, 1)):
        # the more outliers, the smaller all else, and its median
        weight = (1 + torch.rand(5, 128, generator=generator)) / (1 + outliers)
        weight[:, :outliers] = 50
        problem = LayerProblem(weight, torch.eye(128), pattern)
        energy = problem.output_energy()
        judges[f"layers.{block}.fc"] = Judge(block, problem, energy, energy)
    keep = blocks_keep(method, judges)
    assert keep[1] > keep[2] > keep[0]
    assert max(keep.values()) - min(keep.values()) == pytest.approx(2 * METHODS[method][1])
    assert np.mean(list(keep.values())) == pytest.approx(0, abs=1e-12)
    counts = shared_out(method, judges, pattern)
    assert sum(counts.values()) == 3 * pattern.pruned_per_group(128)
    for name, judge in judges.items():
        assert counts[name] / 128 == pytest.approx(0.7 - keep[judge.block], abs=1.5 / 128)

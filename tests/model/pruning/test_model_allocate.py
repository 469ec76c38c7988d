"""`budget` model: the layers trade, their counts recorded, written, resumed, and found where forged."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run
from forging import change_masks, check_forgery, copied, forge_manifest
from outputs import contents
from resuming import interrupted
from tiny_models import FAMILIES, save, tiny, tokens

from maskopt import NM, Unstructured, collect_problems, prune_model
from maskopt.certify import certify_model
from maskopt.errors import DataError, MaskoptError, ModelError, OptionError, VerificationError
from maskopt.model import prune
from maskopt.model.allocate import allocate
from maskopt.model.blocks import Layer
from maskopt.model.importance import GRADIENT_WINDOWS
from maskopt.model.job import open_job
from maskopt.model.options import PruneOptions, prune_options
from maskopt.model.plan import plan_prune
from maskopt.model.report import read_manifest
from maskopt.model.share_out import Curve, share_out
from maskopt.model.solving import DAMPING_GRID
from maskopt.model.verify import verify_output
from maskopt.model.windows import held_out
from maskopt.model.workspace import MANIFEST

OPTIONS: dict[str, Any] = {"sparsity": 0.5, "min_tokens": 1, "budget": "model", "solver": "wanda"}
WHOLE = PruneOptions(Unstructured(sparsity=0.5), budget="model", min_tokens=1)


def refusal(options: dict[str, Any], kind: type[MaskoptError]) -> str:
    """The one error that a prune with these options ends with; a sparsity of None is none."""
    given = {name: value for name, value in options.items() if name != "sparsity" or value}
    with pytest.raises(kind) as caught:
        prune_model(tiny("llama"), tokens(), **given)
    return str(caught.value)


def squares(family: str, data: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the loss's gradients by what every layer's module gives, a mean over the targets."""
    model = tiny(family)
    outputs: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter):
            module.register_forward_hook(
                lambda _, args, output, name=name: outputs.setdefault(name, []).append(output)
            )
    found: dict[str, torch.Tensor] = {}
    targets = data.shape[0] * (data.shape[1] - 1)
    for window in data:
        outputs.clear()
        logits = model(window[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum")
        names = [name for name in outputs if outputs[name][0].requires_grad]
        gradients = torch.autograd.grad(loss, [outputs[x][0] for x in names], allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                width = gradient.shape[-1]
                found[name] = found.get(name, 0) + gradient.reshape(-1, width).square().sum(0)
    return {name: value.double() / targets for name, value in found.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma3"])
@pytest.mark.parametrize("threads", [1, 3])
def test_squares_are_those_of_the_whole_model(family: str, threads: int) -> None:
    options = prune_options(WHOLE, {"threads": threads, "one_pass": True})
    job = open_job(tiny(family), tokens(5), options)
    with job, torch.no_grad():
        for block in job.blocks():
            block.advance()
    assert job.gradients is not None
    found, expected = job.gradients.squares, squares(family, tokens(5))
    assert set(found) == {layer.name for layer in job.layers}
    for layer in job.layers:
        torch.testing.assert_close(found[layer.name], expected[layer.name], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("holdout", [0.0, 0.5])
def test_squares_are_those_of_a_few_windows_that_masks_are_fitted_to(holdout: float) -> None:
    data = tokens(GRADIENT_WINDOWS + 8)
    options = prune_options(WHOLE, {"holdout": holdout, "one_pass": True})
    job = open_job(tiny("llama"), data, options)
    with job, torch.no_grad():
        for block in job.blocks():
            block.advance()
    aside = held_out(len(data), holdout)
    assert bool(aside) == bool(holdout)
    used = [window for window in range(len(data)) if window not in aside][:GRADIENT_WINDOWS]
    expected = squares("llama", data[used])
    assert job.gradients is not None
    for layer in job.layers:
        torch.testing.assert_close(
            job.gradients.squares[layer.name], expected[layer.name], rtol=1e-3, atol=1e-9
        )


def test_squares_of_experts_count_what_their_tokens_say() -> None:
    """A layer's squares foretell to second order what noise in its outputs does to Fisher's quadratic form:
    they are those of the gradient by a weight whose input is one."""
    model, data = tiny("mixtral"), tokens(4)
    job = open_job(model, data, prune_options(WHOLE, {"one_pass": True}))
    with job, torch.no_grad():
        for block in job.blocks():
            block.advance()
    assert job.gradients is not None
    experts = [layer for layer in job.layers if layer.expert is not None]
    assert experts
    for layer in experts:
        found = job.gradients.squares.get(layer.name)
        assert found is None or (found.shape == (layer.rows,) and bool((found >= 0).all()))
    assert sum(float(job.gradients.squares[x.name].sum()) > 0 for x in experts) > len(experts) // 2


@pytest.mark.parametrize("importance", ["alike", "relative", "loss"])
def test_layers_trade_and_the_model_keeps_its_count(importance: str) -> None:
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


def curves(costs: list[float]) -> tuple[list[Any], list[Curve]]:
    layers = open_job(tiny("llama"), None, WHOLE).layers[: len(costs)]
    grid = {x.n: tuple(range(x.n // 4, 3 * x.n // 4 + 1)) for x in layers}
    made = [
        Curve((x,), grid[x.n], tuple(cost * (k / x.n) ** 2 for k in grid[x.n]))
        for x, cost in zip(layers, costs, strict=True)
    ]
    return list(layers), made


def test_it_is_the_cheapest_of_all_counts() -> None:
    layers, made = curves([1.0, 3.0, 0.2])
    options = dataclasses.replace(WHOLE, spread=0.1)
    counts = share_out(layers, made, options)
    ranges = [range(x.n // 2 - x.n // 10, x.n // 2 + x.n // 10 + 1) for x in layers]
    total = sum(x.rows * (x.n // 2) for x in layers)
    every = [
        (sum(float(c.at([k])[0]) for c, k in zip(made, ks, strict=True)), ks)
        for ks in itertools.product(*ranges)
        if sum(x.rows * k for x, k in zip(layers, ks, strict=True)) == total
    ]
    cost = sum(float(c.at([counts[c.layers[0].name]])[0]) for c in made)
    assert cost == pytest.approx(min(every)[0])


def test_a_layer_that_counts_more_prunes_less() -> None:
    layers, made = curves([1.0, 1.0, 1.0, 1.0])
    _, more = curves([30.0, 1.0, 1.0, 1.0])
    name = layers[0].name
    assert share_out(layers, more, WHOLE)[name] < share_out(layers, made, WHOLE)[name]
    scaled = [Curve(c.layers, c.pruned, tuple(7.0 * x for x in c.costs)) for c in made]
    assert share_out(layers, scaled, WHOLE) == share_out(layers, made, WHOLE)


def test_layers_without_a_curve_have_the_models_sparsity() -> None:
    layers, made = curves([1.0, 5.0, 1.0])
    counts = share_out(layers, made[:2], WHOLE)
    assert counts[layers[2].name] == layers[2].n // 2
    assert share_out(layers, [], WHOLE) == {x.name: x.n // 2 for x in layers}


@pytest.mark.parametrize("costs", [(0.0, 0.0, 0.0), (0.0, 1.0, 2.0)])
def test_curves_that_reach_nothing_have_a_logarithm(costs: tuple[float, ...]) -> None:
    layers, _ = curves([1.0])
    found = Curve((layers[0],), (4, 8, 12), costs).at([4, 6, 12])
    assert bool(np.isfinite(found).all())
    assert bool((np.diff(found) >= 0).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_written_and_verified(family: str, tmp_path: Path) -> None:
    folder = save(tiny(family), tmp_path / "model")
    prune_model(folder, tokens(), output=tmp_path / "out", **{**OPTIONS, "min_tokens": 8})
    assert verify_output(tmp_path / "out", folder, calibration=tokens()).checked_layers


@pytest.mark.parametrize("more", [{}, {"weights": "refit"}, {"target": "dense"}])
def test_resumed_runs_write_the_same_bytes(
    more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = save(tiny("llama"), tmp_path / "model", shard="20KB")
    options = {**OPTIONS, "solver": "swap", **more}
    prune_model(dense, tokens(), output=tmp_path / "whole", **options)
    interrupted(dense, tmp_path / "out", 2, "solve", **{"warm_start": None, **options})
    monkeypatch.setattr(prune, "allocate", lambda *_, **__: pytest.fail("chosen a second time"))
    for _ in range(2):  # unfinished, and finished
        prune_model(dense, tokens(), output=tmp_path / "out", resume=True, **options)
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(verify_output(tmp_path / "out", dense, calibration=tokens()).checked_layers) == 21


def test_what_can_be_refused_is_refused_before_layers_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, out = save(tiny("llama"), tmp_path / "model"), tmp_path / "out"
    prune_model(dense, tokens(), output=out, **{**OPTIONS, "budget": "row"})
    monkeypatch.setattr(prune, "allocate", lambda *_: pytest.fail("began"))
    with pytest.raises(ModelError, match="exists and is not empty"):
        prune_model(dense, tokens(), output=out, **OPTIONS)
    with pytest.raises(ModelError, match=r"the result of another run: options\.budget was"):
        prune_model(dense, tokens(), output=out, resume=True, **OPTIONS)
    monkeypatch.undo()
    prune_model(dense, tokens(), output=out, overwrite=True, **OPTIONS)
    monkeypatch.setattr(prune, "allocate", lambda *_: pytest.fail("began"))
    with pytest.raises(ModelError, match=r"the result of another run: options\.pattern"):
        prune_model(dense, tokens(), output=out, resume=True, **{**OPTIONS, "sparsity": 0.7})


def with_counts(folder: Path) -> tuple[Path, dict[str, int], Layer]:
    """A model, counts of which two are not half of the inputs, and the layer that prunes more."""
    dense = save(tiny("llama"), folder / "model")
    layers = open_job(dense, None, WHOLE).layers
    counts = {x.name: x.n // 2 for x in layers}
    one, two = (x for x in layers if x.kind == "mlp.up_proj" and x.block < 2)
    counts[one.name] += 5
    counts[two.name] -= 5
    return dense, counts, one


def test_counts_of_the_users_own(tmp_path: Path) -> None:
    dense, counts, one = with_counts(tmp_path)
    given = {name: np.int64(count) for name, count in counts.items()}
    report = prune_model(dense, tokens(), counts=given, output=tmp_path / "out", **OPTIONS)
    assert {x.name: x.pruned // x.rows for x in report.layers} == counts
    problems = dict(collect_problems(dense, tokens(), counts=counts, **OPTIONS))
    assert problems[one.name].pruned_per_group == counts[one.name]
    gaps = certify_model(dense, tmp_path / "out", calibration=tokens(), rows_per_layer=1)
    assert {r.instance: r.pattern for r in gaps}[one.name] == f"keep {one.n - counts[one.name]}"
    assert all(0 <= record.gap <= 1 for record in gaps)


def test_counts_further_from_the_model_than_the_spread_are_refused(tmp_path: Path) -> None:
    dense, counts, _ = with_counts(tmp_path)
    with pytest.raises(OptionError, match=r"further from 0.5 than `spread` 0.05"):
        prune_model(dense, tokens(), counts=counts, spread=0.05, output=tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_the_plan_counts_what_the_layers_prune_and_the_pass_before(dense: Path) -> None:
    plan, alike = plan_prune(dense, **OPTIONS), plan_prune(dense, **{**OPTIONS, "budget": "row"})
    assert plan.pruned == alike.pruned
    assert plan.memory.gradients > alike.memory.gradients == 0


def test_the_command_takes_a_budget_and_a_file_of_counts(dense: Path, tmp_path: Path) -> None:
    text, out, again = tmp_path / "text.txt", tmp_path / "out", tmp_path / "again"
    text.write_text("Pack my box with five dozen liquor jugs. " * 40)
    common = (
        "prune", dense, "--sparsity", 0.5, "--budget", "model", "--calibration", text,
        "--samples", 4, "--seq-len", 32, "--min-tokens", 8,
    )  # fmt: skip
    assert re.search(r"mlp\.up_proj .* [0-9]+(–[0-9]+)?% ", run(*common, "--output", out))
    options = read_manifest(out / MANIFEST)["fingerprint"]["options"]
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps(options["counts"]))
    run(*common, "--counts", counts, "--output", again)
    assert contents(out) == contents(again)
    run("verify", again, "--against", dense)
    for words in ("[1]", "{", "{}"):
        counts.write_text(words)
        assert "must be JSON" in run(
            *common, "--counts", counts, "--output", out, fails=OptionError
        )
    assert "cannot be read" in run(
        *common, "--counts", tmp_path / "no", "--output", out, fails=OptionError
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("allocate")
    dense = save(tiny("llama"), home / "model")
    prune_model(dense, tokens(), output=home / "out", **OPTIONS)
    return dense, home / "out"


NAME = "model.layers.1.mlp.up_proj"


def test_a_row_of_another_count_is_found(result: tuple[Path, Path], tmp_path: Path) -> None:
    out = copied(result[1], tmp_path)

    def more(masks: dict[str, Any]) -> None:
        kept = masks[f"{NAME}.weight"].kept
        kept[0, int((~kept[0]).nonzero()[0])] = True

    change_masks(out, more)
    forge_manifest(out)
    with pytest.raises(VerificationError, match=r"row 0: .* as in no layer there"):
        verify_output(out)


def other(manifest: dict[str, Any], by: int = 1) -> None:
    manifest["fingerprint"]["options"]["counts"][NAME] += by


def traded(manifest: dict[str, Any]) -> None:
    """Counts and layers that agree with each other, and not with the masks."""
    there = manifest["fingerprint"]["options"]["counts"]
    for name, by in ((NAME, 1), (NAME.replace(".1.", ".0."), -1)):
        there[name] += by
        (layer,) = (x for x in manifest["layers"] if x["name"] == name)
        layer["pruned"] += by * layer["rows"]
        layer["sparsity"] = layer["pruned"] / (layer["rows"] * layer["n"])
        layer["pattern"] = f"keep {layer['n'] - there[name]}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other, "prunes another number of weights in all than its pattern"),
        (lambda m: other(m, 10**6), "counts that leave nothing of a row"),
        (lambda m: other(m, -(10**6)), "damaged or was changed"),
        (traded, "pruned, as in no layer there"),
        (
            lambda m: m["fingerprint"]["options"]["counts"].pop(NAME),
            "has counts of other layers than it names",
        ),
        (lambda m: m["fingerprint"]["options"].update(counts={}), "otherwise than its budget says"),
        (
            lambda m: m["fingerprint"]["options"].update(budget="row"),
            "otherwise than its budget says",
        ),
    ],
)
def test_manifests_that_say_otherwise_are_found(
    result: tuple[Path, Path], tmp_path: Path, change: Any, message: str
) -> None:
    check_forgery(result[1], tmp_path, change, message, result[0])


@pytest.mark.parametrize("more", [{"damping": 0.1}, {"damping": "auto", "holdout": 0.3}])
@pytest.mark.parametrize("budget", ["model", "both"])
def test_refitted_layers_trade_under_any_damping(budget: str, more: dict[str, Any]) -> None:
    given = {**OPTIONS, "budget": budget, "solver": "swap", "weights": "refit", **more}
    report = prune_model(tiny("llama"), tokens(), **given)
    said = {layer.damping for layer in report.layers}
    assert said == {0.1} if more["damping"] == 0.1 else said <= {*DAMPING_GRID}


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"sparsity": None, "pattern": NM(2, 4)},
            OptionError,
            "`budget` model is of a sparsity; 2:4 has a count in every group",
        ),
        (
            {"sparsity": None, "pattern": Unstructured(sparsity=0.5, per="layer")},
            OptionError,
            r"of a plain sparsity, such as 0\.5, not of 0\.5 per layer",
        ),
        (
            {"sparsity": None, "pattern": Unstructured(keep=3)},
            OptionError,
            r"of a plain sparsity, such as 0\.5, not of keep 3",
        ),
        (
            {"importance": "size"},
            OptionError,
            "`importance` must be text alike or relative or loss",
        ),
        ({"spread": 1.5}, OptionError, "`spread` must be"),
        ({"skip_bad_samples": True}, OptionError, "`importance` loss needs every window's loss"),
        ({"budget": "row", "counts": {"a": 1}}, OptionError, "`counts` are those of layers that"),
        ({"counts": {"a": 1}}, OptionError, "no layer that is pruned is called 'a'"),
        ({"counts": {NAME: 1}}, OptionError, "must be a whole number of at least 0 and less than"),
    ],
)
def test_bad_input_gets_one_line(
    options: dict[str, Any], kind: type[MaskoptError], message: str
) -> None:
    assert re.search(message, refusal({**OPTIONS, **options}, kind))


def test_windows_of_a_single_token_have_no_loss() -> None:
    with pytest.raises(DataError, match="`importance` loss leaves nothing of windows of a single"):
        prune_model(tiny("llama"), tokens(4, 1), **OPTIONS)


def test_counts_that_prune_another_number_get_one_line() -> None:
    counts = {x.name: x.n // 2 for x in open_job(tiny("llama"), None, WHOLE).layers}
    counts[NAME] += 1
    with pytest.raises(OptionError, match=r"at sparsity 0\.5 it must be"):
        prune_model(tiny("llama"), tokens(), counts=counts, **OPTIONS)
    with pytest.raises(ModelError, match="shared out by a prune; give its `counts`"):
        collect_problems(tiny("llama"), tokens(), **OPTIONS)


def test_between_nothing_and_what_was_measured_costs_grow_by_the_cube() -> None:
    """On a logarithmic scale all but the last of it would be free."""
    layer = Layer("l", 0, "l", "", "l.weight", None, 1, 10, 100)
    pruned = (0, 20, 40)
    curve = Curve((layer,), pruned, tuple(float(k**3) for k in pruned))
    inside = list(range(21))
    np.testing.assert_allclose(curve.at(inside), [k**3 for k in inside], rtol=1e-12)
    np.testing.assert_allclose(curve.at([40]), 40**3, rtol=1e-12)
    assert bool((np.diff(curve.at(list(range(41)))) > 0).all())


def test_layers_that_may_prune_nothing_share_out_what_is_best() -> None:
    layers = [Layer(f"l{i}", 0, "l", "", f"l{i}.weight", None, 1, 1, 128) for i in range(3)]
    scale = (1.0, 2.0, 8.0)
    options = PruneOptions(Unstructured(sparsity=0.125), budget="model", spread=0.125)
    pruned = (0, 16, 32)
    curves = [
        Curve((layer,), pruned, tuple(s * k**3 for k in pruned))
        for layer, s in zip(layers, scale, strict=True)
    ]
    found = share_out(layers, curves, options)

    def cost(counts: tuple[int, ...]) -> float:
        return sum(s * k**3 for s, k in zip(scale, counts, strict=True))

    every = [c for c in itertools.product(range(33), repeat=3) if sum(c) == 48]
    mine = tuple(found[layer.name] for layer in layers)
    assert sum(mine) == 48
    assert cost(mine) <= 1.05 * min(map(cost, every))

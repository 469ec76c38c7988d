"""Budgets of layers whose rows differ, alone (`layer`) and with the layers (`both`), and what checks all."""

from functools import cache

import pytest
import torch
from forging import change_masks, check_forgery, copied, forge_manifest
from pooled_layers import pool
from tiny_models import loud, save, tiny, tokens

from maskopt import Unstructured, collect_problems, prune_model
from maskopt.certify import certify_model
from maskopt.errors import ModelError, VerificationError
from maskopt.model.again import options_again
from maskopt.model.report import read_manifest
from maskopt.model.verify import verify_output
from maskopt.model.workspace import MANIFEST

EQUAL = {"sparsity": 0.5, "min_tokens": 1}
FREE = {**EQUAL, "budget": "layer", "importance": "alike", "spread": 1}
LAYER = {**FREE, "spread": 0.1}
BOTH = {**LAYER, "budget": "both"}


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


def row_counts(mask):
    return (~mask).sum(1).tolist()


@cache
def pruned(**options):
    return prune_model(tiny("llama", layers=2), tokens(10), one_pass=True, **options)


@pytest.mark.parametrize("weights", ["keep", slow("refit")])
def test_rows_differ_within_limits_and_the_layer_keeps_its_count(weights):
    free, near, equal = (pruned(**given, weights=weights) for given in (FREE, LAYER, EQUAL))
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
        assert one.error_alike == pytest.approx(three.error_start, rel=1e-9)
        assert one.error_start != one.error_alike
        assert three.error_alike is None
        if weights == "keep":  # else it is the damped error that is lowered
            assert one.error < three.error * (1 + 1e-6)
    assert any(felt)
    one, two, three = (sum(x.relative for x in r.layers) for r in (free, near, equal))
    assert one < two < three
    assert one < 0.98 * three


@pytest.mark.parametrize("weights", ["keep", slow("refit")])
def test_layers_differ_and_then_their_rows(weights):
    given = {**BOTH, "importance": "relative", "weights": weights}
    both, model = pruned(**given), pruned(**{**given, "budget": "model"})
    for layer, other in zip(both.layers, model.layers, strict=True):
        assert layer.pruned == other.pruned
        mean = layer.pruned // layer.rows
        assert other.pattern == f"keep {layer.n - mean}"
        assert layer.pattern == f"keep {layer.n - mean} per layer ± 0.1"
        counts = row_counts(both.masks[layer.name])
        assert all(abs(count - mean) <= 0.1 * layer.n for count in counts)
        assert layer.error_alike == pytest.approx(other.error_start, rel=1e-9)
    assert len({layer.pattern for layer in both.layers}) > 2


def test_half_precision_prunes_rows_differently_too():
    report = prune_model(tiny("llama", layers=1, dtype=torch.bfloat16), tokens(), **FREE)
    assert all(set(layer.statuses) == {"swap-optimal"} for layer in report.layers)


@pytest.mark.parametrize(("budget", "importance"), [("layer", "loss"), ("both", "relative")])
def test_layers_of_few_tokens_are_ranked_by_magnitude_alone(budget, importance, tmp_path):
    """What a row counts is not in the folder: `verify` could not know whether the least were pruned."""
    folder = save(loud("mixtral"), tmp_path / "model")
    more = {"budget": budget, "importance": importance, "solver": "wanda", "min_tokens": 60}
    report = prune_model(folder, tokens(8), output=tmp_path / "out", **{**FREE, **more})
    assert 0 < len(report.fallbacks) < len(report.layers)
    verified = verify_output(tmp_path / "out", folder, calibration=tokens(8))
    assert set(report.fallbacks) <= set(verified.checked_layers)


def test_layers_that_saw_too_few_tokens_differ_by_magnitude_within_limits(dense_folder, tmp_path):
    given = {**LAYER, "min_tokens": 10**6}
    report = prune_model(dense_folder, tokens(), output=tmp_path / "out", **given)
    assert all(layer.fallback for layer in report.layers)
    verify_output(tmp_path / "out", dense_folder)


def test_problems_have_the_patterns_of_their_budgets():
    def found(**given):
        return dict(collect_problems(tiny("llama"), tokens(), layers="layers.0.*", **given))

    def patterns(**given):
        return {problem.pattern for problem in found(**given).values()}

    given = {"sparsity": 0.5, "budget": "layer"}
    assert patterns(pattern=pool(0.5)) == patterns(**given, spread=1) == {pool(0.5)}
    assert patterns(pattern=pool(0.5, 0.1)) == patterns(**given) == {pool(0.5, 0.1)}
    layer = found(**LAYER)
    counts = {name: problem.n // 2 for name, problem in layer.items()}
    for name, problem in found(**BOTH, counts=counts).items():
        keep = problem.n - counts[name]
        assert problem.pattern == Unstructured(keep=keep, per="layer", spread=0.1)
        assert problem.pruned == layer[name].pruned
        assert problem.row_limits == layer[name].row_limits


@pytest.mark.parametrize("options", [{}, {"budget": "layer", "spread": 1 / 7}, {"budget": "model"}])
def test_patterns_of_many_digits_are_those_of_the_manifest(options, dense_folder, tmp_path):
    """Two thirds are not 0.6667, to whoever prunes and to whoever checks."""
    how = {"sparsity": 2 / 3, "solver": "wanda", "min_tokens": 1, **options}
    prune_model(dense_folder, tokens(6), output=tmp_path / "out", **how)
    assert verify_output(tmp_path / "out", dense_folder).layers == 21


# What checks them ---------------------------------------------------------------------------------

UP = "model.layers.1.mlp.up_proj"
TOGETHER = r"its rows are swap-optimal together; keeping"


@pytest.fixture(scope="module")
def folders(dense_folder, tmp_path_factory):
    """What each budget writes; nobody may change it."""
    home = tmp_path_factory.mktemp("budgets")

    @cache
    def folder(name):
        given = {"row": EQUAL, "layer": FREE, "both": BOTH, "model": {**EQUAL, "budget": "model"}}
        prune_model(dense_folder, tokens(), output=home / name, solver="swap", **given[name])
        return home / name

    return folder


def option(**values):
    return lambda manifest: manifest["fingerprint"]["options"].update(values)


def layer(**values):
    return lambda manifest: manifest["layers"][9].update(values)


def count(by):
    def change(manifest):
        manifest["fingerprint"]["options"]["counts"][UP] += by

    return change


def moved(manifest):
    """Counts and layers that agree with each other, and not with the masks."""
    there = manifest["fingerprint"]["options"]["counts"]
    for name, by in ((UP, 1), (UP.replace(".1.", ".0."), -1)):
        there[name] += by
        (layer,) = (x for x in manifest["layers"] if x["name"] == name)
        layer["pruned"] += by * layer["rows"]
        layer["sparsity"] = layer["pruned"] / (layer["rows"] * layer["n"])
        layer["pattern"] = f"keep {layer['n'] - there[name]}"


PATTERN, BUDGET = "has another pattern than the options", "otherwise than its budget says"
FORGED = [
    ("model", count(1), "prunes another number of weights in all than its pattern"),
    ("model", count(10**6), "counts that leave nothing of a row"),
    ("model", count(-(10**6)), "damaged or was changed"),
    ("model", moved, "pruned, as in no layer there"),
    ("model", lambda m: m["fingerprint"]["options"]["counts"].pop(UP), "counts of other layers"),
    ("model", option(counts={}), BUDGET),
    ("model", option(budget="row"), BUDGET),
    ("layer", layer(pruned=1023), "counts other pruned weights than its pattern"),
    ("layer", layer(pattern="0.5"), PATTERN),
    ("layer", option(budget="row"), "has a budget that is not its pattern's"),
    ("both", option(spread=0.2), PATTERN),
    ("both", option(spread=2), "damaged or was changed"),
    ("both", option(budget="model"), PATTERN),
    ("both", option(counts={}), BUDGET),
]


@pytest.mark.parametrize(("budget", "change", "message"), FORGED)
def test_manifests_that_say_otherwise_are_found(
    budget, change, message, folders, dense_folder, tmp_path
):
    check_forgery(folders(budget), tmp_path, change, message, dense_folder)


@pytest.mark.parametrize(
    ("budget", "more", "message"),
    [
        ("model", 1, r"row 0: .* as in no layer there"),
        ("layer", None, "is said to have 768 weights pruned; its mask has"),
        ("both", None, r"row 0: 0 of .* beyond the spread of its layer"),
    ],
)
def test_a_row_of_another_count_is_found(budget, more, message, folders, tmp_path):
    out = copied(folders(budget), tmp_path)

    def keep(masks):
        row = masks[f"{UP}.weight"].kept[0]
        row[(~row).nonzero()[:more]] = True

    change_masks(out, keep)
    forge_manifest(out)
    with pytest.raises(VerificationError, match=message):
        verify_output(out)


@pytest.mark.parametrize("budget", ["layer", "both"])
def test_gaps_of_rows_that_differ_are_not_claimed(budget, folders, dense_folder):
    with pytest.raises(ModelError, match="its rows trade, and bounds are of rows that prune alike"):
        certify_model(dense_folder, folders(budget), calibration=tokens(), rows_per_layer=1)


def test_rows_said_to_be_optimal_together_are_compared(folders, dense_folder, tmp_path):
    """They prune equally, each of them optimal."""

    def together(manifest):
        option(budget="layer", importance="alike")(manifest)
        manifest["fingerprint"]["options"]["pattern"]["per"] = "layer"
        for tensor in manifest["tensors"].values():
            tensor["pattern"]["per"] = "layer"
        for layer in manifest["layers"]:
            layer["pattern"] = "0.5 per layer"

    out = copied(folders("row"), tmp_path)
    forge_manifest(out, together)
    verify_output(out, dense_folder)
    with pytest.raises(VerificationError, match=TOGETHER + " input"):
        verify_output(out, dense_folder, calibration=tokens())


@pytest.mark.parametrize("family", ["llama", slow("mixtral")])
def test_rows_that_count_differently_are_proven_together(family, tmp_path):
    dense = save(tiny(family, layers=2), tmp_path / "model")
    given = {**FREE, "importance": "loss"}
    report = prune_model(dense, tokens(), output=tmp_path / "out", **given)
    equal = prune_model(tiny(family, layers=2), tokens(), **FREE)
    assert [x.error for x in report.layers] != [x.error for x in equal.layers]
    verify_output(tmp_path / "out", dense, calibration=tokens())
    forge_manifest(tmp_path / "out", option(importance="alike"))
    with pytest.raises(VerificationError, match=TOGETHER):
        verify_output(tmp_path / "out", dense, calibration=tokens())


@pytest.mark.parametrize("budget", ["both", slow("layer")])
def test_limits_that_a_manifest_does_not_name_are_none(budget, dense_folder, tmp_path):
    out, free = tmp_path / "out", {**FREE, "budget": budget}
    prune_model(dense_folder, tokens(), output=out, **free)
    masks = prune_model(tiny("llama"), tokens(), **free).masks
    assert any(max(row_counts(mask)) > 0.7 * mask.shape[1] for mask in masks.values())
    forge_manifest(out, option(spread=None))
    assert verify_output(out, dense_folder, calibration=tokens()).checked_layers
    assert options_again(read_manifest(out / MANIFEST)["fingerprint"], out)["spread"] == 1
    forge_manifest(out, lambda m: m["fingerprint"]["options"].pop("spread"))
    assert options_again(read_manifest(out / MANIFEST)["fingerprint"], out)["spread"] == 1

"""Held-out windows: what is fitted never sees them, and errors are given on both."""

import pytest
import torch
from tiny_models import tiny, tokens

import maskopt
from maskopt.errors import DataError, ModelError, OptionError
from maskopt.model.plan import plan_prune
from maskopt.model.solving import SHRINK_GRID, SHRINK_TOLERANCE
from maskopt.model.windows import held_out

FIRST = ("layers.0.*",)  # of the first block, whose inputs no pruning has changed


def prune(data, **options):
    return maskopt.prune_model(tiny("llama"), data, sparsity=0.5, min_tokens=1, **options)


def problems(data, **options):
    return dict(
        maskopt.collect_problems(tiny("llama"), data, sparsity=0.5, layers=FIRST, **options)
    )


def test_masks_are_those_of_the_windows_that_are_left():
    data = tokens(10)
    whole, part = prune(data, holdout=0.3), prune(data[:7])
    for name, mask in part.masks.items():
        assert torch.equal(mask, whole.masks[name])
    for one, other in zip(whole.layers, part.layers, strict=True):
        assert one.tokens == other.tokens
        assert one.error == other.error
        assert one.relative == pytest.approx(one.error / one.energy)
        assert one.relative_held is not None
        assert one.relative_held > 0
        assert other.relative_held is None


def test_held_out_errors_are_errors_on_those_windows():
    data = tokens(10)
    report = prune(data, holdout=0.4, include=FIRST)
    found = problems(data[6:])
    for layer in report.layers:
        judged = found[layer.name].objective(report.masks[layer.name]).sum()
        assert layer.error_held == pytest.approx(float(judged), rel=1e-5)
        energy = found[layer.name].output_energy().sum()
        assert layer.energy_held == pytest.approx(float(energy), rel=1e-5)


def test_auto_shrinkage_is_the_greatest_that_is_nearly_the_best_on_the_held_out_windows():
    """Wanda's mask does not change with α, which keeps its diagonal, but the error does: that of the
    start is on the same matrix as that of the end."""
    first = {"include": FIRST, "holdout": 0.5, "solver": "swap", "warm_start": "wanda"}
    auto = prune(tokens(2), shrink="auto", **first)
    fixed = [prune(tokens(2), shrink=alpha, **first) for alpha in SHRINK_GRID]
    for index, layer in enumerate(auto.layers):
        layers = [one.layers[index] for one in fixed]
        best = min(one.error_held for one in layers) * (1 + SHRINK_TOLERANCE)
        near = [i for i, one in enumerate(layers) if one.error_held <= best][-1]
        assert layer.shrink == SHRINK_GRID[near]
        assert layer.error_held == pytest.approx(layers[near].error_held, rel=1e-9)
        assert layer.error_start == layers[near].error_start
    assert {layer.shrink for layer in auto.layers} != {0.0}


def test_output_energy_is_the_mean_square_of_the_dense_output():
    x = torch.randn(50, 6, dtype=torch.float64)
    weight = torch.randn(3, 6, dtype=torch.float64)
    problem = maskopt.LayerProblem(weight, x.T @ x / 50, maskopt.Unstructured(keep=3))
    torch.testing.assert_close(problem.output_energy(), (x @ weight.T).square().mean(0))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"holdout": 1.0}, OptionError, "`holdout` must be a number"),
        ({"holdout": -0.1}, OptionError, "`holdout` must be a number"),
        ({"holdout": 0.1}, DataError, "keeps 0 aside"),
        ({"shrink": "auto"}, ModelError, "needs held-out windows"),
        ({"shrink": "some"}, ModelError, "or be auto"),
        ({"shrink": 1.5}, ModelError, "must lie in"),
    ],
)
def test_bad_input_gets_one_line(options, error, message):
    with pytest.raises(error, match=message):
        prune(tokens(4), **options)


def test_the_share_is_taken_as_written():
    """0.29 · 100 is 28.999… in binary floating point."""
    assert [len(held_out(100, share / 100)) for share in range(100)] == list(range(100))
    assert held_out(10, 0.0) == frozenset()


@pytest.mark.parametrize("shrink", [0.0, 0.5, 1.0])
def test_an_error_and_its_energy_are_of_the_same_gram_matrix(shrink):
    report = prune(tokens(4), shrink=shrink, include=FIRST, solver="wanda")
    found = problems(tokens(4), shrink=shrink)
    for layer in report.layers:
        energy = found[layer.name].output_energy().sum()
        assert layer.energy == pytest.approx(float(energy), rel=1e-5)


@pytest.mark.parametrize("part", ["grams", "solving"])
def test_memory_of_held_out_windows(part):
    """Their Gram matrices are a second set; and a layer is judged by its own of them."""
    data, options = tokens(4), {"sparsity": 0.5, "solver": "wanda", "threads": 1}
    without = getattr(plan_prune(tiny("llama"), data, **options).memory, part)
    held = getattr(plan_prune(tiny("llama"), data, holdout=0.5, **options).memory, part)
    # inputs of q k v, of o, of gate and up, of down; the widest is that of down
    assert held - without == {"grams": 8 * (3 * 32**2 + 48**2), "solving": 4 * 48**2}[part]

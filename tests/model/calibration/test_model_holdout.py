"""Windows kept aside: what is fitted never sees them, and errors are told on both."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny, tokens

import maskopt
from maskopt.errors import DataError, ModelError, OptionError
from maskopt.model.plan import plan_prune
from maskopt.model.solving import SHRINK_GRID, SHRINK_TOLERANCE
from maskopt.model.windows import held_out


def prune(data, **options):
    return maskopt.prune_model(tiny("llama"), data, sparsity=0.5, min_tokens=1, **options)


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
    """Of the first block, whose inputs no pruning has changed."""
    data = tokens(10)
    report = prune(data, holdout=0.4, include=("layers.0.*",))
    found = maskopt.collect_problems(tiny("llama"), data[6:], sparsity=0.5, layers=("layers.0.*",))
    problems = dict(found)
    for layer in report.layers:
        judged = problems[layer.name].objective(report.masks[layer.name]).sum()
        assert layer.error_held == pytest.approx(float(judged), rel=1e-5)
        energy = problems[layer.name].output_energy().sum()
        assert layer.energy_held == pytest.approx(float(energy), rel=1e-5)


def test_auto_shrinkage_is_the_greatest_that_is_nearly_the_best_on_the_held_out_windows():
    data = tokens(8)
    first = {"include": ("layers.0.*",), "holdout": 0.5, "solver": "wanda"}
    auto = prune(data, shrink="auto", **first)
    fixed = [prune(data, shrink=alpha, **first) for alpha in SHRINK_GRID]
    for index, layer in enumerate(auto.layers):
        errors = [one.layers[index].error_held for one in fixed]
        near = [
            alpha
            for alpha, error in zip(SHRINK_GRID, errors, strict=True)
            if error <= min(errors) * (1 + SHRINK_TOLERANCE)
        ]
        assert layer.shrink == near[-1]
        assert layer.error_held == pytest.approx(errors[SHRINK_GRID.index(near[-1])], rel=1e-9)


def test_the_error_of_the_start_is_on_the_same_matrix_as_that_of_the_end():
    """Wanda's mask does not change with α: its diagonal is kept."""
    more = {"include": ("layers.0.*",), "holdout": 0.5, "warm_start": "wanda"}
    auto = prune(tokens(2), shrink="auto", **more)
    fixed = {alpha: prune(tokens(2), shrink=alpha, **more).layers for alpha in SHRINK_GRID}
    for index, layer in enumerate(auto.layers):
        assert layer.error_start == fixed[layer.shrink][index].error_start
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
    assert held_out(10, 0.0) == frozenset()


def test_the_share_is_taken_as_written():
    """0.29 · 100 is 28.999… in binary floating point."""
    assert [len(held_out(100, share / 100)) for share in range(1, 100)] == list(range(1, 100))


def test_an_error_and_its_energy_are_of_the_same_gram_matrix():
    """Of the first block, whose inputs no pruning has changed."""
    for shrink in (0.0, 0.5, 1.0):
        report = prune(tokens(4), shrink=shrink, include=("layers.0.*",))
        found = dict(
            maskopt.collect_problems(
                tiny("llama"), tokens(4), sparsity=0.5, shrink=shrink, layers=("layers.0.*",)
            )
        )
        for layer in report.layers:
            energy = found[layer.name].output_energy().sum()
            assert layer.energy == pytest.approx(float(energy), rel=1e-5)


@pytest.mark.parametrize("part", ["grams", "solving"])
def test_memory_of_windows_kept_aside(part):
    """Their Gram matrices are a second set; and a layer is judged by its own of them."""
    data, options = tokens(4), {"sparsity": 0.5, "solver": "wanda", "threads": 1}
    without = getattr(plan_prune(tiny("llama"), data, **options).memory, part)
    held = getattr(plan_prune(tiny("llama"), data, holdout=0.5, **options).memory, part)
    # inputs of q k v, of o, of gate and up, of down; the widest is that of down
    assert held - without == {"grams": 8 * (3 * 32**2 + 48**2), "solving": 4 * 48**2}[part]

"""What errors are measured on: tokens that count more or less, held-out windows, the dense target."""

import pytest
import torch
from tiny_models import inputs_of, save, tiny, tokens
from transformers import AutoModelForCausalLM

from maskopt import LayerProblem, Unstructured, collect_problems, prune_model
from maskopt.core.gram import CHUNK, Gram, Moved
from maskopt.errors import DataError, ModelError, OptionError
from maskopt.models.architecture.blocks import matrix
from maskopt.models.blockwise.job import Block, open_job
from maskopt.models.blockwise.windows import held_out
from maskopt.models.calibration.token_weights import (
    GRADIENT,
    RELATIVE,
    SKIP_FIRST,
    TOKEN_WEIGHTS,
    UNIFORM,
    weights_of_tokens,
)
from maskopt.models.options.prune import prune_options
from maskopt.models.pruning.plan import _forward_operations, plan_prune
from maskopt.models.pruning.problems import layer_problem
from maskopt.models.pruning.solving import SHRINK_GRID, SHRINK_TOLERANCE
from maskopt.models.verification.verify import verify_model

HALF = {"sparsity": 0.5, "min_tokens": 1}
FIRST = ("layers.0.*",)  # of the first block, whose inputs no pruning has changed
NAME = "model.layers.1.mlp.up_proj"


def gradients(model, data):
    """Norms of the loss's, by the hidden states that leave the layer's block; [windows, length]."""
    left, norms = [], []
    model.get_submodule("model.layers.1").register_forward_hook(
        lambda module, args, output: left.append(output[0] if isinstance(output, tuple) else output)
    )
    for window in data:
        loss = model(window[None], labels=window[None]).loss
        (gradient,) = torch.autograd.grad(loss, left.pop())
        norms.append(gradient[0].norm(dim=1))
    return torch.stack(norms).double()


@pytest.mark.parametrize("token_weights", TOKEN_WEIGHTS)
def test_a_gram_matrix_is_the_weighted_mean(token_weights):
    data, names = tokens(5), (NAME, "model.layers.1.input_layernorm")
    x, state = (inputs_of(tiny("llama"), name, data).view(*data.shape, -1) for name in names)
    weights = torch.ones(x.shape[:2], dtype=torch.float64)
    if token_weights == SKIP_FIRST:
        weights[:, 0] = 0
    elif token_weights == GRADIENT:
        weights = gradients(tiny("llama"), data)
    elif token_weights != UNIFORM:
        weights = 1 / state.square().mean(2)
    weights = weights / weights.mean(1, keepdim=True)
    expected = torch.einsum("wt,wti,wtj->ij", weights, x, x) / weights.numel()
    how = {"sparsity": 0.5, "layers": (NAME,), "token_weights": token_weights}
    found = collect_problems(tiny("llama"), data, **how)
    (_, problem), *_ = list(found)
    torch.testing.assert_close(problem.gram.double(), expected, rtol=1e-4, atol=1e-6)
    assert problem.mean is not None
    mean = torch.einsum("wt,wti->i", weights, x) / weights.numel()
    torch.testing.assert_close(problem.mean.double(), mean, rtol=1e-4, atol=1e-6)


def test_weights_over_several_chunks_and_with_other_inputs():
    x, other = torch.randn(2, CHUNK + 7, 6, dtype=torch.float64)
    weights = torch.rand(CHUNK + 7, dtype=torch.float64)
    gram, moved = Gram(6), Moved(6)
    for task in (*gram.tasks(x, weights), *moved.tasks(x, other, weights)):
        task()
    part = x * weights[:, None]
    torch.testing.assert_close(gram.value(dtype=torch.float64), part.T @ x / len(x))
    w = torch.randn(3, 6, dtype=torch.float64)
    linear = moved.linear(w)
    residual = (other - x) @ w.T
    torch.testing.assert_close(linear.correlation, residual.T @ part / len(x))
    constant = (residual.square() * weights[:, None]).mean(0)
    torch.testing.assert_close(linear.constant, constant)
    # weights have a mean of one and outlast extreme states
    state = torch.randn(1, 9, 4)
    state[0, 0] *= 1e4
    for token_weights in (SKIP_FIRST, RELATIVE):
        weights = weights_of_tokens(state, token_weights)
        assert float(weights.mean()) == pytest.approx(1)
        assert float(weights[0]) < 1e-6
    zeros = weights_of_tokens(torch.zeros(1, 3, 4), RELATIVE)
    assert zeros.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"token_weights": "relative"}, marks=pytest.mark.slow),
        {"token_weights": "relative", "target": "dense", "holdout": 0.4},
        {"token_weights": "gradient"},
    ],
)
def test_a_weighted_run_is_verified(more, dense_folder, tmp_path):
    options = {**HALF, "include": "layers.1", **more}
    report = prune_model(dense_folder, tokens(), output=tmp_path / "out", **options)
    equal = prune_model(tiny("llama"), tokens(), **{**options, "token_weights": "uniform"})
    assert [layer.error for layer in report.layers] != [layer.error for layer in equal.layers]
    found = verify_model(tmp_path / "out", dense_folder, calibration=tokens())
    assert len(found.checked_layers) == 7


ONE = {"data": tokens(4, 1)}
SKIP, LOSS = {"token_weights": SKIP_FIRST}, {"token_weights": GRADIENT}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"token_weights": "first"}, OptionError, "uniform or skip-first or relative or gradient"),
        ({**SKIP, "model": "mixtral"}, OptionError, "skip-first needs `all_experts`"),
        ({**SKIP, **ONE}, DataError, "windows of a single token"),
        ({**LOSS, **ONE}, DataError, "windows of a single token"),
        ({**LOSS, "skip_bad_samples": True}, OptionError, "leaves windows out: c"),
        ({"holdout": 1.0}, OptionError, "`holdout` must be a number"),
        ({"holdout": -0.1}, OptionError, "`holdout` must be a number"),
        ({"holdout": 0.1}, DataError, "keeps 0 aside"),
        ({"gram_shrinkage": "auto"}, ModelError, "needs held-out windows"),
        ({"gram_shrinkage": "some"}, ModelError, "or be auto"),
        ({"gram_shrinkage": 1.5}, ModelError, "must lie in"),
    ],
)
def test_bad_input_gets_one_line(options, error, message):
    how = {"data": tokens(4), "model": "llama", **HALF, **options}
    with pytest.raises(error, match=message):
        prune_model(tiny(how.pop("model")), how.pop("data"), **how)


@pytest.mark.parametrize(
    "family",
    ["llama", "gemma3", "gpt2", "mamba"]
    + [pytest.param(family, marks=pytest.mark.slow) for family in ("bloom", "bamba")],
)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_gradients_of_a_folder_in_a_file_are_those_of_the_model_in_memory(family, dtype, tmp_path):
    dense = save(tiny(family, dtype=getattr(torch, dtype)), tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype)
    options, data = {**HALF, "token_weights": "gradient"}, tokens(3, 10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = list(collect_problems(model, data, **options))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    streamed = list(collect_problems(dense, data, dtype=dtype, activation_memory=0, **options))
    for (name, one), (other, two) in zip(kept, streamed, strict=True):
        assert name == other
        torch.testing.assert_close(one.gram, two.gram, rtol=1e-5, atol=1e-6)


def test_masks_do_not_depend_on_threads():
    options = {"sparsity": 0.5, "token_weights": "gradient", "include": "layers.1.*"}
    reports = [prune_model(tiny("llama"), tokens(), threads=n, **options) for n in (1, 2, 3)]
    errors = [[layer.error for layer in report.layers] for report in reports]
    assert errors[0] == errors[1] == errors[2]


# Held-out windows: what is fitted never sees them, and errors are given on both ------------------


def prune(data, **options):
    return prune_model(tiny("llama"), data, **HALF, **options)


def problems(data, **options):
    return dict(collect_problems(tiny("llama"), data, sparsity=0.5, layers=FIRST, **options))


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


def test_errors_and_energies_are_those_of_the_windows_that_they_are_on():
    data = tokens(10)
    report = prune(data, holdout=0.4, include=FIRST)
    found = problems(data[6:])
    for layer in report.layers:
        judged = found[layer.name].objective(report.masks[layer.name]).sum()
        assert layer.error_held == pytest.approx(float(judged), rel=1e-5)
        energy = found[layer.name].output_energy().sum()
        assert layer.energy_held == pytest.approx(float(energy), rel=1e-5)
    for shrink in (0.0, 0.5, 1.0):  # an error and its energy are of the same Gram matrix
        report = prune(tokens(4), gram_shrinkage=shrink, include=FIRST, solver="wanda")
        found = problems(tokens(4), gram_shrinkage=shrink)
        for layer in report.layers:
            energy = found[layer.name].output_energy().sum()
            assert layer.energy == pytest.approx(float(energy), rel=1e-5)
    x, weight = torch.randn(50, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    problem = LayerProblem(weight, x.T @ x / 50, Unstructured(keep=3))
    torch.testing.assert_close(problem.output_energy(), (x @ weight.T).square().mean(0))


def test_auto_shrinkage_is_the_greatest_that_is_nearly_the_best_on_the_held_out_windows():
    """Wanda's mask does not change with α, which keeps its diagonal, but the error does: that of the
    start is on the same matrix as that of the end."""
    first = {"include": "layers.0.self_attn", "holdout": 0.5, "start": "wanda"}
    auto = prune(tokens(2), gram_shrinkage="auto", **first)
    fixed = [prune(tokens(2), gram_shrinkage=alpha, **first) for alpha in SHRINK_GRID]
    for index, layer in enumerate(auto.layers):
        layers = [one.layers[index] for one in fixed]
        best = min(one.error_held for one in layers) * (1 + SHRINK_TOLERANCE)
        near = [i for i, one in enumerate(layers) if one.error_held <= best][-1]
        assert layer.gram_shrinkage == SHRINK_GRID[near]
        assert layer.error_held == pytest.approx(layers[near].error_held, rel=1e-9)
        assert layer.error_start == layers[near].error_start
    assert {layer.gram_shrinkage for layer in auto.layers} != {0.0}


def test_the_share_is_taken_as_written():
    """0.29 · 100 is 28.999… in binary floating point."""
    assert [len(held_out(100, share / 100)) for share in range(100)] == list(range(100))
    assert held_out(10, 0.0) == frozenset()


# The dense target: a layer is to give on the pruned model's inputs what it gives in the dense model

DENSE = {**HALF, "target": "dense"}


@pytest.mark.parametrize("more", [{}, {"activation_memory": 0, "threads": 3}])
def test_errors_are_those_of_the_outputs_in_the_dense_model(more):
    data, original = tokens(10), tiny("llama", layers=2)
    given = {**DENSE, "holdout": 0.4, "start": "wanda"}
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
    given = {**DENSE, "include": (f"layers.{block}.*",)}
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
    prune_model(tiny("llama"), tokens(2), gram_shrinkage=0.3, solver="wanda", **DENSE)
    for problem in problems:
        assert problem.linear is not None
        gram = problem.gram.double()
        problem.linear.check_moments(gram, 1e-6 * float(gram.trace()), "")
    assert len(problems) == 21


def test_plans_count_held_out_windows_and_the_dense_model_that_goes_along(dense_folder):
    """Gram matrices of held-out windows are a second set, and a layer is judged by its own of them. Moments,
    states and passes of the dense model."""
    more = {"pruned": {}, "dense": {}, "held": {"target": "pruned", "holdout": 0.5}}
    how = {**HALF, "solver": "wanda", "threads": 1}
    given = [prune_options(None, {**how, "target": t, **o}) for t, o in more.items()]
    alone, both, held = (plan_prune(dense_folder, tokens(), one).memory for one in given)
    # inputs of q k v, of o, of gate and up, of down; the widest is that of down
    assert held.grams - alone.grams == 8 * (3 * 32**2 + 48**2)
    assert held.solving - alone.solving == 4 * 48**2
    assert both.grams == 3 * alone.grams
    assert both.activations == 2 * alone.activations
    alone, both, _ = (_forward_operations(open_job(dense_folder, tokens(), x), x) for x in given)
    assert 1.4 * alone < both < 2 * alone

"""How much the tokens of a window count: the Gram matrices are the weighted means."""

import pytest
import torch
from tiny_models import save, tiny, tokens
from transformers import AutoModelForCausalLM

from maskopt import collect_problems, prune_model
from maskopt.errors import DataError, OptionError
from maskopt.gram import CHUNK, Gram, Moved
from maskopt.model.verify import verify_output
from maskopt.model.weighting import GRADIENT, REST, WEIGHTINGS, token_weights

NAME = "model.layers.1.mlp.up_proj"


def inputs(model, data):
    """Of the layer, and the hidden states that enter its block; [windows, length, …], float64."""
    seen = {NAME: [], "model.layers.1": []}
    for path, found in seen.items():
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, kwargs, found=found: found.append(
                (*args, *kwargs.values())[0].detach()
            ),
            with_kwargs=True,
        )
    with torch.no_grad():
        for window in data:
            model(window[None])
    return [torch.cat(found).double() for found in seen.values()]


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


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_gram_matrix_is_the_weighted_mean(weighting):
    data = tokens(5)
    x, state = inputs(tiny("llama"), data)
    weights = torch.ones(x.shape[:2], dtype=torch.float64)
    if weighting == REST:
        weights[:, 0] = 0
    elif weighting == GRADIENT:
        weights = gradients(tiny("llama"), data)
    elif weighting != "alike":
        weights = 1 / state.square().mean(2)
    weights = weights / weights.mean(1, keepdim=True)
    expected = torch.einsum("wt,wti,wtj->ij", weights, x, x) / weights.numel()
    found = collect_problems(tiny("llama"), data, sparsity=0.5, layers=(NAME,), weighting=weighting)
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


def test_weights_have_a_mean_of_one_and_outlast_extreme_states():
    state = torch.randn(1, 9, 4)
    state[0, 0] *= 1e4
    for weighting in ("rest", "relative"):
        weights = token_weights(state, weighting)
        assert float(weights.mean()) == pytest.approx(1)
        assert float(weights[0]) < 1e-6
    zeros = token_weights(torch.zeros(1, 3, 4), "relative")
    assert zeros.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "more",
    [
        {"weighting": "relative"},
        {"weighting": "relative", "target": "dense", "holdout": 0.4},
        {"weighting": "gradient"},
    ],
)
def test_a_weighted_run_is_verified(more, dense_folder, tmp_path):
    options = {"sparsity": 0.5, "min_tokens": 1, **more}
    report = prune_model(dense_folder, tokens(), output=tmp_path / "out", **options)
    equal = prune_model(tiny("llama"), tokens(), **{**options, "weighting": "alike"})
    assert [layer.error for layer in report.layers] != [layer.error for layer in equal.layers]
    found = verify_output(tmp_path / "out", dense_folder, calibration=tokens())
    assert len(found.checked_layers) == 21


SINGLE = "windows of a single token"


@pytest.mark.parametrize(
    ("family", "weighting", "data", "more", "error", "message"),
    [
        (
            "llama", "first", tokens(), {}, OptionError,
            "`weighting` must be text alike or rest or relative or gradient",
        ),
        ("mixtral", "rest", tokens(), {}, OptionError, "`weighting` rest needs `all_experts` there"),
        ("llama", "rest", tokens(4, 1), {}, DataError, SINGLE),
        ("llama", "gradient", tokens(4, 1), {}, DataError, SINGLE),
        (
            "llama", "gradient", tokens(), {"skip_bad_samples": True}, OptionError,
            "`skip_bad_samples` leaves windows out: choose one",
        ),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line(family, weighting, data, more, error, message):
    with pytest.raises(error, match=message):
        prune_model(tiny(family), data, sparsity=0.5, weighting=weighting, **more)


@pytest.mark.parametrize(
    "family",
    ["llama", "gemma3", "gpt2", "mamba"]
    + [pytest.param(family, marks=pytest.mark.slow) for family in ("bloom", "bamba")],
)
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_gradients_of_a_folder_in_a_file_are_those_of_the_model_in_memory(family, dtype, tmp_path):
    dense = save(tiny(family, dtype=dtype), tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype)
    options = {"sparsity": 0.5, "min_tokens": 1, "weighting": "gradient"}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = list(collect_problems(model, tokens(), **options))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    options |= {"dtype": str(dtype).removeprefix("torch."), "activation_memory": 0}
    streamed = list(collect_problems(dense, tokens(), **options))
    for (name, one), (other, two) in zip(kept, streamed, strict=True):
        assert name == other
        torch.testing.assert_close(one.gram, two.gram, rtol=1e-5, atol=1e-6)


def test_masks_do_not_depend_on_threads():
    options = {"sparsity": 0.5, "weighting": "gradient", "include": "layers.1.*"}
    reports = [prune_model(tiny("llama"), tokens(), threads=n, **options) for n in (1, 2, 3)]
    errors = [[layer.error for layer in report.layers] for report in reports]
    assert errors[0] == errors[1] == errors[2]

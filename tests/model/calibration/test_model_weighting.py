"""How much the tokens of a window count: the Gram matrices are the weighted means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def inputs(model: Any, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the layer, and the hidden states that enter its block; [windows, length, …], float64."""
    seen: dict[str, list[torch.Tensor]] = {"layer": [], "block": []}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, kwargs, key=key: seen[key].append(
                (*args, *kwargs.values())[0].detach()
            ),
            with_kwargs=True,
        )
        for key, path in (("layer", NAME), ("block", "model.layers.1"))
    ]
    with torch.no_grad():
        for window in data:
            model(window[None])
    for hook in hooks:
        hook.remove()
    return torch.cat(seen["layer"]).double(), torch.cat(seen["block"]).double()


def gradients(model: Any, data: torch.Tensor) -> torch.Tensor:
    """Norms of the loss's, by the hidden states that leave the layer's block; [windows, length]."""
    left: list[torch.Tensor] = []
    handle = model.get_submodule("model.layers.1").register_forward_hook(
        lambda module, args, output: left.append(output[0] if isinstance(output, tuple) else output)
    )
    norms = []
    for window in data:
        left.clear()
        loss = model(window[None], labels=window[None]).loss
        (gradient,) = torch.autograd.grad(loss, left)
        norms.append(gradient[0].norm(dim=1))
    handle.remove()
    return torch.stack(norms).double()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_gram_matrix_is_the_weighted_mean(weighting: str) -> None:
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


def test_weights_over_several_chunks_and_beside_other_inputs() -> None:
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


def test_weights_have_a_mean_of_one_and_outlast_extreme_states() -> None:
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
def test_a_weighted_run_is_verified(more: dict[str, Any], tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    options: dict[str, Any] = {"sparsity": 0.5, "min_tokens": 1, **more}
    report = prune_model(dense, tokens(), output=tmp_path / "out", **options)
    alike = prune_model(tiny("llama"), tokens(), **{**options, "weighting": "alike"})
    assert [layer.error for layer in report.layers] != [layer.error for layer in alike.layers]
    assert len(verify_output(tmp_path / "out", dense, calibration=tokens()).checked_layers) == 21


def test_bad_input_gets_one_line() -> None:
    with pytest.raises(
        OptionError, match="`weighting` must be text alike or rest or relative or gradient"
    ):
        prune_model(tiny("llama"), tokens(), sparsity=0.5, weighting="first")
    with pytest.raises(OptionError, match="`weighting` rest needs `all_experts` there"):
        prune_model(tiny("mixtral"), tokens(), sparsity=0.5, weighting="rest")
    for weighting in ("rest", "gradient"):
        with pytest.raises(DataError, match="windows of a single token"):
            prune_model(tiny("llama"), tokens(4, 1), sparsity=0.5, weighting=weighting)
    with pytest.raises(OptionError, match="`skip_bad_samples` leaves windows out: choose one"):
        prune_model(
            tiny("llama"), tokens(), sparsity=0.5, weighting="gradient", skip_bad_samples=True
        )


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bloom", "mamba", "bamba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_folder_in_a_file_are_those_of_the_model_in_memory(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    dense = save(tiny(family, dtype=dtype), tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype)
    options: dict[str, Any] = {"sparsity": 0.5, "min_tokens": 1, "weighting": "gradient"}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = list(collect_problems(model, tokens(), **options))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    dtype_name = str(dtype).removeprefix("torch.")
    streamed = list(
        collect_problems(dense, tokens(), **options, dtype=dtype_name, activation_memory=0)
    )
    for (name, one), (other, two) in zip(kept, streamed, strict=True):
        assert name == other
        torch.testing.assert_close(one.gram, two.gram, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 3])
def test_masks_do_not_depend_on_threads(threads: int) -> None:
    reports = [
        prune_model(tiny("llama"), tokens(), sparsity=0.5, weighting="gradient", threads=count)
        for count in (threads, 2)
    ]
    assert [y.error for y in reports[0].layers] == [y.error for y in reports[1].layers]

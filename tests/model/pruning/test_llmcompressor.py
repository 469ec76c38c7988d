"""The modifier for llm-compressor: the masks are those of the solver on what each module is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save, save_tokenizer, tiny, tokens
from torch import Tensor, nn
from torch.utils.data import DataLoader

pytest.importorskip("llmcompressor", reason='needs pip install "maskopt[llmcompressor]"')

from llmcompressor import oneshot
from llmcompressor.recipe import Recipe

from maskopt import LayerProblem, Unstructured, solve
from maskopt.errors import MaskoptError, OptionError, SolverError
from maskopt.gram import Gram
from maskopt.llmcompressor import SparseSwapsModifier

SAMPLES = 6


def data() -> DataLoader[Any]:
    ids = tokens(SAMPLES)
    return DataLoader([{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids])  # type: ignore[arg-type]


def pruned(recipe: Any, home: Path) -> tuple[nn.Module, nn.Module]:
    """Dense and pruned."""
    folder = save(tiny("llama"), home / "dense")
    save_tokenizer(folder)
    model = oneshot(
        model=str(folder), dataset=data(), recipe=recipe, num_calibration_samples=SAMPLES,
        pipeline="sequential",
    )  # fmt: skip
    return tiny("llama"), model


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: module for name, module in found.items() if "lm_head" not in name}


def given_to(model: nn.Module, name: str) -> Gram:
    """What the layer is given by a model that is pruned up to the block before."""
    module = model.get_submodule(name)
    gram = Gram(module.weight.shape[1])
    hook = module.register_forward_pre_hook(lambda _, args: gram.add(args[0][0].detach()))
    with torch.no_grad():
        for window in tokens(SAMPLES):
            model(window[None])
    hook.remove()
    return gram


def zeros(weight: Tensor) -> Tensor:
    return (weight == 0).sum(1)


@pytest.mark.parametrize("structure", ["0:0", "2:4", "1:4"])
def test_every_layer_has_its_zeros_and_everything_else_is_as_it_was(
    structure: str, tmp_path: Path
) -> None:
    share = 0.25 if structure == "1:4" else 0.5
    recipe = SparseSwapsModifier(sparsity=share, mask_structure=structure, ignore=["re:.*lm_head"])
    dense, sparse = pruned(recipe, tmp_path)
    for name, module in linears(sparse).items():
        before = dense.get_submodule(name).weight
        assert bool((zeros(module.weight) == int(share * before.shape[1])).all()), name
        kept = module.weight != 0
        assert torch.equal(module.weight[kept], before[kept])
        if structure != "0:0":
            gone = int(structure[0])
            assert bool(((module.weight.reshape(-1, 4) == 0).sum(1) == gone).all())
    others = {
        k: v
        for k, v in sparse.state_dict().items()
        if k.removesuffix(".weight") not in linears(sparse)
    }
    assert all(torch.equal(v, dense.state_dict()[k]) for k, v in others.items())


def test_masks_are_those_of_the_solver_on_what_the_modules_are_given(tmp_path: Path) -> None:
    recipe = SparseSwapsModifier(
        sparsity=0.5, solver="swap", warm_start="wanda", ignore=["re:.*lm_head"]
    )
    dense, sparse = pruned(recipe, tmp_path)
    name = "model.layers.0.self_attn.q_proj"
    problem = LayerProblem(
        dense.get_submodule(name).weight.detach(),
        given_to(dense, name).value(),
        Unstructured(sparsity=0.5),
        assume_psd=True,
    )
    found = solve(problem, "swap", start="wanda").mask
    assert torch.equal(sparse.get_submodule(name).weight != 0, found)


def test_refitted_weights_are_nearer_than_kept_ones(tmp_path: Path) -> None:
    errors = []
    for weights in ("keep", "refit"):
        recipe = SparseSwapsModifier(
            sparsity=0.5, solver="wanda", weights=weights, ignore=["re:.*lm_head"]
        )
        dense, sparse = pruned(recipe, tmp_path)
        name = "model.layers.0.self_attn.q_proj"
        change = (sparse.get_submodule(name).weight - dense.get_submodule(name).weight).double()
        errors.append(float((change @ given_to(dense, name).value().double() * change).sum()))
    assert 0 < errors[1] < errors[0]


def test_a_recipe_in_yaml_knows_it(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "pruning_stage:\n  sparsity_modifiers:\n    SparseSwapsModifier:\n      sparsity: 0.75\n"
        "      solver: wanda\n      ignore: ['re:.*lm_head']\n"
    )
    modifiers = Recipe.create_instance(str(tmp_path / "recipe.yaml")).modifiers
    assert [type(m) for m in modifiers] == [SparseSwapsModifier]
    _, sparse = pruned(str(tmp_path / "recipe.yaml"), tmp_path)
    assert all(bool((zeros(m.weight) >= 24).all()) for m in linears(sparse).values())


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"solver": "swop"}, SolverError, "did you mean"),
        ({"sparsity": 1.5}, ValueError, "sparsity 1.5 is outside"),
        (
            {"sparsity": 0.3, "mask_structure": "2:4"},
            OptionError,
            "is not that of `mask_structure`",
        ),
        ({"weights": "reconstruct"}, OptionError, "`weights` must be keep or refit"),
        ({"sparsity_profile": "owl", "owl_m": 5, "owl_lmbda": 0.1}, OptionError, "leave it out"),
        ({"solver_options": {"swops": 1}}, MaskoptError, "swops"),
        ({"damping": -1.0, "weights": "refit"}, MaskoptError, "damping"),
        ({"shrink": 2.0}, MaskoptError, "shrink"),
    ],
)
def test_what_cannot_be_is_refused_while_it_is_made(
    options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        SparseSwapsModifier(**{"sparsity": 0.5, **options})

"""The modifier for llm-compressor: the masks are those of the solver on what each module is given."""

import pytest
import torch
from forging import fails
from tiny_models import inputs_of, save, save_tokenizer, tiny, tokens
from torch.utils.data import DataLoader

pytest.importorskip("llmcompressor", reason='needs pip install "maskopt[llmcompressor]"')

from llmcompressor import oneshot
from llmcompressor.recipe import Recipe

from maskopt import LayerProblem, Unstructured, solve
from maskopt.core.gram import Gram
from maskopt.errors import MaskoptError, OptionError, SolverError
from maskopt.models.pruning.llmcompressor import SparseSwapsModifier

WINDOWS = tokens(6)
HEAD = {"ignore": ["re:.*lm_head"]}
QUERIES = "model.layers.0.self_attn.q_proj"


def pruned(recipe, home):
    folder = save(tiny("llama"), home / "dense")
    save_tokenizer(folder)
    data = [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in WINDOWS]
    how = {"num_calibration_samples": len(WINDOWS), "pipeline": "sequential", "recipe": recipe}
    return tiny("llama"), oneshot(model=str(folder), dataset=DataLoader(data), **how)


def linears(model):
    found = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return {name: module for name, module in found.items() if "lm_head" not in name}


def gram_of(model, name):
    gram = Gram(model.get_submodule(name).weight.shape[1])
    for window in inputs_of(model, name, WINDOWS).float().split(WINDOWS.shape[1]):
        gram.add(window)
    return gram.value()


@pytest.mark.parametrize("structure", ["0:0", "2:4", "1:4"])
def test_every_layer_has_its_zeros_and_everything_else_is_unchanged(structure, tmp_path):
    share = 0.25 if structure == "1:4" else 0.5
    recipe = SparseSwapsModifier(sparsity=share, mask_structure=structure, **HEAD)
    dense, sparse = pruned(recipe, tmp_path)
    for name, module in linears(sparse).items():
        before, zeros = dense.get_submodule(name).weight, module.weight == 0
        assert bool((zeros.sum(1) == int(share * before.shape[1])).all()), name
        assert torch.equal(module.weight[~zeros], before[~zeros])
        if structure != "0:0":
            assert bool((zeros.reshape(-1, 4).sum(1) == int(structure[0])).all())
    for key, value in sparse.state_dict().items():
        if key.removesuffix(".weight") not in linears(sparse):
            assert torch.equal(value, dense.state_dict()[key])


def test_masks_are_those_of_the_solver_on_what_the_modules_are_given(tmp_path):
    recipe = SparseSwapsModifier(sparsity=0.5, solver="swap", start="wanda", **HEAD)
    dense, sparse = pruned(recipe, tmp_path)
    weight, gram = dense.get_submodule(QUERIES).weight.detach(), gram_of(dense, QUERIES)
    problem = LayerProblem(weight, gram, Unstructured(sparsity=0.5), assume_psd=True)
    found = solve(problem, "swap", start="wanda").mask
    assert torch.equal(sparse.get_submodule(QUERIES).weight != 0, found)


def test_refitted_weights_are_nearer_than_kept_ones(tmp_path):
    errors = []
    for update in ("none", "least-squares"):
        recipe = SparseSwapsModifier(sparsity=0.5, solver="wanda", update=update, **HEAD)
        after, before = (m.get_submodule(QUERIES).weight for m in pruned(recipe, tmp_path)[::-1])
        change = (after - before).double()
        errors.append(float((change @ gram_of(tiny("llama"), QUERIES).double() * change).sum()))
    assert 0 < errors[1] < errors[0]


def test_a_recipe_in_yaml_knows_it(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "pruning_stage:\n  sparsity_modifiers:\n    SparseSwapsModifier:\n      sparsity: 0.75\n"
        "      solver: wanda\n      ignore: ['re:.*lm_head']\n"
    )
    modifiers = Recipe.create_instance(str(tmp_path / "recipe.yaml")).modifiers
    assert [type(m) for m in modifiers] == [SparseSwapsModifier]
    _, sparse = pruned(str(tmp_path / "recipe.yaml"), tmp_path)
    assert all(bool(((m.weight == 0).sum(1) >= 24).all()) for m in linears(sparse).values())


def test_what_cannot_be_is_refused_while_it_is_made():
    for options, error, said in (
        ({"solver": "swop"}, SolverError, "did you mean"),
        ({"sparsity": 1.5}, ValueError, "sparsity 1.5 is outside"),
        ({"sparsity": 0.3, "mask_structure": "2:4"}, OptionError, "not that of `mask_structure`"),
        ({"update": "blockwise"}, OptionError, "`update` must be one of: none, least-squares; not"),
        ({"sparsity_profile": "owl", "owl_m": 5, "owl_lmbda": 0.1}, OptionError, "leave it out"),
        ({"solver_options": {"swops": 1}}, MaskoptError, "swops"),
        ({"damping": -1.0, "update": "least-squares"}, MaskoptError, "damping"),
        ({"gram_shrinkage": 2.0}, MaskoptError, "gram_shrinkage"),
    ):
        fails(error, said, SparseSwapsModifier, **{"sparsity": 0.5, **options})

"""Zeros of a pruned model while it is trained on: none is lost, whatever trains it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from commands import ROOT, run
from safetensors.torch import load_file, save_file
from tiny_models import edit_json, save, save_with_own_code, tiny, tokens
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from maskopt import keep_masks, prune_model
from maskopt.errors import ModelError, OptionError, VerificationError
from maskopt.model.keep import parameter_masks
from maskopt.model.keep_lora import unwrapped
from maskopt.model.verify_masks import verify_masks

STEPS = 50
OPTIONS: dict[str, Any] = {"sparsity": 0.5, "solver": "wanda", "min_tokens": 1}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a pruned tiny model of a family; nobody may change it."""
    home = tmp_path_factory.mktemp("pruned")

    def of(family: str) -> Path:
        if not (home / family).exists():
            dense = save(tiny(family), home / f"{family}-dense")
            prune_model(dense, tokens(6), output=home / family, **OPTIONS)
        return home / family

    return of


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).train()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> None:
    data = tokens(steps, 8)
    for window in data.split(1):
        loss = model(window, labels=window).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class Restless(torch.optim.Optimizer):
    """Moves every weight, with a gradient or without."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(0.01)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "restless": Restless,
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_no_zero_is_lost(
    family: str, name: str, pruned: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, model = pruned(family), loaded(pruned(family))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with keep_masks(model, folder) as held:
        train(model, OPTIMIZERS[name](model.parameters()))
        assert held.lost() == 0
        assert held.bytes == sum(p.numel() for n, p in before.items() if n in held._held)
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    model.save_pretrained(tmp_path / "tuned")
    found = verify_masks(tmp_path / "tuned", folder)
    assert found.sparsity == pytest.approx(0.5, abs=0.02)
    assert found.zeros >= found.pruned > 0


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Of this process alone."""
    meeting = f"file://{tmp_path / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("around", [compiled, DistributedDataParallel, nn.DataParallel])
def test_what_torch_puts_around_a_model_changes_nothing(
    around: Callable[[Any], Any],
    adapters: bool,
    pruned: Callable[[str], Path],
    process_group: None,
) -> None:
    torch.manual_seed(0)
    model = with_adapter()(loaded(pruned("llama"))) if adapters else loaded(pruned("llama"))
    wrapped = around(model)
    train(wrapped, OPTIMIZERS["SGD"](model.parameters()), 1)  # traced before anything is held
    with torch.no_grad():
        for name, kept in parameter_masks(unwrapped(model), pruned("llama")).items():
            unwrapped(model).get_parameter(name).masked_fill_(~kept, 0)
    with keep_masks(wrapped, pruned("llama")) as held:
        before = [parameter.detach().clone() for parameter, _ in held._held.values()]
        train(wrapped, OPTIMIZERS["AdamW"](model.parameters()), 10)
        if adapters:
            model.merge_and_unload()
        assert held.lost() == 0
        after = [parameter for parameter, _ in held._held.values()]
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_without_it_zeros_are_lost_and_that_is_found(
    pruned: Callable[[str], Path], tmp_path: Path
) -> None:
    model = loaded(pruned("llama"))
    train(model, OPTIMIZERS["AdamW"](model.parameters()), 2)
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(VerificationError, match="pruned weights are not zero, the first ones in"):
        verify_masks(tmp_path / "tuned", pruned("llama"))
    arguments = ("verify", tmp_path / "tuned", "--masks", pruned("llama"))
    assert "keep_masks" in run(*arguments, fails=VerificationError)


def test_gradients_of_pruned_weights_are_zero_and_held_no_longer_than_asked(
    pruned: Callable[[str], Path],
) -> None:
    model = loaded(pruned("llama"))
    held = keep_masks(model, pruned("llama"))
    weight = model.model.layers[0].self_attn.q_proj.weight
    gone = weight == 0
    model(tokens(1), labels=tokens(1)).loss.backward()
    assert not weight.grad[gone].any()
    assert weight.grad[~gone].any()
    held.close()
    model.zero_grad()
    model(tokens(1), labels=tokens(1)).loss.backward()
    assert weight.grad[gone].any()
    Restless(model.parameters()).step()
    assert held.lost() > 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_lora_that_is_merged_loses_none(
    family: str, dropout: float, pruned: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = pruned(family)
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}[family]
    config = peft.LoraConfig(
        r=4, target_modules=targets, lora_dropout=dropout, fan_in_fan_out=family == "gpt2"
    )
    model = peft.get_peft_model(loaded(folder), config)
    with keep_masks(model, folder) as held:
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
        )
        train(model, optimizer)
        model.eval()
        with torch.no_grad():
            adapted = model(tokens(2)).logits
            with model.disable_adapter():
                plain = model(tokens(2)).logits
            merged = model.merge_and_unload()
            assert held.lost() == 0
            # what was trained is what the merged model computes
            assert torch.allclose(merged(tokens(2)).logits, adapted, atol=1e-5)
        assert not torch.allclose(adapted, plain, atol=1e-3)
    merged.save_pretrained(tmp_path / "tuned")
    assert "holds. All" in run("verify", tmp_path / "tuned", "--masks", folder)


def test_lora_that_is_not_merged_inside_is_told_of(
    pruned: Callable[[str], Path], recwarn: pytest.WarningsRecorder
) -> None:
    folder = pruned("llama")
    for merges in (False, True):
        model = peft.get_peft_model(loaded(folder), peft.LoraConfig(r=4, target_modules=["q_proj"]))
        recwarn.clear()
        with keep_masks(model, folder):
            if merges:
                model.merge_and_unload()
        told = [str(one.message) for one in recwarn if "merge_and_unload" in str(one.message)]
        assert bool(told) != merges


def test_what_was_lost_inside_is_told_of(
    pruned: Callable[[str], Path], recwarn: pytest.WarningsRecorder
) -> None:
    """By an adapter that came after the masks, and by an optimiser that none of them sees."""
    folder = pruned("llama")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    with keep_masks(model := loaded(folder), folder) as held:
        peft.get_peft_model(model, config).merge_and_unload()
        lost = held.lost()
        assert lost > 0
    with keep_masks(model := loaded(folder), folder):
        model(tokens(1), labels=tokens(1)).loss.backward()
        model.model.layers[0].self_attn.q_proj.weight.data.add_(1.0)
    with keep_masks(loaded(folder), folder):
        pass
    told = [str(one.message) for one in recwarn if "were not zero" in str(one.message)]
    assert len(told) == 2
    assert told[0].startswith(f"{lost} pruned weights were not zero")


def test_lora_without_it_loses_zeros(pruned: Callable[[str], Path], tmp_path: Path) -> None:
    folder = pruned("llama")
    model = peft.get_peft_model(loaded(folder), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), 5)
    model.merge_and_unload().save_pretrained(tmp_path / "tuned")
    with pytest.raises(
        VerificationError, match=r"in 'model\.layers\.0\.self_attn\.q_proj\.weight'"
    ):
        verify_masks(tmp_path / "tuned", folder)


def test_through_the_trainer_of_transformers(pruned: Callable[[str], Path], tmp_path: Path) -> None:
    folder = pruned("llama")
    model = loaded(folder)
    data = [{"input_ids": row, "labels": row} for row in tokens(STEPS, 8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"), per_device_train_batch_size=1, num_train_epochs=1,
        weight_decay=0.1, learning_rate=1e-2, report_to=[], save_steps=25, use_cpu=True,
    )  # fmt: skip
    with keep_masks(model, folder) as held:
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[held.callback()])
        trainer.train()
    assert trainer.state.global_step == STEPS
    verify_masks(tmp_path / "trainer" / f"checkpoint-{STEPS}", folder)


class Elsewhere:
    """An optimiser that torch knows nothing of."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def step(self) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.01)


def test_the_callback_holds_what_no_optimizer_of_torch_moves(
    pruned: Callable[[str], Path],
) -> None:
    model = loaded(pruned("llama"))
    held = keep_masks(model, pruned("llama"))
    Elsewhere(model).step()
    assert held.lost() > 0
    held.callback().on_step_end(None, None, None)
    assert held.lost() == 0


def test_masks_of_a_report_are_held_too() -> None:
    model = tiny("llama")
    report = prune_model(model, tokens(6), **OPTIONS)
    model.train().requires_grad_(True)
    with keep_masks(model, report.masks) as held:
        train(model, OPTIMIZERS["AdamW"](model.parameters()), 3)
        assert held.lost() == 0


def refused(change: Callable[[Any], Any]) -> Callable[[Path], Any]:
    def make(folder: Path) -> Any:
        model = loaded(folder)
        return change(model) or model

    return make


@torch.no_grad()
def regrown(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.fill_(1.0)


def with_adapter(**options: Any) -> Callable[[Any], Any]:
    kind = peft.IA3Config if "feedforward_modules" in options else peft.LoraConfig
    return lambda model: peft.get_peft_model(model, kind(target_modules=["q_proj"], **options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (regrown, "'model.layers.1.mlp.up_proj.weight' holds weights that its mask prunes"),
        (with_adapter(use_dora=True), "adapter 'default' is a variant of LoRA"),
        (with_adapter(feedforward_modules=[]), "masks are held through LoRA alone"),
    ],
)
def test_what_cannot_be_held_is_refused(
    change: Callable[[Any], Any], message: str, pruned: Callable[[str], Path]
) -> None:
    with pytest.raises(ModelError, match=message):
        keep_masks(refused(change)(pruned("llama")), pruned("llama"))


def test_adapters_on_pruned_parameters_are_refused(pruned: Callable[[str], Path]) -> None:
    """Of experts that are one parameter; the adapters of the layers are held."""
    config = peft.LoraConfig(target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    model = peft.get_peft_model(loaded(pruned("mixtral")), config)
    with pytest.raises(ModelError, match="an adapter on 'down_proj', which is pruned"):
        keep_masks(model, pruned("mixtral"))


@pytest.mark.parametrize(("family", "prefix"), [("gpt2", "transformer."), ("opt", "model.")])
def test_checkpoints_without_the_name_of_the_base_model(
    family: str, prefix: str, tmp_path: Path
) -> None:
    """As the hub has them; `save_pretrained` puts it before every name."""
    dense = save(tiny(family), tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    bare = {n.removeprefix(prefix): t for n, t in tensors.items() if n != "lm_head.weight"}
    save_file(bare, dense / "model.safetensors", metadata={"format": "pt"})
    prune_model(dense, tokens(6), output=tmp_path / "out", **OPTIONS)
    model = loaded(tmp_path / "out")
    with keep_masks(model, tmp_path / "out"):
        train(model, OPTIMIZERS["SGD"](model.parameters()), 2)
    model.save_pretrained(tmp_path / "tuned")
    found = verify_masks(tmp_path / "tuned", tmp_path / "out")
    assert found.pruned > 0
    assert 0 < found.changed <= found.others
    loaded(dense).save_pretrained(tmp_path / "regrown")
    with pytest.raises(VerificationError, match="are not zero"):
        verify_masks(tmp_path / "regrown", tmp_path / "out")


def test_masks_that_are_of_another_model_are_refused(
    pruned: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="the model has no layer"):
        keep_masks(tiny("gpt2"), pruned("llama"))
    name = "model.layers.0.self_attn.q_proj"
    with pytest.raises(ModelError, match="its mask 3 × 4"):
        keep_masks(tiny("llama"), {name: torch.ones(3, 4, dtype=torch.bool)})
    with pytest.raises(ModelError, match="must be bool"):
        keep_masks(tiny("llama"), {name: torch.ones(32, 32)})
    keep_masks(tiny("llama"), {name: np.ones((32, 32), dtype=bool)})  # type: ignore[dict-item]
    dense = save(tiny("llama"), tmp_path / "dense")
    with pytest.raises(ModelError, match="holds no maskopt-masks"):
        keep_masks(tiny("llama"), dense)
    (tmp_path / "other").mkdir()
    save(tiny("gpt2"), tmp_path / "gpt2")
    with pytest.raises(VerificationError, match="has no tensor"):
        verify_masks(tmp_path / "gpt2", pruned("llama"))


def test_options_of_other_checks_are_refused(pruned: Callable[[str], Path]) -> None:
    folder = pruned("llama")
    arguments = ("verify", folder, "--masks", folder, "--against", folder)
    assert "--against is for a folder" in run(*arguments, fails=OptionError)


def test_the_recipe_for_tools_of_pytorch(
    pruned: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "after.md").read_text()
    (recipe,) = (b.split("```")[0] for b in page.split("```python\n") if "FakeSparsity" in b)
    (tmp_path / "OUT").symlink_to(pruned("gpt2"))
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(recipe, found)
    model, before = found["model"].train(), loaded(Path("OUT"))
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1), 5)
    for name in parameter_masks(before, "OUT"):
        owner, _, last = name.rpartition(".")
        weight, old = getattr(model.get_submodule(owner), last), before.get_parameter(name)
        assert bool((weight[old == 0] == 0).all()), name
        assert not torch.equal(weight, old), name
    with pytest.raises(ModelError, match="masks are on it already; remove those first"):
        keep_masks(model, "OUT")


# What a loader makes of the folder ------------------------------------------------------------

LAST = "model.layers.2."


def added(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return plant


def configured(**entries: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda c: c.update(entries))


def another_block(folder: Path) -> None:
    """A fourth block, dense, in weights and configuration."""

    def copy(found: dict[str, torch.Tensor]) -> None:
        block = {n: t for n, t in found.items() if n.startswith(LAST)}
        found.update({n.replace(LAST, "model.layers.3."): t + 1 for n, t in block.items()})

    added(copy)(folder)
    edit_json(folder / "config.json", lambda c: c.update(num_hidden_layers=4))
    edit_json(folder / "config.json", lambda c: c.pop("layer_types", None))


def with_dense_weights(folder: Path) -> None:
    """The configuration names other weights than the files that were checked."""
    shutil.copy(folder / "model.safetensors", folder / "dense.safetensors")
    configured(transformers_weights="dense.safetensors")(folder)


def planted(name: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        if "safetensors" in name:
            shutil.copy(folder / "model.safetensors", folder / name)
        else:
            (folder / name).write_text("{}")

    return plant


def fill(name: str, value: float) -> Callable[[Path], None]:
    return added(lambda found: found[name].fill_(value))


Q = f"{LAST}self_attn.q_proj.weight"
MADE_OTHERWISE: dict[str, tuple[Callable[[Path], None], str]] = {
    "other weights": (with_dense_weights, "dense.safetensors: is not of the result"),
    "weights by config": (configured(transformers_weights="x.safetensors"), "transformers_weights"),
    "in a part of config": (configured(text_config={"transformers_weights": "x"}), "other weights"),
    "quantised": (configured(quantization_config={"quant_method": "x"}), "quantization_config"),
    "code": (configured(auto_map={"AutoModelForCausalLM": "m.M"}), r"run code \(auto_map\)"),
    "kernel": (configured(attn_implementation="owner/kernel"), r"run code \(attn_implementation"),
    "adapter": (planted("adapter_config.json"), "adapter_config.json: is not of the result"),
    "adapter weights": (planted("adapter_model.safetensors"), "adapter_model.safetensors"),
    "pickle": (planted("pytorch_model.bin"), "pytorch_model.bin: is not of the result"),
    "source": (planted("modeling_own.py"), "modeling_own.py: is not of the result"),
    "index": (planted("model.safetensors.index.json"), "a loader could take either"),
    "dense block": (another_block, "parameter 'model.layers.3.* is only in one"),
    "block of config alone": (configured(num_hidden_layers=2, layer_types=None), "is only in one"),
    "blocks without end": (configured(num_hidden_layers=10**5), "`num_hidden_layers` is 100000"),
    "unknown tensor": (
        added(lambda found: found.update(odd=torch.ones(2))),
        "takes no tensor 'odd'; remove the tensor",
    ),
    "block of weights alone": (
        added(lambda f: f.update({Q.replace(LAST, "model.layers.9."): f[Q].clone()})),
        "takes no tensor 'model.layers.9",
    ),
    "tensor twice": (
        added(lambda found: found.update({Q.removeprefix("model."): found[Q] + 1})),
        "are the same parameter; remove one",
    ),
    "NaN": (fill("model.norm.weight", float("nan")), "'model.norm.weight' holds NaN"),
    "infinity in a mask": (fill(Q, float("inf")), "q_proj.weight' holds NaN or infinite"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("how", MADE_OTHERWISE)
def test_what_a_loader_makes_otherwise_is_refused(
    how: str, packed: bool, pruned: Callable[[str], Path], tmp_path: Path
) -> None:
    masks = tmp_path / "packed" if packed else pruned("llama")
    if packed:
        run("pack", pruned("llama"), "--output", masks)
    loaded(pruned("llama")).save_pretrained(tmp_path / "tuned")
    verify_masks(tmp_path / "tuned", masks)
    change, message = MADE_OTHERWISE[how]
    change(tmp_path / "tuned")
    with pytest.raises(VerificationError, match=message):
        verify_masks(tmp_path / "tuned", masks)


def test_a_packed_folder_is_not_built_without_end(
    pruned: Callable[[str], Path], tmp_path: Path
) -> None:
    run("pack", pruned("llama"), "--output", tmp_path / "packed")
    configured(num_hidden_layers=10**5)(tmp_path / "packed")
    with pytest.raises(VerificationError, match="`num_hidden_layers` is 100000"):
        verify_masks(pruned("llama"), tmp_path / "packed")


def test_files_of_training_may_lie_there(pruned: Callable[[str], Path], tmp_path: Path) -> None:
    loaded(pruned("llama")).save_pretrained(tmp_path / "tuned")
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth", "trainer_state.json"):
        (tmp_path / "tuned" / name).write_text("{}")
    for name in ("checkpoint-5", "additional_chat_templates"):
        (tmp_path / "tuned" / name).mkdir()
    verify_masks(tmp_path / "tuned", pruned("llama"))


def test_a_model_with_code_of_its_own_needs_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    dense = save_with_own_code(tmp_path / "dense")
    prune_model(dense, tokens(6), output=tmp_path / "out", trust_remote_code=True, **OPTIONS)
    arguments = ("verify", tmp_path / "out", "--masks", tmp_path / "out")
    assert "--trust-remote-code allows it" in run(*arguments, fails=VerificationError)
    shutil.copy(dense / "modeling_own.py", tmp_path / "out")
    assert "modeling_own.py" in run(*arguments, fails=VerificationError)
    assert "holds. All" in run(*arguments, "--trust-remote-code")

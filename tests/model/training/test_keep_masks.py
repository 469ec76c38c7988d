"""Zeros of a pruned model while it is trained on: none is lost, whatever trains it."""

import functools
import itertools
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from commands import ROOT, run, shows
from forging import change_tensors, config, copied, fails
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from prunes import but_slow, prune
from safetensors.torch import load_file, save_file
from tiny_models import edit_json, patched, save, save_with_own_code, tiny, tokens
from torch import nn, optim
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from maskopt import keep_masks
from maskopt.errors import ModelError, OptionError, VerificationError
from maskopt.models.checkpoints.schema import MASKS
from maskopt.models.training.held_masks import parameter_masks, unwrapped
from maskopt.models.verification.verify import verify_model

STEPS, LAST = 50, "model.layers.1."
PAGE = ROOT / "docs" / "guide" / "after.md"
#: zeros of a matrix of 128 × 512 normal numbers, half of them pruned, that are still zero
EVERY = 32768


@pytest.fixture
def pruned(pairs):
    return lambda family="llama": pairs(family, model=tiny)[1]


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).train()


def backward(model):
    model(tokens(1), labels=tokens(1)).loss.backward()


def train(model, optimizer, steps=STEPS):
    for window in tokens(steps, 8).split(1):
        loss = model(window, labels=window).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def adamw(model):
    weights = [p for p in model.parameters() if p.requires_grad]
    return optim.AdamW(weights, lr=1e-2, weight_decay=0.1)


def sgd(model):
    return optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def adapted(model, **options):
    kind = peft.IA3Config if "feedforward_modules" in options else peft.LoraConfig
    return peft.get_peft_model(model, kind(**{"target_modules": ["q_proj"], **options}))


class Restless(optim.Optimizer):
    def __init__(self, model):
        super().__init__(model.parameters(), {})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(0.01)


MAIN = [("llama", adamw), ("gpt2", Restless), ("mixtral", sgd)]
EACH = itertools.product(*zip(*MAIN, strict=True))


@pytest.mark.parametrize(("family", "optimizer"), but_slow(MAIN, EACH))
def test_no_zero_is_lost(family, optimizer, pruned, tmp_path):
    folder, model = pruned(family), loaded(pruned(family))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with keep_masks(model, folder) as held:
        train(model, optimizer(model))
        assert held.lost() == 0
        assert held.bytes == sum(p.numel() for n, p in before.items() if n in held._held)
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    model.save_pretrained(tmp_path / "tuned")
    found = verify_model(tmp_path / "tuned", masks=folder)
    assert found.sparsity == pytest.approx(0.5, abs=0.02)
    assert found.zeros >= found.pruned > 0


@pytest.fixture
def process_group(tmp_path):
    meeting = f"file://{tmp_path / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


AROUND = {"compiled": functools.partial(torch.compile, backend="eager")}
AROUND |= {"distributed": DistributedDataParallel, "parallel": nn.DataParallel}
WRAPPED = itertools.product(AROUND, (False, True))
MAIN = [("distributed", True), ("parallel", False)]


@pytest.mark.parametrize(("around", "adapters"), but_slow(MAIN, WRAPPED))
def test_what_torch_puts_around_a_model_changes_nothing(around, adapters, pruned, process_group):
    torch.manual_seed(0)
    folder, model = pruned(), loaded(pruned())
    model = adapted(model) if adapters else model
    wrapped = AROUND[around](model)
    train(wrapped, sgd(model), 1)  # traced before anything is held
    for name, kept in parameter_masks(unwrapped(model), folder).items():
        unwrapped(model).get_parameter(name).data.masked_fill_(~kept, 0)
    with keep_masks(wrapped, folder) as held:
        before = [parameter.detach().clone() for parameter, _ in held._held.values()]
        train(wrapped, adamw(model), 10)
        if adapters:
            model.merge_and_unload()
        assert held.lost() == 0
        after = [parameter for parameter, _ in held._held.values()]
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("adapters", [False, True])
def test_without_it_zeros_are_lost_and_that_is_found(adapters, pruned, tmp_path):
    folder, model = pruned(), loaded(pruned())
    model = adapted(model, r=4) if adapters else model
    train(model, adamw(model), 3)
    (model.merge_and_unload() if adapters else model).save_pretrained(tmp_path / "tuned")
    words = "not zero, the first ones in 'model.layers.0." + "self_attn.q_proj.weight'" * adapters
    said = run("verify", tmp_path / "tuned", "--masks", folder, fails=VerificationError)
    shows(said, f"pruned weights are {words}", "keep_masks")


def test_gradients_of_pruned_weights_are_zero_and_held_no_longer_than_asked(pruned):
    model = loaded(pruned())
    held = keep_masks(model, pruned())
    weight = model.model.layers[0].self_attn.q_proj.weight
    gone = weight == 0
    backward(model)
    assert not weight.grad[gone].any()
    assert weight.grad[~gone].any()
    with torch.no_grad():
        weight.add_(0.01)  # by what is no optimiser of torch
    assert held.lost() > 0
    held.callback().on_step_end(None, None, None)
    assert held.lost() == 0
    held.close()
    model.zero_grad()
    backward(model)
    assert weight.grad[gone].any()
    Restless(model).step()
    assert held.lost() > 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_that_is_merged_loses_none(family, pruned, tmp_path):
    folder, how = pruned(family), {"lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"]}
    if family == "gpt2":
        how = {"fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj"]}
    model = adapted(loaded(folder), r=4, **how)
    with keep_masks(model, folder) as held:
        train(model, adamw(model))
        model.eval()
        with torch.no_grad():
            trained = model(tokens(2)).logits
            with model.disable_adapter():
                plain = model(tokens(2)).logits
            merged = model.merge_and_unload()
            assert held.lost() == 0
            # what was trained is what the merged model computes
            assert torch.allclose(merged(tokens(2)).logits, trained, atol=1e-5)
        assert not torch.allclose(trained, plain, atol=1e-3)
    merged.save_pretrained(tmp_path / "tuned")
    assert "holds. All" in run("verify", tmp_path / "tuned", "--masks", folder)


def test_what_is_lost_or_not_merged_inside_is_warned_of(pruned, recwarn):
    """Lost by an adapter that came after the masks, and by an optimiser that none of them sees."""
    folder = pruned()
    for merges in (False, True):
        model = adapted(loaded(folder), r=4)
        recwarn.clear()
        with keep_masks(model, folder):
            if merges:
                model.merge_and_unload()
        assert any("merge_and_unload" in str(one.message) for one in recwarn) != merges
    recwarn.clear()
    with keep_masks(model := loaded(folder), folder) as held:
        adapted(model, r=4, init_lora_weights=False).merge_and_unload()
        lost = held.lost()
        assert lost > 0
    with keep_masks(model := loaded(folder), folder):
        backward(model)
        model.model.layers[0].self_attn.q_proj.weight.data.add_(1.0)
    with keep_masks(loaded(folder), folder):
        pass
    said = [str(one.message) for one in recwarn if "were not zero" in str(one.message)]
    assert len(said) == 2
    assert said[0].startswith(f"{lost} pruned weights were not zero")


@pytest.mark.slow
def test_through_the_trainer_of_transformers(pruned, tmp_path):
    folder, model = pruned(), loaded(pruned())
    data = [{"input_ids": row, "labels": row} for row in tokens(STEPS, 8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"), per_device_train_batch_size=1, num_train_epochs=1,
        weight_decay=0.1, learning_rate=1e-2, report_to=[], save_steps=25, use_cpu=True,
    )  # fmt: skip
    with keep_masks(model, folder) as held:
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[held.callback()])
        trainer.train()
    assert trainer.state.global_step == STEPS
    verify_model(tmp_path / "trainer" / f"checkpoint-{STEPS}", masks=folder)


def test_what_cannot_be_held_is_refused(pruned, dense_folder, tmp_path):
    name, llama, mixtral = "model.layers.0.self_attn.q_proj", pruned(), pruned("mixtral")
    up, experts = f"{LAST}mlp.up_proj.weight", {"target_parameters": ["experts.down_proj"]}
    regrown = patched(loaded(llama), up, lambda p: p.fill_(1.0))
    for model, masks, message in (
        (regrown, llama, "layers.1.mlp.up_proj.weight' holds weights that its mask"),
        (adapted(loaded(llama), use_dora=True), llama, "'default' is a variant of LoRA"),
        (adapted(loaded(llama), feedforward_modules=[]), llama, "held through LoRA alone"),
        # of experts that are one parameter; the adapters of the layers are held
        (adapted(loaded(mixtral), **experts), mixtral, "an adapter on 'down_proj', which"),
        (tiny("gpt2"), llama, "the model has no layer"),
        (tiny("llama"), {name: torch.ones(3, 4, dtype=torch.bool)}, "its mask 3 × 4"),
        (tiny("llama"), {name: torch.ones(32, 32)}, "must be bool"),
        (tiny("llama"), dense_folder, "holds no maskopt-masks"),
    ):
        fails(ModelError, message, keep_masks, model, masks)
    keep_masks(tiny("llama"), {name: np.ones((32, 32), dtype=bool)})
    save(tiny("gpt2"), tmp_path / "gpt2")
    fails(VerificationError, "has no tensor", verify_model, tmp_path / "gpt2", masks=llama)
    words = ("verify", llama, "--masks", llama, "--original", dense_folder)
    assert "--original does not apply to a model with --masks" in run(*words, fails=OptionError)
    # masks of a report are held too
    model = tiny("llama", layers=2)
    report = prune(model)
    with keep_masks(model.train().requires_grad_(True), report.masks) as held:
        train(model, adamw(model), 3)
        assert held.lost() == 0


@pytest.mark.parametrize(("family", "prefix"), [("gpt2", "transformer."), ("opt", "model.")])
def test_checkpoints_without_the_name_of_the_base_model(family, prefix, tmp_path):
    """The hub has them; `save_pretrained` puts it before every name."""
    dense, out = save(tiny(family), tmp_path / "dense"), tmp_path / "out"
    tensors = load_file(dense / "model.safetensors")
    bare = {n.removeprefix(prefix): t for n, t in tensors.items() if n != "lm_head.weight"}
    save_file(bare, dense / "model.safetensors", metadata={"format": "pt"})
    prune(dense, out)
    model = loaded(out)
    with keep_masks(model, out):
        train(model, sgd(model), 2)
    model.save_pretrained(tmp_path / "tuned")
    found = verify_model(tmp_path / "tuned", masks=out)
    assert found.pruned > 0
    assert 0 < found.changed <= found.others
    loaded(dense).save_pretrained(tmp_path / "regrown")
    fails(VerificationError, "are not zero", verify_model, tmp_path / "regrown", masks=out)


def test_the_recipe_for_tools_of_pytorch(pruned, tmp_path, monkeypatch):
    blocks = PAGE.read_text().split("```python\n")
    (recipe,) = (block.split("```")[0] for block in blocks if "FakeSparsity" in block)
    (tmp_path / "OUT").symlink_to(pruned("gpt2"))
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(recipe, found)
    model, before = found["model"].train(), loaded(Path("OUT"))
    train(model, adamw(model), 5)
    for name in parameter_masks(before, "OUT"):
        owner, _, last = name.rpartition(".")
        weight, old = getattr(model.get_submodule(owner), last), before.get_parameter(name)
        assert bool((weight[old == 0] == 0).all()), name
        assert not torch.equal(weight, old), name
    fails(ModelError, "masks are on it already; remove those first", keep_masks, model, "OUT")


def added(change):
    return lambda folder: change_tensors(folder / "model.safetensors", change)


def another_block(folder):
    def copy(found):
        block = {n: t for n, t in found.items() if n.startswith(LAST)}
        found.update({n.replace(LAST, "model.layers.2."): t + 1 for n, t in block.items()})

    added(copy)(folder)
    config(num_hidden_layers=3)(folder)
    edit_json(folder / "config.json", lambda c: c.pop("layer_types", None))


def planted(name):
    like = "model.safetensors" if "safetensors" in name else "config.json"
    return lambda folder: shutil.copy(folder / like, folder / name)


def fill(name, value):
    return added(lambda found: found[name].fill_(value))


Q = f"{LAST}self_attn.q_proj.weight"
NINTH = Q.replace(LAST, "model.layers.9.")
MADE_OTHERWISE = {
    "other weights": (planted("dense.safetensors"), "dense.safetensors: is not of the result"),
    "weights by config": (config(transformers_weights="x.safetensors"), "transformers_weights"),
    "in a part of config": (config(text_config={"transformers_weights": "x"}), "other weights"),
    "quantised": (config(quantization_config={"quant_method": "x"}), "quantization_config"),
    "code": (config(auto_map={"AutoModelForCausalLM": "m.M"}), r"run code \(auto_map\)"),
    "kernel": (config(attn_implementation="owner/kernel"), r"run code \(attn_implementation"),
    "adapter": (planted("adapter_config.json"), "adapter_config.json: is not of the result"),
    "adapter weights": (planted("adapter_model.safetensors"), "adapter_model.safetensors"),
    "pickle": (planted("pytorch_model.bin"), "pytorch_model.bin: is not of the result"),
    "source": (planted("modeling_own.py"), "modeling_own.py: is not of the result"),
    "index": (planted("model.safetensors.index.json"), "a loader could take either"),
    "dense block": (another_block, "parameter 'model.layers.2.* is only in one"),
    "block of config alone": (config(num_hidden_layers=1, layer_types=None), "is only in one"),
    "blocks without end": (config(num_hidden_layers=10**5), "`num_hidden_layers` is 100000"),
    "unknown tensor": (added(lambda f: f.update(odd=torch.ones(2))), "takes no tensor 'odd'; remove"),
    "block of weights alone": (added(lambda f: f.update({NINTH: f[Q].clone()})), "no tensor 'model.layers.9"),
    "tensor twice": (added(lambda f: f.update({Q[6:]: f[Q] + 1})), "are the same parameter; remove one"),
    "NaN": (fill("model.norm.weight", float("nan")), "'model.norm.weight' holds NaN"),
    "infinity in a mask": (fill(Q, float("inf")), "q_proj.weight' holds NaN or infinite"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(pairs, tmp_path_factory):
    """A pruned model's folder, and the same model loaded and saved; nobody may change them."""
    pruned, tuned = pairs("llama", model=tiny)[1], tmp_path_factory.mktemp("loaders") / "tuned"
    loaded(pruned).save_pretrained(tuned)
    verify_model(tuned, masks=pruned)
    return {"plain": pruned, "tuned": tuned}


@pytest.mark.parametrize("how", MADE_OTHERWISE)
def test_what_a_loader_makes_otherwise_is_refused(how, folders, tmp_path):
    change, message = MADE_OTHERWISE[how]
    change(tuned := copied(folders["tuned"], tmp_path))
    fails(VerificationError, message, verify_model, tuned, masks=folders["plain"])


def test_masks_of_other_folders_and_files_of_training(folders, tmp_path):
    """No model of a forged prune is built without end; files that training leaves are accepted."""
    empty, endless, bare = (copied(folders["plain"], tmp_path / x) for x in "ebw")
    save_file({}, empty / MASKS, metadata={"format": "maskopt-masks-1", "tensors": "{}"})
    config(num_hidden_layers=10**5)(endless)
    for shard in bare.glob("*.safetensors"):
        shard.unlink()
    for masks, said in (
        (empty, "holds no mask"),
        (endless, "`num_hidden_layers` is 100000"),
        (bare, "model.safetensors.index.json: no such file"),
    ):
        fails(VerificationError, said, verify_model, folders["plain"], masks=masks)
    tuned = copied(folders["tuned"], tmp_path)
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth", "trainer_state.json"):
        (tuned / name).write_text("{}")
    for name in ("checkpoint-5", "additional_chat_templates"):
        (tuned / name).mkdir()
    verify_model(tuned, masks=folders["plain"])


def test_a_model_with_code_of_its_own_needs_trust(tmp_path, monkeypatch):
    cache = "transformers.dynamic_module_utils.HF_MODULES_CACHE"
    monkeypatch.setattr(cache, str(tmp_path / "modules"))
    dense, out = save_with_own_code(tmp_path / "dense"), tmp_path / "out"
    prune(dense, out, trust_remote_code=True)
    arguments = ("verify", out, "--masks", out)
    assert "--trust-remote-code allows it" in run(*arguments, fails=VerificationError)
    shutil.copy(dense / "modeling_own.py", out)
    assert "modeling_own.py" in run(*arguments, fails=VerificationError)
    assert "holds. All" in run(*arguments, "--trust-remote-code")


# --- quantised
def matrix():
    """A matrix and what is pruned of it: in each row as many, of some groups of 32 all and of some none."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 512, generator=generator)
    gone = torch.zeros_like(weight, dtype=torch.bool)
    gone.scatter_(1, torch.rand(128, 512, generator=generator).argsort(1)[:, :256], True)
    gone[0] = torch.arange(512) < 256
    return weight.masked_fill(gone, 0), gone


@pytest.mark.parametrize("mapping", [None, "SYMMETRIC", "ASYMMETRIC"])
def test_integers_of_torchao_keep_every_zero(mapping):
    ao = pytest.importorskip("torchao.quantization", reason="needs torchao, which is in no extra")
    config = ao.Int8WeightOnlyConfig()
    if mapping is not None:
        how = {"granularity": ao.PerGroup(32), "mapping_type": getattr(ao.MappingType, mapping)}
        config = ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, **how)
    weight, gone = matrix()
    module = torch.nn.Sequential(torch.nn.Linear(512, 128, bias=False)).to(torch.bfloat16)
    module[0].weight.data = weight.to(torch.bfloat16)
    ao.quantize_(module, config)
    assert int((module[0].weight.dequantize()[gone] == 0).sum()) == EVERY


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q5_0", "BF16", "F16", "Q4_1", "Q5_1"])
def test_types_of_gguf_without_a_minimum_keep_every_zero(name):
    weight, gone = matrix()
    kind = GGMLQuantizationType[name]
    kept = int((dequantize(quantize(weight.numpy(), kind), kind)[gone.numpy()] == 0).sum())
    assert kept <= EVERY // 10 if name.endswith("_1") else kept == EVERY
    line = next(x for x in PAGE.read_text().splitlines() if f"`{name}`" in x)
    assert f"{100 * kept / EVERY:.0f}%" in line

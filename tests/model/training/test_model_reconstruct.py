"""Kept weights trained towards the dense model: better, never worse, and the same bytes every time."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from forging import change_tensors, forge_manifest
from outputs import contents
from resuming import interrupted
from safetensors.torch import load_file
from tiny_models import FAMILIES, save, tiny, tokens
from transformers import AutoModelForCausalLM

from maskopt import prune_model
from maskopt.errors import ModelError, OptionError, VerificationError
from maskopt.model import reconstruct, training
from maskopt.model.job import open_job
from maskopt.model.options import prune_options
from maskopt.model.parts import Recorded
from maskopt.model.report import read_manifest
from maskopt.model.verify import verify_output
from maskopt.model.workspace import MANIFEST, MASKS

HOW: dict[str, Any] = {"epochs": 6, "learning_rate": 0.1}
OPTIONS: dict[str, Any] = {
    "sparsity": 0.5,
    "solver": "wanda",
    "warm_start": None,
    "min_tokens": 1,
    "holdout": 0.25,
    "weights": "reconstruct",
    "reconstruct": HOW,
}


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bloom", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("granularity", ["part", "block"])
def test_parts_come_nearer_to_the_dense_model(family: str, granularity: str) -> None:
    model, data = tiny(family), tokens(12)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    more = {"reconstruct": {**HOW, "granularity": granularity}}
    report = prune_model(model, data, **{**OPTIONS, **more})
    assert len(report.parts) == 3 * (2 if granularity == "part" else 1)
    for part in report.parts:
        assert part.held_after <= part.held_before
        assert not part.diverged
    gained = [part.held_after / part.held_before for part in report.parts]
    assert min(gained) < 0.97
    # nothing but kept weights of pruned layers is another
    after = model.state_dict()
    pruned = {name for name in before if not torch.equal(before[name], after[name])}
    assert pruned
    assert not any("norm" in name or "embed" in name or "bias" in name for name in pruned)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_zeros_stay_zeros_bit_for_bit_and_the_dtype_stays(tmp_path: Path) -> None:
    dense = save(tiny("llama", dtype=torch.bfloat16), tmp_path / "dense")
    prune_model(dense, tokens(12), output=tmp_path / "out", **OPTIONS)
    kept = prune_model(
        dense,
        tokens(12),
        output=tmp_path / "kept",
        **{**OPTIONS, "weights": "keep", "reconstruct": {}},
    )
    assert kept.parts == []
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("kept", "out"))
    changed = 0
    for name, tensor in new.items():
        assert tensor.dtype == old[name].dtype == torch.bfloat16
        if any(f"layers.0.self_attn.{kind}" in name for kind in ("q_proj", "k_proj", "v_proj")):
            # given the same inputs, these have the same masks
            assert torch.equal(tensor == 0, old[name] == 0)
            changed += int((tensor != old[name]).sum())
    assert changed > 0
    verify_output(tmp_path / "out", dense)  # of every zero, its bits
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("begin", ["keep", "refit"])
def test_epochs_are_judged_as_their_weights_are_stored(
    family: str, begin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate so small that bfloat16 rounds away what was gained."""
    dense = save(tiny(family, dtype=torch.bfloat16), tmp_path / "dense")
    losses: list[float] = []

    def again(task: training.Task, pool: Any, *rest: Any) -> training.Trained:
        found = train(task, pool, *rest)
        named = dict(task.module.named_parameters())
        exact = {name: named[name].data for name in named}
        for name, parameter in named.items():
            stored = task.stored.get(name, parameter.dtype)
            parameter.data = parameter.data.to(stored).float()
        losses.append(training._mean(task, task.held, pool))
        for name, value in exact.items():
            named[name].data = value
        return found

    train = training.train
    monkeypatch.setattr(reconstruct, "train", again)
    how = {**OPTIONS, "reconstruct": {"begin": begin, "learning_rate": 1e-4}}
    report = prune_model(dense, tokens(12), output=tmp_path / "out", dtype="float32", **how)
    assert losses == [pytest.approx(part.held_after, rel=1e-12) for part in report.parts]
    assert all(part.held_after <= part.held_before for part in report.parts)


def test_a_block_that_would_get_worse_keeps_its_weights() -> None:
    model = tiny("llama")
    report = prune_model(
        model, tokens(12), **{**OPTIONS, "reconstruct": {"epochs": 2, "learning_rate": 1000.0}}
    )
    alike = tiny("llama")
    kept = prune_model(alike, tokens(12), **{**OPTIONS, "weights": "keep", "reconstruct": {}})
    assert all(part.diverged and part.epoch == 0 for part in report.parts)
    assert all(part.held_after == part.held_before for part in report.parts)
    after = alike.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in model.state_dict().items())
    assert [layer.error for layer in kept.layers] == [layer.error for layer in report.layers]


def test_what_training_did_not_better_stays_as_it_is_stored(tmp_path: Path) -> None:
    """Passes in bfloat16 do not round a float32 folder."""
    dense = save(tiny("llama"), tmp_path / "dense")
    how = {"epochs": 1, "learning_rate": 0.0, "train": "all"}
    options = {**OPTIONS, "reconstruct": how, "dtype": "bfloat16"}
    report = prune_model(dense, tokens(12), output=tmp_path / "out", **options)
    assert [part.epoch for part in report.parts] == [0, 0, 0]
    old, new = (load_file(folder / "model.safetensors") for folder in (dense, tmp_path / "out"))
    assert all(torch.equal(new[name], torch.where(new[name] == 0, 0, old[name])) for name in old)
    assert any(bool((new[name] == 0).any()) for name in old)


class Routed(torch.nn.Module):
    """Experts one by one, as in much code that comes with a model: some get no token of a window."""

    def __init__(self, mlp: torch.nn.Module, width: int, count: int) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(copy.deepcopy(mlp) for _ in range(count))
        self.gate = torch.nn.Linear(width, count, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share, chosen = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            here = chosen == number
            if bool(here.any()):
                out[here] = share[here][:, None] * expert(x[here])
        return out


def test_weights_that_a_window_does_not_come_by_are_trained_on_the_others() -> None:
    model = tiny("llama")
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = Routed(layer.mlp, 32, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = prune_model(model, tokens(12, 8), **OPTIONS)
    assert len(report.parts) == 3
    assert any(part.epoch for part in report.parts)
    after = model.state_dict()
    changed = [
        name
        for name in before
        if "experts" in name and bool(((after[name] != before[name]) & (after[name] != 0)).any())
    ]
    assert len(changed) > 3


def test_a_norm_that_blocks_share_is_left_alone() -> None:
    """Trained for one it would change the others, which are finished."""
    model = tiny("llama")
    layers = model.model.layers
    layers[2].input_layernorm = layers[0].input_layernorm
    before = layers[0].input_layernorm.weight.clone()
    options = {**OPTIONS, "reconstruct": {**HOW, "train": "all"}}
    report = prune_model(model, tokens(12), **options)
    assert all(part.epoch for part in report.parts)
    assert torch.equal(layers[0].input_layernorm.weight, before)
    assert not torch.equal(layers[1].input_layernorm.weight, torch.ones(32))


def test_weights_that_are_decayed_become_smaller() -> None:
    sizes = []
    for decay in (0.0, 3.0):
        model = tiny("llama")
        how = {**HOW, "learning_rate": 0.003, "weight_decay": decay}
        report = prune_model(model, tokens(12), **{**OPTIONS, "reconstruct": how})
        assert report.parts[0].epoch
        block = model.model.layers[0]
        weights = [p.detach() for p in block.parameters() if p.ndim == 2]
        sizes.append(sum(float(weight.square().sum()) for weight in weights))
    assert sizes[1] < sizes[0]


def test_experts_that_are_left_out_are_not_decayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are one parameter. The loss by which an epoch was chosen is of the weights that stay."""
    told: list[tuple[float, float]] = []
    real = training.train

    def train(task: training.Task, pool: Any, *rest: Any) -> training.Trained:
        found = real(task, pool, *rest)
        if found.epoch:
            told.append((found.after.held, training._mean(task, task.held, pool)))
        return found

    monkeypatch.setattr(reconstruct, "train", train)
    how = {"epochs": 2, "learning_rate": 0.003, "weight_decay": 30.0}
    more = {"include": ("*.experts.0.*", "self_attn"), "reconstruct": how}
    prune_model(tiny("mixtral"), tokens(12), **{**OPTIONS, **more})
    assert told
    for said, true in told:
        assert said == pytest.approx(true, rel=1e-6)


@pytest.mark.parametrize("seed", [0, 2**62, 2**63 - 1])
def test_every_seed_orders_windows(seed: int) -> None:
    how = {"reconstruct": {"epochs": 1}, "seed": seed}
    assert len(prune_model(tiny("llama"), tokens(8), **{**OPTIONS, **how}).parts) == 3


def test_a_block_that_gives_what_it_should_has_not_diverged() -> None:
    """AdamW makes full steps of rounding."""
    model, alike = tiny("llama"), {"solver": "magnitude", "weights": "keep", "reconstruct": {}}
    prune_model(model, tokens(12), **{**OPTIONS, **alike})
    how = {"epochs": 2, "loss": "cosine"}
    report = prune_model(
        model, tokens(12), **{**OPTIONS, "solver": "magnitude", "reconstruct": how}
    )
    assert all(part.held_before < 1e-6 for part in report.parts)
    assert len(report.parts) == 3
    assert not any(part.diverged for part in report.parts)


@pytest.mark.parametrize(
    ("family", "inputs", "states"),
    # of OPT's parts, attention and both layers of the MLP, one gives four times the width of a hidden state
    [("llama", "pruned", 3), ("llama", "dense", 4), ("opt", "pruned", 10), ("opt", "dense", 12)],
)
def test_hidden_states_that_parts_are_trained_by_are_counted(
    family: str, inputs: str, states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Recorded] = []

    class Seen(Recorded):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(reconstruct, "Recorded", Seen)
    if family == "opt":
        monkeypatch.setitem(FAMILIES["opt"][1], "ffn_dim", 128)
    data, most = tokens(12), 0
    options = {**OPTIONS, "reconstruct": {"epochs": 1, "granularity": "part", "inputs": inputs}}

    def look(event: Any) -> None:
        nonlocal most
        kept = [one._states._memory for one in made if one._states is not None]
        most = max(most, sum(x.nbytes for some in kept if some for x in some.values()))

    model = tiny(family)
    prune_model(model, data, on_progress=look, **options)
    job = open_job(tiny(family), data, prune_options(None, options))
    assert job.trained_states == states
    assert most == states * data.numel() * 32 * 4


def recorded(states: torch.Tensor) -> Recorded:
    """As of a part that gave these, [windows, 1, length, width]."""
    found = Recorded(len(states), None)
    for window, state in enumerate(states):
        found.put(window, state)
    return found


def test_the_error_of_a_channel_counts_by_its_own_size() -> None:
    states = torch.randn(3, 1, 50, 32, generator=torch.Generator().manual_seed(0))
    states[..., 5] = 30.0  # as hidden states of real models have
    by = reconstruct._scales(recorded(states), [0, 1])
    wanted, found = states[2], states[2].clone()
    others = [channel for channel in range(32) if channel != 5]
    found[..., others] *= 0.9
    assert float(reconstruct._distance(found, wanted, "relative")) < 5e-4
    assert float(reconstruct._distance(found * by, wanted * by, "channels")) > 8e-3
    # and all are measured likewise: of every fitted token, in parts of its length
    shares = states[:2].square() / states[:2].square().sum(-1, keepdim=True)
    expected = (shares.mean((0, 1, 2)) / shares.mean()).clamp(min=1e-3).rsqrt()
    torch.testing.assert_close(by, expected)
    # the unit of the states, and the order of the channels, are no matter
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(reconstruct._scales(recorded(7 * states), [0, 1]), by)
    moved = reconstruct._scales(recorded(states[..., order]), [0, 1])
    torch.testing.assert_close(moved, by[order])


def test_channels_and_tokens_of_zeros_have_a_scale() -> None:
    states = torch.ones(1, 1, 4, 8)
    states[..., 3] = 0
    states[0, 0, 2] = 0
    by = reconstruct._scales(recorded(states), [0])
    assert torch.isfinite(by).all()
    assert by[3] == by.max()
    nothing = reconstruct._scales(recorded(torch.zeros(1, 1, 4, 8)), [0])
    assert torch.isfinite(nothing).all()
    zeros = torch.zeros(1, 4, 8)
    assert float(reconstruct._distance(zeros, zeros, "channels")) == 0


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"begin": "refit"},
        {"inputs": "dense"},
        {"loss": "relative"},
        {"loss": "cosine", "granularity": "part"},
        {"train": "all"},
    ],
)
def test_threads_change_nothing(more: dict[str, Any]) -> None:
    models = []
    for threads in (1, 3):
        model = tiny("llama")
        options = {**OPTIONS, "reconstruct": {**HOW, "epochs": 2, **more}, "threads": threads}
        prune_model(model, tokens(12), **options)
        models.append(model.state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"reconstruct": {**HOW, "begin": "refit"}},
        {"reconstruct": {**HOW, "train": "all"}},
        {"reconstruct": {**HOW, "begin": "refit"}, "true_sequential": True, "solver": "magnitude"},
        {"target": "dense", "reconstruct": {**HOW, "granularity": "part", "loss": "relative"}},
    ],
)
def test_a_run_is_resumed_and_verified(more: dict[str, Any], tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense", shard="30KB")
    options = {**OPTIONS, **more}
    whole = prune_model(dense, tokens(), output=tmp_path / "whole", **options)
    for stage in ("targets", "solve", f"train {whole.parts[-1].part}".rstrip()):
        out = tmp_path / stage.replace(" ", "-")
        interrupted(dense, out, 1, stage, **options)
        again = prune_model(dense, tokens(), output=out, resume=True, **options)
        assert contents(out) == contents(tmp_path / "whole")
        assert [replace(p, seconds=0.0) for p in again.parts] == [
            replace(p, seconds=0.0) for p in whole.parts
        ]
    found = verify_output(tmp_path / "whole", dense, calibration=tokens())
    assert len(found.checked_layers) == 21
    assert "trained weights" in found.claimed
    assert "kept weights" not in found.checked


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    files = folder.glob("*.safetensors")
    return {k: v for f in files if f.name != MASKS for k, v in load_file(f).items()}


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "qwen2"])
@pytest.mark.parametrize("granularity", ["part", "block"])
def test_norms_and_biases_are_trained_where_asked_for(
    family: str, granularity: str, tmp_path: Path
) -> None:
    dense = save(tiny(family, dtype=torch.bfloat16), tmp_path / "dense", shard="20KB")
    how = {**HOW, "learning_rate": 0.03, "granularity": granularity, "train": "all"}
    options = {**OPTIONS, "reconstruct": how}
    report = prune_model(dense, tokens(12), output=tmp_path / "out", **options)
    assert max(part.held_after / part.held_before for part in report.parts) < 1
    verify_output(tmp_path / "out", dense, calibration=tokens(12))
    before, after = (read_weights(tmp_path / name) for name in ("dense", "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    vectors = {name for name in changed if before[name].ndim == 1}
    outside = {name for name in vectors if not {"0", "1", "2"} & set(name.split("."))}
    norm = {"gpt2": "ln_1.weight", "gemma3": "input_layernorm.weight"}.get(
        family, "layernorm.weight"
    )
    assert vectors
    assert not outside
    assert any(name.endswith(norm) for name in vectors) == (granularity == "block")
    assert all(after[name].dtype == torch.bfloat16 for name in vectors)


def test_norms_of_a_model_in_memory_are_trained_to_the_same_values(tmp_path: Path) -> None:
    options = {**OPTIONS, "reconstruct": {**HOW, "train": "all", "granularity": "block"}}
    dense = save(tiny("gemma3"), tmp_path / "dense")
    model = tiny("gemma3")
    prune_model(model, tokens(12), **options)
    prune_model(dense, tokens(12), output=tmp_path / "out", **options)
    stored = read_weights(tmp_path / "out")
    assert all(
        torch.equal(stored[name], p) for name, p in model.named_parameters() if name in stored
    )


def test_a_norm_outside_the_blocks_is_never_trained(tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    options = {**OPTIONS, "reconstruct": {**HOW, "train": "all", "granularity": "block"}}
    prune_model(dense, tokens(12), output=tmp_path / "out", **options)
    change_tensors(
        tmp_path / "out" / "model.safetensors", lambda named: named["model.norm.weight"].mul_(2)
    )
    forge_manifest(tmp_path / "out")
    with pytest.raises(VerificationError, match="it is not pruned and differs"):
        verify_output(tmp_path / "out", dense)


def test_trained_weights_of_a_run_that_trains_nothing_are_found(tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    options = {**OPTIONS, "weights": "keep", "reconstruct": {}}
    prune_model(dense, tokens(12), output=tmp_path / "out", **options)
    part = {"block": 0, "part": "mlp", "epoch": 1, "diverged": False, "seconds": 1.0}
    losses = dict.fromkeys(("fitted_before", "fitted_after", "held_before", "held_after"), 0.5)
    forge_manifest(tmp_path / "out", lambda m: m.update(parts=[{**part, **losses}]))
    with pytest.raises(VerificationError, match="its options train none"):
        verify_output(tmp_path / "out", dense)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"holdout": 0.0}, OptionError, "needs windows that judge it"),
        ({"one_pass": True}, OptionError, "`one_pass` exclude each other"),
        ({"weights": "keep"}, OptionError, "give `weights` reconstruct, too"),
        ({"reconstruct": {"epoch": 3}}, OptionError, "epochs"),
        ({"reconstruct": {"epochs": 0}}, OptionError, "epochs must be"),
        ({"reconstruct": {"loss": "l1"}}, OptionError, "relative or square or cosine"),
    ],
)
def test_bad_input_gets_one_line(more: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        prune_model(tiny("llama"), tokens(12), **{**OPTIONS, **more})
    assert "\n" not in str(raised.value)


def test_a_part_that_is_called_twice_says_what_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    kind = type(model.model.layers[1])
    once = kind.forward
    monkeypatch.setattr(
        kind, "forward", lambda block, *a, **more: block.mlp(once(block, *a, **more))
    )
    with pytest.raises(ModelError, match=r"called 2 times in a pass.*granularity=block"):
        prune_model(model, tokens(12), **{**OPTIONS, "reconstruct": {"granularity": "part"}})


def test_the_command_trains_and_says_what_became_of_it(
    dense: Path, data: Path, tmp_path: Path
) -> None:
    words = ["--sparsity", "0.5", "--calibration", str(data), "--output", str(tmp_path / "out")]
    words += ["--min-tokens", "1", "--holdout", "0.34", "--weights", "reconstruct"]
    how = ["--reconstruct", "epochs=2", "--reconstruct", "batch=1"]
    said = run("prune", str(dense), *words, "--seq-len", "16", "--samples", "6", *how)
    assert "mean of 3 parts" in " ".join(said.split())
    held = " ".join(run("verify", str(tmp_path / "out"), "--against", str(dense)).split())
    assert "every weight that is neither pruned nor trained is that of" in held
    options = read_manifest(tmp_path / "out" / MANIFEST)["fingerprint"]["options"]
    assert options["reconstruct"]["batch"] == 1

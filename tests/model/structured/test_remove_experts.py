"""Whole experts removed: costs by definition, the exact choice, and a folder that computes what is left."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run
from outputs import contents
from test_shrink import forge, logits
from tiny_models import SHARED, save, tiny, tokens
from transformers import AutoModelForCausalLM, DeepseekV2Config

from maskopt import open_job, remove_experts
from maskopt.errors import MaskoptError, ModelError, OptionError, VerificationError
from maskopt.model.experts import costs, mixtures_of
from maskopt.model.verify_smaller import verify_smaller
from maskopt.model.walk_options import WalkOptions
from maskopt.model.workspace import MANIFEST

FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss"]


def removed(family: str, home: Path, **options: Any) -> tuple[Path, Path, Any]:
    dense = save(tiny(family), home / "dense", shard="30KB")
    given = {"share": 0.25, **options}
    return dense, home / "out", remove_experts(dense, tokens(6), output=home / "out", **given)


def kept_of(out: Path) -> dict[str, list[int]]:
    kept: dict[str, list[int]] = json.loads((out / MANIFEST).read_text())["shrunk"]["kept"]
    return kept


def test_costs_are_what_the_outputs_miss() -> None:
    """Against each mixture called with the weights of removed experts at zero."""
    model = tiny("mixtral")
    walk = WalkOptions(threads=2)
    with open_job(model, tokens(3), walk) as job, torch.no_grad():
        for block in job.blocks():
            (mixture,) = mixtures_of(job.source.blocks, block.index)
            q, count = costs(block, mixture)
            module = model.get_submodule(mixture.name)
            calls: list[tuple[Any, torch.Tensor]] = []
            handle = module.register_forward_hook(
                lambda _, args, out, calls=calls: calls.append((args, out))
            )
            for sample in range(3):
                block.opened.run(sample, block.opened.samples.states)
            handle.remove()
            assert count == sum(len(args[0]) for args, _ in calls)
            for size in range(mixture.count + 1):
                for gone in itertools.combinations(range(mixture.count), size):
                    p = torch.zeros(mixture.count, dtype=torch.float64)
                    p[list(gone)] = 1
                    missed = 0.0
                    for (hidden, index, weights), out in calls:
                        left = torch.where(torch.isin(index, torch.tensor(gone)), 0.0, weights)
                        missed += float((module(hidden, index, left) - out).double().square().sum())
                    assert float(p @ q @ p) == pytest.approx(missed / count, rel=1e-4, abs=1e-12)
            block.advance()


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_gone_and_nothing_else(family: str, tmp_path: Path) -> None:
    dense, out, report = removed(family, tmp_path)
    text = AutoModelForCausalLM.from_pretrained(out).config.get_text_config()
    assert text.num_local_experts == 3
    for layer in report.layers:
        assert layer.pattern == "3 of 4 experts"
        assert layer.statuses == {"optimal": 1}
        assert layer.lower_bound == pytest.approx(layer.error_kept, rel=1e-5, abs=1e-12)
        assert 0 <= layer.relative < 1  # 0: an expert that no token is sent to
    assert any(layer.relative > 0 for layer in report.layers)
    found = verify_smaller(out, dense)
    assert "kept weights" in found.checked
    assert verify_smaller(out).claimed[0] == "weights"


def test_routers_that_choose_groups_first_are_refused(tmp_path: Path) -> None:
    config = DeepseekV2Config(
        **SHARED, moe_intermediate_size=16, first_k_dense_replace=0, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_shared_experts=1, n_routed_experts=4,
        num_experts_per_tok=2, n_group=2, topk_group=1, topk_method="group_limited_greedy",
    )  # fmt: skip
    dense = save(AutoModelForCausalLM.from_config(config), tmp_path / "dense")
    with pytest.raises(ModelError, match="chooses among 2 groups of experts first"):
        remove_experts(dense, tokens(4), share=0.25, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokens_go_to_the_next_best_of_those_that_stay(tmp_path: Path) -> None:
    """Against the dense model whose routers choose among the kept experts alone."""
    dense, out, _ = removed("mixtral", tmp_path)
    model, kept = AutoModelForCausalLM.from_pretrained(dense), kept_of(out)
    for name, module in model.named_modules():
        if f"{name}.experts" in kept:
            stays = torch.tensor(kept[f"{name}.experts"])

            def reroute(gate: Any, args: Any, output: Any, stays: torch.Tensor = stays) -> Any:
                chances = output[0][:, stays].float().softmax(-1)
                value, place = chances.topk(gate.top_k, dim=-1)
                return output[0], value / value.sum(-1, keepdim=True), stays[place]

            module.gate.register_forward_hook(reroute)
    smaller = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(smaller), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_choice_is_the_best_by_enumeration(family: str, tmp_path: Path) -> None:
    dense, out, report = removed(family, tmp_path, share=0.5)
    with open_job(dense, tokens(6), WalkOptions()) as job, torch.no_grad():
        block = next(iter(job.blocks()))
        (mixture,) = mixtures_of(job.source.blocks, 0)
        q, _ = costs(block, mixture)
    every = itertools.combinations(range(4), 2)
    by_cost = {gone: float(q[list(gone)][:, list(gone)].sum()) for gone in every}
    best = min(by_cost, key=by_cost.__getitem__)
    assert kept_of(out)[mixture.name] == sorted({0, 1, 2, 3} - set(best))
    assert report.layers[0].error_kept == pytest.approx(by_cost[best], rel=1e-6)


def test_samples_that_are_left_out_are_told(tmp_path: Path) -> None:
    """Of one token alone the first experts' products are beyond float32."""
    model = tiny("mixtral")
    with torch.no_grad():
        embedding, block = model.get_input_embeddings().weight, model.model.layers[0]
        embedding[:, 0], embedding[5] = 0, 0
        embedding[5, 0] = 1
        block.self_attn.o_proj.weight[0] = 0
        block.mlp.experts.gate_up_proj[:, :, 0] = 1e38
    dense, data = save(model, tmp_path / "dense"), tokens(4)
    data[data == 5] = 6
    data[2, 3] = 5
    skip = WalkOptions(skip_bad_samples=True)
    report = remove_experts(dense, data, share=0.25, output=tmp_path / "out", options=skip)
    assert [sample["sample"] for sample in report.bad_samples] == [2]
    assert report.fingerprint["options"]["skip_bad_samples"]
    with pytest.raises(ModelError, match="sample 2 has NaN"):
        remove_experts(dense, data, share=0.25, output=tmp_path / "again")


def test_threads_change_nothing(tmp_path: Path) -> None:
    outs = []
    for threads in (1, 3):
        home = tmp_path / str(threads)
        _, out, _ = removed("mixtral", home, options=WalkOptions(threads=threads))
        outs.append(contents(out))
    assert outs[0] == outs[1]


@pytest.mark.parametrize(
    ("family", "options", "error", "said"),
    [
        ("llama", {}, ModelError, "has no experts"),
        ("llama4", {}, ModelError, "is not given a routing"),
        ("deepseek_v3", {}, ModelError, "keeps 'gate.e_score_correction_bias' beside"),
        ("mixtral", {"share": 0.2}, ModelError, "a share of 0.2 of 4 experts is none"),
        ("mixtral", {"share": 0.75}, ModelError, "leaves 1 of 4 experts, and a token goes to 2"),
        ("mixtral", {"options": WalkOptions(holdout=0.5)}, OptionError, "leave out `holdout`"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    family: str, options: dict[str, Any], error: type[MaskoptError], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        removed(family, tmp_path, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s["gone"].append(s["names"].pop(max(s["names"]))), "only one of|where the kept"),
        (lambda s: s["kept"].update({min(s["kept"]): [0, 1]}), "where the kept|cut as"),
        (lambda s: s.pop("experts"), "no removed block or expert"),
        (lambda s: s["settings"].update(num_local_experts=3), "is not the 3"),
    ],
)
def test_forged_manifests_are_refused(change: Any, said: str, tmp_path: Path) -> None:
    dense, out, _ = removed("mixtral", tmp_path, share=0.5)
    assert kept_of(out)[min(kept_of(out))] != [0, 1]
    forge(out, lambda manifest: change(manifest["shrunk"]))
    with pytest.raises(VerificationError, match=said):
        verify_smaller(out, dense)


def test_the_command_and_what_comes_after(tmp_path: Path) -> None:
    dense = save(tiny("mixtral"), tmp_path / "dense")
    np.save(tmp_path / "tokens.npy", tokens(6).numpy())
    text = ["--calibration", tmp_path / "tokens.npy"]
    said = run("shrink", dense, "--experts", 0.25, *text, "--output", tmp_path / "out")
    assert "3 of 4 experts" in said
    assert "not routed anew" in said
    assert "holds" in run("verify", tmp_path / "out", "--against", dense)
    assert "kept 3 of 4 experts" in (tmp_path / "out" / "README.md").read_text()
    same = ["--config", tmp_path / "out" / MANIFEST, *text, "--output", tmp_path / "again"]
    run("shrink", dense, *same)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    run("report", tmp_path / "out", "--output", tmp_path / "page.html")
    assert "3 of 4 experts" in (tmp_path / "page.html").read_text()
    both = ["--experts", 0.25, "--blocks", 1, *text, "--output", tmp_path / "both"]
    assert "second `maskopt shrink`" in run("shrink", dense, *both, fails=OptionError)
    run("shrink", tmp_path / "out", "--heads", 0.5, *text, "--output", tmp_path / "twice")
    few = ["--sparsity", 0.5, "--solver", "wanda", "--min-tokens", 1]
    run("prune", tmp_path / "out", *few, *text, "--output", tmp_path / "pruned")

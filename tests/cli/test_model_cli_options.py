"""What the options of `maskopt prune` and `maskopt plan` change, from the command line."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from tiny_models import patched, save, tiny, tokens

from maskopt.errors import MaskoptError, ModelError
from maskopt.model import plan as planning
from maskopt.model.plan import plan_prune
from maskopt.model.workspace import MANIFEST, MASKS

TEXT = "Pack my box with five dozen liquor jugs. "


def prune(dense: Path, data: object, out: Path, *more: object) -> str:
    return run(
        "prune", dense, "--sparsity", 0.5, "--solver", "wanda", "--min-tokens", 1,
        "--calibration", data, "--output", out, *more,
    )  # fmt: skip


def masks(out: Path) -> bytes:
    return (out / MASKS).read_bytes()


def manifest(out: Path) -> Any:
    return json.loads((out / MANIFEST).read_text())


def test_orders_of_gram_matrices(dense: Path, data: Path, tmp_path: Path) -> None:
    results = {}
    for name in ("none", "sequential", "one-pass", "true-sequential"):
        out = tmp_path / name
        prune(dense, data, out, *([] if name == "none" else [f"--{name}"]))
        options = manifest(out)["fingerprint"]["options"]
        assert options["one_pass"] == (name == "one-pass")
        assert options["true_sequential"] == (name == "true-sequential")
        results[name] = masks(out)
    assert results["none"] == results["sequential"]
    assert len(set(results.values())) == 3


def test_memory(dense: Path, data: Path, tmp_path: Path) -> None:
    prune(dense, data, tmp_path / "memory")
    prune(dense, data, tmp_path / "file", "--activation-memory", "1kB", "--max-memory", "8GiB")
    assert masks(tmp_path / "memory") == masks(tmp_path / "file")
    command = ["prune", dense, "--sparsity", 0.5, "--solver", "wanda", "--calibration", data]
    said = run(*command, "--output", tmp_path / "x", "--max-memory", "100MiB", fails=ModelError)
    assert "--max-memory allows 0.10 (base 1.00" in said
    assert not (tmp_path / "x").exists()
    one, two = (
        run("eval", dense, "--text", data, *more)
        for more in ([], ["--activation-memory", "0", "--threads", "1"])
    )
    assert "6 windows of 16 tokens" in one
    assert one == two


def test_bad_samples(data: Path, tmp_path: Path) -> None:
    token = int(tokens()[3, 2])

    def overflow(p: torch.Tensor) -> None:
        p[token] = float("inf")

    dense = save(patched(tiny("llama"), "model.embed_tokens.weight", overflow), tmp_path / "dense")
    command = ["prune", dense, "--sparsity", 0.5, "--solver", "wanda", "--calibration", data]
    # the weight itself is infinite, which is refused before any sample is
    said = run(*command, "--output", tmp_path / "out", fails=ModelError)
    assert "embed_tokens.weight' holds NaN or infinite weights" in said
    # finite, but too large for GPT-2's norm
    patched(model := tiny("gpt2"), "transformer.wte.weight", lambda p: p[token].fill_(3e38))
    dense = save(model, tmp_path / "large")
    command[1] = dense
    said = run(*command, "--output", tmp_path / "out", fails=ModelError)
    assert "--skip-bad-samples" in said
    assert not (tmp_path / "out").exists()
    bad = [i for i, row in enumerate(tokens().tolist()) if token in row]
    assert 0 < len(bad) < 6
    shown = run(*command, "--output", tmp_path / "out", "--skip-bad-samples")
    assert f"left out for NaN or infinity: {len(bad)} samples" in shown
    assert [item["sample"] for item in manifest(tmp_path / "out")["bad_samples"]] == bad


def test_sources_of_text(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "\n".join(json.dumps({"body": TEXT * 4, "id": i}) for i in range(3))
    (tmp_path / "text.jsonl").write_text(lines)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text(TEXT * 4)
    asked = []

    def load_dataset(name: str, configuration: str | None, **how: Any) -> dict[str, list[str]]:
        asked.append((name, configuration, how["split"]))
        return {"text": [TEXT * 4, "", TEXT]}

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    for number, (source, more) in enumerate(
        [
            (tmp_path / "text.jsonl", ["--text-field", "body"]),
            (tmp_path / "folder", []),
            ("hf:c4", []),
            ("hf:wikitext2", []),
            ("hf:c4:validation", []),
        ]
    ):
        out = tmp_path / str(number)
        prune(dense, source, out, "--samples", 3, "--seq-len", 24, *more)
        calibration = manifest(out)["fingerprint"]["calibration"]
        assert (calibration["samples"], calibration["length"]) == (3, 24)
        assert calibration["source"] == str(source if number > 1 else Path(source).name)
        assert len(calibration["sha256"]) == 64
    assert asked == [
        ("allenai/c4", None, "train"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
        ("allenai/c4", None, "validation"),
    ]
    shown = run("eval", dense, "--text", "hf:wikitext2:test", "--seq-len", 32)
    assert "windows of 32 tokens from hf:wikitext2:test" in shown


def test_resume_and_overwrite(dense: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune(dense, data, out)
    before = masks(out)
    command = ["prune", dense, "--sparsity", 0.5, "--solver", "wanda", "--min-tokens", 1]
    command += ["--calibration", data, "--output", out]
    assert "not empty" in run(*command, fails=ModelError)
    run(*command, "--resume")  # there is nothing left to do
    assert masks(out) == before
    said = run(*command, "--resume", "--shrink", 0.1, fails=ModelError)
    assert "another run" in said
    assert "shrink" in said
    run(*command, "--overwrite", "--shrink", 1.0)
    assert manifest(out)["fingerprint"]["options"]["shrink"] == 1.0


def plan(dense: Path, *, include: str | None = None, **options: Any) -> Any:
    return plan_prune(
        dense, tokens(4, 16), sparsity=0.5, solver="wanda", include=include, threads=1, **options
    )


def test_a_plan_counts_passes(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny("llama")
    model.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens(4, 16), use_cache=False)
    head = 2 * 4 * 16 * model.lm_head.weight.numel()
    one = counter.get_total_flops() - head  # of all blocks, once
    monkeypatch.setattr(planning, "_speed", lambda *_: 1 / planning.SHARE)
    gram = 4 * 16 * 3 * (2 * 32**2 + 32**2 + 48**2)  # q k v, o, gate up, down
    assert plan(dense, one_pass=True).forward_seconds == pytest.approx(one + gram, rel=0.02)
    last = 3 * 2 * 4 * 16 * 32 * 48  # down projections of passes that only collect
    assert plan(dense).forward_seconds == pytest.approx(2 * one - last + gram, rel=0.02)
    # the last block is not reached, and the first one is only passed through
    short = plan(dense, include="layers.1.mlp.down_proj").forward_seconds
    assert short == pytest.approx(one / 3 * 3 - last / 3 + 4 * 16 * 48**2, rel=0.02)
    assert plan(dense, true_sequential=True).forward_seconds > plan(dense).forward_seconds
    # forward and back over three windows of four, forward over the other one, epoch by epoch
    two, three, parts = (
        plan(dense, weights="reconstruct", holdout=0.25, reconstruct=how).forward_seconds
        for how in ({"epochs": 2}, {"epochs": 3}, {"epochs": 3, "granularity": "part"})
    )
    share = planning.SHARE / planning.TRAINED_SHARE
    assert three - two == pytest.approx((3 * 0.75 + 0.25) * one * share, rel=0.02)
    assert parts - three == pytest.approx(one * share, rel=0.02)


def test_a_plan_adds_up(dense: Path) -> None:
    result = plan(dense)
    parts = (result.forward_seconds, result.solve_seconds, result.file_seconds)
    assert all(part > 0 for part in parts)
    assert result.seconds > sum(parts)


def test_a_plan_does_not_wait_for_a_search_without_end(
    dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskopt.model.plan.PROBE_LIMIT", 0.5)
    command = ["plan", dense, "--sparsity", 0.5, "--solver"]
    assert "time, estimated: unknown" in run(*command, "branch")
    endless = [*command, "tabu", "--option", "moves=1000000000", "--option"]
    assert "time, estimated: unknown" in run(*endless, "seed=1")
    layers = len(plan(dense).layers)
    assert f"solving about {0.25 * layers:.0f} s" in run(*endless, "time_limit=0.25")


def test_a_plan_refuses_what_the_prune_would(dense: Path, data: Path, tmp_path: Path) -> None:
    how = ["--sparsity", 0.5, "--solver", "wanda", "--min-tokens", 1]
    run("gram", dense, "--calibration", data, "--output", tmp_path / "grams")
    for more, said in (
        (["--grams", tmp_path / "grams"], "name one of the two"),
        (["--output", dense, "--overwrite"], "is the model itself"),
        (
            ["--budget", "model", "--importance", "measured", "--spread", 0.001],
            "no step in common",
        ),
    ):
        words = [dense, "--calibration", data, *how, *more]
        assert said in run("plan", *words, fails=MaskoptError)
        out = [] if "--output" in more else ["--output", tmp_path / "out"]
        assert said.split()[-1] in run("prune", *words, *out, fails=MaskoptError)
    assert not (tmp_path / "out").exists()


def test_a_plan_with_a_solver_that_takes_no_rows_as_wide_as_those_it_times(dense: Path) -> None:
    shown = run("plan", dense, "--sparsity", 0.5, "--solver", "highs")
    assert "time, estimated: unknown" in shown

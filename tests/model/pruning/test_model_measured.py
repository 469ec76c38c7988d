"""`importance` measured: what the model's output loses where one block alone is pruned, and what follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from outputs import contents
from resuming import interrupted
from test_model_allocate import refusal
from tiny_models import FAMILIES, logs, save, tiny, tokens

from maskopt import LayerProblem, Unstructured, prune_model, shrink_model, solve
from maskopt.errors import OptionError
from maskopt.model import allocate as allocating
from maskopt.model import plan as planning
from maskopt.model.block_curves import measured_curves
from maskopt.model.importance import VARIANT_WINDOWS, VARIANTS
from maskopt.model.job import Job, open_job
from maskopt.model.options import PruneOptions
from maskopt.model.plan import plan_prune
from maskopt.model.share_out import Curve, Moves, share_out
from maskopt.model.verify import verify_output

OPTIONS: dict[str, Any] = {
    "sparsity": 0.5,
    "min_tokens": 1,
    "budget": "model",
    "importance": "measured",
    "solver": "wanda",
}
MEASURED = PruneOptions(
    Unstructured(sparsity=0.5), budget="model", importance="measured", min_tokens=1, spread=0.25
)


def inputs_of(model: Any, name: str, ids: torch.Tensor) -> torch.Tensor:
    """What a layer of the dense model is given, [tokens, n]."""
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(
        lambda _, args, __: seen.append(args[0].detach().flatten(0, -2))
    )
    with torch.no_grad():
        model(ids)
    hook.remove()
    return torch.cat(seen)


def walked(options: PruneOptions = MEASURED, count: int = 6) -> Job:
    return open_job(tiny("llama"), tokens(count), options)


def test_costs_are_divergences_of_models_with_one_block_pruned() -> None:
    curves = measured_curves(walked(), MEASURED)
    assert [len(curve.layers) for curve in curves] == [7, 7, 7]
    ids = tokens(6)[:VARIANT_WINDOWS]
    full = logs(tiny("llama"), ids)
    for block, curve in enumerate(curves):
        middle = curve.layers[0].n // 2
        assert curve.pruned == (
            middle - curve.layers[0].n // 4,
            middle,
            middle + curve.layers[0].n // 4,
        )
        for pruned, cost in zip(curve.pruned, curve.costs, strict=True):
            model = tiny("llama")
            masks = {}
            for layer in curve.layers:
                assert layer.block == block
                weight = model.get_parameter(layer.parameter).detach()
                x = inputs_of(model, layer.name, ids).double()
                keep = layer.n - layer.n * pruned // curve.layers[0].n
                problem = LayerProblem(weight, x.T @ x / len(x), Unstructured(keep=keep))
                masks[layer.parameter] = solve(problem, "wanda").mask
            for name, mask in masks.items():
                model.get_parameter(name).data *= mask
            other = logs(model, ids)
            kl = float((full.exp() * (full - other)).sum(-1).mean())
            assert cost == pytest.approx(kl, rel=2e-2, abs=1e-7)


def test_the_model_is_as_it_was() -> None:
    job = walked()
    before = {name: p.clone() for name, p in job.source.model.named_parameters()}
    measured_curves(job, MEASURED)
    assert all(torch.equal(p, before[name]) for name, p in job.source.model.named_parameters())


def test_in_files_and_with_other_threads_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = measured_curves(walked(), MEASURED)
    small = PruneOptions(**{**vars(MEASURED), "activation_memory": 1, "threads": 1})
    for one, two in zip(plain, measured_curves(walked(small), small), strict=True):
        assert one == two


def test_the_block_that_matters_less_prunes_more() -> None:
    layers = open_job(tiny("llama"), None, MEASURED).layers
    blocks = [tuple(x for x in layers if x.block == index) for index in range(3)]
    n = blocks[0][0].n
    curves = [
        Curve(block, (n // 4, n // 2, 3 * n // 4), (cost / 4, cost, 4 * cost))
        for block, cost in zip(blocks, (1.0, 5.0, 0.2), strict=True)
    ]
    counts = share_out(layers, curves, MEASURED)
    assert sum(x.rows * counts[x.name] for x in layers) == sum(x.rows * x.n // 2 for x in layers)
    for block in blocks:  # together
        assert len({counts[x.name] / x.n for x in block}) == 1
    part = [counts[block[0].name] / n for block in blocks]
    assert part[1] < part[0] < part[2]
    assert part[2] <= 0.75


def test_moves_keep_all_of_their_layers_within_the_spread() -> None:
    layers = open_job(tiny("llama"), None, MEASURED).layers[:7]
    alike = {x.name: x.n // 2 for x in layers}
    move = Moves.of(layers, alike, 0.3)
    for index, layer in enumerate(layers):
        counts = move.counts(index)
        assert alike[layer.name] in counts
        assert all(abs(count - alike[layer.name]) <= 0.3 * layer.n for count in counts)
    assert move.sizes()[move.moves.index(0)] == sum(x.rows * alike[x.name] for x in layers)


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"mamba"}))
def test_every_family_is_written_and_verified(family: str, tmp_path: Path) -> None:
    folder = save(tiny(family), tmp_path / "model")
    prune_model(folder, tokens(), output=tmp_path / "out", **{**OPTIONS, "min_tokens": 8})
    assert verify_output(tmp_path / "out", folder, calibration=tokens()).checked_layers


def test_resumed_runs_measure_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = save(tiny("llama"), tmp_path / "model", shard="20KB")
    options = {**OPTIONS, "weighting": "gradient", "holdout": 0.25, "solver": "swap"}
    prune_model(dense, tokens(), output=tmp_path / "whole", **options)
    interrupted(dense, tmp_path / "out", 2, "solve", **{"warm_start": None, **options})
    monkeypatch.setattr(allocating, "measured_curves", lambda *_: pytest.fail("measured again"))
    prune_model(dense, tokens(), output=tmp_path / "out", resume=True, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_plan_counts_the_variants(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_speed", lambda *_: 1e9)  # operations, not this machine
    plan, other = (plan_prune(dense, **{**OPTIONS, "importance": i}) for i in ("measured", "alike"))
    assert plan.forward_seconds > other.forward_seconds
    assert plan.pruned == other.pruned
    job = open_job(dense, None, MEASURED)
    blocks = len(job.source.blocks)
    assert job.load.variants == VARIANTS * VARIANT_WINDOWS * blocks


def test_widths_without_a_step_in_common_are_refused(tmp_path: Path) -> None:
    """Of 32 and 34 inputs the step in common is a half, as of those of a Mamba that has one of 2."""
    with pytest.raises(OptionError, match="2, 32, 64 inputs have no step in common"):
        prune_model(tiny("mamba"), tokens(), **OPTIONS)
    dense = save(tiny("llama"), tmp_path / "dense")
    shrink_model(dense, tokens(6), output=tmp_path / "narrow", channels=0.3, solver="wanda")
    with pytest.raises(OptionError, match="32, 34 inputs have no step in common"):
        prune_model(tmp_path / "narrow", tokens(6), output=tmp_path / "out", **OPTIONS)
    single = {**OPTIONS, "importance": "relative"}  # of one layer every count is a step
    prune_model(tmp_path / "narrow", tokens(6), output=tmp_path / "out", **single)


@pytest.mark.parametrize("budget", ["layer", "both"])
def test_rows_are_not_measured(budget: str) -> None:
    said = refusal({**OPTIONS, "budget": budget}, OptionError)
    assert said.startswith("`importance` measured is of whole blocks and says nothing of rows")

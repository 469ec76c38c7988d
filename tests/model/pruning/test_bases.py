"""The option `transform`: the same function in other bases, its check, and forgeries of it."""

import shutil
from dataclasses import replace

import pytest
import torch
from forging import fails, forge_manifest
from prunes import but_slow, contents, interrupted, manifest_of, prune
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, save, tiny, tokens
from transformers import AutoModelForCausalLM

from maskopt import PruneOptions, collect_grams, distill_model, keep_masks, open_job
from maskopt.core.pattern import NM, Unstructured
from maskopt.errors import ModelError, OptionError, VerificationError
from maskopt.models.blockwise.memory import estimate_memory
from maskopt.models.checkpoints.result import read_bases
from maskopt.models.checkpoints.schema import BASES, file_digest
from maskopt.models.evaluation.bound import certify_model
from maskopt.models.pruning import bases as finding
from maskopt.models.pruning.bases import order_seconds, rotation
from maskopt.models.pruning.output import apply_masks
from maskopt.models.pruning.plan import _forward_operations
from maskopt.models.verification.verify import verify_model

FREE = {"transform": "free", "sparsity": "2:4"}
#: layers that N:M does not fit
LEFT_OUT = {"mamba": ["dt_proj"]}
VALUES, CHANNELS = "model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight"


def logits(folder, bases=None):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, basis in (bases or {}).items():
            parameter = model.get_parameter(name)
            parameter.copy_(basis.apply(parameter))
        return model(tokens()[:2]).logits


def bases_of(out):
    return read_bases(out / BASES) if (out / BASES).exists() else {}


@pytest.mark.parametrize(
    "family", but_slow(("llama", "gemma3", "opt", "phi3", "gpt_oss"), FAMILIES)
)
def test_every_family_computes_the_same_and_is_verified(family, tmp_path):
    dense, out = save(tiny(family), tmp_path / "dense"), tmp_path / "out"
    prune(dense, out, **FREE, exclude=LEFT_OUT.get(family, ()))
    bases = bases_of(out)
    before = logits(dense)
    stored = AutoModelForCausalLM.from_pretrained(dense).state_dict()
    if bases.keys() <= stored.keys():
        after = logits(dense, bases)
        assert (after - before).abs().max() <= 1e-6 * before.abs().max()
    found = verify_model(out, original=dense, calibration=tokens())
    assert any("function" in what for what in found.claimed) == bool(bases)
    expected = {"llama": 15, "gemma3": 15, "opt": 18, "phi3": 6, "gpt_oss": 9, "gpt2": 0}
    assert len(bases) == expected.get(family, len(bases))


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.5, "solver": "swap", "start": "wanda"},
        {"update": "least-squares", "solver": "admm", "true_sequential": True},
        {"update": "blockwise", "training": {"epochs": 1}, "holdout": 0.34},
        {"distillation": {"epochs": 1}, "holdout": 0.34},
        {"sparsity": 0.5, "allocation": "layers"},
        {"include": "down_proj"},
        {"include": "v_proj"},
    ],
)
def test_with_other_options_the_result_is_verified(options, tmp_path):
    dense, out = save(tiny("llama"), tmp_path / "dense", shard="30KB"), tmp_path / "out"
    prune(dense, out, tokens(8), **FREE | options)
    assert bases_of(out)
    verify_model(out, original=dense)


def test_less_of_the_score_is_pruned():
    torch.manual_seed(0)
    value, weight = torch.randn(2, 16, 32, dtype=torch.float64)
    weight, gram = weight.T, torch.cov(torch.randn(16, 64, dtype=torch.float64))

    def pruned(r, pattern):
        made, taken = r @ value, weight @ r.T
        return sum(
            float((score - finding._least(score, pattern).logical_not() * score).sum() / scale)
            for score, scale in (
                (made.square(), value.square().sum()),
                (
                    taken.square() * (r @ gram @ r.T).diagonal(),
                    (weight.square() * gram.diagonal()).sum(),
                ),
            )
        )

    for pattern in (NM(2, 4), Unstructured(sparsity=0.5)):
        found = rotation(value, [(weight, gram)], pattern)
        one = torch.eye(16, dtype=torch.float64)
        assert torch.allclose(found @ found.T, one, atol=1e-12)
        assert pruned(found, pattern) < 0.8 * pruned(one, pattern)


def test_a_model_in_memory_gets_the_masks_of_its_folder(tmp_path):
    dense = save(tiny("llama"), tmp_path / "dense")
    prune(dense, tmp_path / "out", **FREE)
    model = AutoModelForCausalLM.from_pretrained(dense)
    report = prune(model, **FREE)
    for name, mask in report.masks.items():
        stored = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"]
        assert torch.equal(model.get_parameter(f"{name}.weight"), stored)
        assert not stored[~mask].any()


@pytest.mark.parametrize(("block", "stage"), [(1, "solve"), (2, "solve")])
def test_a_stopped_run_goes_on_to_the_same_bytes(block, stage, tmp_path):
    dense = save(tiny("llama"), tmp_path / "dense")
    prune(dense, tmp_path / "whole", **FREE)
    interrupted(dense, tmp_path / "out", block, stage, **FREE)
    prune(dense, tmp_path / "out", resume=True, **FREE)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    prune(dense, tmp_path / "out", resume=True, **FREE)


def test_a_finished_run_does_not_look_for_bases_again(tmp_path, monkeypatch):
    dense = save(tiny("llama"), tmp_path / "dense")
    prune(dense, tmp_path / "out", **FREE)
    monkeypatch.setattr(finding, "_of_block", lambda *_: pytest.fail("found again"))
    prune(dense, tmp_path / "out", resume=True, **FREE)
    fails(ModelError, "transform", prune, dense, tmp_path / "out", resume=True, sparsity="2:4")


def test_a_block_that_would_compute_another_output_keeps_its_basis(tmp_path, monkeypatch, caplog):
    dense = save(tiny("llama"), tmp_path / "dense")
    monkeypatch.setattr(finding, "rotation", lambda value, *_: 2 * torch.eye(len(value)).double())
    prune(dense, tmp_path / "out", **FREE)
    assert {len(basis.change.shape) for basis in bases_of(tmp_path / "out").values()} == {1}
    assert "o_proj.weight keeps its basis" in caplog.text


def test_a_plan_counts_the_search(tmp_path):
    dense = save(tiny("llama"), tmp_path / "dense")

    def planned(transform, sparsity="2:4"):
        how = {"samples": 16, "seq_len": 16, "solver": "magnitude"}
        options = PruneOptions(transform=transform, sparsity=sparsity, **how)
        job = open_job(dense, tokens(16), options)
        return order_seconds(job, options), job.load, _forward_operations(job, options)

    none, rotated, ordered = map(planned, ("none", "rotation", "free"))
    assert none[0] == rotated[0] == planned("free", 0.5)[0] == 0 < ordered[0]
    assert none[2] < rotated[2] == ordered[2]
    # as wide as in a model of 70B
    wide = [replace(layer, rows=8192, n=28672) for layer in ordered[1].layers[-1:]]
    one, two = (estimate_memory(replace(load, layers=wide)) for load in (none[1], ordered[1]))
    assert one.solving < two.solving == 16 * 28672**2 + 32 * 8192 * 28672


def test_what_does_not_go_together_is_refused(tmp_path):
    dense, out = save(tiny("llama"), tmp_path / "dense"), tmp_path / "out"
    prune(dense, out, **FREE)
    masks = out / "maskopt-masks.bits"
    fails(ModelError, "in other bases", apply_masks, dense, masks, tmp_path / "applied")
    assert not (tmp_path / "applied").exists()
    grams = collect_grams(dense, tokens(), output=tmp_path / "grams")
    fails(OptionError, "needs text", prune, dense, tmp_path / "new", grams=grams, **FREE)


def test_the_commands_that_follow_a_prune_take_the_result_or_refuse_it(made, tmp_path):
    dense, out = made
    assert verify_model(out, masks=out).zeros
    trained = {"epochs": 1, "learning_rate": 0.003, "holdout": 0.25}
    distill_model(out, dense, tokens(16), output=tmp_path / "trained", **trained)
    assert verify_model(tmp_path / "trained", masks=out).zeros
    shutil.copytree(out, tmp_path / "tuned")
    assert verify_model(tmp_path / "tuned", masks=out).zeros
    with keep_masks(AutoModelForCausalLM.from_pretrained(out), out) as held:
        assert held.lost() == 0
    said = "prune with `transform` none"
    fails(ModelError, said, certify_model, dense, out, calibration=tokens())


def change_bases(out, change):
    with safe_open(out / BASES, "pt") as file:
        about = file.metadata()
    changes = load_file(out / BASES)
    change(changes, about)
    save_file(changes, out / BASES, about)
    digest = file_digest(out / BASES)
    forge_manifest(out, lambda m: m["fingerprint"].update(bases=digest))


def swapped(changes, _):
    changes[CHANNELS][[0, 1]] = changes[CHANNELS][[1, 0]]


FORGED = {
    "kept weight differs": [swapped, lambda c, _: c[VALUES].copy_(c[VALUES].flip(1))],
    "neither an order nor orthogonal": [
        lambda c, _: c[VALUES].mul_(1.001),
        lambda c, _: c[VALUES].fill_(torch.nan),
        lambda c, _: c.update({VALUES: c[VALUES].float()}),
        lambda c, _: c[CHANNELS].fill_(0),
        lambda c, _: c.update({CHANNELS: c[CHANNELS].double()}),
    ],
    "changes other tensors": [
        lambda _, a: a.update(tensors=a["tensors"].replace("gate_proj", "up_proj")),
        lambda _, a: a.update(tensors=a["tensors"].replace("v_proj", "k_proj")),
    ],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("made")
    dense = save(tiny("llama"), place / "dense")
    prune(dense, place / "out", **FREE)
    return dense, place / "out"


@pytest.mark.parametrize(
    ("said", "change"), [(said, change) for said, every in FORGED.items() for change in every]
)
def test_forged_bases_are_refused(said, change, made, tmp_path):
    dense, out = made[0], shutil.copytree(made[1], tmp_path / "out")
    change_bases(out, change)
    fails(VerificationError, said, verify_model, out, original=dense)


def test_forged_manifests_and_files_are_refused(made, tmp_path):
    for number, (said, change) in enumerate(
        {
            "a file of other bases": lambda m: m["fingerprint"].update(bases="0" * 64),
            "without their file, or": lambda m: m["fingerprint"].pop("bases"),
            "its options change none": lambda m: m["fingerprint"]["options"].update(
                transform="none"
            ),
        }.items()
    ):
        out = shutil.copytree(made[1], tmp_path / str(number))
        forge_manifest(out, change)
        fails(VerificationError, said, verify_model, out, original=made[0])
    out = shutil.copytree(made[1], tmp_path / "gone")
    (out / BASES).unlink()
    fails(VerificationError, "is not there", verify_model, out, original=made[0])
    fails(VerificationError, "is not there", verify_model, out)


def test_a_weight_beyond_rounding_is_refused(made, tmp_path):
    out = shutil.copytree(made[1], tmp_path / "out")
    weights = load_file(out / "model.safetensors")
    name = "model.layers.0.self_attn.v_proj.weight"
    kept = weights[name].view(-1).nonzero()[0]
    place = weights[name].view(-1)
    place[kept] = torch.nextafter(
        torch.nextafter(place[kept], torch.tensor(9.0)), torch.tensor(9.0)
    )
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    forge_manifest(out)
    fails(VerificationError, "kept weight differs", verify_model, out, original=made[0])


def test_half_precision_is_verified(tmp_path):
    dense = save(tiny("llama").bfloat16(), tmp_path / "dense", shard="30KB")
    prune(dense, tmp_path / "out", **FREE, dtype="float32")
    assert bases_of(tmp_path / "out")
    verify_model(tmp_path / "out", original=dense)
    assert manifest_of(tmp_path / "out")["fingerprint"]["bases"]

"""Mask files and model cards of pruned folders."""

import json
import shutil
import tempfile
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from commands import shows
from forging import copied, fails, flip
from huggingface_hub import ModelCard
from hypothesis import given, strategies as st
from prunes import contents, prune, read_masks, smaller
from tiny_models import save, save_with_own_code, tiny, tokens

from maskopt import NM
from maskopt.errors import ModelError, OptionError, VerificationError
from maskopt.models.checkpoints.result import TensorMask, join_masks, write_masks
from maskopt.models.checkpoints.schema import MANIFEST, MASKS
from maskopt.models.evaluation.bound import certify_model
from maskopt.models.pruning import run as running
from maskopt.models.pruning.card import hub_name, write_card
from maskopt.models.pruning.output import apply_masks, extract_masks
from maskopt.models.verification.verify import verify_model


# --- mask files
@given(st.lists(st.integers(1, 9), min_size=2, max_size=3), st.integers(0, 99), st.booleans())
def test_masks_come_back(shape, seed, last):
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    axis = len(shape) - (1 if last else 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        write_masks(path, {"a.weight": TensorMask(kept, axis), "b": TensorMask(~kept, axis)})
        back = read_masks(path)
    b = back["b"]
    assert torch.equal(back["a.weight"].kept, kept)
    assert torch.equal(b.kept, ~kept)
    assert (b.input_axis, b.rows().shape[1]) == (axis, shape[axis])


def test_masks_are_applied_and_extracted(dense_folder, pruned_folder, tmp_path, monkeypatch):
    apply_masks(dense_folder, pruned_folder / MASKS, tmp_path / "out")
    for shard in pruned_folder.glob("model*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()
    masks, path = pruned_folder / MASKS, tmp_path / "masks.bits"
    fails(ModelError, "not empty", apply_masks, dense_folder, masks, tmp_path / "out")
    assert len(extract_masks(pruned_folder, path)) == 21
    theirs = read_masks(path)
    for name, mask in read_masks(masks).items():
        assert torch.equal(mask.kept, theirs[name].kept)
        assert mask.input_axis == theirs[name].input_axis
    fails(OptionError, "`overwrite`", extract_masks, pruned_folder, path)
    extract_masks(pruned_folder, path, overwrite=True)
    refuse = Mock(side_effect=OSError(30, "Read-only file system"))
    said = "cannot be written: Read-only file system"
    with monkeypatch.context() as patch:
        patch.setattr("maskopt.core.files.tempfile.mkstemp", refuse)
        fails(ModelError, said, extract_masks, pruned_folder, tmp_path / "masks.safetensors")
    # masks that do not belong to the model
    other, small = save(tiny("gpt2"), tmp_path / "gpt2"), tmp_path / "m.safetensors"
    mask = TensorMask(torch.ones(2, 2, dtype=torch.bool), 1)
    write_masks(small, {"model.layers.0.mlp.up_proj.weight": mask})
    result = copied(pruned_folder, tmp_path / "changed")
    flip(result / MASKS, -10)
    for model, masks, message in (
        (other, pruned_folder / MASKS, "has no tensor"),
        (dense_folder, small, r"is \[2, 2\]"),
        (dense_folder, result / MASKS, "does not match its digest"),
    ):
        fails(ModelError, message, apply_masks, model, masks, tmp_path / "applied")
    assert not (tmp_path / "applied").exists()
    fails(VerificationError, "was changed", verify_model, result)
    write_masks(small, {"x": mask})
    fails(ModelError, "another part", join_masks, tmp_path / "b.safetensors", [small, small])


# --- cards
TAKEN_OVER = """license: other
license_name: mine
license_link: https://example.org/licence
language: [en, de]
pipeline_tag: text-generation
"""
CARD = f"""---
{TAKEN_OVER}base_model: someone/below
extra_gated_prompt: Say please
tags: [chat]
---
# The original

Its text.
"""
OURS = {"library_name": "transformers", "tags": ["maskopt", "pruned", "sparse"]}
CODE = "put those files next to it"


@pytest.fixture(scope="module")
def snapshot(dense_folder, tmp_path_factory):
    """A model with a card where the hub's cache would have it."""
    home = tmp_path_factory.mktemp("hub") / "models--owner--name" / "snapshots" / "0123"
    shutil.copytree(dense_folder, home)
    (home / "README.md").write_text(CARD)
    return home


@pytest.fixture(scope="module")
def report(snapshot, tmp_path_factory):
    return prune(snapshot, tmp_path_factory.mktemp("pruned") / "out")


@pytest.fixture
def carded(report, tmp_path):
    return copied(report.output, tmp_path)


def test_a_card_inherits_what_still_holds_and_keeps_the_original(snapshot, report, carded):
    card = ModelCard.load(carded / "README.md")
    assert card.data.to_dict() == {**yaml.safe_load(TAKEN_OVER), "base_model": "owner/name", **OURS}
    manifest = json.loads((carded / MANIFEST).read_text())
    fingerprint, again = manifest["fingerprint"], "$ maskopt prune MODEL"
    shows(card.text, "owner/name, pruned to 50% zeros by maskopt", "wanda pruned 50.0% of")
    shows(card.text, f"{again} --config FOLDER/{MANIFEST} --calibration TEXT")
    shows(card.text, "that of the original holds: mine", fingerprint["model"])
    assert fingerprint["calibration"]["sha256"] in card.text
    assert CODE not in card.text
    for folder in (snapshot.parents[2], Path(report.output).parent):  # are nobody's business
        assert str(folder) not in card.content
    assert (carded / "README-original.md").read_text() == CARD
    assert "README-original.md" in manifest["files"]
    verify_model(carded, snapshot)
    (carded / "README.md").write_text("Edited by hand.")
    verify_model(carded, snapshot)
    (carded / "README-original.md").write_text("Not the original's.")
    fails(VerificationError, r"README-original.md: was changed", verify_model, carded, snapshot)


def test_the_figures_are_those_of_the_report(snapshot, tmp_path):
    model = shutil.copytree(snapshot, tmp_path / "dense")
    how = {"sparsity": NM(keep=2, of=4), "solver": "swap", "holdout": 0.34}
    report = prune(model, tmp_path / "out", include="layers.0", **how)
    text = (tmp_path / "out" / "README.md").read_text()
    for name in ("relative", "relative_held"):
        mean = sum(getattr(layer, name) for layer in report.layers) / len(report.layers)
        assert f"| {mean:.4g} |" in text
    assert "| 100% |" in text  # of the rows are proven
    assert "# dense, pruned to 2:4 by maskopt" in text
    assert "base_model: someone/below" in text  # of a folder without a name, its own card's


def test_every_card_outlives_prunes_and_stops(snapshot, carded, tmp_path, monkeypatch):
    first, twice = tmp_path / "first", tmp_path / "twice"
    smaller(snapshot, first, count=1)
    prune(first, twice)
    assert (twice / "README-original.md").read_text() == CARD
    assert (twice / "README-original-2.md").read_bytes() == (first / "README.md").read_bytes()
    verify_model(twice, first)
    fails(ModelError, "was pruned by maskopt already", prune, carded, tmp_path / "third")
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patched:
        patched.setattr(running, "write_manifest", Mock(side_effect=KeyboardInterrupt))
        fails(KeyboardInterrupt, None, prune, snapshot, stopped)
    staging = next(path.parent for path in stopped.rglob("README-original.md"))
    assert (staging / "README.md").exists()
    prune(snapshot, stopped, resume=True)
    assert contents(stopped) == contents(carded)


UNUSABLE = [
    *(None, b"no metadata", b"\xff\xfe\x00", b"---\n- a\n- list\n---\n", b"---\nlicense: [\n---\n"),
    b"---\nlicense: " + b"m" * 500 + b"\n---\n",
    b"---\nlicense_name: 'mine\n\n  # of all others'\n---\n",
    b"---\nlicense: {a: 1}\nlanguage: [1, 2]\nbase_model: 3\n---\n",
    b"---\nlicense: mit\n---\n" + b"x" * 2**20,
    b"---\neval_results: 7\nmodel-index: [{results: broken}]\n---\n",
]
LICENSED = b"---\nlicense: [mit, apache-2.0]\n---\n"


@pytest.mark.parametrize("card", [*UNUSABLE, LICENSED])
def test_of_an_unusable_card_nothing_is_taken_over(card, snapshot, report, tmp_path):
    shutil.copy(snapshot / "config.json", tmp_path)
    there = [] if card is None else ["README.md"]
    if there:
        (tmp_path / "README.md").write_bytes(card)
    files = write_card(tmp_path, report, None, "dense", ["LICENSE", *there])
    ours = ModelCard.load(tmp_path / "README.md")
    licences, said = {}, "its card names none"
    if card is LICENSED:
        licences = {"license": ["mit", "apache-2.0"]}
        said = "that of the original holds: mit, apache-2.0."
    assert ours.data.to_dict() == licences | OURS
    assert said in ours.text
    assert files == ["LICENSE", *(["README-original.md"] if there else [])]
    if there:
        assert (tmp_path / "README-original.md").read_bytes() == card


def test_an_unreadable_card_does_not_stop_a_prune_but_a_link_does(dense_folder, snapshot, tmp_path):
    model, out = Path(shutil.copytree(dense_folder, tmp_path / "dense")), tmp_path / "out"
    (model / "README.md").symlink_to(snapshot / "README.md")
    fails(ModelError, r"README\.md: is a link out of the model folder", prune, model, out)
    assert not out.exists()
    (model / "README.md").unlink()
    (model / "README.md").write_bytes(b"\xff\xfe\x00")
    prune(model, out)
    assert ModelCard.load(out / "README.md").data.to_dict() == OURS
    verify_model(out, model)


def test_cards_of_models_with_code_of_their_own(tmp_path):
    for path in ("/x/models--google--gemma-3-270m/snapshots/abc", "google/gemma-3-270m"):
        assert hub_name(path) == "google/gemma-3-270m"
    for path in ("/home/me/x", "./me/x", "", "a/b/c", "/x/models--alone/snapshots/abc"):
        assert hub_name(path) is None
    # code is not copied
    dense, out = save_with_own_code(tmp_path / "dense"), tmp_path / "own"
    prune(dense, out, trust_remote_code=True)
    assert CODE in (out / "README.md").read_text()
    shutil.copy(dense / "modeling_own.py", out)
    how = {"method": "box", "rows_per_layer": 1, "trust_remote_code": True}
    assert certify_model(dense, out, calibration=tokens(), **how)

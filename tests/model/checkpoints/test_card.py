"""The model card of a pruned folder: what the hub reads in it, what it takes over, what it refuses to."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from huggingface_hub import ModelCard
from outputs import contents
from tiny_models import save_with_own_code, tiny, tokens
from transformers import AutoModelForCausalLM

from maskopt import NM, prune_model
from maskopt.errors import ModelError, VerificationError
from maskopt.models.checkpoints.pack import pack, unpack_folder
from maskopt.models.checkpoints.workspace import MANIFEST
from maskopt.models.evaluation.bound import certify_model
from maskopt.models.pruning import run as running
from maskopt.models.pruning.card import hub_name, write_card
from maskopt.models.verification.verify import verify_model

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


def prune(model, out, **options):
    chosen = {"sparsity": 0.5, "solver": "wanda", "min_tokens": 1, **options}
    return prune_model(model, tokens(), output=out, **chosen)


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
def out(report, tmp_path):
    return Path(shutil.copytree(report.output, tmp_path / "out"))


def test_it_inherits_what_holds_for_the_pruned_model_too_and_keeps_the_original(
    snapshot, report, out
):
    card = ModelCard.load(out / "README.md")
    ours = yaml.safe_load(TAKEN_OVER) | {"base_model": "owner/name"} | OURS
    assert card.data.to_dict() == ours
    manifest = json.loads((out / MANIFEST).read_text())
    fingerprint = manifest["fingerprint"]
    for text in (
        "owner/name, pruned to 50% zeros by maskopt",
        "wanda pruned 50.0% of",
        "$ maskopt prune MODEL --config",
        "$ maskopt prune MODEL --sparsity 0.5 --solver wanda --min-tokens 1",
        "that of the original holds: mine",
        fingerprint["model"],
        fingerprint["calibration"]["sha256"],
    ):
        assert text in card.text
    assert CODE not in card.text
    for folder in (snapshot.parents[2], Path(report.output).parent):  # are nobody's business
        assert str(folder) not in card.content
    assert (out / "README-original.md").read_text() == CARD
    assert "README-original.md" in manifest["files"]
    verify_model(out, snapshot)
    (out / "README.md").write_text("Edited by hand.")
    verify_model(out, snapshot)
    (out / "README-original.md").write_text("Not the original's.")
    with pytest.raises(VerificationError, match=r"README-original.md: was changed"):
        verify_model(out, snapshot)


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


def test_packing_and_pruning_again_keep_every_card(out, tmp_path):
    pack(out, tmp_path / "packed")
    assert (tmp_path / "packed" / "README.md").read_bytes() == (out / "README.md").read_bytes()
    unpack_folder(tmp_path / "packed", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(out)
    twice = tmp_path / "twice"
    prune(out, twice, sparsity=0.75)
    assert (twice / "README-original.md").read_text() == CARD
    assert (twice / "README-original-2.md").read_text() == (out / "README.md").read_text()
    verify_model(twice, out)


@pytest.mark.parametrize(
    ("card", "licences"),
    [
        (None, None),
        (b"no metadata", None),
        (b"---\nlicense: [\n---\n", None),
        (b"---\n- a\n- list\n---\n", None),
        (b"\xff\xfe\x00", None),
        (b"---\nlicense: " + b"m" * 500 + b"\n---\n", None),
        (b"---\nlicense_name: 'mine\n\n  # of all others'\n---\n", None),
        (b"---\nlicense: {a: 1}\nlanguage: [1, 2]\nbase_model: 3\n---\n", None),
        (b"---\nlicense: mit\n---\n" + b"x" * 2**20, None),
        (b"---\neval_results: 7\nmodel-index: [{results: broken}]\n---\n", None),
        (b"---\nlicense: [mit, apache-2.0]\n---\n", ["mit", "apache-2.0"]),
    ],
)
def test_of_a_card_that_cannot_be_used_nothing_is_taken_over(
    card, licences, snapshot, report, tmp_path
):
    shutil.copy(snapshot / "config.json", tmp_path)
    there = [] if card is None else ["README.md"]
    if there:
        (tmp_path / "README.md").write_bytes(card)
    files = write_card(tmp_path, report, None, "dense", ["LICENSE", *there])
    ours = ModelCard.load(tmp_path / "README.md")
    assert ours.data.to_dict() == ({"license": licences} if licences else {}) | OURS
    said = ", ".join(licences) if licences else "its card names none"
    assert (f"that of the original holds: {said}." if licences else said) in ours.text
    assert files == ["LICENSE", *(["README-original.md"] if there else [])]
    if there:
        assert (tmp_path / "README-original.md").read_bytes() == card


def test_a_card_that_cannot_be_read_does_not_stop_a_prune_but_a_link_does(
    dense_folder, snapshot, tmp_path
):
    model, out = Path(shutil.copytree(dense_folder, tmp_path / "dense")), tmp_path / "out"
    (model / "README.md").symlink_to(snapshot / "README.md")
    with pytest.raises(ModelError, match=r"README\.md: is a link out of the model folder"):
        prune(model, out)
    assert not out.exists()
    (model / "README.md").unlink()
    (model / "README.md").write_bytes(b"\xff\xfe\x00")
    prune(model, out)
    assert ModelCard.load(out / "README.md").data.to_dict() == OURS
    verify_model(out, model)


def test_an_interruption_between_the_cards_and_the_end_leaves_the_same_bytes(
    snapshot, out, tmp_path, monkeypatch
):
    again = tmp_path / "again"
    with monkeypatch.context() as patched:
        patched.setattr(running, "write_manifest", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prune(snapshot, again)
    staging = next(path.parent for path in again.rglob("README-original.md"))
    assert (staging / "README.md").exists()
    prune(snapshot, again, resume=True)
    assert contents(again) == contents(out)


def test_a_model_in_memory_has_a_card_as_well_and_names_on_the_hub(tmp_path):
    model = tiny("llama")
    model.config._name_or_path = "owner/name"
    prune(model, tmp_path / "out")
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model == "owner/name"
    verify_model(tmp_path / "out")
    for path, name in (
        ("/x/models--google--gemma-3-270m/snapshots/abc", "google/gemma-3-270m"),
        ("google/gemma-3-270m", "google/gemma-3-270m"),
        *((path, None) for path in ("/home/me/gemma", "./me/gemma", "", "a/b/c")),
        ("/x/models--alone/snapshots/abc", None),
    ):
        assert hub_name(path) == name


def test_a_model_with_code_of_its_own_says_what_it_needs(tmp_path):
    """Of a folder the code is not copied; a model in memory is saved with it, and opened with nothing run."""
    dense, out = save_with_own_code(tmp_path / "dense"), tmp_path / "out"
    prune(dense, out, trust_remote_code=True)
    assert CODE in (out / "README.md").read_text()
    shutil.copy(dense / "modeling_own.py", out)
    how = {"method": "box", "rows_per_layer": 1, "trust_remote_code": True}
    assert certify_model(dense, out, calibration=tokens(), **how)
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    prune(model, tmp_path / "again", trust_remote_code=True)
    assert (tmp_path / "again" / MANIFEST).exists()

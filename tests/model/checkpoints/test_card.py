"""The model card of a pruned folder: what the hub reads in it, what it takes over, what it refuses to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from outputs import contents
from safetensors.torch import load_file
from tiny_models import save, save_with_own_code, tiny, tokens
from transformers import AutoModelForCausalLM

from maskopt import NM, prune_model
from maskopt.certify import certify_model
from maskopt.errors import ModelError, VerificationError
from maskopt.model.card import hub_name
from maskopt.model.pack import pack, unpack_folder
from maskopt.model.verify import verify_output
from maskopt.model.workspace import MANIFEST

CARD = """---
license: other
license_name: mine
license_link: https://example.org/licence
language: [en, de]
pipeline_tag: text-generation
base_model: someone/below
extra_gated_prompt: Say please
tags: [chat]
---
# The original

Its text.
"""


def dense(home: Path, card: str | bytes | None = CARD) -> Path:
    folder = save(tiny("llama"), home)
    if card is not None:
        (folder / "README.md").write_bytes(card.encode() if isinstance(card, str) else card)
    return folder


def pruned(model: Path, out: Path, **options: Any) -> Path:
    chosen = {"sparsity": 0.5, "solver": "wanda", "min_tokens": 1, **options}
    prune_model(model, tokens(6), output=out, **chosen)
    return out


def test_it_inherits_what_holds_for_the_pruned_model_too_and_keeps_the_original(
    tmp_path: Path,
) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    out = pruned(dense(snapshot), tmp_path / "out")
    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict() == {
        "license": "other",
        "license_name": "mine",
        "license_link": "https://example.org/licence",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
        "base_model": "owner/name",
        "library_name": "transformers",
        "tags": ["maskopt", "pruned", "sparse"],
    }
    assert "owner/name, pruned to 50% zeros by maskopt" in card.text
    assert "wanda pruned 50.0% of" in card.text
    assert "$ maskopt prune MODEL --config" in card.text
    assert "$ maskopt prune MODEL --sparsity 0.5 --solver wanda --min-tokens 1" in card.text
    assert "that of the original holds: mine" in card.text
    manifest = json.loads((out / "maskopt-manifest.json").read_text())
    for digest in (
        manifest["fingerprint"]["model"],
        manifest["fingerprint"]["calibration"]["sha256"],
    ):
        assert digest in card.text
    assert str(tmp_path) not in card.content  # a folder's path is nobody's business
    assert (out / "README-original.md").read_text() == CARD
    assert "README-original.md" in manifest["files"]
    verify_output(out, snapshot)
    (out / "README.md").write_text("Edited by hand.")
    verify_output(out, snapshot)
    (out / "README-original.md").write_text("Not the original's.")
    with pytest.raises(VerificationError, match=r"README-original.md: was changed"):
        verify_output(out, snapshot)


def test_the_figures_are_those_of_the_report(tmp_path: Path) -> None:
    model = dense(tmp_path / "dense")
    report = prune_model(
        model, tokens(6), output=tmp_path / "out", pattern=NM(keep=2, of=4), min_tokens=1,
        solver="swap", holdout=0.34,
    )  # fmt: skip
    text = (tmp_path / "out" / "README.md").read_text()
    for name in ("relative", "relative_held"):
        mean = sum(getattr(layer, name) for layer in report.layers) / len(report.layers)
        assert f"| {mean:.4g} |" in text
    assert "| 100% |" in text  # of the rows are proven
    assert "# dense, pruned to 2:4 by maskopt" in text
    assert "base_model: someone/below" in text  # of a folder without a name, its own card's


def test_a_pruned_model_that_is_pruned_again_keeps_every_card(tmp_path: Path) -> None:
    once = pruned(dense(tmp_path / "dense"), tmp_path / "once")
    twice = pruned(once, tmp_path / "twice", sparsity=0.75)
    assert (twice / "README-original.md").read_text() == CARD
    assert (twice / "README-original-2.md").read_text() == (once / "README.md").read_text()
    verify_output(twice, once)


@pytest.mark.parametrize(
    "card",
    [
        None,
        "no metadata",
        "---\nlicense: [\n---\n",
        "---\n- a\n- list\n---\n",
        b"\xff\xfe\x00",
        "---\nlicense: " + "m" * 500 + "\n---\n",
        "---\nlicense_name: 'mine\n\n  # of all others'\n---\n",
        "---\nlicense: {a: 1}\nlanguage: [1, 2]\nbase_model: 3\n---\n",
        "---\nlicense: mit\n---\n" + "x" * 2**20,
        "---\neval_results: 7\nmodel-index: [{results: broken}]\n---\n",
    ],
)
def test_of_a_card_that_cannot_be_used_nothing_is_taken_over(
    card: str | bytes | None, tmp_path: Path
) -> None:
    out = pruned(dense(tmp_path / "dense", card), tmp_path / "out")
    ours = ModelCard.load(out / "README.md")
    assert ours.data.to_dict() == {
        "library_name": "transformers",
        "tags": ["maskopt", "pruned", "sparse"],
    }
    assert "its card names none" in ours.text
    assert (out / "README-original.md").exists() == (card is not None)
    verify_output(out, tmp_path / "dense")


def test_several_licences_are_all_named(tmp_path: Path) -> None:
    folder = dense(tmp_path / "dense", "---\nlicense: [mit, apache-2.0]\n---\n")
    ours = ModelCard.load(pruned(folder, tmp_path / "out") / "README.md")
    assert ours.data["license"] == ["mit", "apache-2.0"]
    assert "Licence: that of the original holds: mit, apache-2.0." in ours.text


def test_a_card_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.md").write_text(CARD)
    model = dense(tmp_path / "dense", None)
    (model / "README.md").symlink_to(tmp_path / "elsewhere.md")
    with pytest.raises(ModelError, match=r"README\.md: is a link out of the model folder"):
        pruned(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interruption_between_the_cards_and_the_end_leaves_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from maskopt.model import output

    model = dense(tmp_path / "dense")
    whole = pruned(model, tmp_path / "whole")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(output, "write_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            pruned(model, tmp_path / "out")
    staging = next(path.parent for path in (tmp_path / "out").rglob("README-original.md"))
    assert (staging / "README.md").exists()
    pruned(model, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == contents(whole)


def test_a_model_in_memory_has_a_card_as_well(tmp_path: Path) -> None:
    model = tiny("llama")
    model.config._name_or_path = "owner/name"
    prune_model(
        model, tokens(6), output=tmp_path / "out", sparsity=0.5, solver="wanda", min_tokens=1
    )
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "owner/name"
    verify_output(tmp_path / "out")


def test_packing_keeps_the_cards(tmp_path: Path) -> None:
    out = pruned(dense(tmp_path / "dense"), tmp_path / "out")
    pack(out, tmp_path / "packed")
    assert (tmp_path / "packed" / "README.md").read_bytes() == (out / "README.md").read_bytes()
    unpack_folder(tmp_path / "packed", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(out)
    assert load_file(tmp_path / "again" / "model.safetensors")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/x/models--google--gemma-3-270m/snapshots/abc", "google/gemma-3-270m"),
        ("google/gemma-3-270m", "google/gemma-3-270m"),
        ("/home/me/gemma", None),
        ("./me/gemma", None),
        ("", None),
        ("a/b/c", None),
        ("/x/models--alone/snapshots/abc", None),
    ],
)
def test_names_on_the_hub(path: str, name: str | None) -> None:
    assert hub_name(path) == name


def test_a_model_with_code_of_its_own_says_what_it_needs(tmp_path: Path) -> None:
    """Of a folder the code is not copied; a model in memory is saved with it, and opened with nothing run."""
    dense, out = save_with_own_code(tmp_path / "dense"), tmp_path / "out"
    options = {"sparsity": 0.5, "solver": "wanda", "min_tokens": 1, "trust_remote_code": True}
    prune_model(dense, tokens(6), output=out, **options)  # type: ignore[arg-type]
    assert "put those files beside it" in (out / "README.md").read_text()
    shutil.copy(dense / "modeling_own.py", out)
    assert certify_model(
        dense, out, calibration=tokens(6), method="box", rows_per_layer=1, trust_remote_code=True
    )
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    prune_model(model, tokens(6), output=tmp_path / "again", **options)  # type: ignore[arg-type]
    assert (tmp_path / "again" / MANIFEST).exists()
    plain = save(tiny("llama"), tmp_path / "plain")
    prune_model(plain, tokens(6), output=tmp_path / "other", sparsity=0.5, solver="wanda")
    assert "put those files" not in (tmp_path / "other" / "README.md").read_text()

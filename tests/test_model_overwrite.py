"""`overwrite` replaces: what is in the folder afterwards is the new result and nothing of the earlier one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from test_model_resume import contents
from tiny_models import chat_tokenizer, save, tiny, tokens

from maskopt import prune_model, shrink_model
from maskopt.errors import ModelError
from maskopt.model.gram_store import collect_grams
from maskopt.model.output import apply_masks
from maskopt.model.pack import pack, unpack_folder
from maskopt.model.verify import verify_output
from maskopt.model.verify_smaller import verify_smaller
from maskopt.model.workspace import HIDDEN, MANIFEST, MASKS

OPTIONS: dict[str, Any] = {"sparsity": 0.5, "solver": "wanda", "min_tokens": 1}


def models(home: Path) -> tuple[Path, Path]:
    """One of several shards with a tokenizer, and one of one file without."""
    chatty = save(tiny("llama"), home / "chatty", shard="30KB")
    chat_tokenizer().save_pretrained(chatty)
    return chatty, save(tiny("llama"), home / "plain")


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_prune_over_that_of_another_model(tmp_path: Path) -> None:
    chatty, plain = models(tmp_path)
    prune_model(chatty, tokens(6), output=tmp_path / "out", **OPTIONS)
    (tmp_path / "out" / "notes.md").write_text("mine")
    prune_model(plain, tokens(6), output=tmp_path / "out", overwrite=True, **OPTIONS)
    prune_model(plain, tokens(6), output=tmp_path / "fresh", **OPTIONS)
    assert (tmp_path / "out" / "notes.md").read_text() == "mine"
    found = contents(tmp_path / "out")
    assert found.keys() == {*contents(tmp_path / "fresh"), "notes.md"}
    verify_output(tmp_path / "out", plain)


def test_over_a_model_that_has_no_manifest(tmp_path: Path) -> None:
    chatty, plain = models(tmp_path)
    (chatty / "notes.md").write_text("mine")
    (chatty / "vocab.txt").write_text("of an older tokenizer")
    prune_model(plain, tokens(6), output=chatty, overwrite=True, **OPTIONS)
    prune_model(plain, tokens(6), output=tmp_path / "fresh", **OPTIONS)
    assert contents(chatty).keys() == {*contents(tmp_path / "fresh"), "notes.md"}


def test_other_kinds_of_results_over_a_prune(tmp_path: Path) -> None:
    chatty, plain = models(tmp_path)
    for name in "abc":
        prune_model(chatty, tokens(6), output=tmp_path / name, **OPTIONS)
    shrink_model(
        plain, tokens(6), output=tmp_path / "a", overwrite=True, channels=0.5, solver="wanda"
    )
    verify_smaller(tmp_path / "a", plain)
    masks = tmp_path / "b" / MASKS
    apply_masks(chatty, masks, tmp_path / "c", overwrite=True)
    assert not (tmp_path / "c" / MANIFEST).exists()
    with pytest.raises(ModelError, match="nothing to resume"):
        prune_model(chatty, tokens(6), output=tmp_path / "c", resume=True, **OPTIONS)
    collect_grams(plain, tokens(6), output=tmp_path / "grams")
    prune_model(plain, tokens(6), output=tmp_path / "grams", overwrite=True, **OPTIONS)
    assert not [f for f in (tmp_path / "grams").iterdir() if "grams" in f.name]
    verify_output(tmp_path / "grams", plain)


def test_a_pack_over_another(tmp_path: Path) -> None:
    for name, dense in zip("ab", models(tmp_path), strict=True):
        prune_model(dense, tokens(6), output=tmp_path / name, **OPTIONS)
    pack(tmp_path / "a", tmp_path / "packed")
    pack(tmp_path / "b", tmp_path / "packed", overwrite=True)
    unpack_folder(tmp_path / "packed", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "b")
    # a file of another pack that someone put there is not of this one
    pack(tmp_path / "a", tmp_path / "other")
    (stray, *_) = (tmp_path / "other").glob("*.packed")
    (tmp_path / "packed" / stray.name).write_bytes(stray.read_bytes())
    unpack_folder(tmp_path / "packed", tmp_path / "again", overwrite=True)
    assert contents(tmp_path / "again") == contents(tmp_path / "b")


@pytest.mark.parametrize("write", [pack, unpack_folder])
def test_nothing_is_packed_over_itself(write: Any, tmp_path: Path) -> None:
    prune_model(models(tmp_path)[1], tokens(6), output=tmp_path / "out", **OPTIONS)
    pack(tmp_path / "out", tmp_path / "packed")
    folder = tmp_path / ("out" if write is pack else "packed")
    before = contents(folder)
    with pytest.raises(ModelError, match="is the model itself"):
        write(folder, folder, overwrite=True)
    assert contents(folder) == before


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_an_interrupt_of_the_last_step_loses_no_weights(
    at: int, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where files move, each is the earlier one, the new one, or waits: none is dropped."""
    chatty, plain = models(tmp_path)
    prune_model(plain, tokens(6), output=tmp_path / "out", **OPTIONS)
    prune_model(chatty, tokens(6), output=tmp_path / "other", **OPTIONS)
    masks = tmp_path / "other" / MASKS
    apply_masks(chatty, masks, tmp_path / "whole")
    replace, moved = os.replace, []

    def stopped(source: Any, target: Any) -> None:
        if Path(target).parent == tmp_path / "out" and Path(source).parent.name == "out":
            if len(moved) == at:
                raise error
            moved.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises((KeyboardInterrupt, ModelError)):
        apply_masks(chatty, masks, tmp_path / "out", overwrite=True)
    there, waits = tmp_path / "out", tmp_path / "out" / HIDDEN / "out"
    whole = files(tmp_path / "whole")
    for name, data in whole.items():
        new = [f for f in (there / name, waits / name) if f.exists() and f.read_bytes() == data]
        assert new, name
    monkeypatch.undo()
    apply_masks(chatty, masks, tmp_path / "out", overwrite=True)
    assert files(tmp_path / "out") == whole

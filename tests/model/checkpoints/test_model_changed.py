"""A model folder that changes while a prune reads it: the run itself notices, and nothing is half-written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forging import change_tensors, shard_of
from outputs import contents
from resuming import OPTIONS
from test_model_resume import whole  # noqa: F401
from tiny_models import edit_json, save, save_tokenizer, tiny, tokens

from maskopt import prune_model
from maskopt.errors import ModelError
from maskopt.model.checkpoint import INDEX, open_checkpoint
from maskopt.model.progress import BlockProgress
from maskopt.model.unchanged import Unchanged
from maskopt.model.verify import verify_output
from maskopt.model.workspace import HIDDEN


@pytest.fixture
def model(dense: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dense, tmp_path / "model"))


def add_one(model: Path, tensor: str) -> None:
    path = shard_of(model, tensor)
    times = path.stat()
    change_tensors(path, lambda t: t.update({tensor: t[tensor] + 1}))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as copies with their times do


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights to come": (lambda m: add_one(m, "model.layers.2.mlp.up_proj.weight"), r"model-0"),
    "weights done": (lambda m: add_one(m, "model.layers.0.mlp.up_proj.weight"), r"model-0"),
    "embedding": (lambda m: add_one(m, "model.embed_tokens.weight"), r"model-0"),
    "a shard is gone": (
        lambda m: shard_of(m, "lm_head.weight").unlink(),
        r"lm_head|model-0",
    ),
    "config": (
        lambda m: edit_json(m / "config.json", lambda c: c.update(rope_theta=1.0)),
        r"config\.json",
    ),
    "index": (lambda m: edit_json(m / INDEX, lambda i: i.update(metadata={})), INDEX),
    "a new tokenizer": (lambda m: (m / "vocab.txt").write_text("a"), r"vocab\.txt"),
    "a file is gone": (
        lambda m: (m / "generation_config.json").unlink(),
        r"generation_config\.json",
    ),
}


def changing(model: Path, out: Path, change: Callable[[Path], Any], block: int = 1) -> None:
    """Prune, with a change of the model in the middle of a block."""
    done: list[int] = []

    def meanwhile(event: BlockProgress) -> None:
        if (event.block, event.stage) == (block, "solve") and not done:
            done.append(1)
            change(model)

    prune_model(model, tokens(), output=out, on_progress=meanwhile, **OPTIONS)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed_by_the_run(
    name: str,
    model: Path,
    dense: Path,
    whole: dict[str, bytes],  # noqa: F811
    tmp_path: Path,
) -> None:
    change, message = CHANGES[name]
    out = tmp_path / "out"
    with pytest.raises(ModelError, match=f"{message}.*changed while the run was under way"):
        changing(model, out, change)
    assert [entry.name for entry in out.iterdir()] == [HIDDEN]
    shutil.rmtree(model)
    shutil.copytree(dense, model)
    prune_model(model, tokens(), output=out, resume=True, **OPTIONS)
    assert contents(out) == whole
    verify_output(out, against=dense)


def test_before_the_first_block_is_done_nothing_is_left(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="changed while the run was under way"):
        changing(model, tmp_path / "out", CHANGES["embedding"][0], block=0)
    assert not (tmp_path / "out").exists()


def test_another_model_is_not_resumed(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="changed while the run was under way"):
        changing(model, tmp_path / "out", CHANGES["weights done"][0])
    with pytest.raises(ModelError, match="model"):
        prune_model(model, tokens(), output=tmp_path / "out", resume=True, **OPTIONS)


def test_a_file_that_is_only_touched_is_the_same(
    model: Path,
    whole: dict[str, bytes],  # noqa: F811
    tmp_path: Path,
) -> None:
    def touch(folder: Path) -> None:
        for file in folder.iterdir():
            shutil.copy(file, tmp_path / "copy")
            os.replace(tmp_path / "copy", file)

    changing(model, tmp_path / "out", touch)
    assert contents(tmp_path / "out") == whole


def test_a_change_between_opening_and_beginning(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    Unchanged(checkpoint).check()
    change_tensors(shard_of(model, "lm_head.weight"), lambda t: t.update(more=torch.ones(3)))
    with pytest.raises(ModelError, match="changed while"):
        Unchanged(checkpoint)


def test_what_is_not_copied_may_change(model: Path, tmp_path: Path) -> None:
    changing(model, tmp_path / "out", lambda m: (m / "notes.py").write_text("x"))
    verify_output(tmp_path / "out", against=model)


def test_indices_of_other_weights_are_not_copied(tmp_path: Path) -> None:
    """A loader would look for what they name."""
    model = save(tiny("llama"), tmp_path / "model")
    save_tokenizer(model)
    for name in ("pytorch_model.bin.index.json", "model.fp16.safetensors.index.json", INDEX):
        (model / name).write_text('{"metadata": {}, "weight_map": {}}')
    prune_model(model, tokens(), output=tmp_path / "out", **OPTIONS)
    assert not list((tmp_path / "out").glob("*.index.json"))
    verify_output(tmp_path / "out", against=model)

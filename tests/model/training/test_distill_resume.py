"""Interrupted distillations: what was saved is gone on with, to the same bytes; nothing else is."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run
from tiny_models import edit_json, loud, save, tokens

from maskopt import distill_model, prune_model
from maskopt.errors import MaskoptError, ModelError, OptionError
from maskopt.model import output, training
from maskopt.model.distill_output import RECORD
from maskopt.model.journal import Journal
from maskopt.model.training_state import FolderKeeper
from maskopt.model.workspace import CARD, HIDDEN, JOURNAL, earlier_files

#: 24 windows are fitted, so that an epoch has twelve steps
WINDOWS = tokens(32)
STEPS = 12
#: a dense model, it pruned, and what an uninterrupted run makes of both
Given = tuple[Path, Path, dict[str, bytes]]
HOW: dict[str, Any] = {"epochs": 3, "learning_rate": 0.003, "holdout": 0.25, "save_every": 1e-9}


@pytest.fixture(scope="module", params=["llama", "gpt2-bfloat16"])
def given(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Given:
    """A dense model, it pruned, and what an uninterrupted run makes of both. Nobody may change them."""
    home = tmp_path_factory.mktemp("given")
    family, _, dtype = request.param.partition("-")
    dense = save(loud(family, getattr(torch, dtype or "float32")), home / "dense")
    how = {"sparsity": 0.5, "solver": "wanda", "min_tokens": 1}
    prune_model(dense, tokens(6), output=home / "pruned", **how)
    found = distill_model(home / "pruned", dense, WINDOWS, output=home / "whole", **HOW)
    assert found.epoch == 3
    return dense, home / "pruned", files(home / "whole")


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


class _Stop(Exception):
    pass


def stop_after(step: int) -> Callable[[str, int, int], None]:
    def stop(what: str, done: int, total: int) -> None:
        assert total == 2 * 3 * STEPS or what != "train"
        if what == "train" and done == 2 * step:
            raise _Stop

    return stop


def interrupted(dense: Path, pruned: Path, out: Path, step: int, **how: Any) -> None:
    with pytest.raises(_Stop):
        distill_model(
            pruned, dense, WINDOWS, output=out, on_progress=stop_after(step), **{**HOW, **how}
        )


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every step that is taken."""
    taken, plain = [], training._set_gradients

    def counted(*arguments: Any) -> None:
        taken.append(1)
        plain(*arguments)

    monkeypatch.setattr(training, "_set_gradients", counted)
    return taken


@pytest.mark.parametrize("step", [1, STEPS - 1, STEPS, STEPS + 1, 3 * STEPS])
def test_the_same_bytes(step: int, given: Given, tmp_path: Path, steps: list[int]) -> None:
    """In the first epoch, before it is judged, after that, and at the very end."""
    dense, pruned, whole = given
    out = tmp_path / "out"
    interrupted(dense, pruned, out, step)
    assert [entry.name for entry in out.iterdir()] == [HIDDEN]
    with pytest.raises(ModelError, match="unfinished run; go on with `resume`"):
        distill_model(pruned, dense, WINDOWS, output=out, **HOW)
    found = distill_model(pruned, dense, WINDOWS, output=out, resume=True, **HOW)
    assert files(out) == whole
    assert len(steps) == 3 * STEPS
    assert found.epoch == 3
    # nothing is left to do
    again = distill_model(pruned, dense, WINDOWS, output=out, resume=True, **HOW)
    assert (again.before, again.after, again.epoch) == (found.before, found.after, found.epoch)
    assert len(steps) == 3 * STEPS
    assert files(out) == whole


def test_again_and_again_from_what_was_saved_earlier(
    given: Given,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: list[int],
) -> None:
    dense, pruned, whole = given
    asked = itertools.count(1)
    monkeypatch.setattr(FolderKeeper, "due", lambda _: next(asked) % 5 == 0)
    interrupted(dense, pruned, tmp_path / "out", 9)
    interrupted(dense, pruned, tmp_path / "out", 14, resume=True, threads=1)
    # of the steps up to the 9th the first five were saved, and five more after them
    assert len(steps) == 9 + 9
    (saved,) = (tmp_path / "out" / HIDDEN / "blocks").glob("step-*")
    assert saved.name == "step-00000011.safetensors"
    distill_model(pruned, dense, WINDOWS, output=tmp_path / "out", resume=True, threads=3, **HOW)
    assert len(steps) == 9 + 9 + 3 * STEPS - 11
    assert files(tmp_path / "out") == whole


def test_killed_while_it_saves(
    given: Given,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: list[int],
) -> None:
    """As a dead process leaves the folder: a file that no line of the journal counts, and half of another."""
    dense, pruned, whole = given
    out, dead = tmp_path / "out", tmp_path / "dead"
    plain = Journal.set_progress

    def dies(self: Journal, record: dict[str, Any]) -> None:
        if record["step"] == 4:
            shutil.copytree(out, dead)
        plain(self, record)

    monkeypatch.setattr(Journal, "set_progress", dies)
    interrupted(dense, pruned, out, 6)
    (dead / HIDDEN / "blocks" / ".step-00000005.safetensors.x.tmp").write_bytes(b"half")
    assert sorted(x.name for x in (dead / HIDDEN / "blocks").glob("step-*")) == [
        "step-00000003.safetensors",
        "step-00000004.safetensors",
    ]
    steps.clear()
    monkeypatch.setattr(Journal, "set_progress", plain)
    distill_model(pruned, dense, WINDOWS, output=dead, resume=True, **HOW)
    assert len(steps) == 3 * STEPS - 3
    assert files(dead) == whole


def test_the_best_epoch_is_kept_though_later_ones_are_worse(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, pruned, _ = given
    plain = training._mean
    judged: list[int] = []

    def worse(task: Any, windows: Any, pool: Any) -> float:
        """From the second epoch on: those kept aside are judged at the start, and after every epoch."""
        loss = plain(task, windows, pool)
        if list(windows) == list(task.held):
            judged.append(1)
            return loss * max(1, len(judged) - 1)
        return loss

    monkeypatch.setattr(training, "_mean", worse)
    found = distill_model(pruned, dense, WINDOWS, output=tmp_path / "whole", **HOW)
    assert found.epoch == 1
    judged.clear()
    interrupted(dense, pruned, tmp_path / "out", 2 * STEPS + 3)
    again = distill_model(pruned, dense, WINDOWS, output=tmp_path / "out", resume=True, **HOW)
    assert (again.before, again.after, again.epoch) == (found.before, found.after, 1)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_what_is_not_saved_is_not_kept(given: Given, tmp_path: Path) -> None:
    dense, pruned, _ = given
    # ten minutes, the default, are not over
    for every in (0.0, 10.0):
        interrupted(dense, pruned, tmp_path / "out", 2 * STEPS, save_every=every)
        assert not (tmp_path / "out").exists()
        with pytest.raises(ModelError, match="nothing to resume"):
            distill_model(pruned, dense, WINDOWS, output=tmp_path / "out", resume=True, **HOW)


def test_what_cannot_be_gone_on_with(given: Given, tmp_path: Path) -> None:
    dense, pruned, whole = given
    out = tmp_path / "out"
    interrupted(dense, pruned, out, 3)

    def refused(words: str, kind: type[MaskoptError] = ModelError, **more: Any) -> None:
        with pytest.raises(kind, match=words):
            distill_model(
                pruned,
                dense,
                **{"output": out, "resume": True, "calibration": WINDOWS, **HOW, **more},
            )

    refused(r"unfinished run is another one: options\.epochs was 3, is 2", epochs=2)
    refused(r"calibration\.sha256", calibration=tokens(32, seed=1))
    refused("goes on with what `overwrite` drops", overwrite=True)
    refused("save_every", OptionError, save_every=-1)
    (saved,) = (out / HIDDEN / "blocks").glob("step-*")
    right = saved.read_bytes()
    for wrong in (right[:-1] + bytes([right[-1] ^ 1]), right[:100], None):
        saved.unlink() if wrong is None else saved.write_bytes(wrong)
        refused("does not match the journal")
    # nothing was lost meanwhile
    saved.write_bytes(right)
    distill_model(pruned, dense, WINDOWS, output=out, resume=True, **HOW)
    assert files(out) == whole
    refused(r"holds the result of another run: options\.batch was 2, is 3", batch=3)
    assert earlier_files(out) == {file.name for file in out.iterdir()}
    (weights, *_) = sorted(out.glob("*.safetensors"))
    good = weights.read_bytes()
    weights.write_bytes(good[:-7])
    refused(f"{weights.name} was changed since .*; `overwrite`")
    weights.write_bytes(good)
    (out / CARD).write_text("edited")
    distill_model(pruned, dense, WINDOWS, output=out, resume=True, **HOW)
    edit_json(out / RECORD, lambda record: record.pop("after"))
    refused("is damaged; start over with `overwrite`")


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../x"},
        {"step": -1},
        {"step": True},
        {"before": [1.0]},
        {"held": None},
        {"digest": 7},
    ],
)
def test_a_forged_journal_is_refused(change: dict[str, Any], given: Given, tmp_path: Path) -> None:
    dense, pruned, _ = given
    out = tmp_path / "out"
    interrupted(dense, pruned, out, 1)
    path = out / HIDDEN / JOURNAL
    journal = Journal(path)
    assert journal.progress is not None
    record = {name: value for name, value in journal.progress.items() if name != "kind"}
    journal.set_progress({**record, **change})
    with pytest.raises(ModelError, match="not a journal of maskopt"):
        distill_model(pruned, dense, WINDOWS, output=out, resume=True, **HOW)


def test_a_full_disk_is_noticed_beforehand(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, pruned, _ = given
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    with pytest.raises(ModelError, match=r"free on the disk; `save_every` 0 takes less"):
        distill_model(pruned, dense, WINDOWS, output=tmp_path / "out", **HOW)
    assert not (tmp_path / "out").exists()


def test_the_command_goes_on(given: Given, tmp_path: Path) -> None:
    dense, pruned, _ = given
    text, out = tmp_path / "tokens.npy", tmp_path / "out"
    np.save(text, WINDOWS.numpy())
    with pytest.raises(_Stop):
        distill_model(
            pruned, dense, calibration=text, output=out, on_progress=stop_after(20), **HOW
        )
    how = ["--epochs", "3", "--learning-rate", "0.003", "--holdout", "0.25", "--output", str(out)]
    said = run(
        *("distill", pruned, "--teacher", dense, "--calibration", text, *how, "--resume"),
        *("--save-every", "0"),
    )
    assert "trained model" in said
    assert json.loads((out / RECORD).read_text())["epoch"] == 3
    assert not (out / HIDDEN).exists()

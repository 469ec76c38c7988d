"""Interrupted distillations: what was saved is gone on with, to the same bytes; nothing else is."""

import itertools
import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from commands import run
from tiny_models import edit_json, tokens

from maskopt import distill_model
from maskopt.errors import ModelError, OptionError
from maskopt.model import output, training
from maskopt.model.distill_output import RECORD
from maskopt.model.journal import Journal
from maskopt.model.training_state import FolderKeeper
from maskopt.model.workspace import CARD, HIDDEN, JOURNAL, earlier_files

#: of 16 windows 12 are fitted, so that an epoch has six steps
STEPS = 6
HOW = {"epochs": 3, "learning_rate": 0.003, "holdout": 0.25, "save_every": 1e-9}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "tokens.npy"
    np.save(path, tokens(16).numpy())
    return path


@pytest.fixture(
    scope="module", params=["llama", pytest.param("gpt2-bfloat16", marks=pytest.mark.slow)]
)
def given(request, made, text, tmp_path_factory):
    """A run, and what it makes when nothing interrupts it."""
    family, _, dtype = request.param.partition("-")
    dense, pruned = made(family, dtype=getattr(torch, dtype or "float32"))
    whole = tmp_path_factory.mktemp("whole") / "out"
    distil = partial(distill_model, pruned, dense, calibration=text, **HOW)
    assert distil(output=whole).epoch == 3
    return distil, files(whole)


only_llama = pytest.mark.parametrize("given", ["llama"], indirect=True)


def files(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


class _Stop(Exception):
    pass


def interrupted(distil, out, step, **how):
    def stop(what, done, total):
        assert total == 2 * 3 * STEPS or what != "train"
        if what == "train" and done == 2 * step:
            raise _Stop

    with pytest.raises(_Stop):
        distil(output=out, on_progress=stop, **how)


@pytest.fixture
def steps(monkeypatch):
    """Grows by one with every step that is taken."""
    taken, plain = [], training._set_gradients
    monkeypatch.setattr(training, "_set_gradients", lambda *a: (taken.append(1), plain(*a)))
    return taken


@pytest.mark.parametrize(
    ("every", "kills", "taken"),
    [  # kills: after so many steps, of which so many were saved
        # in the first epoch, before it is judged, after that, and at the very end
        (1, {k: k for k in (1, STEPS - 1, STEPS, STEPS + 1, 3 * STEPS)}, 3 * STEPS),
        (5, {7: 5, 11: 8}, 7 + 6 + 3 * STEPS - 8),
    ],
)
def test_the_same_bytes(every, kills, taken, given, tmp_path, steps, monkeypatch):
    (distil, whole), out = given, tmp_path / "out"
    asked = itertools.count(1)
    monkeypatch.setattr(FolderKeeper, "due", lambda _: next(asked) % every == 0)
    for threads, (step, kept) in enumerate(kills.items(), 1):
        interrupted(distil, out, step, threads=threads, resume=threads > 1)
        assert [entry.name for entry in out.iterdir()] == [HIDDEN]
        (saved,) = (out / HIDDEN / "blocks").glob("step-*")
        assert saved.name == f"step-{kept:08}.safetensors"
        with pytest.raises(ModelError, match="unfinished run; go on with `resume`"):
            distil(output=out)
    found = distil(output=out, resume=True)
    assert files(out) == whole
    assert len(steps) == taken
    assert found.epoch == 3
    # nothing is left to do
    again = distil(output=out, resume=True)
    assert (again.before, again.after, again.epoch) == (found.before, found.after, found.epoch)
    assert len(steps) == taken
    assert files(out) == whole


@only_llama
def test_killed_while_it_saves(given, tmp_path, monkeypatch, steps):
    """A dead process leaves a file that no line of the journal counts, and half of another. The command
    goes on from there."""
    (distil, whole), out, dead = given, tmp_path / "out", tmp_path / "dead"
    plain = Journal.set_progress

    def dies(self, record):
        if record["step"] == 4:
            shutil.copytree(out, dead)
        plain(self, record)

    monkeypatch.setattr(Journal, "set_progress", dies)
    interrupted(distil, out, 5)
    (dead / HIDDEN / "blocks" / ".step-00000005.safetensors.x.tmp").write_bytes(b"half")
    assert sorted(x.name for x in (dead / HIDDEN / "blocks").glob("step-*")) == [
        "step-00000003.safetensors",
        "step-00000004.safetensors",
    ]
    steps.clear()
    monkeypatch.setattr(Journal, "set_progress", plain)
    (pruned, dense), text = distil.args, distil.keywords["calibration"]
    how = ["--calibration", text, "--epochs", 3, "--learning-rate", 0.003, "--holdout", 0.25]
    how += ["--output", dead, "--resume", "--save-every", 0]
    assert "trained model" in run("distill", pruned, "--teacher", dense, *how)
    assert json.loads((dead / RECORD).read_text())["epoch"] == 3
    assert len(steps) == 3 * STEPS - 3
    assert files(dead) == whole


@only_llama
def test_the_best_epoch_is_kept_though_later_ones_are_worse(given, tmp_path, monkeypatch):
    distil, _ = given
    plain, judged = training._mean, []

    def worse(task, windows, pool):
        """From the second epoch on: held windows are judged at the start, and after every epoch."""
        loss = plain(task, windows, pool)
        if list(windows) == list(task.held):
            judged.append(1)
            return loss * max(1, len(judged) - 1)
        return loss

    monkeypatch.setattr(training, "_mean", worse)
    found = distil(output=tmp_path / "whole")
    assert found.epoch == 1
    judged.clear()
    interrupted(distil, tmp_path / "out", 2 * STEPS + 3)
    again = distil(output=tmp_path / "out", resume=True)
    assert (again.before, again.after, again.epoch) == (found.before, found.after, 1)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@only_llama
def test_what_is_not_saved_is_not_kept(given, tmp_path, monkeypatch):
    distil, out = given[0], tmp_path / "out"
    # ten minutes, the default, are not over
    for every in (0.0, 10.0):
        interrupted(distil, out, STEPS + 1, save_every=every)
        assert not out.exists()
        with pytest.raises(ModelError, match="nothing to resume"):
            distil(output=out, resume=True)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    with pytest.raises(ModelError, match=r"free on the disk; `save_every` 0 takes less"):
        distil(output=out)
    assert not out.exists()


@only_llama
def test_what_cannot_be_gone_on_with(given, tmp_path):
    (distil, whole), out = given, tmp_path / "out"
    interrupted(distil, out, 3)

    def refused(words, kind=ModelError, **more):
        with pytest.raises(kind, match=words):
            distil(output=out, resume=True, **more)

    refused(r"unfinished run is another one: options\.epochs was 3, is 2", epochs=2)
    refused(r"calibration\.sha256", calibration=tokens(16, seed=1))
    refused("goes on with what `overwrite` drops", overwrite=True)
    refused("save_every", OptionError, save_every=-1)
    path = out / HIDDEN / JOURNAL
    right, journal = path.read_bytes(), Journal(path)
    record = {name: value for name, value in journal.progress.items() if name != "kind"}
    for forged in (
        *({"file": "../x"}, {"step": -1}, {"step": True}),
        *({"before": [1.0]}, {"held": None}, {"digest": 7}),
    ):
        journal.set_progress({**record, **forged})
        refused("not a journal of maskopt")
    path.write_bytes(right)
    (saved,) = (out / HIDDEN / "blocks").glob("step-*")
    right = saved.read_bytes()
    for wrong in (right[:-1] + bytes([right[-1] ^ 1]), right[:100], None):
        saved.unlink() if wrong is None else saved.write_bytes(wrong)
        refused("does not match the journal")
    # nothing was lost meanwhile
    saved.write_bytes(right)
    distil(output=out, resume=True)
    assert files(out) == whole
    refused(r"holds the result of another run: options\.batch was 2, is 3", batch=3)
    assert earlier_files(out) == {file.name for file in out.iterdir()}
    (weights, *_) = sorted(out.glob("*.safetensors"))
    good = weights.read_bytes()
    weights.write_bytes(good[:-7])
    refused(f"{weights.name} was changed since .*; `overwrite`")
    weights.write_bytes(good)
    (out / CARD).write_text("edited")
    distil(output=out, resume=True)
    edit_json(out / RECORD, lambda record: record.pop("after"))
    refused("is damaged; start over with `overwrite`")

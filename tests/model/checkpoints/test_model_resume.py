"""Interrupted prunes: killed, out of disk, two at once, of a changing model. Resumed output is identical."""

import json
import multiprocessing
import os
import random
import shutil
import time
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import prunes
import pytest
import torch
from commands import small_files
from filelock import FileLock
from forging import change_tensors, copied, fails, flip, shard_of, signed
from prunes import Stop, contents, files, slow
from tiny_models import edit_json, overflowing, patched, save, tiny, tokens

from maskopt.errors import ModelError
from maskopt.models.checkpoints.checkpoint import open_checkpoint
from maskopt.models.checkpoints.result import Unchanged
from maskopt.models.checkpoints.schema import INDEX, MANIFEST, MASKS
from maskopt.models.checkpoints.workspace import GONE, HIDDEN, Journal, read_journal
from maskopt.models.verification.verify import verify_model

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
JOURNAL = f"{HIDDEN}/journal.jsonl"
OPTIONS = {"solver": "elimination", "start": "wanda"}
prune, interrupted = (partial(f, **OPTIONS) for f in (prunes.prune, prunes.interrupted))
ROUNDS = {"true_sequential": True, "token_weights": "gradient"}
STOPPED = [
    *(({}, block, stage) for block, stage in ((1, "calibrate"), (1, "solve"), (2, "calibrate"))),
    *((options, 1, "solve") for options in ({"calibrate_on": "dense"}, ROUNDS)),
]
FULL, IN_FILES = Mock(side_effect=OSError(28, "No space left")), {"activation_memory": 0}
LATER = {"embedding", "a shard is gone", "a new tokenizer"}  # noticed in the same ways as others


def refused(message, dense, out, **options):
    """In one line, before anything is done."""
    given, began = {"resume": True, **options}, []
    fails(ModelError, rf"\A.*({message}).*\Z", prune, dense, out, on_progress=began.append, **given)
    assert not began


@pytest.fixture(scope="module")
def whole_folder(dense, tmp_path_factory):
    return prune(dense, tmp_path_factory.mktemp("whole") / "out").output


@pytest.fixture(scope="module")
def whole(whole_folder):
    return contents(whole_folder)


@pytest.fixture(scope="module")
def unfinished(dense, tmp_path_factory):
    """What the same run leaves when it is stopped in its last block."""
    interrupted(dense, out := tmp_path_factory.mktemp("unfinished") / "out", 2, "solve")
    return out


@pytest.fixture
def stopped(unfinished, tmp_path):
    return copied(unfinished, tmp_path)


@pytest.mark.parametrize(("options", "block", "stage"), STOPPED)
def test_a_stopped_run_goes_on_to_the_same_bytes(options, block, stage, dense, whole, tmp_path):
    out = tmp_path / "out"
    if options:
        prune(dense, tmp_path / "whole", **options)
        whole = contents(tmp_path / "whole")
    interrupted(dense, out, block, stage, **options)
    assert [entry.name for entry in out.iterdir()] == [HIDDEN]
    refused("unfinished run; go on with `resume`", dense, out, resume=False, **options)
    for _ in range(2):  # at the second time nothing is left to do
        assert len(prune(dense, out, resume=True, **options).layers) == 21
        assert contents(out) == whole


def test_skipped_samples_stay_skipped_and_threads_and_memory_change_no_byte(dense, whole, tmp_path):
    for number, more in enumerate(({"max_memory": 2**33}, {"threads": 5, "activation_memory": 0})):
        prune(dense, out := tmp_path / str(number), **{"threads": 1, **more})
        assert contents(out) == whole
    bad, data = save(overflowing(), tmp_path / "bad"), tokens()
    data[data == 5] = 6
    data[1, 2] = 5
    options = {"skip_bad_samples": True, "include": ["q_proj"]}
    prune(bad, tmp_path / "whole", data, **options)
    interrupted(bad, tmp_path / "out", 1, "solve", data=data, **options)
    report = prune(bad, tmp_path / "out", data, resume=True, **options)
    assert [item["sample"] for item in report.bad_samples] == [1]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_journal_of_another_run_is_refused(dense, stopped, tmp_path, monkeypatch):
    before = (stopped / JOURNAL).read_bytes()
    for change, message in (
        ({"seed": 1}, "options.seed was 0, is 1"),
        ({"sparsity": 0.6}, r"options.sparsity was '0.5', is '0.6'"),
        ({"solver": "wanda", "start": None}, "options.solver was 'elimination'"),
        ({"exclude": ["k_proj"]}, "options.exclude"),
        ({"dtype": "float64"}, "dtype was 'float32', is 'float64'"),
        ({"data": tokens(seed=9)}, r"calibration\.sha256 was"),
    ):
        refused(message, dense, stopped, **change)
        assert (stopped / JOURNAL).read_bytes() == before
    model = patched(tiny("llama"), "lm_head.weight", lambda p: p[0, 0].add_(1))
    refused("model was", save(model, tmp_path / "other", shard="30KB"), stopped)
    monkeypatch.setattr("maskopt.models.checkpoints.report.__version__", "99")
    refused(r"versions.maskopt was .*, is '99'", dense, stopped)


def forge(out, **change):
    """The digests of a journal are no secret: whoever changes a line can make them right."""
    records = [r | change if r["kind"] == "block" else r for r in read_journal(out / JOURNAL)]
    lines = [json.dumps(signed(record), sort_keys=True) + "\n" for record in records]
    (out / JOURNAL).write_text("".join(lines))


def folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()
    (path / "x").write_text("mine")


def link(out, name):
    target, place = out.parent / "elsewhere", out / HIDDEN / name
    target.mkdir()
    shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    place.symlink_to(target / "new" if name in ("journal.jsonl", "lock") else target)


CONFIG = "config.json"
SHARD, BLOCK = "model-00001-of-00005.safetensors", f"{HIDDEN}/blocks/00001.safetensors"
SPOILED = {
    "journal": (lambda out: flip(out / JOURNAL, 99), "damaged"),
    "the same number": (  # with a capital E
        lambda out: flip(out / JOURNAL, (out / JOURNAL).read_bytes().upper().index(b"E-0"), 32),
        "damaged",
    ),
    "masks": (lambda out: flip(out / BLOCK, -3), "does not match the journal"),
    "forged masks": (lambda out: forge(out, masks=3), "not a journal"),
    "forged layers": (lambda out: forge(out, layers=0), "not a journal"),
    "forged samples": (lambda out: forge(out, bad=[1]), "not a journal"),
    "forged index": (lambda out: forge(out, index=-1), "not a journal"),
    "folder": (lambda out: folder(out / SHARD), f"does not list 1 of .*: {SHARD};"),
    "folder of out": (lambda out: folder(out / HIDDEN / "out" / SHARD), f"{SHARD}: is a folder, "),
    "folder of blocks": (lambda out: folder(out / BLOCK), f"{BLOCK}: is a folder, which"),
    **{
        f"link {name}": (lambda out, name=name: link(out, name), "is a link, which maskopt never")
        for name in ("", "out", "blocks", "lock", "journal.jsonl")
    },
}


@posix
@pytest.mark.parametrize("name", SPOILED)
def test_an_unfinished_run_that_was_changed_is_refused(name, dense, stopped, tmp_path):
    spoil, message = SPOILED[name]
    spoil(stopped)
    before = files(tmp_path)
    refused(message, dense, stopped)
    if "link" in name:
        refused(message, dense, stopped, resume=False, overwrite=True)
    assert files(tmp_path) == before


def test_what_is_lost_or_was_put_right_goes_on(dense, whole, stopped, tmp_path):
    torn = Journal(tmp_path / "journal.jsonl")
    torn.add("header", header={"a": 1})
    torn.path.write_bytes(torn.path.read_bytes() + b"torn")
    Journal(torn.path).add("block", index=0, layers=[])
    assert [record["kind"] for record in read_journal(torn.path)] == ["header", "block"]
    # shards are written as they are done, and again if lost or changed
    first, second, *_ = written = sorted((stopped / HIDDEN / "out").glob("model-*.safetensors"))
    assert len(written) < len([name for name in whole if name.startswith("model-")])
    assert all(shard.read_bytes() == whole[shard.name] for shard in written)
    assert set(Journal(stopped / JOURNAL).shards) == {shard.name for shard in written}
    first.unlink()
    flip(second)
    journal = stopped / JOURNAL
    good, generator = journal.read_bytes(), random.Random(0)
    for _ in range(30):
        journal.write_bytes(good)
        flip(journal, generator.randrange(len(good) - 1), 1 << generator.randrange(8))
        fails(ModelError, r"damaged|not a journal", Journal, journal)
    journal.write_bytes(good + b'{"kind": "block", "ind')  # cut off by a crash: dropped
    (tmp_path / "mine.txt").write_text("mine")
    committed = stopped / HIDDEN / "committed"
    committed.write_text("../../../mine.txt\nconfig.json")
    said = "committed: is damaged; start over with `overwrite`"
    fails(ModelError, said, prune, dense, stopped, resume=True)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    committed.unlink()
    prune(dense, stopped, resume=True)
    assert contents(stopped) == whole


def test_a_finished_result_that_was_damaged_is_not_finished(dense, whole_folder, tmp_path):
    finished = copied(whole_folder, tmp_path)
    shard = sorted(finished.glob("*.safetensors"))[1]
    for path in (shard, finished / "config.json", finished / MASKS):
        right = path.read_bytes()
        for wrong in (right[:-7], right[:-1] + bytes([right[-1] ^ 1]), right[:3]):
            path.write_bytes(wrong)
            refused(f"{path.name} was changed .*; `overwrite`", dense, finished)
        path.unlink()
        refused(f"{path.name} is gone; `overwrite`", dense, finished)
        path.write_bytes(right)
    shard.unlink()
    shard.mkdir()
    refused(f"{shard.name} is a folder; `overwrite`", dense, finished)
    refused(f"1 of .*: {shard.name}; choose", dense, finished, resume=False, overwrite=True)
    shard.rmdir()
    prune(dense, finished, overwrite=True)
    prune(dense, finished, resume=True)


def test_killed_while_it_clears_up(dense, whole, stopped, monkeypatch):
    def stop(path, **_):
        if Path(path).name.startswith(HIDDEN) and Path(path).exists():
            (Path(path) / "journal.jsonl").unlink()
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("maskopt.models.checkpoints.workspace.shutil.rmtree", stop)
        fails(Stop, None, prune, dense, stopped, resume=True)
    began = []
    prune(dense, stopped, resume=True, on_progress=began.append)
    assert not began  # nothing is done again
    assert contents(stopped) == whole


def commit_until(move, monkeypatch, dense, out):
    """A run that goes on, and is stopped before its move number `move` into the output folder."""
    real, moves = os.replace, iter(range(1, 1000))

    def replace(source, target):
        if Path(target).parent == out and next(moves) == move:
            raise Stop
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("maskopt.models.checkpoints.workspace.os.replace", replace)
        fails(Stop, None, prune, dense, out, resume=True)


@pytest.mark.parametrize("move", [1, slow(3), 5])
@pytest.mark.parametrize("over", [False, True])
def test_a_commit_is_finished(over, move, dense, whole, whole_folder, stopped, monkeypatch):
    if over:
        shutil.copytree(whole_folder, stopped, dirs_exist_ok=True)
    commit_until(move, monkeypatch, dense, stopped)
    assert over or not (stopped / MANIFEST).exists()
    prune(dense, stopped, resume=True)
    assert contents(stopped) == whole


def test_an_interrupted_commit_can_be_replaced(dense, stopped, tmp_path, monkeypatch):
    commit_until(2, monkeypatch, dense, stopped)
    assert len([*stopped.iterdir()]) == 2
    for stage in ("calibrate", "solve"):
        interrupted(dense, stopped, 0, stage, overwrite=True)
    other = save(tiny("llama"), tmp_path / "other")
    prune(other, stopped, overwrite=True)
    verify_model(stopped, original=other)


def attempts(dense, out):
    for resume in (False, True):
        refused("another process is at work", dense, out, resume=resume, overwrite=not resume)
    return "both are refused"


def test_a_second_process_is_refused(dense, tmp_path):
    out, said = tmp_path / "out", []
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")

    def meanwhile(event):
        if event.stage == "solve" and event.block == 0 and not said:
            with context.Pool(1) as pool:
                said.append(pool.apply(attempts, (dense, out)))

    prune(dense, out, on_progress=meanwhile)
    assert said
    verify_model(out, original=dense)


@posix
@pytest.mark.parametrize("newcomer", [False, True])
def test_a_lock_that_was_moved_away_is_none(newcomer, dense, tmp_path, monkeypatch):
    """Between our opening of the lock file and our lock the process before moves the hidden folder away."""
    out = tmp_path / "out"

    class Late(FileLock):
        def __init__(self, path, *, on_acquired, **options):
            def after_others(handle):
                os.replace(out / HIDDEN, out / GONE)
                if newcomer:
                    (out / HIDDEN).mkdir()
                    (out / HIDDEN / "lock").touch()
                on_acquired(handle)

            super().__init__(path, on_acquired=after_others, **options)

    with monkeypatch.context() as patch:
        patch.setattr("maskopt.models.checkpoints.workspace.FileLock", Late)
        refused("another process is at work", dense, out, resume=False)
    assert (out / HIDDEN).exists() == newcomer
    prune(dense, out, overwrite=True)


def slow_prune(dense, out, resume):
    torch.set_num_threads(1)
    prune(dense, out, resume=resume, overwrite=not resume, threads=1, activation_memory=0)


@posix
@pytest.mark.slow
def test_killed_at_random_moments(dense, whole, tmp_path):
    """kill -9 a child at random moments of a prune, one in each tenth of it, then resume."""
    began, generator = time.perf_counter(), random.Random(7)
    slow_prune(dense, tmp_path / "timing", False)
    length, alive = time.perf_counter() - began, 0
    for trial in range(10):
        out = tmp_path / str(trial)
        fork = multiprocessing.get_context("fork")
        child = fork.Process(target=slow_prune, args=(dense, out, False))
        child.start()
        time.sleep((trial + generator.random()) / 10 * length)
        alive += child.is_alive()
        child.kill()  # SIGKILL; a child that has ended meanwhile is no error
        child.join()
        slow_prune(dense, out, (out / MANIFEST).exists() or (out / HIDDEN).exists())
        assert contents(out) == whole, trial
        assert not [p for p in out.rglob("*") if p.suffix == ".tmp" or "activations" in p.name]
    assert alive >= 5


@posix
def test_a_full_disk(dense, whole, tmp_path):
    out, said = tmp_path / "out", r"\A.*no space left.*go on with `resume`.*\Z"
    with small_files(20_000):
        fails(ModelError, said, prune, dense, out)
    assert [entry.name for entry in out.iterdir()] == [HIDDEN]
    prune(dense, out, resume=True)
    assert contents(out) == whole


def test_what_does_not_fit_and_outputs_that_cannot_be(dense, tmp_path, monkeypatch):
    needed = "maskopt.models.pruning.output.disk_needed"
    for patch, value, options, message in (
        ((needed,), lambda *_: 2**60, {}, r"takes 1073741824\.00 GiB"),
        ((Path, "mkdir"), Mock(side_effect=OSError(13, "No")), {}, "cannot be written: No"),
        ((os, "posix_fallocate"), FULL, IN_FILES, r"no room for 0\.00 GiB of hidden"),
        ((os, "name"), os.name, {"max_memory": 2**26}, r"needed, `max_memory` allows 0\.06"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(*patch, value)
            refused(message, dense, tmp_path / "out", resume=False, **options)
            assert list(tmp_path.iterdir()) == []
            if options is IN_FILES:
                refused(message, tiny("llama"), None, resume=False, **options)
    (tmp_path / "file").write_text("x")
    for out, message, how in (
        (dense, "choose one", {"overwrite": True}),
        (tmp_path / "file", "not a folder", {"resume": False}),
        (dense, "not empty|the model itself", {"resume": False}),
        (tmp_path / "file" / "below", "Not a directory|no such", {"resume": False}),
        (dense, "the model itself", {"resume": False, "overwrite": True}),
        (None, "needs an output folder", {"resume": False}),
        (tmp_path / "out", "nothing to resume", {}),
    ):
        refused(message, dense, out, **how)


@pytest.fixture
def model(dense, tmp_path):
    return Path(shutil.copytree(dense, tmp_path / "model"))


def add_one(model, tensor):
    path = shard_of(model, tensor)
    times = path.stat()
    change_tensors(path, lambda t: t.update({tensor: t[tensor] + 1}))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as copies with their times do


CHANGES = {
    "weights to come": (lambda m: add_one(m, "model.layers.2.mlp.up_proj.weight"), "model-0"),
    "weights done": (lambda m: add_one(m, "model.layers.0.mlp.up_proj.weight"), "model-0"),
    "embedding": (lambda m: add_one(m, "model.embed_tokens.weight"), "model-0"),
    "a shard is gone": (lambda m: shard_of(m, "lm_head.weight").unlink(), "lm_head|model-0"),
    "config": (lambda m: edit_json(m / CONFIG, lambda c: c.update(rope_theta=1.0)), CONFIG),
    "index": (lambda m: edit_json(m / INDEX, lambda i: i.update(metadata={})), INDEX),
    "a new tokenizer": (lambda m: (m / "vocab.txt").write_text("a"), r"vocab\.txt"),
    "a file is gone": (lambda m: (m / "generation_config.json").unlink(), "generation_config"),
}


def changing(model, out, change, block=1):
    changes = [change]

    def meanwhile(event):
        if (event.block, event.stage) == (block, "solve") and changes:
            changes.pop()(model)

    prune(model, out, on_progress=meanwhile)


@pytest.mark.parametrize("name", [slow(name) if name in LATER else name for name in CHANGES])
def test_a_change_is_noticed_by_the_run(name, model, dense, whole, tmp_path):
    (change, message), out = CHANGES[name], tmp_path / "out"
    said = f"{message}.*changed while the run was under way"
    fails(ModelError, said, changing, model, out, change)
    assert [entry.name for entry in out.iterdir()] == [HIDDEN]
    if name == "weights done":
        refused("model", model, out)
    shutil.rmtree(model)
    shutil.copytree(dense, model)
    prune(model, out, resume=True)
    assert contents(out) == whole
    if name == "weights done":
        verify_model(out, original=dense)


def test_a_file_that_is_only_touched_or_not_copied_may_change(model, dense, whole, tmp_path):
    def touch(folder):
        for file in folder.iterdir():
            shutil.copy(file, tmp_path / "copy")
            os.replace(tmp_path / "copy", file)
        (folder / "notes.py").write_text("x")

    changing(model, tmp_path / "out", touch)
    assert contents(tmp_path / "out") == whole
    verify_model(tmp_path / "out", original=model)
    # before the first block is done nothing is left
    new, said = tmp_path / "new", "changed while the run was under way"
    fails(ModelError, said, changing, model, new, CHANGES["embedding"][0], block=0)
    interrupted(dense, tmp_path / "deep" / "out", 0, "calibrate")
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", "out"}
    # between opening and beginning nothing may change
    checkpoint = open_checkpoint(model)
    Unchanged(checkpoint).check()
    change_tensors(shard_of(model, "lm_head.weight"), lambda t: t.update(more=torch.ones(3)))
    fails(ModelError, "changed while", Unchanged, checkpoint)

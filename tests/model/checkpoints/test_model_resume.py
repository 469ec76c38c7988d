"""Interrupted prunes: killed, out of disk, two at once. Resumed output is bit-identical."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TESTS
from filelock import FileLock
from outputs import contents
from resuming import OPTIONS, Stop, interrupted
from tiny_models import save, tiny, tokens

from maskopt import prune_model
from maskopt.errors import ModelError
from maskopt.model import output as output_module
from maskopt.model import workspace as workspace_module
from maskopt.model.journal import Journal, read_journal
from maskopt.model.progress import BlockProgress
from maskopt.model.verify import verify_output
from maskopt.model.workspace import GONE, HIDDEN, MANIFEST, MASKS

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")


@pytest.fixture(scope="module")
def whole(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    prune_model(dense, tokens(), output=out, **OPTIONS)
    return contents(out)


def test_the_same_bytes_twice_and_with_any_number_of_threads(
    dense: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    for threads in (1, 2, 5):
        out = tmp_path / str(threads)
        prune_model(dense, tokens(), output=out, threads=threads, **OPTIONS)
        assert contents(out) == whole


def test_activations_in_a_file_give_the_same_bytes(
    dense: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prune_model(dense, tokens(), output=out, activation_memory=0, **OPTIONS)
    assert contents(out) == whole


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("stage", ["calibrate", "solve"])
def test_an_error_in_the_middle(
    dense: Path, whole: dict[str, bytes], tmp_path: Path, block: int, stage: str
) -> None:
    out = tmp_path / "out"
    interrupted(dense, out, block, stage)
    assert [entry.name for entry in out.iterdir()] == [HIDDEN]
    with pytest.raises(ModelError, match="unfinished run; go on with `resume`"):
        prune_model(dense, tokens(), output=out, **OPTIONS)
    prune_model(dense, tokens(), output=out, resume=True, **OPTIONS)
    assert contents(out) == whole
    again = prune_model(dense, tokens(), output=out, resume=True, **OPTIONS)  # nothing left to do
    assert len(again.layers) == 21
    assert contents(out) == whole


def test_shards_are_written_as_they_are_done(
    dense: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupted(dense, out, 2, "solve")
    written = list((out / HIDDEN / "out").glob("model-*.safetensors"))
    assert 0 < len(written) < len([name for name in whole if name.startswith("model-")])
    for shard in written:
        assert shard.read_bytes() == whole[shard.name]
    done = set(Journal(out / HIDDEN / "journal.jsonl").shards)
    assert done == {shard.name for shard in written}


@pytest.mark.parametrize(
    "options", [{"one_pass": True}, {"true_sequential": True}, {"weighting": "gradient"}]
)
def test_other_orders_resume_too(dense: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    prune_model(dense, tokens(), output=tmp_path / "whole", **OPTIONS, **options)
    interrupted(dense, tmp_path / "out", 1, "solve", **options)
    prune_model(dense, tokens(), output=tmp_path / "out", resume=True, **OPTIONS, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_error_before_the_first_block_leaves_nothing(dense: Path, tmp_path: Path) -> None:
    interrupted(dense, tmp_path / "deep" / "out", 0, "calibrate")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ModelError, match="nothing to resume"):
        prune_model(dense, tokens(), output=tmp_path / "out", resume=True, **OPTIONS)


def test_skipped_samples_stay_skipped(tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():  # only token 5 reaches the first input of an enormous weight
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[5, 0] = 10
        model.model.layers[0].self_attn.o_proj.weight[0] = 0
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 3e38
    dense, data = save(model, tmp_path / "dense"), tokens()
    data[data == 5] = 6
    data[1, 2] = 5
    options = {**OPTIONS, "skip_bad_samples": True, "include": ["q_proj"]}
    prune_model(dense, data, output=tmp_path / "whole", **options)

    def stop(event: BlockProgress) -> None:
        if event.block == 1 and event.stage == "solve":
            raise Stop

    with pytest.raises(Stop):
        prune_model(dense, data, output=tmp_path / "out", on_progress=stop, **options)
    report = prune_model(dense, data, output=tmp_path / "out", resume=True, **options)
    assert [item["sample"] for item in report.bad_samples] == [1]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "options.seed was 0, is 1"),
        ({"sparsity": 0.6}, r"options.pattern.sparsity was 0.5, is 0.6"),
        ({"solver": "wanda", "warm_start": None}, "options.solver was 'elimination'"),
        ({"exclude": ["k_proj"]}, "options.exclude"),
        ({"dtype": "float64"}, "dtype was 'float32', is 'float64'"),
    ],
)
def test_a_journal_of_other_options_is_refused(
    dense: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    interrupted(dense, tmp_path / "out", 1, "solve")
    before = (tmp_path / "out" / HIDDEN / "journal.jsonl").read_bytes()
    with pytest.raises(ModelError, match=message):
        prune_model(dense, tokens(), output=tmp_path / "out", resume=True, **{**OPTIONS, **change})
    assert (tmp_path / "out" / HIDDEN / "journal.jsonl").read_bytes() == before


def test_a_journal_of_another_model_data_or_version_is_refused(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(dense, out, 1, "solve")
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    other = save(model, tmp_path / "other", shard="30KB")
    with pytest.raises(ModelError, match="model was"):
        prune_model(other, tokens(), output=out, resume=True, **OPTIONS)
    with pytest.raises(ModelError, match=r"calibration\.sha256 was"):
        prune_model(dense, tokens(seed=9), output=out, resume=True, **OPTIONS)
    monkeypatch.setattr("maskopt.__version__", "99")
    with pytest.raises(ModelError, match=r"versions.maskopt was .*, is '99'"):
        prune_model(dense, tokens(), output=out, resume=True, **OPTIONS)


def test_damage_is_noticed(dense: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(dense, out, 2, "solve")
    journal = out / HIDDEN / "journal.jsonl"
    good = journal.read_bytes()
    masks = out / HIDDEN / "blocks" / "00001.safetensors"
    good_masks = masks.read_bytes()
    generator = random.Random(0)
    for _ in range(30):
        place, bit = generator.randrange(len(good) - 1), generator.randrange(8)
        flipped = bytearray(good)
        flipped[place] ^= 1 << bit
        journal.write_bytes(bytes(flipped))
        with pytest.raises(ModelError, match=r"damaged|not a journal"):
            prune_model(dense, tokens(), output=out, resume=True, **OPTIONS)
    exponent = good.upper().index(b"E-0")
    journal.write_bytes(good[:exponent] + b"E" + good[exponent + 1 :])  # the same number
    with pytest.raises(ModelError, match="damaged"):
        prune_model(dense, tokens(), output=out, resume=True, **OPTIONS)
    journal.write_bytes(good)
    flipped = bytearray(good_masks)
    flipped[-3] ^= 4
    masks.write_bytes(bytes(flipped))
    with pytest.raises(ModelError, match="does not match the journal"):
        prune_model(dense, tokens(), output=out, resume=True, **OPTIONS)
    masks.write_bytes(good_masks)
    journal.write_bytes(good + b'{"kind": "block", "ind')  # cut off by a crash: dropped
    prune_model(dense, tokens(), output=out, resume=True, **OPTIONS)
    assert contents(out) == whole


def test_a_finished_shard_that_is_lost_or_damaged_is_written_again(
    dense: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupted(dense, out, 2, "solve")
    first, second = sorted((out / HIDDEN / "out").glob("model-*.safetensors"))[:2]
    first.unlink()
    data = bytearray(second.read_bytes())
    data[-1] ^= 1
    second.write_bytes(bytes(data))
    prune_model(dense, tokens(), output=out, resume=True, **OPTIONS)
    assert contents(out) == whole


def signed(record: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return json.dumps({**record, "sha256": digest}, sort_keys=True).encode() + b"\n"


def test_a_finished_result_of_which_something_is_gone_is_not_finished(
    dense: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prune_model(dense, tokens(), output=out, **OPTIONS)
    (out / MASKS).unlink()
    with pytest.raises(ModelError, match=f"{MASKS} is gone; `overwrite`"):
        prune_model(dense, tokens(), output=out, resume=True, **OPTIONS)


@pytest.mark.parametrize("change", [{"masks": 3}, {"layers": 0}, {"bad": [1]}, {"index": -1}])
def test_a_forged_journal_is_refused_in_one_line(
    dense: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Its digests are no secret: whoever changes a line can make them right."""
    out = tmp_path / "out"
    interrupted(dense, out, 1, "solve")
    path = out / HIDDEN / "journal.jsonl"
    records = read_journal(path)
    for record in records:
        if record["kind"] == "block":
            record.update(change)
    path.write_bytes(b"".join(map(signed, records)))
    with pytest.raises(ModelError, match="not a journal") as caught:
        prune_model(dense, tokens(), output=out, resume=True, **OPTIONS)
    assert "\n" not in str(caught.value)


@posix
@pytest.mark.parametrize("name", ["", "out", "blocks", "journal.jsonl", "lock"])
def test_links_in_the_hidden_folder_are_not_followed(
    dense: Path, tmp_path: Path, name: str
) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    hidden = out / HIDDEN
    hidden.mkdir(parents=True)
    if not name:
        hidden.rmdir()
    target = elsewhere / "new" if "l" in name and name != "blocks" else elsewhere
    (hidden / name if name else hidden).symlink_to(target)
    for how in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(ModelError, match="is a link, which maskopt never makes there"):
            prune_model(dense, tokens(), output=out, **how, **OPTIONS)
    assert list(elsewhere.iterdir()) == []


def test_a_forged_commit_moves_nothing(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(dense, out, 2, "solve")
    (tmp_path / "mine.txt").write_text("mine")
    (out / HIDDEN / "committed").write_text("../../../mine.txt\nconfig.json")
    with pytest.raises(ModelError, match="committed: is damaged; start over with `overwrite`"):
        prune_model(dense, tokens(), output=out, resume=True, **OPTIONS)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_killed_while_it_clears_up(
    dense: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def stop(path: Path, **_: Any) -> None:
        if Path(path).name.startswith(HIDDEN) and Path(path).exists():
            (Path(path) / "journal.jsonl").unlink()
            raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(workspace_module.shutil, "rmtree", stop)
        with pytest.raises(Stop):
            prune_model(dense, tokens(), output=out, **OPTIONS)
    began = []
    prune_model(dense, tokens(), output=out, resume=True, on_progress=began.append, **OPTIONS)
    assert not began  # nothing is done again
    assert contents(out) == whole


def test_no_room_for_hidden_states(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    for where in ({"output": tmp_path / "out"}, {}):
        model = dense if where else tiny("llama")
        with pytest.raises(ModelError, match=r"no room for 0\.00 GiB of hidden states"):
            prune_model(model, tokens(), activation_memory=0, **where, **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_a_journal_survives_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.begin({"a": 1})
    path.write_bytes(path.read_bytes() + b"torn")
    again = Journal(path)
    again.add_block(0, {"layers": []})
    assert [record["kind"] for record in read_journal(path)] == ["header", "block"]


def test_an_interrupted_commit_is_finished(
    dense: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    real = os.replace
    for stop_at in (1, 3, 5):
        count = 0

        def replace(source: Any, target: Any, stop_at: int = stop_at) -> None:
            nonlocal count
            if Path(target).parent == out:
                count += 1
                if count == stop_at:
                    raise Stop
            real(source, target)

        monkeypatch.setattr(workspace_module.os, "replace", replace)
        with pytest.raises(Stop):
            prune_model(dense, tokens(), output=out, overwrite=True, **OPTIONS)
        monkeypatch.setattr(workspace_module.os, "replace", real)
        assert not (out / MANIFEST).exists() or stop_at > 1
        prune_model(dense, tokens(), output=out, resume=True, **OPTIONS)
        assert contents(out) == whole


def test_overwriting_leaves_no_old_weights(
    dense: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    # one file, which would be loaded before any shards
    prune_model(save(tiny("llama"), tmp_path / "other"), tokens(), output=out, **OPTIONS)
    with pytest.raises(ModelError, match="not empty; `overwrite`"):
        prune_model(dense, tokens(), output=out, **OPTIONS)
    assert (out / "model.safetensors").exists()
    prune_model(dense, tokens(), output=out, overwrite=True, **OPTIONS)
    assert contents(out) == whole


def test_a_finished_result_that_was_damaged_is_not_finished(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune_model(dense, tokens(), output=out, **OPTIONS)
    shard = sorted(out.glob("*.safetensors"))[1]
    for path in (shard, out / "config.json", out / MASKS):
        right = path.read_bytes()
        for wrong in (right[:-7], right[:-1] + bytes([right[-1] ^ 1]), right[:3]):
            path.write_bytes(wrong)
            with pytest.raises(ModelError, match=f"{path.name} was changed .*; `overwrite`"):
                prune_model(dense, tokens(), output=out, resume=True, **OPTIONS)
        path.write_bytes(right)
    shard.unlink()
    shard.mkdir()
    with pytest.raises(ModelError, match=f"{shard.name} is a folder; `overwrite`"):
        prune_model(dense, tokens(), output=out, resume=True, **OPTIONS)
    with pytest.raises(ModelError, match=f"does not list 1 of .*: {shard.name}; choose"):
        prune_model(dense, tokens(), output=out, overwrite=True, **OPTIONS)
    shard.rmdir()
    prune_model(dense, tokens(), output=out, overwrite=True, **OPTIONS)
    prune_model(dense, tokens(), output=out, resume=True, **OPTIONS)


@pytest.mark.parametrize("where", ["", "out", "blocks"])
def test_a_folder_in_the_place_of_a_file_is_named(
    where: str, dense: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupted(dense, out, 2, "solve")
    folder = out / HIDDEN / where if where else out
    (first, *_) = sorted(folder.glob("*.safetensors")) or [out / "model-00001-of-00005.safetensors"]
    first.unlink(missing_ok=True)
    first.mkdir()
    (first / "x").write_text("mine")
    said = f"{first}: is a folder, which" if where else f"does not list 1 of .*: {first.name};"
    began: list[Any] = []
    with pytest.raises(ModelError, match=said):
        prune_model(dense, tokens(), output=out, resume=True, on_progress=began.append, **OPTIONS)
    assert not began
    assert (first / "x").read_text() == "mine"
    shutil.rmtree(first)
    if where != "blocks":  # whose masks are gone
        prune_model(dense, tokens(), output=out, resume=True, **OPTIONS)
        assert contents(out) == whole


def test_an_interrupted_commit_can_be_replaced(
    dense: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that it has moved are known as such, also after another run that came to nothing."""
    out, real = tmp_path / "out", os.replace

    def replace(source: Any, target: Any) -> None:
        real(source, target)
        if Path(target).parent == out:
            raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(workspace_module.os, "replace", replace)
        with pytest.raises(Stop):
            prune_model(dense, tokens(), output=out, **OPTIONS)
    assert len([*out.iterdir()]) == 2
    for stage in ("calibrate", "solve"):
        interrupted(dense, out, 0, stage, overwrite=True)
    other = save(tiny("llama"), tmp_path / "other")
    prune_model(other, tokens(), output=out, overwrite=True, **OPTIONS)
    verify_output(out, against=other)


def test_a_second_process_is_refused(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tried = []

    def meanwhile(event: BlockProgress) -> None:
        if event.stage == "solve" and event.block == 0 and not tried:
            tried.append(_in_another_process(dense, out, {"overwrite": True}))
            tried.append(_in_another_process(dense, out, {"resume": True}))

    prune_model(dense, tokens(), output=out, on_progress=meanwhile, **OPTIONS)
    assert all("another process is at work" in message for message in tried), tried
    assert len(tried) == 2
    verify_output(out, against=dense)


@posix
@pytest.mark.parametrize("newcomer", [False, True])
def test_a_lock_that_was_moved_away_is_none(
    dense: Path, tmp_path: Path, newcomer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our opening of the lock file and our lock, the process before finishes (and moves the
    hidden folder away), and perhaps a third one begins anew."""
    out = tmp_path / "out"

    class Late(FileLock):
        def __init__(self, path: Path, *, on_acquired: Any, **options: Any) -> None:
            def after_others(handle: int) -> None:
                os.replace(out / HIDDEN, out / GONE)
                if newcomer:
                    (out / HIDDEN).mkdir()
                    (out / HIDDEN / "lock").touch()
                on_acquired(handle)

            super().__init__(path, on_acquired=after_others, **options)

    with monkeypatch.context() as patch:
        patch.setattr("maskopt.model.workspace.FileLock", Late)
        with pytest.raises(ModelError, match="another process is at work"):
            prune_model(dense, tokens(), output=out, **OPTIONS)
    assert (out / HIDDEN).exists() == newcomer
    prune_model(dense, tokens(), output=out, overwrite=True, **OPTIONS)


def _in_another_process(dense: Path, out: Path, options: dict[str, Any]) -> str:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_attempt, (dense, out, options))


def _attempt(dense: Path, out: Path, options: dict[str, Any]) -> str:
    try:
        prune_model(dense, tokens(), output=out, **OPTIONS, **options)
    except ModelError as error:
        return str(error)
    return "done"


@posix
def test_killed_at_twenty_random_moments(
    dense: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """kill -9 a child at random moments of a prune, from its start to its end, then resume."""
    generator = random.Random(7)
    context = multiprocessing.get_context("fork")
    began = time.perf_counter()
    _slow_prune(dense, tmp_path / "timing", False)
    length = time.perf_counter() - began
    alive = 0
    for trial in range(20):
        out = tmp_path / str(trial)
        child = context.Process(target=_slow_prune, args=(dense, out, False))
        child.start()
        time.sleep(generator.random() * length)
        alive += child.is_alive()
        child.kill()  # SIGKILL; a child that has ended meanwhile is no error
        child.join()
        left_early = not out.exists() or not any(out.iterdir())
        _slow_prune(dense, out, not left_early and _resumable(out))
        assert contents(out) == whole, trial
        assert not [p for p in out.rglob("*") if p.suffix == ".tmp" or "activations" in p.name]
    assert alive >= 10


def _resumable(out: Path) -> bool:
    return (out / MANIFEST).exists() or (out / HIDDEN).exists()


def _slow_prune(dense: Path, out: Path, resume: bool) -> None:
    torch.set_num_threads(1)
    prune_model(
        dense, tokens(), output=out, resume=resume, overwrite=not resume,
        threads=1, activation_memory=0, **OPTIONS,
    )  # fmt: skip


@pytest.fixture
def limited() -> Any:
    """Run a prune in a child process whose files may not grow beyond some bytes."""

    def run(dense: Path, out: Path, limit: int) -> subprocess.CompletedProcess[str]:
        code = (
            "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "sys.path.insert(0, sys.argv[4])\n"
            "from test_model_resume import *\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)\n"
            "try: prune_model(Path(sys.argv[1]), tokens(), output=Path(sys.argv[2]), **OPTIONS)\n"
            "except ModelError as error: print(error); sys.exit(3)\n"
        )
        arguments = [str(dense), str(out), str(limit), str(TESTS)]
        return subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
        )

    return run


@posix
def test_a_full_disk(dense: Path, whole: dict[str, bytes], tmp_path: Path, limited: Any) -> None:
    out = tmp_path / "out"
    result = limited(dense, out, 20_000)
    assert result.returncode == 3, result.stderr
    assert "no space left" in result.stdout
    assert "go on with `resume`" in result.stdout
    assert result.stdout.count("\n") == 1
    assert [entry.name for entry in out.iterdir()] == [HIDDEN]
    prune_model(dense, tokens(), output=out, resume=True, **OPTIONS)
    assert contents(out) == whole


def test_a_disk_that_is_too_small_is_refused_up_front(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_module, "disk_needed", lambda *_: 2**60)
    with pytest.raises(ModelError, match=r"takes 1073741824\.00 GiB"):
        prune_model(dense, tokens(), output=tmp_path / "out", **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ModelError, match="cannot be written: Permission denied"):
        prune_model(dense, tokens(), output=tmp_path / "out", **OPTIONS)


def test_outputs_that_cannot_be(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="choose one"):
        prune_model(dense, tokens(), output=dense, overwrite=True, resume=True, **OPTIONS)
    (tmp_path / "file").write_text("x")
    for out, message in [
        (tmp_path / "file", "not a folder"),
        (dense, "not empty|the model itself"),
        (tmp_path / "file" / "below", "Not a directory|no such"),
    ]:
        with pytest.raises(ModelError, match=message):
            prune_model(dense, tokens(), output=out, **OPTIONS)
    with pytest.raises(ModelError, match="the model itself"):
        prune_model(dense, tokens(), output=dense, overwrite=True, **OPTIONS)
    with pytest.raises(ModelError, match="needs an output folder"):
        prune_model(dense, tokens(), **OPTIONS)


def test_memory_is_refused_up_front_with_the_numbers(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"estimated .* GiB are needed, `max_memory` allows 0\.10"):
        prune_model(
            dense, tokens(), output=tmp_path / "out", max_memory=int(0.1 * 2**30), **OPTIONS
        )
    prune_model(dense, tokens(), output=tmp_path / "out", max_memory=2**33, **OPTIONS)
    assert (tmp_path / "out" / MASKS).exists()

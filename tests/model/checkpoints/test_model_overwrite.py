"""`overwrite` replaces an earlier result alone: files that no run has written or a run reads are not lost."""

import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from commands import run, shows
from forging import copied, fails
from prunes import contents, files, prune, smaller
from tiny_models import chat_tokenizer, save, tiny, tokens

from maskopt.demo import run_demo
from maskopt.errors import MaskoptError, ModelError
from maskopt.models.checkpoints import workspace
from maskopt.models.checkpoints.schema import MANIFEST, MASKS
from maskopt.models.checkpoints.workspace import HIDDEN
from maskopt.models.pruning.gram_store import collect_grams
from maskopt.models.pruning.output import apply_masks
from maskopt.models.verification.verify import verify_model


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What runs read: `dense` is of one file without a tokenizer, `chatty` of several shards with one."""
    home = tmp_path_factory.mktemp("given")
    names = ("dense", "pruned", "grams", "chatty", "talked", "applied")
    found = {name: home / name for name in names}
    save(tiny("llama"), found["dense"])
    save(tiny("llama"), found["chatty"], shard="30KB")
    chat_tokenizer().save_pretrained(found["chatty"])
    found["text"] = home / "text.npy"
    np.save(found["text"], tokens().numpy())
    prune(found["dense"], found["pruned"])
    prune(found["chatty"], found["talked"])
    apply_masks(found["chatty"], found["talked"] / MASKS, found["applied"])
    collect_grams(found["dense"], tokens(), output=found["grams"])
    return found


@pytest.mark.parametrize(
    ("first", "model", "second"), [("talked", "dense", "pruned"), ("pruned", "chatty", "talked")]
)
def test_a_prune_over_that_of_another_model(first, model, second, given, tmp_path):
    """One file, which would be loaded before any shards, and a tokenizer must not stay."""
    out = copied(given[first], tmp_path)
    fails(ModelError, "not empty; `overwrite`", prune, given[model], out)
    assert contents(out) == contents(given[first])
    prune(given[model], out, overwrite=True)
    assert contents(out) == contents(given[second])
    verify_model(out, given[model])


def test_what_no_run_has_written_is_never_deleted(given, tmp_path):
    out = copied(given["pruned"], tmp_path)
    mine = "optimizer.pt", "adapter_config.json", "results.bits", "merges.txt", "maskopt-x", "x/y"
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
        before, entry = files(out), out / name.split("/")[0]
        message = rf"does not list 1 of the files and folders there: {entry.name};"
        fails(ModelError, message, prune, given["dense"], out, overwrite=True)
        assert files(out) == before
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    # nor a model without a manifest
    chatty = copied(given["chatty"], tmp_path / "chatty")
    before = files(chatty)
    message = rf"does not list {len(before)} of .*: chat_template\.jinja,.*, …"
    fails(ModelError, message, prune, given["dense"], chatty, overwrite=True)
    for damaged in ("{", '{"files": [["config.json"]]}', "[]"):
        (chatty / MANIFEST).write_text(damaged)
        fails(ModelError, "does not list", prune, given["dense"], chatty, overwrite=True)
    (chatty / MANIFEST).unlink()
    assert files(chatty) == before


def test_every_command_knows_all_files_of_its_result(given, tmp_path):
    a, b, c = out = [tmp_path / f"of-{name}" for name in "abc"]
    prune(given["dense"], a)
    smaller(given["chatty"], b, channels=0.5, solver="wanda")
    smaller(given["chatty"], c, count=1, windows=2)
    for folder in (*out, *(given[n] for n in ("talked", "applied", "grams"))):
        assert workspace.earlier_files(folder) == {file.name for file in folder.iterdir()}, folder


TEXT = "--calibration {text}"
COMMANDS = [
    f"prune {{dense}} --sparsity 0.5 {TEXT}", f"prune-structured {{dense}} --channels 0.5 {TEXT}",
    f"prune-structured {{dense}} --blocks 1 {TEXT}", f"distill {{pruned}} --teacher {{dense}} {TEXT}",
    "masks apply {dense} {pruned}/maskopt-masks.bits", "sweep {dense} --grams {grams} --sparsity 0.5",
    "demo",
]  # fmt: skip
STORED = "{dense} --sparsity 0.5 --grams {grams}"


def replaced(command, given, output, error=ModelError):
    """What the command says that may overwrite this folder."""
    return run(*command.format(**given).split(), "--output", output, "--overwrite", fails=error)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_current_and_the_home_folder_are_no_outputs(command, given, tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "work" / "here"
    for folder in (home, here):
        folder.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path.home() / ".cache"))  # of loops' machine code
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(home))
    monkeypatch.chdir(here)
    (tmp_path / "link").symlink_to(here)
    more = (".", str(here), "..", tmp_path / "link") if command is COMMANDS[0] else ()
    for output in ("", home, *more):
        said = replaced(command, given, output)
        assert "`output`" in said or "--output" in said
        assert "is empty, or is the current folder, one above it or the home folder" in said
    assert not [*here.iterdir(), *home.iterdir()]


@pytest.mark.parametrize("name", ["dense", "grams", "pruned"])
def test_another_path_to_an_input_is_noticed(name, given, tmp_path):
    """A link stands for a bind mount, too: both are other paths to the same device and inode."""
    folder = given[name]
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "above").symlink_to(folder.parent)
    (linked := tmp_path / "linked").mkdir()
    (weights, *_) = [file for file in folder.iterdir() if file.stat().st_size > 2000]
    (linked / "x").hardlink_to(weights)
    outputs = [folder, tmp_path / "link", tmp_path / "above", tmp_path / "above" / name, linked]
    outputs += [folder / "inside", tmp_path / "link" / "deep" / "inside"]
    inputs = {"other": "hf:c4", "tokens": tokens(), "the_input": None, "input": folder}
    for output in outputs:
        said = r"is the input itself, lies|of the input itself"
        fails(ModelError, said, workspace.check_inputs, output, **inputs)
    workspace.check_inputs(tmp_path / "out", input=folder)
    workspace.check_inputs(folder.parent / "out", input=folder)


def test_no_input_of_a_run_is_its_output(given):
    for command, output, what in (
        *((COMMANDS[number], "dense", "model") for number in (0, 1, 2, 4)),
        (COMMANDS[3], "pruned", "model"),
        (COMMANDS[3], "dense", "teacher"),
        (COMMANDS[4], "pruned", "mask file"),
        *((f"prune {dry}{STORED}", "grams", "grams") for dry in ("", "--dry-run ")),
        (f"{COMMANDS[0]} --config {{pruned}}/maskopt-manifest.json", "pruned", "config file"),
        (COMMANDS[0].replace("{text}", "{pruned}"), "pruned", "calibration"),
    ):
        before = files(given[output].parent)
        said = replaced(command, given, given[output], MaskoptError)
        shows(said, f"is the {what}", "itself, lies in it or holds it")
        assert files(given[output].parent) == before


def test_a_sweep_over_its_input_and_a_demo_over_other_files(given, tmp_path):
    before = files(given["dense"].parent)
    (tmp_path / "0.5-swap-none").symlink_to(given["grams"])
    assert "is the grams itself" in replaced(COMMANDS[5], given, tmp_path)
    assert files(given["dense"].parent) == before
    for name in ("model/config.json", "report.html", "notes.md"):
        mine = tmp_path / Path(name).stem / name
        mine.parent.mkdir(parents=True)
        mine.write_text("mine")
        said = f"does not list 1 of .*: {mine.name}"
        how = {"model": "gemma3", "sparsity": 0.5, "samples": 1, "windows": 1}
        fails(ModelError, said, run_demo, tmp_path / mine.stem, overwrite=True, **how)
        assert mine.read_text() == "mine"


def test_a_file_that_appears_during_the_run_stays_and_another_kind_of_result_goes(given, tmp_path):
    out = tmp_path / "out"
    late = {"on_progress": lambda event: (out / "README.md").write_text("mine")}
    for how in (late, {"resume": True}):
        fails(ModelError, r"does not list 1 of .*: README\.md", prune, given["dense"], out, **how)
        assert (out / "README.md").read_text() == "mine"
    (out / "README.md").unlink()
    prune(given["dense"], out, resume=True)
    assert contents(out).keys() == contents(given["pruned"]).keys()
    # other kinds of results over a prune
    dense, chatty, masks = given["dense"], given["chatty"], given["talked"] / MASKS
    a, b, grams = (tmp_path / name for name in ("a", "b", "grams"))
    for out, old in ((a, "talked"), (b, "talked"), (grams, "grams")):
        shutil.copytree(given[old], out)
    smaller(dense, a, overwrite=True, channels=0.5, solver="wanda")
    verify_model(a, dense)
    for _ in range(2):  # over a prune, and over the same
        apply_masks(chatty, masks, b, overwrite=True)
        assert files(b) == files(given["applied"])
    fails(ModelError, "nothing to resume", prune, chatty, b, resume=True)
    prune(dense, grams, overwrite=True)
    assert contents(grams) == contents(given["pruned"])
    verify_model(grams, dense)


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_an_interrupt_of_the_last_step_loses_no_weights(at, error, given, tmp_path, monkeypatch):
    """Where files move, each is the earlier one, the new one, or waits: none is dropped."""
    replace, moved, out = os.replace, [], copied(given["pruned"], tmp_path)
    again = partial(apply_masks, given["chatty"], given["talked"] / MASKS, out, overwrite=True)

    def stopped(source, target):
        if Path(target).parent == out and Path(source).parent.name == "out":
            if len(moved) == at:
                raise error
            moved.append(target)
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stopped)
        fails((KeyboardInterrupt, ModelError), None, again)
    for name, data in files(given["applied"]).items():
        places = (out / name, out / HIDDEN / "out" / name)
        assert [f for f in places if f.exists() and f.read_bytes() == data], name
    again()
    assert files(out) == files(given["applied"])

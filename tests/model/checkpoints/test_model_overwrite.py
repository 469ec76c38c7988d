"""`overwrite` replaces an earlier result and nothing else: afterwards the folder holds the new result alone,
and files that no run has written, or that a run reads, are never lost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run
from outputs import contents
from tiny_models import chat_tokenizer, save, tiny, tokens

from maskopt import prune_model, shrink_model
from maskopt.demo import run_demo
from maskopt.errors import MaskoptError, ModelError
from maskopt.model.gram_store import collect_grams
from maskopt.model.output import apply_masks
from maskopt.model.pack import pack, unpack_folder
from maskopt.model.remove_blocks import remove_blocks
from maskopt.model.verify import verify_output
from maskopt.model.verify_smaller import verify_smaller
from maskopt.model.workspace import HIDDEN, MANIFEST, MASKS, check_inputs, earlier_files

OPTIONS: dict[str, Any] = {"sparsity": 0.5, "solver": "wanda", "min_tokens": 1}


def models(home: Path) -> tuple[Path, Path]:
    """One of several shards with a tokenizer, and one of one file without."""
    chatty = save(tiny("llama"), home / "chatty", shard="30KB")
    chat_tokenizer().save_pretrained(chatty)
    return chatty, save(tiny("llama"), home / "plain")


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_prune_over_that_of_another_model(tmp_path: Path) -> None:
    chatty, plain = models(tmp_path)
    prune_model(chatty, tokens(6), output=tmp_path / "out", **OPTIONS)
    prune_model(plain, tokens(6), output=tmp_path / "out", overwrite=True, **OPTIONS)
    prune_model(plain, tokens(6), output=tmp_path / "fresh", **OPTIONS)
    assert contents(tmp_path / "out").keys() == contents(tmp_path / "fresh").keys()
    verify_output(tmp_path / "out", plain)


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "adapter_config.json", "results.bits", "merges.txt", "maskopt-x", "x/y"],
)
def test_a_file_that_no_run_has_written_is_never_deleted(name: str, tmp_path: Path) -> None:
    _, plain = models(tmp_path)
    out = tmp_path / "out"
    prune_model(plain, tokens(6), output=out, **OPTIONS)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    before = files(out)
    with pytest.raises(
        ModelError, match="does not list 1 of the files and folders there: "
    ) as caught:
        prune_model(plain, tokens(6), output=out, overwrite=True, **OPTIONS)
    assert f": {name.split('/')[0]};" in str(caught.value)
    assert files(out) == before


def test_a_model_without_a_manifest_is_never_replaced(tmp_path: Path) -> None:
    chatty, plain = models(tmp_path)
    before = files(chatty)
    count = len(before)
    with pytest.raises(
        ModelError, match=rf"does not list {count} of .*: chat_template\.jinja,.*, …"
    ):
        prune_model(plain, tokens(6), output=chatty, overwrite=True, **OPTIONS)
    for damaged in ("{", '{"files": [["config.json"]]}', "[]"):
        (chatty / MANIFEST).write_text(damaged)
        with pytest.raises(ModelError, match="does not list"):
            prune_model(plain, tokens(6), output=chatty, overwrite=True, **OPTIONS)
    (chatty / MANIFEST).unlink()
    assert files(chatty) == before


def test_every_command_knows_all_files_of_its_result(tmp_path: Path) -> None:
    chatty, _ = models(tmp_path)
    data, out = tokens(6), {name: tmp_path / f"of-{name}" for name in "abcdefgh"}
    prune_model(chatty, data, output=out["a"], **OPTIONS)
    prune_model(tiny("llama"), data, output=out["b"], **OPTIONS)
    shrink_model(chatty, data, output=out["c"], channels=0.5, solver="wanda")
    remove_blocks(chatty, data, output=out["d"], count=1, windows=2)
    collect_grams(chatty, data, output=out["e"])
    apply_masks(chatty, out["a"] / MASKS, out["f"])
    pack(out["a"], out["g"])
    unpack_folder(out["g"], out["h"])
    for folder in out.values():
        assert earlier_files(folder) == {file.name for file in folder.iterdir()}, folder
    again = files(out["f"])
    apply_masks(chatty, out["a"] / MASKS, out["f"], overwrite=True)
    assert files(out["f"]) == again


COMMANDS = [
    ["prune", "{dense}", "--sparsity", "0.5", "--calibration", "{text}"],
    ["shrink", "{dense}", "--channels", "0.5", "--calibration", "{text}"],
    ["shrink", "{dense}", "--blocks", "1", "--calibration", "{text}"],
    ["gram", "{dense}", "--calibration", "{text}"],
    ["distill", "{pruned}", "--teacher", "{dense}", "--calibration", "{text}"],
    ["apply", "{dense}", "{pruned}/maskopt-masks.bits"],
    ["pack", "{pruned}"],
    ["unpack", "{packed}"],
    ["sweep", "{dense}", "--grams", "{grams}", "--sparsity", "0.5"],
    ["demo"],
]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the commands read; nobody may change it."""
    home = tmp_path_factory.mktemp("given")
    found = {name: home / name for name in ("dense", "pruned", "packed", "grams")}
    save(tiny("llama"), found["dense"])
    found["text"] = home / "text.npy"
    np.save(found["text"], tokens(6).numpy())
    prune_model(found["dense"], tokens(6), output=found["pruned"], **OPTIONS)
    pack(found["pruned"], found["packed"])
    collect_grams(found["dense"], tokens(6), output=found["grams"])
    return found


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: "-".join(command[::2][:2]))
def test_the_current_and_the_home_folder_are_no_outputs(
    command: list[str], given: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "work" / "here"
    home.mkdir()
    here.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.chdir(here)
    (tmp_path / "link").symlink_to(here)
    words = [word.format(**given) for word in command]
    for output in ("", ".", str(here), "..", tmp_path / "link", home):
        said = run(*words, "--output", output, "--overwrite", fails=ModelError)
        assert "`output`" in said or "--output" in said
        assert "is empty, or is the current folder, one above it or the home folder" in said
    assert not [*here.iterdir(), *home.iterdir()]


@pytest.mark.parametrize("name", ["dense", "grams", "pruned"])
def test_another_path_to_an_input_is_noticed(
    name: str, given: dict[str, Path], tmp_path: Path
) -> None:
    """A link stands for a bind mount, too: both are other paths to the same device and inode."""
    folder = given[name]
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "above").symlink_to(folder.parent)
    linked = tmp_path / "linked"
    linked.mkdir()
    (weights, *_) = [file for file in folder.iterdir() if file.stat().st_size > 2000]
    (linked / "x").hardlink_to(weights)
    outputs = [folder, tmp_path / "link", tmp_path / "above", tmp_path / "above" / name, linked]
    outputs += [folder / "inside", tmp_path / "link" / "deep" / "inside"]
    for output in outputs:
        with pytest.raises(
            ModelError, match=r"is the input itself, lies in it|of the input itself"
        ):
            check_inputs(output, other="hf:c4", tokens=tokens(), the_input=None, input=folder)
    check_inputs(tmp_path / "out", input=folder)
    check_inputs(folder.parent / "out", input=folder)


@pytest.mark.parametrize(
    ("command", "output", "what"),
    [
        (COMMANDS[0], "dense", "model"),
        (COMMANDS[1], "dense", "model"),
        (COMMANDS[2], "dense", "model"),
        (COMMANDS[3], "dense", "model"),
        (COMMANDS[4], "pruned", "model"),
        (COMMANDS[4], "dense", "teacher"),
        (COMMANDS[5], "dense", "model"),
        (COMMANDS[5], "pruned", "mask file"),
        (COMMANDS[6], "pruned", "model"),
        (COMMANDS[7], "packed", "model"),
        (["prune", "{dense}", "--sparsity", "0.5", "--grams", "{grams}"], "grams", "grams"),
        (["plan", "{dense}", "--sparsity", "0.5", "--grams", "{grams}"], "grams", "grams"),
        ([*COMMANDS[0], "--config", "{pruned}/maskopt-manifest.json"], "pruned", "config file"),
        (["gram", "{dense}", "--calibration", "{pruned}/README.md"], "pruned", "calibration"),
        (
            ["prune", "{dense}", "--sparsity", "0.5", "--calibration", "{pruned}"],
            "pruned",
            "calibr",
        ),
    ],
)
def test_no_input_of_a_run_is_its_output(
    command: list[str], output: str, what: str, given: dict[str, Path]
) -> None:
    before = files(given[output].parent)
    words = [word.format(**given) for word in command]
    said = run(*words, "--output", given[output], "--overwrite", fails=MaskoptError)
    assert f"is the {what}" in said
    assert "itself, lies in it or holds it" in said
    assert files(given[output].parent) == before


def test_a_sweep_is_not_written_over_its_input(given: dict[str, Path], tmp_path: Path) -> None:
    before = files(given["dense"].parent)
    (tmp_path / "0.5-swap-keep").symlink_to(given["grams"])
    words = [word.format(**given) for word in COMMANDS[8]]
    said = run(*words, "--output", tmp_path, "--overwrite", fails=ModelError)
    assert "is the grams itself" in said
    assert files(given["dense"].parent) == before


@pytest.mark.parametrize("name", ["model/config.json", "report.html", "notes.md"])
def test_a_demo_replaces_what_a_demo_wrote(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ModelError, match=f"does not list 1 of .*: {Path(name).name}"):
        run_demo(tmp_path, overwrite=True)
    assert (tmp_path / name).read_text() == "mine"


def test_a_file_that_appears_during_the_run_is_not_replaced(
    given: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def meanwhile(event: Any) -> None:
        (out / "README.md").write_text("mine")

    with pytest.raises(ModelError, match=r"does not list 1 of .*: README\.md"):
        prune_model(given["dense"], tokens(6), output=out, on_progress=meanwhile, **OPTIONS)
    assert (out / "README.md").read_text() == "mine"
    with pytest.raises(ModelError, match=r"does not list 1 of .*: README\.md"):
        prune_model(given["dense"], tokens(6), output=out, resume=True, **OPTIONS)
    (out / "README.md").unlink()
    prune_model(given["dense"], tokens(6), output=out, resume=True, **OPTIONS)
    assert contents(out).keys() == contents(given["pruned"]).keys()


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

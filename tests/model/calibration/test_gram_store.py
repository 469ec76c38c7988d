"""Gram matrices on disk: pruned from them is what is pruned from the text in one pass, to the byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run
from hypothesis import given
from hypothesis import strategies as st
from outputs import contents
from tiny_models import save, save_tokenizer, save_with_own_code, tiny, tokens

from maskopt import collect_grams, prune_model
from maskopt.cli.sweep import swept_table
from maskopt.errors import MaskoptError, ModelError, OptionError, ProblemError
from maskopt.gram import Gram
from maskopt.model.checkpoint import file_digest
from maskopt.model.evaluate import evaluate
from maskopt.model.gram_store import INDEX, GramStore
from maskopt.model.options import PruneOptions
from maskopt.model.plan import plan_prune
from maskopt.model.report import read_manifest
from maskopt.model.safefile import open_safe
from maskopt.model.sweep import sweep
from maskopt.model.verify import verify_output
from maskopt.model.walk_options import WalkOptions
from maskopt.model.workspace import MANIFEST
from maskopt.pattern import NM, Unstructured

OPTIONS: dict[str, Any] = {"sparsity": 0.5, "min_tokens": 1}


@given(st.integers(1, 30), st.integers(0, 3), st.integers(0, 10**6))
def test_a_gram_matrix_comes_back_to_the_bit(n: int, sequences: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gram = Gram(n)
    for _ in range(sequences):
        gram.add(torch.randn(7, n, generator=generator))
    again = Gram.restored(gram.state())
    for shrink in (0.0, 0.3):
        assert torch.equal(again.value(shrink=shrink), gram.value(shrink=shrink))
    assert torch.equal(again.mean(), gram.mean())
    assert torch.equal(again.variance(), gram.variance())
    assert again.tokens == gram.tokens
    assert len(gram.state()["sum"]) == n * (n + 1) // 2
    more = torch.randn(5, n, generator=generator)
    gram.add(more)
    again.add(more)
    assert torch.equal(again.value(), gram.value())


def test_a_state_that_does_not_fit_is_refused() -> None:
    state = Gram(3).state()
    with pytest.raises(ProblemError, match="does not fit"):
        Gram.restored({**state, "sum": state["sum"][:-1]})
    for bad in (-1e-300, float("nan"), float("inf")):
        with pytest.raises(ProblemError, match="its diagonal is below 0, or values are not finite"):
            Gram.restored({**state, "sum": torch.tensor([0.0] * 5 + [bad], dtype=torch.float64)})


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("weights", ["keep", "refit"])
def test_the_same_bytes_as_in_one_pass(family: str, weights: str, tmp_path: Path) -> None:
    dense = save(tiny(family), tmp_path / "dense", shard="30KB")
    how = {**OPTIONS, "weights": weights, "holdout": 0.34}
    prune_model(dense, tokens(6), output=tmp_path / "walked", one_pass=True, **how)
    collect_grams(dense, tokens(6), output=tmp_path / "grams", holdout=0.34)
    prune_model(dense, grams=tmp_path / "grams", output=tmp_path / "stored", **how)
    assert contents(tmp_path / "stored") == contents(tmp_path / "walked")
    verify_output(tmp_path / "stored", dense)


def test_precision_and_seed_are_those_of_the_store(tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    save_tokenizer(dense)
    (tmp_path / "text.txt").write_text("one two, three and four. " * 40)
    walk: dict[str, Any] = {"calibration": tmp_path / "text.txt", "samples": 6, "seq_len": 16}
    walk |= {"dtype": "bfloat16", "seed": 5}
    prune_model(dense, output=tmp_path / "walked", one_pass=True, **walk, **OPTIONS)
    collect_grams(dense, output=tmp_path / "grams", **walk)
    for label, said in (("silent", {}), ("spoken", {"dtype": "bfloat16", "seed": 5})):
        out = tmp_path / label
        prune_model(dense, grams=tmp_path / "grams", output=out, **said, **OPTIONS)
        assert contents(out) == contents(tmp_path / "walked")
        verify_output(out, dense, calibration=tmp_path / "text.txt")


def test_windows_kept_aside_are_those_of_the_store_on_the_command_line(tmp_path: Path) -> None:
    dense, grams, out = (
        save(tiny("llama"), tmp_path / "dense"),
        tmp_path / "grams",
        tmp_path / "out",
    )
    collect_grams(dense, tokens(6), output=grams, holdout=0.34)
    more = ["--min-tokens", "1", "--solver", "wanda", "--shrink", "auto"]
    run(
        "prune", str(dense), "--grams", str(grams), "--sparsity", "0.5", *more, "--output", str(out)
    )
    options = json.loads((out / MANIFEST).read_text())["fingerprint"]["options"]
    assert (options["shrink"], options["holdout"]) == ("auto", 0.34)
    collect_grams(dense, tokens(6), output=tmp_path / "without")
    with pytest.raises(ModelError, match="needs held-out windows"):
        prune_model(dense, grams=tmp_path / "without", shrink="auto", **OPTIONS)


def test_errors_are_checked_again_from_the_text(tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    collect_grams(dense, tokens(6), output=tmp_path / "grams")
    prune_model(dense, grams=tmp_path / "grams", output=tmp_path / "out", **OPTIONS)
    found = verify_output(tmp_path / "out", dense, calibration=tokens(6))
    assert len(found.checked_layers) == 21


@pytest.mark.parametrize("stop", [1, 2])
def test_interrupted_prunes_go_on(stop: int, tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    collect_grams(dense, tokens(6), output=tmp_path / "grams")
    prune_model(dense, grams=tmp_path / "grams", output=tmp_path / "whole", **OPTIONS)

    def halt(event: Any) -> None:
        if event.block == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_model(
            dense, grams=tmp_path / "grams", output=tmp_path / "out", on_progress=halt, **OPTIONS
        )
    prune_model(dense, grams=tmp_path / "grams", output=tmp_path / "out", resume=True, **OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_only_chosen_layers_are_stored(tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    collect_grams(dense, tokens(6), output=tmp_path / "grams", include="layers.1.*")
    prune_model(
        dense, grams=tmp_path / "grams", output=tmp_path / "one", include="layers.1.*", **OPTIONS
    )
    with pytest.raises(ModelError, match=r"no Gram matrix of layer .model.layers.0"):
        prune_model(dense, grams=tmp_path / "grams", output=tmp_path / "all", **OPTIONS)
    assert not (tmp_path / "all").exists()


def test_a_layer_that_was_left_out_is_not_taken_for_one_without_tokens(tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    collect_grams(dense, tokens(6), output=tmp_path / "grams", include="q_proj")
    with pytest.raises(ModelError, match=r"no Gram matrix of layer .*k_proj"):
        prune_model(dense, grams=tmp_path / "grams", output=tmp_path / "all", **OPTIONS)


def other_model(home: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    save(model, home / "dense")


def flip(home: Path) -> None:
    path = home / "grams" / "grams-00001.bits"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def damage(home: Path) -> None:
    (home / "grams" / INDEX).write_text("{}")


def damage_a_part(home: Path) -> None:
    index = json.loads((home / "grams" / INDEX).read_text())
    del index["layers"]
    (home / "grams" / INDEX).write_text(json.dumps(index))


def damage_the_text(home: Path) -> None:
    index = json.loads((home / "grams" / INDEX).read_text())
    del index["fingerprint"]["calibration"]["samples"]
    (home / "grams" / INDEX).write_text(json.dumps(index))


def damage_the_precision(home: Path) -> None:
    index = json.loads((home / "grams" / INDEX).read_text())
    del index["fingerprint"]["dtype"]
    (home / "grams" / INDEX).write_text(json.dumps(index))


def damage_the_layers(home: Path) -> None:
    index = json.loads((home / "grams" / INDEX).read_text())
    index["layers"], index["bad_samples"] = [[1]], [1]
    (home / "grams" / INDEX).write_text(json.dumps(index))


def rename(home: Path) -> None:
    """A right digest of a file that is none."""
    path = home / "grams" / INDEX
    index = json.loads(path.read_text())
    (home / "grams" / "grams-00001.bits").write_bytes(
        (home / "dense" / "model.safetensors").read_bytes()
    )
    index["files"]["grams-00001.bits"] = file_digest(home / "grams" / "grams-00001.bits")
    path.write_text(json.dumps(index))


def negate(home: Path) -> None:
    """Right digests of negative Gram matrices, of which every mask would cost nothing."""
    index = json.loads((home / "grams" / INDEX).read_text())
    for name in index["files"]:
        path = home / "grams" / name
        stored = open_safe(path)
        with open(path, "r+b") as file:
            for entry in stored.entries.values():
                if entry.name.endswith("/sum"):
                    file.seek(entry.start)
                    file.write((-stored.read(entry.name)).numpy().tobytes())
        index["files"][name] = file_digest(path)
    (home / "grams" / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            negate,
            r"layer 'model\.layers\.0\.\S+': its Gram matrix was changed: its diagonal is below 0",
        ),
        (other_model, "of another model"),
        (flip, "was changed"),
        (damage, "not an index of format"),
        (damage_a_part, "not an index of format"),
        (damage_the_text, "not an index of format"),
        (damage_the_precision, "not an index of format"),
        (damage_the_layers, "not an index of format"),
        (rename, "holds no Gram matrices of format"),
    ],
)
def test_what_was_changed_is_refused(
    spoil: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    collect_grams(dense, tokens(6), output=tmp_path / "grams")
    spoil(tmp_path)
    with pytest.raises(ModelError, match=said):
        prune_model(dense, grams=tmp_path / "grams", output=tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out" / MANIFEST).exists()


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"weights": "reconstruct", "holdout": 0.3}, OptionError, "reconstruct needs the text"),
        ({"target": "dense"}, OptionError, "`target` needs the text"),
        ({"true_sequential": True}, OptionError, "`true_sequential` needs the text"),
        ({"budget": "model"}, OptionError, "need the text"),
        ({"budget": "layer"}, OptionError, "need the text"),
        ({"calibration": "here.txt"}, ModelError, "one of the two"),
        ({"samples": 3}, OptionError, "`samples` 3 says nothing here: .*grams was made of"),
        ({"bos": "never"}, OptionError, "`bos` never says nothing here"),
        ({"seq_len": 9}, OptionError, "`seq_len` 9 says nothing here"),
        ({"holdout": 0.2}, OptionError, r"`holdout` 0\.2 says nothing here"),
        ({"weighting": "rest"}, OptionError, "`weighting` rest says nothing here"),
        ({"dtype": "bfloat16"}, OptionError, "`dtype` bfloat16 says nothing here"),
        ({"seed": 5}, OptionError, "`seed` 5 says nothing here"),
    ],
)
def test_what_needs_a_walk_is_refused(
    options: dict[str, Any], error: type[MaskoptError], said: str, tmp_path: Path
) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    collect_grams(dense, tokens(6), output=tmp_path / "grams")
    with pytest.raises(error, match=said):
        prune_model(
            dense, grams=tmp_path / "grams", output=tmp_path / "out", **{**OPTIONS, **options}
        )


def test_an_option_at_its_default_that_is_asked_for_is_refused(tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    grams = tmp_path / "grams"
    collect_grams(dense, tokens(8), output=grams, holdout=0.25, seed=3)
    how = {"grams": grams, "output": tmp_path / "out", **OPTIONS}
    for name in ("seed", "holdout", "samples", "one_pass"):
        usual = getattr(PruneOptions, name)
        with pytest.raises(OptionError, match=f"`{name}` {usual} says nothing here"):
            prune_model(dense, **how, **{name: usual})
        flag = "--sequential" if name == "one_pass" else f"--{name} {usual}"
        command = (
            "prune",
            dense,
            "--grams",
            grams,
            "--sparsity",
            0.5,
            "--output",
            tmp_path / "out",
        )
        assert f"{usual} says nothing here" in run(*command, *flag.split(), fails=OptionError)
    prune_model(dense, **how, seed=3, holdout=0.25, samples=8, one_pass=True, dtype="auto")
    # a file of options that --print-config wrote holds those at their defaults, too
    path = tmp_path / "run.toml"
    path.write_text(
        run("prune", dense, "--grams", grams, "--sparsity", 0.5, "--min-tokens", 1, "--print-config",
            "--output", tmp_path / "again")
    )  # fmt: skip
    assert "seed = 0" in path.read_text()
    run("prune", "--config", path)
    options = read_manifest(tmp_path / "again" / MANIFEST)["fingerprint"]["options"]
    assert options["seed"] == 3


def test_a_model_in_memory_is_not_pruned_from_a_store(tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    collect_grams(dense, tokens(6), output=tmp_path / "grams")
    with pytest.raises(ModelError, match="`grams` are of model folders"):
        prune_model(tiny("llama"), grams=tmp_path / "grams", **OPTIONS)


def test_rows_that_trade_alike_need_no_walk(tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    how = {**OPTIONS, "budget": "layer", "importance": "relative"}
    collect_grams(dense, tokens(6), output=tmp_path / "grams")
    prune_model(dense, grams=tmp_path / "grams", output=tmp_path / "stored", **how)
    prune_model(dense, tokens(6), output=tmp_path / "walked", one_pass=True, **how)
    assert contents(tmp_path / "stored") == contents(tmp_path / "walked")


@pytest.mark.parametrize("budget", ["model", "both"])
def test_layers_whose_counts_are_known_need_no_walk(budget: str, tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    how = {**OPTIONS, "budget": budget, "importance": "relative"}
    report = prune_model(dense, tokens(6), output=tmp_path / "chosen", **how)
    chosen = report.fingerprint["options"]["counts"]
    assert any(layer.pruned * 2 != layer.rows * layer.n for layer in report.layers)
    collect_grams(dense, tokens(6), output=tmp_path / "grams")
    how["counts"] = chosen
    prune_model(dense, grams=tmp_path / "grams", output=tmp_path / "stored", **how)
    prune_model(dense, tokens(6), output=tmp_path / "walked", one_pass=True, **how)
    assert contents(tmp_path / "stored") == contents(tmp_path / "walked")


def test_an_option_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no option is called 'sample'; did you mean 'samples'"):
        collect_grams(tmp_path, tokens(6), output=tmp_path / "grams", sample=4)
    assert not (tmp_path / "grams").exists()


def test_the_model_is_never_the_place_of_its_own_gram_matrices(tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    before = {file.name: file.read_bytes() for file in dense.iterdir()}
    with pytest.raises(ModelError, match="is the model itself"):
        collect_grams(dense, tokens(6), output=dense, overwrite=True)
    assert before == {file.name: file.read_bytes() for file in dense.iterdir()}


def test_what_a_store_is_of_goes_before_what_is_asked(tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    collect_grams(dense, tokens(6), output=tmp_path / "grams", weighting="rest")
    options = GramStore(tmp_path / "grams").options(PruneOptions(Unstructured(sparsity=0.5)))
    assert (options.weighting, options.one_pass, options.samples) == ("rest", True, 6)


def test_windows_that_a_store_keeps_aside_choose(tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    collect_grams(dense, tokens(6), output=tmp_path / "grams", holdout=0.3)
    how: dict[str, Any] = {"weights": "refit", "damping": "auto", "shrink": "auto", "min_tokens": 1}
    report = prune_model(
        dense, grams=tmp_path / "grams", output=tmp_path / "out", sparsity=0.5, **how
    )
    assert all(layer.error_held is not None for layer in report.layers)
    found, _ = sweep(
        dense, tmp_path / "grams", tmp_path / "sweep", patterns=[Unstructured(sparsity=0.5)],
        weights=["refit"], **{k: v for k, v in how.items() if k != "weights"},
    )  # fmt: skip
    assert contents(found[0].output) == contents(tmp_path / "out")
    assert plan_prune(dense, grams=tmp_path / "grams", sparsity=0.5, **how).forward_seconds == 0.0
    with pytest.raises(OptionError, match="reconstruct needs the text"):
        prune_model(
            dense, grams=tmp_path / "grams", output=tmp_path / "none", sparsity=0.5,
            weights="reconstruct",
        )  # fmt: skip


def test_a_sweep_is_its_prunes_and_goes_on_where_it_was(tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    collect_grams(dense, tokens(6), output=tmp_path / "grams")
    how: dict[str, Any] = {
        "patterns": [Unstructured(sparsity=0.5), NM(keep=2, of=4)],
        "weights": ["keep", "refit"],
        "min_tokens": 1,
        "damping": 0.02,  # of the refitted ones
    }
    found, dense_too = sweep(dense, tmp_path / "grams", tmp_path / "sweep", text=tokens(3), **how)
    assert [one.label for one in found] == [
        "0.5-swap-keep", "0.5-swap-refit", "2of4-swap-keep", "2of4-swap-refit",
    ]  # fmt: skip
    assert dense_too is not None
    assert all(one.evaluation is not None and one.evaluation.change for one in found)
    prune_model(
        dense, grams=tmp_path / "grams", output=tmp_path / "alone", sparsity=0.5, weights="refit",
        min_tokens=1, damping=0.02,
    )  # fmt: skip
    assert contents(tmp_path / "alone") == contents(tmp_path / "sweep" / "0.5-swap-refit")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "sweep").rglob("*") if p.is_file()}
    again, _ = sweep(dense, tmp_path / "grams", tmp_path / "sweep", **how)
    assert [one.report.sparsity for one in again] == [one.report.sparsity for one in found]
    assert before == {p: p.stat().st_mtime_ns for p in before}
    (weights,) = again[1].output.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(
        ModelError, match=r"0\.5-swap-refit: .*safetensors was changed .*`overwrite`"
    ):
        sweep(dense, tmp_path / "grams", tmp_path / "sweep", **how)
    with pytest.raises(OptionError, match="nothing is swept"):
        sweep(dense, tmp_path / "grams", tmp_path / "none", patterns=[])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"text": "nothere.txt"}, "no such file"),
        ({"text": tokens(3)[:, :1]}, "at least two tokens"),
        ({"patterns": [NM(keep=2, of=4), NM(keep=3, of=5)]}, "do not divide into groups of 5"),
        ({"patterns": [Unstructured(0.5), Unstructured(0.5, per="layer")]}, "need the text"),
        ({"solvers": ["swap", "nothing"]}, "unknown solver"),
        ({"holdout": 0.3}, "`holdout`"),
    ],
)
def test_a_sweep_is_refused_before_its_first_prune(
    more: dict[str, Any], said: str, tmp_path: Path
) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    collect_grams(dense, tokens(6), output=tmp_path / "grams")
    with pytest.raises(MaskoptError, match=said):
        sweep(
            dense, tmp_path / "grams", tmp_path / "out",
            **{"patterns": [Unstructured(0.5)], "min_tokens": 1, **more},
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_sweep_judges_as_it_prunes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    here: dict[str, Any] = {"device": "cpu", "threads": 1, "trust_remote_code": True}
    collect_grams(dense, tokens(6), output=tmp_path / "grams", **here)
    walks: list[WalkOptions] = []

    def told(models: Any, text: Any, walk: WalkOptions, **more: Any) -> Any:
        walks.append(walk)
        return evaluate(models, text, walk, **more)

    monkeypatch.setattr("maskopt.model.sweep.evaluate", told)
    found, _ = sweep(
        dense, tmp_path / "grams", tmp_path / "out", patterns=[Unstructured(0.5)], text=tokens(3),
        solvers=["wanda"], min_tokens=1, **here,
    )  # fmt: skip
    assert [one.evaluation is not None for one in found] == [True]
    assert {name: getattr(walks[0], name) for name in here} == here


def test_a_model_with_code_of_its_own_is_swept_but_not_judged(tmp_path: Path) -> None:
    dense = save_with_own_code(tmp_path / "dense")
    collect_grams(dense, tokens(6), output=tmp_path / "grams", trust_remote_code=True)
    how: dict[str, Any] = {"patterns": [Unstructured(0.5)], "solvers": ["wanda"], "min_tokens": 1}
    how |= {"grams": tmp_path / "grams", "output": tmp_path / "out", "trust_remote_code": True}
    with pytest.raises(ModelError, match="not copied to the pruned folders; leave out `text`"):
        sweep(dense, text=tokens(3), **how)
    assert not (tmp_path / "out").exists()
    assert [one.label for one in sweep(dense, **how)[0]] == ["0.5-wanda-keep"]


def test_a_sweep_with_other_options_replaces_if_asked_to(tmp_path: Path) -> None:
    dense, grams, out = (
        save(tiny("llama"), tmp_path / "dense"),
        tmp_path / "grams",
        tmp_path / "out",
    )
    collect_grams(dense, tokens(6), output=grams)
    some = ["--grams", grams, "--sparsity", 0.5, "--solver", "wanda", "--min-tokens", 1]
    run("sweep", dense, *some, "--output", out)
    before = contents(out / "0.5-wanda-keep")
    other = [dense, *some, "--shrink", 0.1, "--output", out]
    said = run("sweep", *other, fails=ModelError)
    assert "another run: options.shrink was 0.0, is 0.1; --overwrite replaces it" in said
    assert contents(out / "0.5-wanda-keep") == before
    run("sweep", *other, "--overwrite")
    prune_model(
        dense, grams=grams, output=tmp_path / "alone", sparsity=0.5, solver="wanda", min_tokens=1,
        shrink=0.1,
    )  # fmt: skip
    assert contents(out / "0.5-wanda-keep") == contents(tmp_path / "alone")


def test_of_layers_without_tokens_a_sweep_tells_no_error(tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    collect_grams(dense, tokens(2), output=tmp_path / "grams", include="q_proj")
    found, _ = sweep(
        dense, tmp_path / "grams", tmp_path / "out", patterns=[Unstructured(0.5)], min_tokens=10**6,
        include="q_proj",
    )  # fmt: skip
    assert [list(column.cells) for column in swept_table(found, None).columns[2:4]] == [
        ["–"],
        ["–"],
    ]


def test_the_commands(tmp_path: Path) -> None:
    dense = save(tiny("llama"), tmp_path / "dense")
    np.save(tmp_path / "tokens.npy", tokens(6).numpy())
    text = tmp_path / "tokens.npy"
    assert "Gram matrices" in run(
        "gram", dense, "--calibration", text, "--output", tmp_path / "grams"
    )
    more = ["--min-tokens", 1, "--solver", "wanda"]
    out = tmp_path / "out"
    run("prune", dense, "--grams", tmp_path / "grams", "--sparsity", 0.5, "--output", out, *more)
    assert "holds" in run("verify", out, "--against", dense)
    planned = run("plan", dense, "--grams", tmp_path / "grams", "--sparsity", 0.5, *more)
    assert "forward passes and Gram matrices about 0 s" in " ".join(planned.split())
    said = run(
        "sweep", dense, "--grams", tmp_path / "grams", "--sparsity", "0.5,0.75", "--pattern", "2:4",
        "--weights", "keep,refit", "--output", tmp_path / "sweep", "--text", text, *more,
    )  # fmt: skip
    for label in ("0.5-wanda-keep", "0.75-wanda-refit", "2of4-wanda-keep", "perplexity"):
        assert label in said
    assert "could not convert" in run(
        "sweep", dense, "--grams", tmp_path / "grams", "--sparsity", "half", "--output",
        tmp_path / "no", fails=OptionError,
    )  # fmt: skip
    assert "name a source of text" in run(
        "prune", dense, "--sparsity", 0.5, "--output", tmp_path / "no", fails=ModelError
    )

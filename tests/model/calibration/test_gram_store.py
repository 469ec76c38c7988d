"""Gram matrices on disk: pruned from them is what is pruned from the text in one pass, to the byte."""

import shutil

import numpy as np
import pytest
import torch
from commands import run
from forging import flip
from hypothesis import given
from hypothesis import strategies as st
from outputs import contents
from tiny_models import edit_json, patched, save, save_with_own_code, tiny, tokens

from maskopt import collect_grams, prune_model
from maskopt.cli.sweep import swept_table
from maskopt.core.gram import Gram
from maskopt.core.pattern import NM, Unstructured
from maskopt.errors import MaskoptError, ModelError, OptionError, PatternError, ProblemError
from maskopt.models.checkpoints.checkpoint import file_digest
from maskopt.models.checkpoints.report import read_manifest
from maskopt.models.checkpoints.safefile import open_safe
from maskopt.models.checkpoints.workspace import MANIFEST
from maskopt.models.evaluation.evaluate import evaluate
from maskopt.models.evaluation.sweep import sweep
from maskopt.models.options.prune import PruneOptions
from maskopt.models.pruning.gram_store import INDEX, GramStore
from maskopt.models.pruning.plan import plan_prune
from maskopt.models.verification.verify import verify_model

HALF = [Unstructured(sparsity=0.5)]
FIRST = "grams-00001.bits"
ATTENTION = {"include": "layers.1.self_attn.*"}


def prune(model, data=None, **options):
    how = {"sparsity": 0.5, "min_tokens": 1, "solver": "wanda", **options}
    return prune_model(model, data, **how)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model and its stores, one with held-out windows; nobody may change them."""
    home = tmp_path_factory.mktemp("home")
    dense = save(tiny("llama"), home / "dense")
    collect_grams(dense, tokens(), output=home / "grams")
    collect_grams(dense, tokens(), output=home / "held", holdout=0.34)
    prune(dense, grams=home / "grams", output=home / "out")
    return home


@pytest.fixture(scope="module")
def model(home):
    return home / "dense"


@pytest.fixture(scope="module")
def grams(home):
    return home / "grams"


@given(st.integers(1, 30), st.integers(0, 3), st.integers(0, 10**6))
def test_a_gram_matrix_comes_back_to_the_bit(n, sequences, seed):
    generator = torch.Generator().manual_seed(seed)
    gram = Gram(n)
    for _ in range(sequences):
        gram.add(torch.randn(7, n, generator=generator))
    again = Gram.restored(gram.state())
    for shrink in (0.0, 0.3):
        assert torch.equal(again.value(shrinkage=shrink), gram.value(shrinkage=shrink))
    assert torch.equal(again.mean(), gram.mean())
    assert torch.equal(again.variance(), gram.variance())
    assert again.tokens == gram.tokens
    assert len(gram.state()["sum"]) == n * (n + 1) // 2
    more = torch.randn(5, n, generator=generator)
    gram.add(more)
    again.add(more)
    assert torch.equal(again.value(), gram.value())
    state, bad = gram.state(), "its diagonal is below 0, or values are not finite"
    with pytest.raises(ProblemError, match="does not fit"):
        Gram.restored({**state, "sum": state["sum"][:-1]})
    for last in (-1e-300, float("nan"), float("inf")):
        state["sum"][-1] = last
        with pytest.raises(ProblemError, match=bad):
            Gram.restored(state)


NONE, REFIT = "none", "least-squares"
OTHERS = (
    *(("llama", REFIT), ("gpt2", NONE), ("mixtral", REFIT), ("phi3", NONE), ("phi3", REFIT)),
    *(("qwen3_moe", NONE), ("qwen3_moe", REFIT)),
)


@pytest.mark.parametrize(
    ("family", "update", "holdout"),
    [
        *(("llama", NONE, 0.0), ("mixtral", NONE, 0.34), ("gpt2", REFIT, 0.34)),
        *(pytest.param(*one, 0.34, marks=pytest.mark.slow) for one in OTHERS),
    ],
)
def test_the_same_bytes_as_in_one_pass(family, update, holdout, tmp_path):
    dense = save(tiny(family, layers=2), tmp_path / "dense", shard="30KB")
    how = {"update": update, "holdout": holdout, "solver": "wanda" if holdout else "swap"}
    prune(dense, tokens(), output=tmp_path / "walked", calibrate_on="dense", **how)
    collect_grams(dense, tokens(), output=tmp_path / "grams", holdout=holdout)
    prune(dense, grams=tmp_path / "grams", output=tmp_path / "stored", **how)
    assert contents(tmp_path / "stored") == contents(tmp_path / "walked")
    found = verify_model(tmp_path / "stored", dense, calibration=None if holdout else tokens())
    assert len(found.checked_layers) == (0 if holdout else 14)


def test_precision_and_seed_are_those_of_the_store(dense, tmp_path):
    text, grams = tmp_path / "text.txt", tmp_path / "grams"
    text.write_text("one two, three and four. " * 40)
    said, first = {"dtype": "bfloat16", "seed": 5}, {"include": "layers.0.*"}
    walk = {"calibration": text, "samples": 6, "seq_len": 16, **said, **first}
    prune(dense, output=tmp_path / "walked", calibrate_on="dense", **walk)
    collect_grams(dense, output=grams, **walk)
    for label, more in (("silent", {}), ("spoken", said)):
        out = tmp_path / label
        prune(dense, grams=grams, output=out, **more, **first)
        assert contents(out) == contents(tmp_path / "walked")
    verify_model(out, dense, calibration=text)


def test_held_out_windows_are_those_of_the_store(home, model, grams, tmp_path):
    out, held = tmp_path / "out", home / "held"
    more = ["--min-tokens", 1, "--solver", "wanda", "--gram-shrinkage", "auto", "--output", out]
    run("prune", model, "--grams", held, "--sparsity", 0.5, *more)
    options = read_manifest(out / MANIFEST)["fingerprint"]["options"]
    assert (options["gram_shrinkage"], options["holdout"]) == ("auto", 0.34)
    with pytest.raises(ModelError, match="needs held-out windows"):
        prune(model, grams=grams, gram_shrinkage="auto")
    how = {"update": REFIT, "damping": "auto", "gram_shrinkage": "auto"}
    how |= {"include": "layers.1.*.o_proj"}
    report = prune(model, grams=held, output=tmp_path / "refit", solver="swap", **how)
    assert [layer.error_held is not None for layer in report.layers] == [True]
    swept = {**how, "update": [REFIT], "min_tokens": 1}
    found, _ = sweep(model, held, tmp_path / "sweep", sparsity=HALF, **swept)
    assert contents(found[0].output) == contents(tmp_path / "refit")
    plan = plan_prune(model, grams=held, sparsity=0.5, min_tokens=1, **how)
    assert plan.forward_seconds == 0.0


@pytest.mark.parametrize("stop", [1, 2])
def test_interrupted_prunes_go_on(stop, home, model, grams, tmp_path):
    def halt(event):
        if event.block == stop:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prune(model, grams=grams, output=out, on_progress=halt)
    prune(model, grams=grams, output=out, resume=True)
    assert contents(out) == contents(home / "out")


@pytest.mark.parametrize(
    ("include", "missing"), [("layers.1.*", r".model.layers.0"), ("q_proj", r".*k_proj")]
)
def test_only_chosen_layers_are_stored(include, missing, model, tmp_path):
    """A layer that was left out is not taken for one without tokens."""
    grams = tmp_path / "grams"
    collect_grams(model, tokens(), output=grams, include=include)
    prune(model, grams=grams, output=tmp_path / "one", include=include)
    with pytest.raises(ModelError, match=f"no Gram matrix of layer {missing}"):
        prune(model, grams=grams, output=tmp_path / "all")
    assert not (tmp_path / "all").exists()


def other_model(home):
    other = patched(tiny("llama"), "lm_head.weight", lambda weight: weight.add_(1))
    save(other, home / "dense")


def index(change):
    """Another index in the store."""
    return lambda home: edit_json(home / "grams" / INDEX, lambda value: change(value, home))


def another_file(index, home):
    """A right digest of a file that is none."""
    shutil.copy(home / "dense" / "model.safetensors", home / "grams" / FIRST)
    index["files"][FIRST] = file_digest(home / "grams" / FIRST)


def negate(index, home):
    """Right digests of negative Gram matrices, of which every mask would cost nothing."""
    for name in index["files"]:
        path = home / "grams" / name
        stored = open_safe(path)
        with open(path, "r+b") as file:
            for entry in stored.entries.values():
                if entry.name.endswith("/sum"):
                    file.seek(entry.start)
                    file.write((-stored.read(entry.name)).numpy().tobytes())
        index["files"][name] = file_digest(path)


NO_INDEX = "not an index of format"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (index(negate), r"'model\.layers\.0\.\S+': .* changed: its diagonal is below 0"),
        (other_model, "of another model"),
        (lambda home: flip(home / "grams" / FIRST, -9), "was changed"),
        (index(lambda i, _: i.clear()), NO_INDEX),
        (index(lambda i, _: i.pop("layers")), NO_INDEX),
        (index(lambda i, _: i["fingerprint"]["calibration"].pop("samples")), NO_INDEX),
        (index(lambda i, _: i["fingerprint"].pop("dtype")), NO_INDEX),
        (index(lambda i, _: i.update(layers=[[1]], bad_samples=[1])), NO_INDEX),
        (index(another_file), "holds no Gram matrices of format"),
    ],
)
def test_what_was_changed_is_refused(spoil, said, home, tmp_path):
    for name in ("dense", "grams"):
        shutil.copytree(home / name, tmp_path / name)
    spoil(tmp_path)
    with pytest.raises(ModelError, match=said):
        prune(tmp_path / "dense", grams=tmp_path / "grams", output=tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_what_needs_a_walk_is_refused(home, model, grams, tmp_path):
    asked = {"samples": 3, "bos": "never", "seq_len": 9, "holdout": 0.2, "dtype": "bfloat16"}
    asked |= {"token_weights": "skip-first", "seed": 5}
    for options, said in (
        ({"update": "blockwise", "holdout": 0.3}, "`update` blockwise needs the text"),
        ({"update": "blockwise", "grams": home / "held"}, "`update` blockwise needs the text"),
        ({"target": "dense"}, "`target` needs the text"),
        ({"true_sequential": True}, "`true_sequential` needs the text"),
        ({"allocation": "layers"}, "need the text"),
        ({"allocation": "rows"}, "need the text"),
        *(({k: v}, f"`{k}` {v} says nothing here: .*grams was made of") for k, v in asked.items()),
    ):
        how = {"grams": grams, "output": tmp_path / "out", "solver": "swap", **options}
        with pytest.raises(OptionError, match=said):
            prune(model, **how)


def test_models_and_options_that_do_not_go_with_a_store(model, grams, tmp_path):
    for source, more, said in (
        (tiny("llama"), {}, "`grams` are of model folders"),
        (model, {"output": tmp_path / "out", "calibration": "here.txt"}, "one of the two"),
    ):
        with pytest.raises(ModelError, match=said):
            prune(source, grams=grams, **more)
    with pytest.raises(OptionError, match="no option is called 'sample'; did you mean 'samples'"):
        collect_grams(tmp_path, tokens(), output=tmp_path / "grams", sample=4)
    assert not (tmp_path / "grams").exists()
    # what a store is of goes before what is asked
    collect_grams(model, tokens(), output=tmp_path / "grams", token_weights="skip-first")
    options = GramStore(tmp_path / "grams").options(PruneOptions(Unstructured(sparsity=0.5)))
    assert (options.token_weights, options.one_pass, options.samples) == ("skip-first", True, 6)


def test_an_option_at_its_default_that_is_asked_for_is_refused(model, tmp_path):
    grams, out = tmp_path / "grams", tmp_path / "out"
    collect_grams(model, tokens(8), output=grams, holdout=0.25, seed=3)
    how = {"grams": grams, "output": out}
    command = ["prune", model, "--grams", grams, "--sparsity", 0.5, "--solver", "wanda"]
    for name in ("seed", "holdout", "samples", "calibrate_on"):
        usual = getattr(PruneOptions, name)
        with pytest.raises(OptionError, match=f"`{name}` {usual} says nothing here"):
            prune(model, **how, **{name: usual})
        flag = f"--{name.replace('_', '-')}"
        said = run(*command, "--output", out, flag, usual, fails=OptionError)
        assert f"{usual} says nothing here" in said
    prune(model, **how, seed=3, holdout=0.25, samples=8, calibrate_on="dense", dtype="auto")
    # a file of options that --print-config wrote holds those at their defaults, too
    path, again = tmp_path / "run.toml", tmp_path / "again"
    path.write_text(run(*command, "--min-tokens", 1, "--print-config", "--output", again))
    assert "seed = 0" in path.read_text()
    run("prune", "--config", path)
    assert read_manifest(again / MANIFEST)["fingerprint"]["options"]["seed"] == 3


@pytest.mark.parametrize(
    "allocation", ["rows", pytest.param("layers", marks=pytest.mark.slow), "both"]
)
def test_allocations_whose_counts_are_known_need_no_walk(allocation, model, grams, tmp_path):
    how = {"allocation": allocation, "sensitivity": "relative"}
    if allocation != "rows":  # whose rows need none
        report = prune(model, tokens(), output=tmp_path / "chosen", **how)
        assert any(layer.pruned * 2 != layer.rows * layer.n for layer in report.layers)
        how["counts"] = report.fingerprint["options"]["counts"]
    prune(model, grams=grams, output=tmp_path / "stored", **how)
    prune(model, tokens(), output=tmp_path / "walked", calibrate_on="dense", **how)
    assert contents(tmp_path / "stored") == contents(tmp_path / "walked")


def test_a_sweep_is_its_prunes_and_goes_on_where_it_was(model, grams, tmp_path):
    out, how = tmp_path / "sweep", {"damping": 0.02, **ATTENTION}  # damping of the refitted ones
    swept = {"sparsity": [*HALF, "2:4"], "update": [NONE, REFIT], "min_tokens": 1, **how}
    found, dense_too = sweep(model, grams, out, text=tokens(3), **swept)
    labels = [f"{share}-swap-{update}" for share in ("0.5", "2of4") for update in (NONE, REFIT)]
    assert [one.label for one in found] == labels
    assert dense_too is not None
    assert all(one.evaluation is not None and one.evaluation.change for one in found)
    prune(model, grams=grams, output=tmp_path / "alone", update=REFIT, solver="swap", **how)
    assert contents(tmp_path / "alone") == contents(out / "0.5-swap-least-squares")
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    again, _ = sweep(model, grams, out, **swept)
    assert [one.report.sparsity for one in again] == [one.report.sparsity for one in found]
    assert before == {p: p.stat().st_mtime_ns for p in before}
    (weights,) = again[1].output.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(
        ModelError, match=r"5-swap-least-squares: .*tensors was changed .*`overwrite`"
    ):
        sweep(model, grams, out, **swept)
    # of layers without tokens no error is shown
    swept = {"sparsity": HALF, "min_tokens": 10**6, "include": "q_proj"}
    found, _ = sweep(model, grams, tmp_path / "none", **swept)
    columns = swept_table(found, None).columns[2:4]
    assert [list(column.cells) for column in columns] == [["–"], ["–"]]


def test_a_sweep_is_refused_before_its_first_prune(model, grams, tmp_path):
    for more, said in (
        ({"sparsity": []}, "nothing is swept"),
        ({"text": "nothere.txt"}, "no such file"),
        ({"text": tokens(3)[:, :1]}, "at least two tokens"),
        ({"sparsity": [NM(keep=2, of=4), NM(keep=3, of=5)]}, "do not divide into groups of 5"),
        ({"sparsity": [*HALF, Unstructured(0.5, per="layer")]}, "need the text"),
        ({"solvers": ["swap", "nothing"]}, "unknown solver"),
        ({"holdout": 0.3}, "`holdout`"),
    ):
        with pytest.raises(MaskoptError, match=said):
            sweep(model, grams, tmp_path / "out", **{"sparsity": HALF, "min_tokens": 1, **more})
        assert not (tmp_path / "out").exists()


def test_a_sweep_judges_as_it_prunes_but_no_model_with_code_of_its_own(
    model, tmp_path, monkeypatch
):
    here = {"device": "cpu", "threads": 1, "trust_remote_code": True}
    own = save_with_own_code(tmp_path / "own")
    for source, name in ((model, "grams"), (own, "own-grams")):
        collect_grams(source, tokens(), output=tmp_path / name, **here)
    walks = []

    def recorded(models, text, walk, **more):
        walks.append(walk)
        return evaluate(models, text, walk, **more)

    monkeypatch.setattr("maskopt.models.evaluation.sweep.evaluate", recorded)
    how = {"sparsity": HALF, "solvers": ["wanda"], "min_tokens": 1, **here}
    found, _ = sweep(model, tmp_path / "grams", tmp_path / "out", text=tokens(3), **how)
    assert [one.evaluation is not None for one in found] == [True]
    assert {name: getattr(walks[0], name) for name in here} == here
    with pytest.raises(ModelError, match="not copied to the pruned folders; leave out `text`"):
        sweep(own, tmp_path / "own-grams", tmp_path / "of-own", text=tokens(3), **how)
    assert not (tmp_path / "of-own").exists()
    found, _ = sweep(own, tmp_path / "own-grams", tmp_path / "of-own", **how)
    assert [one.label for one in found] == ["0.5-wanda-none"]


def test_the_commands(model, tmp_path):
    text, grams, out, swept = (tmp_path / n for n in ("t.npy", "grams", "out", "sweep"))
    np.save(text, tokens(3).numpy())
    assert "Gram matrices" in run("sweep", model, "--calibration", text, "--grams", grams)
    half, more = ["--sparsity", 0.5], [model, "--grams", grams, "--min-tokens", 1]
    more += ["--solver", "wanda", "--include", ATTENTION["include"]]
    # a sweep collects what it needs, and reads it the next time
    words = ["sweep", model, "--grams", tmp_path / "new", *more[3:], *half]
    words += ["--output", tmp_path / "first"]
    for _ in range(2):
        assert "0.5-wanda-none" in run(*words, "--calibration", text)
    np.save(other := tmp_path / "other.npy", tokens(2).numpy())
    assert "of other text" in run(*words, "--calibration", other, fails=ModelError)
    run("prune", *more, *half, "--output", out)
    assert "holds" in run("verify", out, "--original", model)
    planned = run("prune", "--dry-run", *more, *half)
    assert "forward passes and Gram matrices about 0 s" in " ".join(planned.split())
    both = ["--sparsity", "0.5,0.75,2:4", "--update", "none,least-squares"]
    said = run("sweep", *more, *both, "--output", swept, "--text", text)
    for label in ("0.5-wanda-none", "0.75-wanda-least-squares", "2of4-wanda-none", "perplexity"):
        assert label in said
    no = ["--output", tmp_path / "no"]
    assert "must be like 0.6" in run("sweep", *more, "--sparsity", "x", *no, fails=PatternError)
    assert "name a source of text" in run("prune", model, *half, *no, fails=ModelError)
    # other options replace if asked to
    before = contents(swept / "0.5-wanda-none")
    other = [*more, *half, "--gram-shrinkage", 0.1, "--output", swept]
    said = run("sweep", *other, fails=ModelError)
    assert "another run: options.gram_shrinkage was 0.0, is 0.1; --overwrite replaces it" in said
    assert contents(swept / "0.5-wanda-none") == before
    run("sweep", *other, "--overwrite")
    prune(model, grams=grams, output=tmp_path / "alone", gram_shrinkage=0.1, **ATTENTION)
    assert contents(swept / "0.5-wanda-none") == contents(tmp_path / "alone")

"""Gram matrices: on disk, and pruned from them; weighted tokens, held-out windows, the dense target."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from commands import run, shows
from forging import fails, flip
from hypothesis import given, strategies as st
from prunes import contents, interrupted, manifest_of, prune, slow
from tiny_models import edit_json, inputs_of, patched, save, save_with_own_code, tiny, tokens
from transformers import AutoModelForCausalLM

import maskopt.errors as e
from maskopt import NM, LayerProblem, Unstructured, collect_grams, collect_problems, prune_model
from maskopt.cli.prune import swept_table
from maskopt.core.gram import CHUNK, Gram
from maskopt.models.blockwise.job import open_job
from maskopt.models.calibration.tokens import TOKEN_WEIGHTS, held_out, weights_of_tokens
from maskopt.models.checkpoints.checkpoint import open_safe
from maskopt.models.checkpoints.schema import MANIFEST, file_digest
from maskopt.models.evaluation.evaluate import evaluate
from maskopt.models.evaluation.sweep import sweep
from maskopt.models.options.prune import PruneOptions, prune_options
from maskopt.models.pruning.gram_store import INDEX, GramStore
from maskopt.models.pruning.plan import _forward_operations, plan_prune
from maskopt.models.pruning.prune_layer import SHRINK_GRID, SHRINK_TOLERANCE
from maskopt.models.verification.verify import verify_model

HALF, STORED = [Unstructured(sparsity=0.5)], "grams-00001.bits"
ATTENTION, LAST = {"include": "layers.1.self_attn.*"}, "layers.1.*.o_proj"
UNIFORM, SKIP_FIRST, RELATIVE, GRADIENT = TOKEN_WEIGHTS
EQUALLY = {"sparsity": 0.5, "min_tokens": 1}
FIRST_BLOCK = ("layers.0.*",)  # of the first block, whose inputs no pruning has changed
NAME = "model.layers.1.mlp.up_proj"
RUNS = [(RELATIVE, {}), (RELATIVE, {"target": "dense", "holdout": 0.4}), (GRADIENT, {})]
ONE, FIRST_TOKENS = {"data": tokens(4, 1)}, {"token_weights": "first"}
SKIP, LOSS = {"token_weights": SKIP_FIRST}, {"token_weights": GRADIENT}
FAMILIES = ["llama", "gemma3", "gpt2", "mamba", slow("bloom"), slow("bamba")]
DENSE = {**EQUALLY, "target": "dense"}
NONE, REFIT = "none", "least-squares"
FIRST = [("llama", NONE, 0.0), ("mixtral", NONE, 0.34), ("gpt2", REFIT, 0.34)]
EACH = itertools.product(("llama", "gpt2", "mixtral", "phi3", "qwen3_moe"), (NONE, REFIT), (0.34,))
EACH = [*FIRST, *(slow(*x) for x in EACH if x not in FIRST and x[:2] != ("llama", NONE))]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model and its stores, one with held-out windows; nobody may change them."""
    home = tmp_path_factory.mktemp("home")
    dense = save(tiny("llama"), home / "dense")
    collect_grams(dense, tokens(), output=home / "grams")
    collect_grams(dense, tokens(), output=home / "held", holdout=0.34)
    prune(dense, grams=home / "grams", output=home / "out")
    return home


@given(st.integers(1, 30), st.integers(0, 3), st.integers(0, 10**6))
def test_a_gram_matrix_comes_back_to_the_bit(n, sequences, seed):
    generator = torch.Generator().manual_seed(seed)
    gram = Gram(n)
    for _ in range(sequences):
        gram.add(torch.randn(7, n, generator=generator))
    again = Gram.restored(gram.state())
    for shrink in (0.0, 0.3):
        assert torch.equal(again.value(shrinkage=shrink), gram.value(shrinkage=shrink))
    assert torch.equal(again.moments(), gram.moments())
    assert again.tokens == gram.tokens
    assert len(gram.state()["sum"]) == n * (n + 1) // 2
    more = torch.randn(5, n, generator=generator)
    gram.add(more)
    again.add(more)
    assert torch.equal(again.value(), gram.value())
    state, bad = gram.state(), "its diagonal is below 0, or values are not finite"
    fails(e.ProblemError, "does not fit", Gram.restored, {**state, "sum": state["sum"][:-1]})
    for last in (-1e-300, float("nan"), float("inf")):
        state["sum"][-1] = last
        fails(e.ProblemError, bad, Gram.restored, state)


@pytest.mark.parametrize(("family", "update", "holdout"), EACH)
def test_the_same_bytes_as_in_one_pass(family, update, holdout, tmp_path):
    dense = save(tiny(family, layers=2), tmp_path / "dense", shard="30KB")
    how = {"update": update, "holdout": holdout, "solver": "wanda" if holdout else "swap"}
    prune(dense, tmp_path / "walked", calibrate_on="dense", **how)
    collect_grams(dense, tokens(), output=tmp_path / "grams", holdout=holdout)
    prune(dense, grams=tmp_path / "grams", output=tmp_path / "stored", **how)
    assert contents(tmp_path / "stored") == contents(tmp_path / "walked")
    found = verify_model(tmp_path / "stored", dense, calibration=None if holdout else tokens())
    assert len(found.checked_layers) == (0 if holdout else 14)


def test_precision_seed_and_held_out_windows_are_those_of_the_store(dense, home, tmp_path):
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
    # so are held-out windows
    model, out, held = home / "dense", tmp_path / "out", home / "held"
    more = ["--min-tokens", 1, "--solver", "wanda", "--gram-shrinkage", "auto", "--output", out]
    run("prune", model, "--grams", held, "--sparsity", 0.5, *more)
    options = manifest_of(out)["fingerprint"]["options"]
    assert (options["gram_shrinkage"], options["holdout"]) == ("auto", 0.34)
    how = {"grams": home / "grams", "gram_shrinkage": "auto"}
    fails(e.ModelError, "needs held-out windows", prune, model, **how)
    how = {"update": REFIT, "damping": "auto", "gram_shrinkage": "auto", "include": LAST}
    report = prune(model, grams=held, output=tmp_path / "refit", solver="swap", **how)
    assert [layer.error_held is not None for layer in report.layers] == [True]
    swept = {**how, "update": [REFIT], "min_tokens": 1}
    found, _ = sweep(model, held, tmp_path / "sweep", sparsity=HALF, **swept)
    assert contents(found[0].output) == contents(tmp_path / "refit")
    assert plan_prune(model, grams=held, sparsity=0.5, min_tokens=1, **how).forward_seconds == 0.0


def test_interrupted_prunes_go_on_and_only_chosen_layers_are_stored(home, tmp_path):
    """A layer that was left out is not taken for one without tokens."""
    model, given = home / "dense", {"grams": home / "grams"}
    for stop in (1, 2):
        interrupted(model, out := tmp_path / str(stop), stop, "solve", **given)
        prune(model, out, resume=True, **given)
        assert contents(out) == contents(home / "out")
    for include, missing in (("layers.1.*", r".model.layers.0"), ("q_proj", r".*k_proj")):
        grams, out = tmp_path / f"{include} grams", tmp_path / "out"
        collect_grams(model, tokens(), output=grams, include=include)
        prune(model, grams=grams, output=tmp_path / include, include=include)
        said = f"no Gram matrix of layer {missing}"
        fails(e.ModelError, said, prune, model, grams=grams, output=out)
        assert not out.exists()
    said = "save the model first"
    fails(e.ModelError, said, collect_grams, tiny("llama"), tokens(), output=tmp_path / "memory")


def other_model(home):
    other = patched(tiny("llama"), "lm_head.weight", lambda weight: weight.add_(1))
    save(other, home / "dense")


def index(change):
    return lambda home: edit_json(home / "grams" / INDEX, lambda value: change(value, home))


def another_file(index, home):
    shutil.copy(home / "dense" / "model.safetensors", home / "grams" / STORED)
    index["files"][STORED] = file_digest(home / "grams" / STORED)


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
SPOILED = [
    (index(negate), r"'model\.layers\.0\.\S+': .* changed: its diagonal is below 0"),
    (other_model, "of another model"),
    (lambda home: flip(home / "grams" / STORED, -9), "was changed"),
    (index(lambda i, _: i.clear()), NO_INDEX),
    (index(lambda i, _: i.pop("layers")), NO_INDEX),
    (index(lambda i, _: i["fingerprint"]["calibration"].pop("samples")), NO_INDEX),
    (index(lambda i, _: i["fingerprint"].pop("dtype")), NO_INDEX),
    (index(lambda i, _: i.update(layers=[[1]], bad_samples=[1])), NO_INDEX),
    (index(another_file), "holds no Gram matrices of format"),
]


@pytest.mark.parametrize(("spoil", "said"), SPOILED)
def test_what_was_changed_is_refused(spoil, said, home, tmp_path):
    model, grams, out = (tmp_path / name for name in ("dense", "grams", "out"))
    for folder in (model, grams):
        shutil.copytree(home / folder.name, folder)
    spoil(tmp_path)
    fails(e.ModelError, said, prune, model, out, grams=grams)
    assert not (out / MANIFEST).exists()


def test_what_does_not_go_with_a_store(home, tmp_path):
    model, grams, out = home / "dense", home / "grams", tmp_path / "out"
    asked = {"samples": 3, "bos": "never", "seq_len": 9, "holdout": 0.2, "dtype": "bfloat16"}
    asked |= {"token_weights": "skip-first", "seed": 5}
    for options, said in (
        ({"update": "blockwise", "holdout": 0.3}, "`update` blockwise needs the text"),
        ({"update": "blockwise", "grams": home / "held"}, "`update` blockwise needs the text"),
        ({"true_sequential": True}, "`true_sequential` needs the text"),
        ({"allocation": "layers"}, "need the text"),
        ({"allocation": "rows"}, "need the text"),
        *(({k: v}, f"`{k}` {v} says nothing here: .*grams was made of") for k, v in asked.items()),
    ):
        how = {"grams": grams, "solver": "swap", **options}
        fails(e.OptionError, said, prune, model, out, **how)
    fails(e.ModelError, "for `output`, `grams`", prune, tiny("llama"), grams=grams)
    fails(e.ModelError, "one of the two", prune, model, out, grams=grams, calibration="here.txt")
    said = "no option is called 'sample'; did you mean 'samples'"
    fails(e.OptionError, said, collect_grams, tmp_path, tokens(), output=out, sample=4)
    fails(e.ModelError, "Gram matrices need `calibration`", collect_grams, model, output=out)
    assert not out.exists()
    # what a store is of goes before what is asked
    collect_grams(model, tokens(), output=out, token_weights="skip-first")
    options = GramStore(out).options(PruneOptions(Unstructured(sparsity=0.5)))
    assert (options.token_weights, options.one_pass, options.samples) == ("skip-first", True, 6)


def test_an_option_at_its_default_that_is_asked_for_is_refused(home, tmp_path):
    model, grams, out = home / "dense", tmp_path / "grams", tmp_path / "out"
    collect_grams(model, tokens(8), output=grams, holdout=0.25, seed=3)
    how = {"grams": grams, "output": out}
    command = ["prune", model, "--grams", grams, "--sparsity", 0.5, "--solver", "wanda"]
    for name in ("seed", "holdout", "samples", "calibrate_on"):
        usual = getattr(PruneOptions, name)
        said = f"{usual} says nothing here"
        fails(e.OptionError, f"`{name}` {said}", prune, model, **how, **{name: usual})
        flag = f"--{name.replace('_', '-')}"
        assert said in run(*command, "--output", out, flag, usual, fails=e.OptionError)
    prune(model, **how, seed=3, holdout=0.25, samples=8, calibrate_on="dense", dtype="auto")
    # a file of options that --print-config wrote holds those at their defaults, too
    path, again = tmp_path / "run.toml", tmp_path / "again"
    path.write_text(run(*command, "--min-tokens", 1, "--print-config", "--output", again))
    assert "seed = 0" in path.read_text()
    run("prune", "--config", path)
    assert manifest_of(again)["fingerprint"]["options"]["seed"] == 3


@pytest.mark.parametrize("allocation", ["rows", slow("layers"), "both"])
def test_allocations_whose_counts_are_known_need_no_walk(allocation, home, tmp_path):
    model, grams = home / "dense", home / "grams"
    how = {"allocation": allocation, "sensitivity": "relative"}
    if allocation != "rows":  # whose rows need none
        report = prune(model, tmp_path / "chosen", **how)
        assert any(layer.pruned * 2 != layer.rows * layer.n for layer in report.layers)
        how["counts"] = report.fingerprint["options"]["counts"]
    prune(model, grams=grams, output=tmp_path / "stored", **how)
    prune(model, tmp_path / "walked", calibrate_on="dense", **how)
    assert contents(tmp_path / "stored") == contents(tmp_path / "walked")


def test_a_sweep_is_its_prunes_and_goes_on_where_it_was(home, tmp_path):
    model, grams = home / "dense", home / "grams"
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
    said = r"5-swap-least-squares: .*tensors was changed .*`overwrite`"
    fails(e.ModelError, said, sweep, model, grams, out, **swept)
    # of layers without tokens no error is shown
    swept = {"sparsity": HALF, "min_tokens": 10**6, "include": "q_proj"}
    found, _ = sweep(model, grams, tmp_path / "none", **swept)
    columns = swept_table(found, None).columns[2:4]
    assert [list(column.cells) for column in columns] == [["–"], ["–"]]


def test_sweeps_that_are_refused_and_models_with_own_code(home, tmp_path, monkeypatch):
    model, grams, out = home / "dense", home / "grams", tmp_path / "out"
    for more, said in (  # before the first prune
        ({"sparsity": []}, "nothing is swept"),
        ({"text": "nothere.txt"}, "no such file"),
        ({"text": tokens(3)[:, :1]}, "at least two tokens"),
        ({"sparsity": [NM(keep=2, of=4), NM(keep=3, of=5)]}, "do not divide into groups of 5"),
        ({"sparsity": [*HALF, Unstructured(0.5, per="layer")]}, "need the text"),
        ({"solver": ["swap", "nothing"]}, "unknown solver"),
        ({"holdout": 0.3}, "`holdout`"),
    ):
        how = {"sparsity": HALF, "min_tokens": 1, **more}
        fails(e.MaskoptError, said, sweep, model, grams, out, **how)
        assert not out.exists()
    # a sweep judges as it prunes
    here = {"device": "cpu", "threads": 1, "trust_remote_code": True}
    walks, own = [], save_with_own_code(tmp_path / "own")
    collect_grams(own, tokens(), output=tmp_path / "own-grams", **here)

    def recorded(models, text, walk, **more):
        walks.append(walk)
        return evaluate(models, text, walk, **more)

    monkeypatch.setattr("maskopt.models.evaluation.sweep.evaluate", recorded)
    how = {"sparsity": HALF, "solver": ["wanda"], "min_tokens": 1, **here}
    found, _ = sweep(model, grams, out, text=tokens(3), **how)
    assert [one.evaluation is not None for one in found] == [True]
    assert {name: getattr(walks[0], name) for name in here} == here
    # but no model with code of its own
    given = (own, tmp_path / "own-grams", tmp_path / "of-own")
    said = "not copied to the pruned folders; leave out `text`"
    fails(e.ModelError, said, sweep, *given, text=tokens(3), **how)
    assert not (tmp_path / "of-own").exists()
    found, _ = sweep(*given, **how)
    assert [one.label for one in found] == ["0.5-wanda-none"]


def test_the_commands(home, tmp_path):
    model, text = home / "dense", tmp_path / "t.npy"
    grams, out, swept = (tmp_path / n for n in ("grams", "out", "sweep"))
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
    assert "of other text" in run(*words, "--calibration", other, fails=e.ModelError)
    run("prune", *more, *half, "--output", out)
    assert "holds" in run("verify", out, "--original", model)
    planned = run("prune", "--dry-run", *more, *half)
    assert "forward passes and Gram matrices about 0 s" in " ".join(planned.split())
    both = ["--sparsity", "0.5,0.75,2:4", "--update", "none,least-squares"]
    said = run("sweep", *more, *both, "--output", swept, "--text", text)
    shows(said, "0.5-wanda-none", "0.75-wanda-least-squares", "2of4-wanda-none", "perplexity")
    no = ["--output", tmp_path / "no"]
    assert "must be like 0.6" in run("sweep", *more, "--sparsity", "x", *no, fails=e.PatternError)
    assert "name a source of text" in run("prune", model, *half, *no, fails=e.DataError)
    # other options replace if asked to
    before = contents(swept / "0.5-wanda-none")
    other = [*more, *half, "--gram-shrinkage", 0.1, "--output", swept]
    said = run("sweep", *other, fails=e.ModelError)
    assert "another run: options.gram_shrinkage was 0.0, is 0.1; --overwrite replaces it" in said
    assert contents(swept / "0.5-wanda-none") == before
    run("sweep", *other, "--overwrite")
    prune(model, grams=grams, output=tmp_path / "alone", gram_shrinkage=0.1, **ATTENTION)
    assert contents(swept / "0.5-wanda-none") == contents(tmp_path / "alone")


# --- what errors are measured on: tokens that count more or less, held-out windows, the dense target
def gradients(model, data):
    """Norms of the loss's, by the hidden states that leave the layer's block; [windows, length]."""
    left, norms = [], []
    model.get_submodule("model.layers.1").register_forward_hook(
        lambda module, args, output: left.append(output[0] if isinstance(output, tuple) else output)
    )
    for window in data:
        (gradient,) = torch.autograd.grad(model(window[None], labels=window[None]).loss, left.pop())
        norms.append(gradient[0].norm(dim=1))
    return torch.stack(norms).double()


@pytest.mark.parametrize("token_weights", TOKEN_WEIGHTS)
def test_a_gram_matrix_is_the_weighted_mean(token_weights):
    data, names = tokens(5), (NAME, "model.layers.1.input_layernorm")
    x, state = (inputs_of(tiny("llama"), name, data).view(*data.shape, -1) for name in names)
    weights = torch.ones(x.shape[:2], dtype=torch.float64)
    if token_weights == SKIP_FIRST:
        weights[:, 0] = 0
    elif token_weights == GRADIENT:
        weights = gradients(tiny("llama"), data)
    elif token_weights != UNIFORM:
        weights = 1 / state.square().mean(2)
    weights = weights / weights.mean(1, keepdim=True)
    expected = torch.einsum("wt,wti,wtj->ij", weights, x, x) / weights.numel()
    how = {"sparsity": 0.5, "layers": (NAME,), "token_weights": token_weights}
    (_, problem), *_ = list(collect_problems(tiny("llama"), data, **how))
    torch.testing.assert_close(problem.gram.double(), expected, rtol=1e-4, atol=1e-6)
    assert problem.moments is not None
    mean = torch.einsum("wt,wti->i", weights, x) / weights.numel()
    torch.testing.assert_close(problem.moments[0].double(), mean, rtol=1e-4, atol=1e-6)


def test_weights_over_several_chunks():
    x = torch.randn(CHUNK + 7, 6, dtype=torch.float64)
    weights, gram = torch.rand(CHUNK + 7, dtype=torch.float64), Gram(6)
    for task in gram.tasks(x, weights):
        task()
    part = x * weights[:, None]
    torch.testing.assert_close(gram.value(dtype=torch.float64), part.T @ x / len(x))
    # weights have a mean of one and outlast extreme states
    state = torch.randn(1, 9, 4)
    state[0, 0] *= 1e4
    for token_weights in (SKIP_FIRST, RELATIVE):
        weights = weights_of_tokens(state, token_weights)
        assert float(weights.mean()) == pytest.approx(1)
        assert float(weights[0]) < 1e-6
    zeros = weights_of_tokens(torch.zeros(1, 3, 4), RELATIVE)
    assert zeros.tolist() == [1.0, 1.0, 1.0]


RUNS = [(RELATIVE, {}), (RELATIVE, {"holdout": 0.4}), (GRADIENT, {})]


@pytest.mark.parametrize(("token_weights", "more"), RUNS)
def test_a_weighted_run_is_verified(token_weights, more, dense_folder, tmp_path):
    options = {**EQUALLY, "include": "layers.1", "token_weights": token_weights, **more}
    report = prune_model(dense_folder, tokens(), output=tmp_path / "out", **options)
    equal = prune_model(tiny("llama"), tokens(), **{**options, "token_weights": "uniform"})
    assert [layer.error for layer in report.layers] != [layer.error for layer in equal.layers]
    found = verify_model(tmp_path / "out", dense_folder, calibration=tokens())
    assert len(found.checked_layers) == 7


def test_bad_input_gets_one_line():
    for options, error, message in (
        (FIRST_TOKENS, e.OptionError, "uniform, skip-first, relative, gradient"),
        ({**SKIP, "model": "mixtral"}, e.OptionError, "skip-first needs `all_experts`"),
        ({**SKIP, **ONE}, e.DataError, "windows of a single token"),
        ({**LOSS, **ONE}, e.DataError, "windows of a single token"),
        ({**LOSS, "skip_bad_samples": True}, e.OptionError, "leaves windows out: c"),
        ({"holdout": 1.0}, e.OptionError, "`holdout` must be a number"),
        ({"holdout": -0.1}, e.OptionError, "`holdout` must be a number"),
        ({"holdout": 0.1}, e.DataError, "holds out none; take at least 10 windows"),
        ({"gram_shrinkage": "auto"}, e.ModelError, "needs held-out windows"),
        ({"gram_shrinkage": "some"}, e.ModelError, "or be auto"),
        ({"gram_shrinkage": 1.5}, e.ModelError, "must lie in"),
    ):
        how = {"data": tokens(4), "model": "llama", **EQUALLY, **options}
        fails(error, message, prune_model, tiny(how.pop("model")), how.pop("data"), **how)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", slow("bfloat16")])
def test_gradients_of_a_folder_in_a_file_are_those_of_the_model_in_memory(family, dtype, tmp_path):
    dense = save(tiny(family, dtype=getattr(torch, dtype)), tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype)
    options, data = {**EQUALLY, "token_weights": "gradient"}, tokens(3, 10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = list(collect_problems(model, data, **options))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    streamed = list(collect_problems(dense, data, dtype=dtype, activation_memory=0, **options))
    for (name, one), (other, two) in zip(kept, streamed, strict=True):
        assert name == other
        torch.testing.assert_close(one.gram, two.gram, rtol=1e-5, atol=1e-6)


# --- held-out windows: what is fitted never sees them, and errors are given on both
def pruned(data, **options):
    return prune_model(tiny("llama"), data, **EQUALLY, **options)


def problems(data, **options):
    return dict(collect_problems(tiny("llama"), data, sparsity=0.5, layers=FIRST_BLOCK, **options))


def test_masks_are_those_of_the_windows_that_are_left_with_any_threads():
    options = {"token_weights": "gradient", "include": "layers.1.*"}
    reports = [pruned(tokens(), threads=n, **options) for n in (1, 2, 3)]
    errors = [[layer.error for layer in report.layers] for report in reports]
    assert errors[0] == errors[1] == errors[2]
    data = tokens(10)
    whole, part = pruned(data, holdout=0.3), pruned(data[:7])
    for name, mask in part.masks.items():
        assert torch.equal(mask, whole.masks[name])
    for one, other in zip(whole.layers, part.layers, strict=True):
        assert (one.tokens, one.error) == (other.tokens, other.error)
        assert one.relative == pytest.approx(one.error / one.energy)
        assert one.relative_held > 0
        assert other.relative_held is None


def test_errors_and_energies_are_those_of_the_windows_that_they_are_on():
    data = tokens(10)
    report = pruned(data, holdout=0.4, include=FIRST_BLOCK)
    found = problems(data[6:])
    for layer in report.layers:
        problem, mask = found[layer.name], report.masks[layer.name]
        judged = [float(x.sum()) for x in (problem.objective(mask), problem.output_energy())]
        assert [layer.error_held, layer.energy_held] == pytest.approx(judged, rel=1e-5)
    for shrink in (0.0, 0.5, 1.0):  # an error and its energy are of the same Gram matrix
        report = pruned(tokens(4), gram_shrinkage=shrink, include=FIRST_BLOCK, solver="wanda")
        found = problems(tokens(4), gram_shrinkage=shrink)
        energies = [float(found[layer.name].output_energy().sum()) for layer in report.layers]
        assert [layer.energy for layer in report.layers] == pytest.approx(energies, rel=1e-5)
    x, weight = torch.randn(50, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    problem = LayerProblem(weight, x.T @ x / 50, Unstructured(keep=3))
    torch.testing.assert_close(problem.output_energy(), (x @ weight.T).square().mean(0))


def test_auto_shrinkage_is_the_greatest_that_is_nearly_the_best_on_the_held_out_windows():
    """Wanda's mask does not change with α, but the error does: that of the result is on the same matrix."""
    first = {"include": "layers.0.self_attn", "holdout": 0.5, "start": "wanda"}
    auto = pruned(tokens(2), gram_shrinkage="auto", **first)
    fixed = [pruned(tokens(2), gram_shrinkage=alpha, **first) for alpha in SHRINK_GRID]
    for index, layer in enumerate(auto.layers):
        layers = [one.layers[index] for one in fixed]
        best = min(one.error_held for one in layers) * (1 + SHRINK_TOLERANCE)
        near = [i for i, one in enumerate(layers) if one.error_held <= best][-1]
        assert layer.gram_shrinkage == SHRINK_GRID[near]
        assert layer.error_held == pytest.approx(layers[near].error_held, rel=1e-9)
        assert layer.error_wanda == layers[near].error_wanda
    assert {layer.gram_shrinkage for layer in auto.layers} != {0.0}
    # the share of held-out windows is taken as written: 0.29 · 100 is 28.999… in binary floating point
    assert [len(held_out(100, share / 100)) for share in range(100)] == list(range(100))
    assert held_out(10, 0.0) == frozenset()


@pytest.mark.slow
def test_plans_count_held_out_windows_and_the_dense_model_that_goes_along(dense_folder):
    """Gram matrices of held-out windows are a second set; states of the dense model are the targets."""
    how, held_out = {**EQUALLY, "solver": "wanda", "threads": 1}, {"holdout": 0.5}
    more = ({}, held_out, {**held_out, "update": "blockwise"})
    given = [prune_options(None, {**how, **one}) for one in more]
    alone, held, trained = (plan_prune(dense_folder, tokens(), one).memory for one in given)
    assert trained.grams == held.grams
    assert trained.activations == 2 * alone.activations
    alone_operations, _, both = (
        _forward_operations(open_job(dense_folder, tokens(), x), x) for x in given
    )
    assert 1.4 * alone_operations < both < 2 * alone_operations
    # inputs of q k v, of o, of gate and up, of down; the widest is that of down
    assert held.grams - alone.grams == 8 * (3 * 32**2 + 48**2)
    assert held.solving - alone.solving == 4 * 48**2

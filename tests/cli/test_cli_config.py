"""Options of a prune from a file: what is printed is read again, and a manifest repeats its run."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from commands import run
from forging import forge_manifest
from outputs import contents
from tiny_models import save, tiny, tokens

from maskopt.errors import DataError, MaskoptError, ModelError, OptionError, PatternError
from maskopt.model.again import command_again, options_again
from maskopt.model.report import read_manifest

ALL = [
    "--sparsity", "0.5", "--solver", "wanda", "--include", "q_proj,k_proj", "--samples", "7",
    "--seq-len", "9",
    "--weights", "reconstruct", "--reconstruct", "epochs=2", "--reconstruct", "begin=refit",
    "--holdout", "0.3", "--shrink", "auto", "--one-pass", "--max-memory", "3GiB", "--damping", "0.5",
]  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    import numpy as np

    np.save(tmp_path / "tokens.npy", tokens(6).numpy())
    return save(tiny("llama"), tmp_path / "dense")


def arguments(model: Path, *more: str, out: str = "out") -> list[str]:
    home = model.parent
    return [
        str(model),
        "--calibration",
        str(home / "tokens.npy"),
        "--output",
        str(home / out),
        *more,
    ]


def printed(*given: str) -> dict[str, Any]:
    return tomllib.loads(run("prune", *given, "--print-config"))


def test_what_is_printed_is_read_again(model: Path, tmp_path: Path) -> None:
    text = run("prune", *arguments(model, *ALL), "--print-config")
    assert not (tmp_path / "out").exists()  # nothing else is done
    found = tomllib.loads(text)
    assert found["model"] == str(model)
    assert found["output"] == str(tmp_path / "out")
    assert found["include"] == ["q_proj", "k_proj"]
    assert found["reconstruct"] == {"epochs": 2, "begin": "refit"}
    assert (found["shrink"], found["damping"], found["one_pass"]) == ("auto", 0.5, True)
    (tmp_path / "run.toml").write_text(text)
    assert run("prune", "--config", tmp_path / "run.toml", "--print-config") == text
    assert run("plan", "--config", tmp_path / "run.toml", "--print-config") == text


@pytest.mark.parametrize("value", ["null", "[1, null]", '{"a": null}'])
def test_what_toml_cannot_say_is_refused(value: str, model: Path) -> None:
    given = arguments(model, "--sparsity", "0.5", "--option", f"moves={value}", "--print-config")
    said = run("prune", *given, fails=OptionError)
    assert "`solver_options` moves: null cannot be said in TOML" in said


def test_the_command_line_goes_before_the_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("sparsity = 0.5\nsamples = 3\none_pass = true\nseed = 4\n")
    both = arguments(model, "--config", str(tmp_path / "run.toml"))
    found = printed(*both, "--samples", "9", "--sequential", "--pattern", "2:4")
    assert (found["samples"], found["one_pass"], found["seed"]) == (9, False, 4)
    assert found["pattern"] == "2:4"
    assert "sparsity" not in found
    assert printed(*both)["sparsity"] == 0.5
    wrong = [
        *arguments(model),
        "--sparsity",
        "0.5",
        "--pattern",
        "2:4",
        "--output",
        str(tmp_path / "x"),
    ]
    assert "exactly one" in run("prune", *wrong, fails=PatternError)


@pytest.mark.parametrize(
    "options",
    [
        ["--sparsity", "0.5"],
        ["--pattern", "2:4", "--solver", "magnitude", "--layers", "mlp"],
        ["--sparsity", "0.5", "--budget", "model", "--importance", "alike", "--seed", "3"],
        ["--pattern", "0.5 per layer", "--importance", "alike"],
        ["--sparsity", "0.5", "--dtype", "bfloat16"],
        ["--sparsity", "0.5", "--weights", "reconstruct", "--reconstruct", "epochs=1", "--holdout", "0.2"],
    ],
)  # fmt: skip
def test_a_manifest_repeats_its_run(options: list[str], model: Path, tmp_path: Path) -> None:
    few = ["--min-tokens", "1", "--samples", "6"]
    if "--solver" not in options:
        few += ["--solver", "swap", "--warm-start", "wanda"]
    run("prune", *arguments(model, *options, *few))
    again = arguments(
        model, "--config", str(tmp_path / "out" / "maskopt-manifest.json"), out="again"
    )
    run("prune", *again)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    manifest = read_manifest(tmp_path / "out" / "maskopt-manifest.json")
    by_file, *rest = command_again(manifest["fingerprint"], tmp_path / "out")
    assert "--config" in by_file
    assert bool(rest) == ("model" not in options)  # counts of all layers are too long for a line
    for spelled in rest:
        assert "--config" not in spelled
        assert printed(*_typed(spelled, model)) == printed(*_typed(by_file, model))


@pytest.mark.parametrize(
    ("device", "dtype", "said"),
    [("cpu", "float32", None), ("cuda", "float32", "float32"), ("cpu", "bfloat16", "bfloat16")],
)
def test_a_precision_is_repeated_unless_it_goes_without_saying(
    device: str, dtype: str, said: str | None
) -> None:
    text = {"samples": 1, "length": 8, "beginning": {"bos": "auto"}, "source": "text.txt"}
    options = {"channels": 0.25}
    found = {"options": options, "calibration": text, "device": device, "dtype": dtype}
    assert options_again(found, "out").get("dtype") == said
    assert ("--dtype" in command_again(found, "out")[1]) == (said is not None)


def _typed(line: str, model: Path) -> list[str]:
    places = {"MODEL": str(model), "TEXT": str(model.parent / "tokens.npy"), "AGAIN": "again"}
    return [places.get(word, word) for word in shlex.split(line)[2:]]


def test_a_whole_run_of_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        f'model = "{model}"\ncalibration = "{tmp_path / "tokens.npy"}"\noutput = "{tmp_path / "out"}"\n'
        'sparsity = 0.5\nsolver = "tabu"\nmin_tokens = 1\n[solver_options]\nmoves = 3\n'
    )
    run("prune", "--config", tmp_path / "run.toml")
    run("verify", tmp_path / "out", "--against", model)


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("run.toml", "sampels = 3", OptionError, "did you mean 'samples'"),
        ("run.toml", 'config = "other.toml"', OptionError, "no option is called 'config'"),
        ("run.toml", "resume = true", OptionError, "no option is called 'resume'"),
        (
            "run.toml",
            "trust_remote_code = true",
            OptionError,
            "remove it, and give it on the command",
        ),
        (
            "run.toml",
            "trust_remote_code = false",
            OptionError,
            "remove it, and give it on the command",
        ),
        ("run.toml", "seed = true", OptionError, "`seed` is no switch, to be true"),
        ("run.toml", "samples = ", OptionError, "is no TOML"),
        ("missing.toml", None, OptionError, "cannot be read"),
        ("manifest.json", "{}", ModelError, "not a manifest"),
    ],
)
def test_files_that_say_nothing_are_refused(
    name: str, text: str | None, error: type[MaskoptError], message: str, model: Path
) -> None:
    path = model.parent / name
    if text is not None:
        path.write_text(text)
    assert message in run("prune", *arguments(model, "--config", str(path)), fails=error)


def test_no_file_holds_trust(model: Path, tmp_path: Path) -> None:
    text = run("prune", *arguments(model, *ALL, "--trust-remote-code"), "--print-config")
    assert "trust_remote_code" not in text
    (tmp_path / "run.toml").write_text(text)
    assert run("prune", "--config", tmp_path / "run.toml", "--print-config") == text


def _adds(**options: Any) -> Any:
    return lambda manifest: manifest["fingerprint"]["options"].update(options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_adds(trust_remote_code=True), "sets `trust_remote_code`, which a manifest cannot set"),
        (_adds(model="other"), "sets `model`"),
        (_adds(output="elsewhere"), "sets `output`"),
        (_adds(calibration="/etc/passwd"), "sets `calibration`"),
        (_adds(device="cuda"), "sets `device`"),
        (_adds(overwrite=True), "sets `overwrite`"),
        (_adds(counts="/etc/passwd"), "`counts` must be an object, not '/etc/passwd'"),
        (lambda m: m["fingerprint"].pop("calibration"), "holds no options of a prune"),
        (lambda m: m.update(fingerprint=[]), "holds no options of a prune"),
    ],
)
def test_a_manifest_sets_nothing_but_what_decides_the_result(
    change: Any, message: str, model: Path, tmp_path: Path
) -> None:
    run("prune", *arguments(model, "--sparsity", "0.5", "--solver", "wanda", "--min-tokens", "1"))
    forge_manifest(tmp_path / "out", change)
    path = tmp_path / "out" / "maskopt-manifest.json"
    again = arguments(model, "--config", str(path), "--print-config", out="again")
    assert message in run("prune", *again, fails=OptionError)


def test_a_manifest_names_no_folder_as_a_data_set(model: Path, tmp_path: Path) -> None:
    run("prune", *arguments(model, "--sparsity", "0.5", "--solver", "wanda", "--min-tokens", "1"))
    forge_manifest(
        tmp_path / "out", lambda m: m["fingerprint"]["calibration"].update(source="hf:../private")
    )
    path = tmp_path / "out" / "maskopt-manifest.json"
    again = ["prune", model, "--config", path, "--output", tmp_path / "again"]
    assert "not the name of a data set" in run(*again, fails=DataError)

"""Options of a prune from a file: what is printed is read again, and a manifest repeats its run."""

import functools
import shlex
import tomllib

import pytest
from commands import run
from forging import copied, edit, forge_manifest
from outputs import contents

from maskopt.errors import DataError, ModelError, OptionError
from maskopt.models.checkpoints.report import read_manifest
from maskopt.models.checkpoints.workspace import MANIFEST
from maskopt.models.pruning.rerun import command_again, options_again

ALL = shlex.split(
    "--sparsity 0.5 --solver wanda --include q_proj,k_proj --samples 7 --seq-len 9 --damping 0.5 "
    "--update blockwise --training epochs=2 --training begin=least-squares --holdout 0.3 "
    "--gram-shrinkage auto --calibrate-on dense --max-memory 3GiB"
)


@pytest.fixture
def given(dense_folder, data, tmp_path):
    """Arguments of `prune` by what is added to the model, the tokens and the folder of the result."""

    def made(*more, out="out"):
        return ["prune", dense_folder, "--calibration", data, "--output", tmp_path / out, *more]

    return made


def printed(*words):
    return tomllib.loads(run(*words, "--print-config"))


def test_what_is_printed_is_read_again(given, dense_folder, tmp_path):
    text = run(*given(*ALL, "--trust-remote-code"), "--print-config")
    assert not (tmp_path / "out").exists()  # nothing else is done
    found = tomllib.loads(text)
    assert found["model"] == str(dense_folder)
    assert found["output"] == str(tmp_path / "out")
    assert found["include"] == ["q_proj", "k_proj"]
    assert found["training"] == {"epochs": 2, "begin": "least-squares"}
    assert (found["gram_shrinkage"], found["damping"]) == ("auto", 0.5)
    assert found["calibrate_on"] == "dense"
    assert "trust_remote_code" not in text  # no file holds trust
    (tmp_path / "run.toml").write_text(text)
    for dry in ([], ["--dry-run"]):
        assert run("prune", *dry, "--config", tmp_path / "run.toml", "--print-config") == text
    # what TOML cannot say is refused
    for value in ("null", "[1, null]", '{"a": null}'):
        words = given("--sparsity", 0.5, "--solver-options", f"moves={value}", "--print-config")
        said = run(*words, fails=OptionError)
        assert "--solver-options moves: null cannot be said in TOML" in said


def test_a_file_gives_what_the_command_line_does_not(given, dense_folder, data, tmp_path):
    text = 'sparsity = 0.5\nsamples = 3\ncalibrate_on = "dense"\nseed = 4\n'
    (tmp_path / "run.toml").write_text(text)
    both = given("--config", tmp_path / "run.toml")
    found = printed(*both, "--samples", 9, "--calibrate-on", "pruned", "--sparsity", "2:4")
    assert (found["samples"], found["calibrate_on"], found["seed"]) == (9, "pruned", 4)
    assert (found["sparsity"], printed(*both)["sparsity"]) == ("2:4", 0.5)
    orders = ([], ["--calibrate-on", "pruned"], ["--calibrate-on", "dense"], ["--true-sequential"])
    found = [printed(*given("--sparsity", 0.5, *order)) for order in orders]
    assert [x["calibrate_on"] for x in found] == ["pruned", "pruned", "dense", "pruned"]
    assert [x.get("true_sequential", False) for x in found] == [False, False, False, True]
    (tmp_path / "run.toml").write_text(
        f'model = "{dense_folder}"\ncalibration = "{data}"\noutput = "{tmp_path / "out"}"\n'
        'sparsity = 0.5\nsolver = "tabu"\nmin_tokens = 1\n[solver_options]\nmoves = 3\n'
    )
    run("prune", "--config", tmp_path / "run.toml")
    run("verify", tmp_path / "out", "--original", dense_folder)
    trust = "remove it, and give it on the command"
    for name, content, error, message in (
        ("none.toml", None, OptionError, "cannot be read"),
        ("run.toml", "sampels = 3", OptionError, "did you mean 'samples'"),
        ("run.toml", 'config = "other.toml"', OptionError, "no option is called 'config'"),
        ("run.toml", "resume = true", OptionError, "no option is called 'resume'"),
        ("run.toml", "trust_remote_code = true", OptionError, trust),
        ("run.toml", "trust_remote_code = false", OptionError, trust),
        (
            "run.toml",
            "seed = true",
            OptionError,
            "run.toml: `seed` must be a whole number, not True",
        ),
        ("run.toml", "samples = ", OptionError, "is no TOML"),
        ("manifest.json", "{}", ModelError, "not a manifest"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        assert message in run(*given("--config", tmp_path / name), fails=error)


@pytest.mark.parametrize(
    "options",
    [
        "--sparsity 2:4 --solver magnitude --include mlp",
        "--sparsity 0.5 --allocation layers --sensitivity uniform --seed 3",
        "--sparsity 0.5 --update blockwise --training epochs=1 --holdout 0.2",
        pytest.param("--sparsity '0.5 per layer' --sensitivity uniform", marks=pytest.mark.slow),
        pytest.param("--sparsity 0.5 --dtype bfloat16", marks=pytest.mark.slow),
    ],
)
def test_a_manifest_repeats_its_run(options, given, dense_folder, data, tmp_path):
    few = ["--min-tokens", 1, "--samples", 6]
    few += [] if "--solver" in options else ["--solver", "swap", "--start", "wanda"]
    run(*given(*shlex.split(options), *few))
    run(*given("--config", tmp_path / "out" / MANIFEST, out="again"))
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    manifest = read_manifest(tmp_path / "out" / MANIFEST)
    by_file, *rest = command_again(manifest["fingerprint"], tmp_path / "out")
    assert "--config" in by_file
    # counts of all layers are too long for a line
    assert bool(rest) == ("--allocation" not in options)
    places = {"MODEL": dense_folder, "TEXT": data, "AGAIN": "again"}
    taken = [printed(*(places.get(x, x) for x in shlex.split(y)[1:])) for y in (by_file, *rest)]
    assert not any("--config" in spelled for spelled in rest)
    assert all(found == taken[0] for found in taken)


def test_a_precision_is_repeated_unless_it_goes_without_saying():
    text = {"samples": 1, "length": 8, "beginning": {"bos": "auto"}, "source": "text.txt"}
    for device, dtype, said in (
        ("cpu", "float32", None), ("cuda", "float32", "float32"), ("cpu", "bfloat16", "bfloat16"),
    ):  # fmt: skip
        found = {
            "options": {"channels": 0.25},
            "calibration": text,
            "device": device,
            "dtype": dtype,
        }
        assert options_again(found, "out").get("dtype") == said
        assert ("--dtype" in command_again(found, "out")[1]) == (said is not None)


option = functools.partial(edit, "fingerprint", "options")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (option("trust_remote_code", to=True), "`trust_remote_code`, which a manifest cannot set"),
        (option("model", to="other"), "sets `model`"),
        (option("output", to="elsewhere"), "sets `output`"),
        (option("calibration", to="/etc/passwd"), "sets `calibration`"),
        (option("device", to="cuda"), "sets `device`"),
        (option("overwrite", to=True), "sets `overwrite`"),
        (option("counts", to="/etc/passwd"), "`counts` must be an object, not '/etc/passwd'"),
        (lambda m: m["fingerprint"].pop("calibration"), "holds no options of a prune"),
        (edit("fingerprint", to=[]), "holds no options of a prune"),
        (edit("fingerprint", "calibration", "source", to="hf:../private"), "name of a data set"),
    ],
)  # fmt: skip
def test_a_manifest_sets_nothing_but_what_decides_the_result(
    change, message, given, pruned_folder, dense_folder, tmp_path
):
    forge_manifest(forged := copied(pruned_folder, tmp_path), change)
    words = given("--config", forged / MANIFEST, "--print-config", out="again")
    if "data set" in message:  # which is read when no other calibration is given
        words = ["prune", dense_folder, *words[4:-1]]
    assert message in run(*words, fails=DataError if "data set" in message else OptionError)

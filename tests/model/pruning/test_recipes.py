"""Recipes: options that agree wherever they are given, and one folder of prune and distillation."""

import json
import os
import random
import tomllib
from functools import partial

import forging
import pytest
from commands import run
from forging import change_tensors, copied, edit, fails, forge_manifest, options, says
from prunes import Stop, contents
from tiny_models import loud, tokens

from maskopt import PruneOptions, prune_model
from maskopt.cli.command import flag
from maskopt.core.fields import options_of
from maskopt.errors import DataError, ModelError, OptionError, VerificationError
from maskopt.models.checkpoints.schema import MANIFEST
from maskopt.models.checkpoints.workspace import HIDDEN, Workspace
from maskopt.models.options.prune import RECIPES, prune_options
from maskopt.models.pruning.card import options_again
from maskopt.models.pruning.plan import plan_prune
from maskopt.models.training import tasks as stage
from maskopt.models.training.trainer import FolderKeeper
from maskopt.models.verification.verify import verify_model

ALLOCATED = {"allocation": "layers"}
TRAINED = {"update": "blockwise", "training": {"epochs": 2}, "holdout": 0.3}
#: of every option another value than its default, with what it needs
VALUES = {
    "sparsity": 0.7, "solver": "wanda", "start": "wanda", "solver_options": {"max_swaps": 3},
    "transform": "rotation",
    "allocation": "both", "sensitivity": ("uniform", ALLOCATED), "max_deviation": (0.3, ALLOCATED),
    "counts": ({"a": 3}, ALLOCATED), "update": "least-squares",
    "training": ({"begin": "least-squares", "epochs": 2}, TRAINED),
    "distillation": ({"epochs": 3, "seed": 5}, {"holdout": 0.3}),
    "damping": (0.5, {"update": "least-squares"}),
    "damping_exponent": (0.5, {"update": "least-squares"}), "min_tokens": 3,
    "gram_shrinkage": ("auto", {"holdout": 0.3}), "include": ("q_proj", "layers.0.*"),
    "exclude": ("k_proj",), "seed": 3, "calibrate_on": "dense", "true_sequential": True,
    "all_experts": True, "skip_bad_samples": True, "token_weights": "relative", "holdout": 0.3,
    "samples": 7, "seq_len": 9, "bos": "never", "text_field": "words", "chat": True, "device": "cpu",
    "dtype": "bfloat16", "threads": 2, "activation_memory": 5000, "max_memory": 6000,
}  # fmt: skip
FEW = {"sparsity": 0.5, "samples": 12, "seq_len": 16, "holdout": 0.34, "min_tokens": 1}
QUICK = {**FEW, "training": {"epochs": 1}, "distillation": {"learning_rate": 0.003}}


def flags(given):
    """The options as words of the command line."""
    words = []
    for name, value in given.items():
        if name == "counts":
            words += [flag(name), json.dumps(value)]
        elif isinstance(value, dict):
            words += [w for key, x in value.items() for w in (flag(name), f"{key}={json.dumps(x)}")]
        elif value is True:
            words.append(flag(name))
        else:
            words += [flag(name), ",".join(value) if isinstance(value, tuple) else value]
    return words


def options_of_file(text):
    known = {one.name for one in options_of(PruneOptions)}
    return PruneOptions(**{k: v for k, v in tomllib.loads(text).items() if k in known})


def check_agreement(options, words, tmp_path):
    """The command line, the file that it prints, and the manifest of the run give these options."""
    text = run("prune", *words, "--print-config")
    (tmp_path / "run.toml").write_text(text)
    assert options_of_file(text) == options
    assert run("prune", "--config", tmp_path / "run.toml", "--print-config") == text
    record = json.loads(json.dumps(options.record()))
    calibration = {"samples": 1, "length": 8, "beginning": {"bos": "auto"}, "source": "text.txt"}
    found = {"options": record, "calibration": calibration, "device": "cpu", "dtype": "float32"}
    again = options_again("prune", found, "OUT")
    assert PruneOptions(**{k: v for k, v in again.items() if k in record}).record() == record


@pytest.mark.parametrize("one", options_of(PruneOptions), ids=lambda one: one.name)
def test_an_option_means_the_same_everywhere(one, tmp_path):
    if one.name == "trust_remote_code":  # which no file holds
        return
    value, more = VALUES[one.name], {}
    if isinstance(value, tuple) and isinstance(value[-1], dict):
        value, more = value
    given = {"sparsity": 0.5, **more, one.name: value}
    options = prune_options(None, given)
    assert getattr(options, one.name) != one.default
    check_agreement(options, flags(given), tmp_path)
    assert (one.name in options.record()) == one.recorded


@pytest.mark.parametrize("sparsity", ["0.5", "2:4", "0.5 per layer"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_means_the_same_everywhere(recipe, sparsity, tmp_path):
    given = {"recipe": recipe, "sparsity": sparsity}
    options = prune_options(None, given)
    check_agreement(options, flags(given), tmp_path)
    (tmp_path / "recipe.toml").write_text(f'recipe = "{recipe}"\nsparsity = "{sparsity}"\n')
    by_file = ["prune", "--config", tmp_path / "recipe.toml", "--print-config"]
    assert options_of_file(run(*by_file)) == options
    if recipe == "fast":
        assert options == PruneOptions(sparsity)
    # every option of it may be changed, on the command line, in a file, and from Python
    others = {"samples": 9, "seq_len": 8, "holdout": 0.4, "solver": "swap", "update": "none"}
    others |= {"training": {"epochs": 1}, "distillation": {"epochs": 0}, "allocation": "uniform"}
    for name, value in RECIPES[recipe].items():
        if name == "allocation" and sparsity != "0.5":
            continue  # which the pattern decides
        other = others[name]
        changed = prune_options(None, {**given, name: other})
        found = getattr(changed, name)
        if name == "training":
            assert {**value, **other}.items() <= found.items()
        else:
            assert found == ({} if name == "distillation" else other)
        check_agreement(changed, flags({**given, name: other}), tmp_path)
        assert options_of_file(run(*by_file, *flags({name: other}))) == changed


def test_the_recipes_are_those_that_were_measured():
    cases = ("balanced", 0.5), ("best", 0.5), ("best", "2:4")
    balanced, best, groups = (prune_options(None, {"recipe": r, "sparsity": s}) for r, s in cases)
    assert (balanced.solver, balanced.update) == ("admm", "least-squares")
    assert (best.allocation, best.sensitivity, best.solver) == ("layers", "fisher", "admm")
    assert best.training["begin"] == "least-squares"
    assert (best.samples, best.seq_len, best.holdout) == (72, 512, 0.118)
    assert (best.distilled.seed, best.distilled.samples, best.distilled.epochs) == (1, 72, 2)
    assert groups.allocation == "uniform"
    rest = {"allocation": 0, "sparsity": 0}
    assert groups.record() | rest == best.record() | rest


def test_what_cannot_be(dense, data, tmp_path):
    prune = partial(prune_model, dense, tokens(16), sparsity=0.5, output=tmp_path / "out")
    fails(OptionError, "fast, balanced, best; not 'finest'", prune, recipe="finest")
    fails(OptionError, "give them by name", prune, options=PruneOptions(0.5), recipe="best")
    fails(OptionError, "`distillation` needs windows", prune, distillation={"epochs": 1})
    how = {"holdout": 0.25, "distillation": {"epochs": 1}}
    no_option = "no option of `distillation` is called 'samples'"
    fails(OptionError, no_option, prune, holdout=0.25, distillation={"samples": 1})
    fails(OptionError, "epochs", prune, holdout=0.25, distillation={"epochs": -1})
    fails(ModelError, "GiB are needed", prune, **how, max_memory="1GiB")
    how["sparsity"] = 0.5
    short = partial(prune_model, dense, tokens(16, length=1), output=tmp_path / "out")
    fails(DataError, "nothing is predicted", short, **how)
    fails(OptionError, "model folder", prune_model, loud("llama", layers=1), tokens(16), **how)
    assert not (tmp_path / "out").exists()
    dry = plan_prune(dense, samples=16, seq_len=16, **how)
    plain = plan_prune(dense, sparsity=0.5, samples=16, seq_len=16, holdout=0.25)
    assert dry.forward_seconds > plain.forward_seconds
    assert dry.disk > plain.disk


# --- one folder
@pytest.fixture(scope="module")
def home(dense, tmp_path_factory):
    """A tiny model with a tokenizer, a text, and the best recipe's result without an interruption."""
    home, generator = tmp_path_factory.mktemp("recipes"), random.Random(0)
    (home / "text.txt").write_text("".join(chr(generator.randrange(33, 120)) for _ in range(4000)))
    best = partial(prune_model, dense, calibration=home / "text.txt", recipe="best", **QUICK)
    assert best(output=home / "whole").distillation["epoch"] > 0
    return home, best


@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_goes_on_to_the_same_folder(home, dense, monkeypatch):
    folder, best = home
    out, whole = folder / "killed", contents(folder / "whole")
    monkeypatch.setattr(FolderKeeper, "due", lambda _: True)

    def killed_at(block, words, done, *, resume):
        def stop(event):
            if (event.block, event.done) == (block, done) and words in event.stage:
                raise Stop

        fails(Stop, None, best, output=out, on_progress=stop, resume=resume)
        assert [entry.name for entry in out.iterdir()] == [HIDDEN]

    killed_at(1, "solve", 1, resume=False)
    killed_at(2, "train", 2, resume=True)
    for words, done in (("dense model", 5), ("train", 4), ("train", 10)):
        killed_at(3, f"distillation, {words}", done, resume=True)
    again = partial(best, output=out, resume=True)
    fails(ModelError, "options.distillation", again, distillation={"epochs": 9})
    # while the shards are written again, and while files are moved into view
    write, written = stage.write_shard, []

    def dies(*given):
        if len(written) == 1:
            raise Stop
        written.append(given)
        return write(*given)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "write_shard", dies)
        fails(Stop, None, again)
    replace = os.replace

    def moves(source, target):
        replace(source, target)
        if os.fspath(target).endswith(".safetensors") and os.path.dirname(target) == str(out):
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("maskopt.models.checkpoints.workspace.os.replace", moves)
        fails(Stop, None, again)
    assert Workspace(out).journal.exists()
    losses = []
    for _ in range(2):  # at the second time nothing is left to do
        losses.append(dict(again().distillation))
        assert contents(out) == whole
    assert losses[0] == losses[1]


def test_it_is_verified_and_shown_as_one_folder(home, dense, tmp_path):
    folder, _ = home
    whole = folder / "whole"
    found = verify_model(whole, dense)
    assert "trained weights" in found.claimed
    assert {"counts", "configuration and tokenizer"} <= set(found.checked)
    record = json.loads((whole / MANIFEST).read_text())
    losses, fingerprint = record["distillation"], record["fingerprint"]
    assert losses["after"]["held"] < losses["before"]["held"]
    assert fingerprint["distillation"]["sha256"] != fingerprint["calibration"]["sha256"]
    assert not (whole / "maskopt-distill.json").exists()
    words = flags({**QUICK, "recipe": "best"})
    text = ["--calibration", folder / "text.txt"]
    said = run("prune", dense, *text, *words, "--output", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)
    for shown in ("error/Wanda", "proven", f"{losses['after']['held']:.4f} (epoch"):
        assert shown in said
    assert "holds" in run("verify", tmp_path / "out", "--original", dense)
    run("report", whole, "--output", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "ratio to Wanda" in page
    assert "distilled: KL to the dense model" in page
    assert "KL to the original" in (whole / "README.md").read_text()
    run("prune", dense, "--config", whole / MANIFEST, *text, "--output", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(whole)
    said = "were distilled since"
    fails(VerificationError, said, verify_model, whole, dense, calibration=text[1])


@pytest.fixture(scope="module")
def distilled(home, dense):
    """Masks of the fast recipe, and kept weights that only the distillation changed."""
    folder, _ = home
    out, how = folder / "fast", {**FEW, "distillation": {"learning_rate": 0.003}}
    prune_model(dense, calibration=folder / "text.txt", output=out, **how)
    found = verify_model(out, dense, calibration=folder / "text.txt")
    assert {"errors", "statuses"} <= set(found.checked)
    assert "kept weights" in found.claimed
    return out


def no_distillation(manifest):
    options(distillation={})(manifest)
    manifest["distillation"] = None


def moved_masks(masks):
    masks[min(masks)].kept[:] = masks[min(masks)].kept.roll(1, 1)


def moved_norm(out):
    name = "model.norm.weight"
    change_tensors(forging.shard_of(out, name), lambda tensors: tensors[name].add_(1))


FOLDERS = {
    "a zero": (lambda out: forging.change_weight(out, "pruned", 0.5), "that its mask prunes"),
    "other masks": (lambda out: forging.change_masks(out, moved_masks), "that its mask prunes"),
    "another tensor": (moved_norm, "differs from the original"),
}
SAYS = {
    "no distillation": (no_distillation, "a kept weight differs from the original"),
    "no losses": (edit("distillation", to=None), "losses of a distillation, or none"),
    "no options": (options(distillation={}), "losses of a distillation, or none"),
    "a late epoch": (edit("distillation", "epoch", to=9), "longer than the options say"),
    "no epoch": (edit("distillation", "epoch", to=0), "epoch is not what its losses say"),
    "worse": (edit("distillation", "after", "held", to=99.0), "epoch is not what its losses"),
    "no number": (edit("distillation", "after", to={}), "damaged or was changed"),
    "another run": (options(sparsity="0.6"), "has another pattern than the options"),
}
FORGED = FOLDERS | {name: (says(change), said) for name, (change, said) in SAYS.items()}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_distilled_folder_is_refused(name, distilled, dense, tmp_path):
    forge, said = FORGED[name]
    forge(out := copied(distilled, tmp_path))
    forge_manifest(out)
    fails(VerificationError, said, verify_model, out, dense)


def test_a_manifest_of_another_run_is_refused(distilled, home, dense, pruned_folder, tmp_path):
    for number, other in enumerate((home[0] / "whole", pruned_folder)):
        out = copied(distilled, tmp_path / str(number))
        (out / MANIFEST).write_bytes((other / MANIFEST).read_bytes())
        fails(VerificationError, None, verify_model, out, dense)
        forge_manifest(out)
        fails(VerificationError, None, verify_model, out, dense)
    # any edit is refused or changes nothing
    sound, expected = json.loads((distilled / MANIFEST).read_text()), verify_model(distilled, dense)
    out = copied(distilled, tmp_path / "edits")
    for seed in range(15):
        edited = forging.forged(sound["distillation"], random.Random(seed))
        (out / MANIFEST).write_text(json.dumps(forging.signed({**sound, "distillation": edited})))
        try:
            found = verify_model(out, dense)
        except VerificationError:
            continue
        assert found == expected

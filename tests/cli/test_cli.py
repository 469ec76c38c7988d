"""The command line as a user meets it: helps, statuses, examples, one clear line for an expected error."""

import dataclasses
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import typer
from commands import ROOT, ended, run, shows, small_files
from rich.console import Console

import maskopt
from maskopt import RowProblem, Unstructured, available_solvers
from maskopt.cli import PANELS, all_commands, app, prune, solve, view as views
from maskopt.cli.command import flag
from maskopt.cli.console import errors, make_table
from maskopt.cli.view import JsonView, LiveView, PlainView, PruneView, View, duration
from maskopt.core.fields import JSON_FILE, REQUIRED, options_of
from maskopt.errors import OptionError
from maskopt.models.blockwise.forward import BlockProgress
from maskopt.models.checkpoints.report import LayerReport
from maskopt.models.options.prune import RECIPE, PruneOptions
from maskopt.models.options.structured import ShrinkOptions
from maskopt.models.options.walk import DistillOptions, WalkOptions
from maskopt.models.pruning import plan
from maskopt.solvers import Swap

TRUST = "trust_remote_code"
COMMANDS = all_commands()
ESCAPED = r"a\x1b[2J[red]b[/red]\nspoof: holds: 1 row checked\u202e\udc80"
ODD = ESCAPED.encode().decode("unicode_escape")


def test_solvers_and_their_options_are_listed(monkeypatch):
    listed = run("solvers")
    monkeypatch.setattr(solve, "screen", Console(width=80, markup=False))
    Console(width=80, markup=False, file=(shown := io.StringIO())).print(solve._solvers())
    words = "".join(shown.getvalue().replace("│", " ").split())
    for name, info in available_solvers().items():
        assert f" {name} " in listed
        assert name in shown.getvalue()
        assert info.available or "unavailable" in words
    assert all(len(line) <= 80 for line in shown.getvalue().splitlines())
    assert shown.getvalue().count("optimality") >= 5
    shows(run("solvers", "swap"), "swap: options", *(f.name for f in dataclasses.fields(Swap)))


def test_helps_name_every_command_and_fit_two_screens():
    shown = ended("--help").stdout
    assert len(LINES) >= 40
    names = [name for panel in PANELS.values() for name in panel]
    listed = re.findall(r"^  ([a-z]\S+) ", shown, re.MULTILINE)
    assert (listed, re.findall(r"^(\w+):$", shown, re.MULTILINE)) == (names, [*PANELS, "Options"])
    assert "Exit status: 0 done" in shown
    listed = re.findall(r"^  ([a-z]\S+) ", ended("masks", "--help").stdout, re.MULTILINE)
    assert listed == ["apply", "export"]
    assert run("--version") == f"maskopt {maskopt.__version__}\n"
    listed = " ".join(f"{shown} {ended('masks', '--help').stdout}".split())
    for name, command in COMMANDS.items():
        shown = ended(*name.split(), "--help").stdout
        first = " ".join(inspect.getdoc(command.run).split("\n\n")[0].split())
        assert f" {name.split()[-1]} {first}" in listed
        assert shown.startswith(f"Usage: maskopt {name} [OPTIONS]")
        assert f"Example: {command.example}" in " ".join(shown.split())
        sizes = [len(line) for line in shown.splitlines()]
        assert (len(sizes) <= 48, max(sizes) <= 80) == (True, True), (name, sizes)
        every = ended(*name.split(), "--help-all").stdout
        for one in command.options:
            assert one.argument or flag(one.name) in every
            assert not one.choices or f"[{'|'.join(one.choices)}]" in every


def typed(one):
    """A value of an option that is not its default, and the same as words of the command line."""
    values = {"sparsity": "2:4", "include": ("a", "b"), "exclude": ("c",), "counts": {"a": 1}}
    values |= {"training": {"epochs": 2}, "distillation": {"epochs": 2}, "start": "wanda"}
    values |= {"solver_options": {"moves": 3}, "max_memory": 2**30, "damping": 0.5}
    values |= {"threads": 1, "max_deviation": 0.5}
    if one.name in values:
        value = values[one.name]
    elif one.choices:
        value = next(word for word in one.choices if word != one.default)
    elif isinstance(one.default, bool):
        value = not one.default
    elif isinstance(one.default, int | float):
        value = one.default / 2 + 0.25 if isinstance(one.default, float) else one.default + 1
    else:
        value = "other"
    if isinstance(value, dict):
        as_json = json.dumps(value)
        return value, [as_json if one.unit == JSON_FILE else "=".join(map(str, *value.items()))]
    words = [",".join(value) if isinstance(value, tuple) else str(value)]
    return value, [] if value is True else words


@pytest.mark.parametrize(("given", "then"), [(None, "passive"), ("active", "active")])
def test_threads_that_wait_leave_the_cores_to_others_unless_asked_otherwise(
    given, then, monkeypatch
):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    assert ended("--version").returncode == 0
    assert os.environ["OMP_WAIT_POLICY"] == then


@pytest.mark.parametrize("command", ["prune", "prune-structured"])
def test_command_line_file_manifest_and_python_agree(command, tmp_path):
    kind, given = (PruneOptions, ["0.5"]) if command == "prune" else (ShrinkOptions, [0.0, 0.5])
    (file := tmp_path / "run.toml").write_text("")
    usual = tomllib.loads(run(command, "--print-config"))
    known = {one.name: one for one in COMMANDS[command].library if one is not RECIPE}
    assert list(known) == [f.name for f in dataclasses.fields(kind)]
    recorded = kind(*given).record()
    for name, one in known.items():
        in_python = inspect.signature(kind).parameters[name].default
        if one.default is not REQUIRED and not isinstance(one.default, dict):
            assert in_python == one.default
        unset = one.default in (None, (), {}) or one.default is REQUIRED or name == TRUST
        assert usual.get(name) == (None if unset else one.default)
        assert (name in recorded) == one.recorded
        value, words = typed(one)
        one.checked(value)  # which Python takes
        text = run(command, flag(name), *words, "--print-config")
        expected = list(value) if isinstance(value, tuple) else value
        assert tomllib.loads(text).get(name) == (None if name == TRUST else expected)
        file.write_text(text)
        assert run(command, "--config", file, "--print-config") == text
    # what is not of the library is in the file under the names of the command line, too
    own = {o.name for o in COMMANDS[command].own if not isinstance(o.default, bool)}
    given = {name: f"some {name}" for name in own & {"model", "calibration", "output"}}
    file.write_text("\n".join(f'{name} = "{value}"' for name, value in given.items()))
    assert given.items() <= tomllib.loads(run(command, "--config", file, "--print-config")).items()


def test_defaults_of_other_commands_are_those_of_python():
    for name, kind in (("eval", WalkOptions), ("distill", DistillOptions), ("sweep", PruneOptions)):
        usual = {one.name: one.default for one in options_of(kind)}
        assert all(usual[one.name] == one.default for one in COMMANDS[name].library)
    known = {one.name: one for one in options_of(PruneOptions)}
    for name in ("compare", "bound", "export"):
        found = {one.name: one for one in COMMANDS[name].library}
        assert {"bos", "seq_len", "threads", "include", "exclude", "sparsity"} <= found.keys()
        assert all(known[name].hint == one.hint for name, one in found.items())
        differ = {n: o.default for n, o in found.items() if known[n].default != o.default}
        assert differ == {"samples": 32, "seq_len": 512, "sparsity": None}


#: options of each command, by hand: none may appear in a command because another one has it
TAKES = {
    "prune": """
        model calibration grams output overwrite resume dry_run recipe include exclude
        token_weights all_experts calibrate_on true_sequential skip_bad_samples dtype seed
        holdout samples seq_len bos text_field chat device threads activation_memory max_memory
        trust_remote_code sparsity solver start solver_options transform allocation sensitivity
        max_deviation counts update training distillation damping damping_exponent min_tokens
        gram_shrinkage
    """,
    "prune-structured": """
        model calibration blocks windows experts output overwrite resume calibrate_on
        true_sequential skip_bad_samples dtype seed holdout samples seq_len bos text_field chat
        device threads activation_memory max_memory trust_remote_code channels heads round_to
        solver solver_options update damping certify
    """,
    "distill": """
        pruned teacher calibration output overwrite resume dry_run seed holdout samples seq_len
        bos text_field chat device threads activation_memory max_memory trust_remote_code epochs
        batch learning_rate weight_decay recompute save_every
    """,
    "sweep": """
        model grams calibration sparsity solver update text windows output overwrite include
        exclude token_weights all_experts skip_bad_samples dtype seed holdout samples seq_len
        bos text_field chat device threads activation_memory max_memory trust_remote_code start
        solver_options min_tokens gram_shrinkage damping damping_exponent
    """,
    "eval": """
        models text windows json overwrite seq_len bos text_field card chat device dtype threads
        activation_memory trust_remote_code
    """,
    "solve": """
        instance solver start solver_options prove jobs time_limit memory_limit seed cardinality
        maximize output overwrite
    """,
    "compare": """
        source solvers solver_options rows columns row_time_limit jobs seed cardinality maximize
        calibration output overwrite include exclude token_weights all_experts skip_bad_samples
        dtype samples seq_len bos text_field chat device threads activation_memory max_memory
        trust_remote_code sparsity gram_shrinkage update damping damping_exponent
    """,
    "bound": """
        source original method solver rows cuts layer_time_limit jobs seed cardinality
        maximize calibration output overwrite include exclude token_weights all_experts
        skip_bad_samples dtype samples seq_len bos text_field chat device threads
        activation_memory max_memory trust_remote_code sparsity gram_shrinkage update damping
        damping_exponent
    """,
    "export": """
        source destination row columns format formulation seed cardinality maximize calibration
        overwrite include exclude token_weights all_experts skip_bad_samples dtype samples
        seq_len bos text_field chat device threads activation_memory max_memory
        trust_remote_code sparsity gram_shrinkage update damping damping_exponent
    """,
    "verify": """
        model_or_instance solution original calibration masks strict exact cardinality maximize
        semi_structured include text_field threads trust_remote_code
    """,
    "report": """
        folders evaluation gaps picture figures output overwrite
    """,
    "demo": """
        model sparsity samples windows output overwrite
    """,
    "solvers": """
        name
    """,
    "masks apply": """
        model masks output overwrite
    """,
    "masks export": """
        model output overwrite
    """,
}


def test_each_command_takes_its_options_and_no_others():
    found = {n: sorted(one.name for one in (*c.own, *c.library)) for n, c in COMMANDS.items()}
    assert found == {name: sorted(words.split()) for name, words in TAKES.items()}


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ("no-such-command", 2, "No such"),
        ("solvers --no-such-option", 2, "No such"),
        ("bound no/[red]:M:.npz", 1, "[red]:M:.npz"),  # brackets and colons are no markup
        ("prune M --sparsity 0.5 --calibration t", 1, "--output is missing"),
        ("solve row.npz --output s.npz --jobs 2", 1, "--jobs is for --prove"),
        ("solve row.npz --output s.npz --prove --solver swap", 1, "--prove takes the solver"),
        ("bound OUT --original M --calibration t --sparsity 0.5", 1, "--sparsity is of masks"),
        ("bound OUT OUT --original M --calibration t", 1, "--original is of one pruned folder"),
        ("bound OUT --original M", 1, "--calibration is missing"),
        ("solvers swap", 1, "error: only prune and sweep run as several processes"),
    ],
)
def test_errors_have_a_status_and_no_traceback(words, status, said, monkeypatch):
    if words == "solvers swap":  # where torchrun started two of them
        monkeypatch.setattr("maskopt.cli.command.several", lambda: True)
    result = ended(*words.split())
    assert (result.returncode, "Traceback" in result.stderr) == (status, False)
    assert said in result.stderr


def test_too_little_memory_is_one_line_and_another_error_keeps_its_traceback(monkeypatch):
    of_cuda = torch.OutOfMemoryError("CUDA out of memory.\nTried")
    given = MemoryError(), of_cuda, RuntimeError("CUDA error: out of memory")
    raised = (Mock(side_effect=error) for error in given)
    for allocate in (lambda: np.empty(2**58), lambda: torch.empty(2**55), *raised):
        monkeypatch.setattr("maskopt.cli.app", allocate)
        result = ended()
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert result.stderr.startswith("error: there is not enough memory")
    monkeypatch.setattr("maskopt.cli.app", Mock(side_effect=IndexError))
    with pytest.raises(IndexError):
        ended()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs limits of files, and /dev/full")
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RowProblem(np.ones(40), np.eye(40), Unstructured(0.5)).save("row.npz")
    command = ["solve", "row.npz", "--solver", "wanda", "--output", "s.npz"]
    with small_files(1024):
        result = ended(*command)
    assert (result.returncode, os.listdir()) == (1, ["row.npz"])
    assert "File too large: 's.npz'" in result.stderr
    command = shlex.join([sys.executable, "-m", "maskopt", *command, "--overwrite"])
    # of a closed stdout nothing is said: nobody need listen
    for to, said in (("> /dev/full", "No space left on device"), (">&-", "")):
        words = ["bash", "-c", f"exec {command} {to}"]
        result = subprocess.run(words, capture_output=True, text=True)
        assert result.returncode == bool(said), result.stderr
        assert said in result.stderr
        assert "Traceback" not in result.stderr
        assert sorted(os.listdir()) == ["row.npz", "s.npz"]


def in_blocks(page):
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^(?:\$ |    )(?:torchrun .* -m )?(maskopt .*)$", text, re.MULTILINE)
    parts = [p for line in lines for p in re.split(r" && | \| | > ", line.split("  #")[0])]
    return {part.strip() for part in parts if part.startswith("maskopt ") and "…" not in part}


PAGES = ROOT / "README.md", *(ROOT / "docs").rglob("*.md")
LINES = sorted({c.example for c in COMMANDS.values()}.union(*map(in_blocks, PAGES)))
COMMAND = typer.main.get_command(app)


@pytest.mark.parametrize("line", LINES)
def test_the_line_is_taken(line):
    name, *arguments = shlex.split(line, comments=True)[1:]
    command = COMMAND.get_command(None, name)
    if name == "masks":
        command, name = command.get_command(None, arguments[0]), arguments.pop(0)
    with command.make_context(name, arguments) as context:
        assert context.args == []  # nothing is left over
        source = {p.name: context.get_parameter_source(p.name).name for p in command.params}
    flags = [word for word in arguments if word.startswith("-") and len(word) > 1]
    known = {flag: p.name for p in command.params for flag in (*p.opts, *p.secondary_opts)}
    assert {source[known[flag]] for flag in flags} <= {"COMMANDLINE"}


# --- views
@pytest.fixture
def screen(monkeypatch):
    """A console of a width, in place of stderr; what is on it."""

    def make(width, *, terminal=False):
        stream = io.StringIO()
        console = type(errors)(file=stream, width=width, height=10, force_terminal=terminal)
        for module in (views, prune):
            monkeypatch.setattr(module, "errors", console)
        return stream

    return make


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_has_one_line_that_fits_and_no_number_is_cut(width, screen, still):
    screen(width, terminal=True)
    live = LiveView()
    what = "block 152 of 152: solve model.language_model.layers.151.self_attn.q_proj"
    live.show(what, 0, 124_416, part=0.0)
    still.now += 7200
    live.show(what, 124_416, 124_416, part=0.66, note="error 0.512 of the whole")
    page = Console(width=width, file=io.StringIO(), record=True)
    page.print(live.live.renderable)
    line, note = page.export_text().splitlines()
    assert (len(line) <= width, note) == (True, "error 0.512 of the whole")
    assert re.fullmatch("block 152 of 152.*100%.*1:01:49 left", line)


def test_lines_are_few_and_say_what_is_done(screen, still, tmp_path):
    stream = screen(80)
    plain = PlainView()
    for second in range(200):
        still.now += 1
        plain.show("rows", second, 200, note=f"{second // 100} blocks")
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["rows 1%; 0 blocks", "rows 16%; 0 blocks; 2:48 left"]
    assert next(line for line in lines if "1 blocks" in line).startswith("rows 50%")
    assert len(lines) == 8
    stream = screen(80)
    view = JsonView()
    for step in range(5):
        still.now += 0.3
        view.show("solve", step, 4, part=step / 8, layer={"name": "q"} if step == 2 else None)
    first, *_, last = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (first["what"], last["done"], last["total"]) == ("solve", 4, 4)
    assert {"seconds", "left"} <= set(first)
    stream = screen(80)
    with pytest.raises(KeyboardInterrupt), prune.naming_resume(tmp_path):
        raise KeyboardInterrupt
    assert "no block was finished; nothing of this run is kept" in stream.getvalue()


def test_the_time_left_is_by_the_pace_since_work_began(still):
    assert [duration(x) for x in (7, 200, 3723)] == ["0:07", "3:20", "1:02:03"]

    class Steps(View):
        def take(self, step):
            self.left = step.left

    shown = Steps()
    # a model is opened, which says nothing of the rest; a resumed run begins in the middle
    for seconds, step, left in (
        (300, ("rows", 50, 100), None), (10, ("rows", 60, 100), 40),
        (0, ("other rows", 0, 10), None), (8, ("other rows", 2, 10), 32),
    ):  # fmt: skip
        still.now += seconds
        shown.show(*step)
        assert shown.left == (None if left is None else pytest.approx(left))


class Kept(View):
    seen = ()

    def show(self, what, done, total, **more):
        self.seen = (*self.seen, {"what": what, "done": done, "total": total, **more})


def layer(error, proven):
    statuses = {"swap_optimal": proven, "feasible": 4 - proven}
    given = "q", 0, "q", 4, 8, "0.5", 16, error, 0.0, statuses, 99, False, 1.0
    return LayerReport(*given, energy=10.0, error_wanda=2.0)


def test_a_prune_shows_how_far_it_is_and_what_it_has_reached(still):
    kept = Kept()
    show = PruneView(kept)
    for block in range(4):
        show(BlockProgress(block, 4, "solve", 0, 2))
        still.now += 10
        show(BlockProgress(block, 4, "solve", 1, 2, layer(1.0, 4 - block)))
    parts = [kept.seen[index]["part"] for index in (0, 4, 5)]
    assert parts == pytest.approx([0, 2 / 4, (2 + 0.98) / 4])
    last = kept.seen[-1]
    assert (kept.seen[0]["note"], last["what"]) == ("", "block 4 of 4: solve")
    assert last["note"].startswith("error 0.500 times that of Wanda; 10 of 16 rows proven")
    assert last["layer"]["rows"] == 4
    # before a block is done, the time left is by what was expected
    show = PruneView(kept := Kept(), expected=100.0)
    for seconds, step, part in (
        (25, (0, 4, "solve", 0, 2), 0.25), (500, (0, 4, "solve", 1, 2), 0.98),
        (0, (1, 4, "solve", 0, 2), 1 / 4),
    ):  # fmt: skip
        still.now += seconds
        show(BlockProgress(*step))
        assert kept.seen[-1]["part"] == pytest.approx(part)


def test_nothing_is_printed_with_control_characters_and_markup(tmp_path, screen, still):
    weight = torch.arange(1.0, 9.0)
    RowProblem(weight, torch.eye(8), Unstructured(0.5), name=ODD[:-1]).save(tmp_path / "row.npz")
    shown = run("compare", tmp_path / "row.npz", "--solvers", "wanda")
    shown += run("bound", tmp_path / "row.npz", "--method", "box")
    assert "".join(c for c in shown if not c.isprintable()).replace("\n", "") == ""
    assert not any(line.lstrip(" │").startswith("spoof") for line in shown.splitlines())
    assert "[red]b[/red]" in shown
    said = ended("solve", tmp_path / "no\x1b[2J\nspoof.npz", "--output", tmp_path / "s.npz").stderr
    assert said == f"error: {tmp_path}/no\\x1b[2J\\nspoof.npz: no such file\n"
    for kind in (LiveView, PlainView):
        stream = screen(200)
        with (view := kind()).live:
            still.now += 60
            view.show(ODD, 1, 2, note=ODD)
            view.say(ODD)
        assert ESCAPED in stream.getvalue()
        assert not re.search("\x1b\\[2J|\nspoof", stream.getvalue())
    table = make_table(ODD, title=ODD, caption=ODD)
    table.add_row(ODD)
    type(errors)(file=(stream := io.StringIO()), width=300, markup=False).print(table)
    assert stream.getvalue().count(ESCAPED) == 4


def test_a_prune_says_beforehand_what_it_takes(dense_folder, data, tmp_path, monkeypatch):
    def given(out, *more):
        how = ["--calibration", data, "--sparsity", 0.5, "--solver", "wanda", "--min-tokens", 1]
        return ["prune", dense_folder, *how, "--output", tmp_path / out, *more]

    monkeypatch.setattr(plan, "_speed", lambda *_: 1e9)
    assert "estimated" not in run(*given("small"))
    monkeypatch.setattr(plan, "SMALL", 0)
    assert run(*given("plain")).startswith("time, estimated: about 0:")
    quiet = ended(*given("quiet", "--quiet"))
    assert (quiet.returncode, quiet.stderr, "estimated" in quiet.stdout) == (0, "", False)
    assert "sparsity of these layers: 0.5" in quiet.stdout
    result = ended(*given("json", "--log-json"))
    facts, *lines = [json.loads(line) for line in result.stderr.splitlines()]
    assert min(facts["expected_seconds"], facts["expected_gib"]) > 0
    layers = [line["layer"] for line in lines if "layer" in line]
    assert (result.returncode, len(layers)) == (0, 21)
    assert {"name", "error", "rows", "statuses"} <= set(layers[0])
    assert "exclude each other" in run(*given("out", "--quiet", "--log-json"), fails=OptionError)

"""What a command shows while it works: in a terminal of any width, in a pipe, as JSON, and not at all."""

import io
import json
import time
from types import SimpleNamespace

import pytest
import torch
from commands import ended, run
from rich.console import Console

from maskopt import RowProblem, Unstructured
from maskopt.cli import prune
from maskopt.cli import view as views
from maskopt.cli.console import errors
from maskopt.cli.prune_view import PruneView
from maskopt.cli.view import JsonView, LiveView, PlainView, View, clock
from maskopt.errors import OptionError
from maskopt.models.blockwise.progress import BlockProgress
from maskopt.models.checkpoints.report import LayerReport
from maskopt.models.pruning import plan
from maskopt.report.table import Table

LONG = "block 152 of 152: solve model.language_model.layers.151.self_attn.q_proj"


@pytest.fixture
def still(monkeypatch):
    """Time stands where `now` puts it."""
    found = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: found.now)
    return found


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
    live.show(LONG, 0, 124_416, part=0.0)
    still.now += 7200
    live.show(LONG, 124_416, 124_416, part=0.66, note="error 0.512 of the whole")
    page = Console(width=width, file=io.StringIO(), record=True)
    page.print(live._live.renderable)
    line, note = page.export_text().splitlines()
    assert len(line) <= width
    assert line.startswith("block 152 of 152")
    assert "100%" in line
    assert line.endswith("1:01:49 left")
    assert note == "error 0.512 of the whole"


def test_lines_are_few_and_say_what_is_done(screen, still, tmp_path):
    stream = screen(80)
    with PlainView() as plain:
        for second in range(200):
            still.now += 1
            plain.show("rows", second, 200, note=f"{second // 100} blocks")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "rows 1%; 0 blocks"
    assert lines[1] == "rows 16%; 0 blocks; 2:48 left"
    assert next(line for line in lines if "1 blocks" in line).startswith("rows 50%")
    assert len(lines) == 8
    stream = screen(80)
    with JsonView() as view:
        for step in range(5):
            still.now += 0.3
            view.show("solve", step, 4, part=step / 8, layer={"name": "q"} if step == 2 else None)
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert found[0]["what"] == "solve"
    assert found[-1]["done"] == found[-1]["total"] == 4
    assert {"seconds", "left"} <= set(found[0])
    # an interrupted run says that nothing is left of it
    stream = screen(80)
    with pytest.raises(KeyboardInterrupt), prune.told_of_resume(tmp_path):
        raise KeyboardInterrupt
    assert "no block was finished; nothing of this run is kept" in stream.getvalue()


def test_the_time_left_is_by_the_pace_since_work_began(still):
    assert [clock(x) for x in (7, 200, 3723)] == ["0:07", "3:20", "1:02:03"]

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
    """Keeps what it is shown."""

    seen = ()

    def show(self, what, done, total, **more):
        self.seen = (*self.seen, {"what": what, "done": done, "total": total, **more})


def layer(error, proven):
    statuses = {"swap_optimal": proven, "feasible": 4 - proven}
    return LayerReport(
        *("q", 0, "q", 4, 8, "0.5", 16, error, 0.0, statuses, 99, False, 1.0),
        energy=10.0,
        error_wanda=2.0,
    )


def test_a_prune_shows_how_far_it_is_and_what_it_has_reached(still):
    kept = Kept()
    show = PruneView(kept)
    for block in range(4):
        show(BlockProgress(block, 4, "solve", 0, 2))
        still.now += 10
        show(BlockProgress(block, 4, "solve", 1, 2, layer(1.0, 4 - block)))
    assert kept.seen[0]["part"] == 0.0
    assert kept.seen[0]["note"] == ""
    assert kept.seen[4]["part"] == pytest.approx(2 / 4)
    assert kept.seen[5]["part"] == pytest.approx((2 + 0.98) / 4)
    assert kept.seen[-1]["what"] == "block 4 of 4: solve"
    assert kept.seen[-1]["note"].startswith("error 0.500 times that of Wanda; 10 of 16 rows proven")
    assert kept.seen[-1]["layer"]["rows"] == 4
    # before a block is done, the time left is by what was expected
    show = PruneView(kept := Kept(), expected=100.0)
    for seconds, step, part in (
        (25, (0, 4, "solve", 0, 2), 0.25), (500, (0, 4, "solve", 1, 2), 0.98),
        (0, (1, 4, "solve", 0, 2), 1 / 4),
    ):  # fmt: skip
        still.now += seconds
        show(BlockProgress(*step))
        assert kept.seen[-1]["part"] == pytest.approx(part)


ODD = "a\x1b[2J[red]b[/red]\nspoof: holds: 1 row checked\u202e\udc80"
ESCAPED = r"a\x1b[2J[red]b[/red]\nspoof: holds: 1 row checked\u202e\udc80"


def test_nothing_is_printed_with_control_characters_and_markup(tmp_path, screen, still):
    """Names out of files, what an error quotes, and what goes on."""
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
        with kind() as view:
            still.now += 60
            view.show(ODD, 1, 2, note=ODD)
            view.say(ODD)
        assert ESCAPED in stream.getvalue()
        assert "\x1b[2J" not in stream.getvalue()
        assert "\nspoof" not in stream.getvalue()
    stream = io.StringIO()
    Console(file=stream, width=300).print(Table(ODD, (ODD,), [(ODD,)], note=ODD).rich())
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
    assert (quiet.returncode, quiet.stderr) == (0, "")
    assert "estimated" not in quiet.stdout
    assert "sparsity of these layers: 0.5" in quiet.stdout
    result = ended(*given("json", "--log-json"))
    assert result.returncode == 0
    facts, *lines = [json.loads(line) for line in result.stderr.splitlines()]
    assert facts["expected_seconds"] > 0
    assert facts["expected_gib"] > 0
    layers = [line["layer"] for line in lines if "layer" in line]
    assert len(layers) == 21
    assert {"name", "error", "rows", "statuses"} <= set(layers[0])
    assert "exclude each other" in run(*given("out", "--quiet", "--log-json"), fails=OptionError)

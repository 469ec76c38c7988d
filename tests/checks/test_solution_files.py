"""Solutions and certificates come back from files unchanged, and no damaged file is read."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from strategies import random_gram, random_weight

from maskopt import NM, LayerProblem, Solution, lower_bound, solve, verify
from maskopt.certificate import Certificate
from maskopt.errors import OptionError, ProblemError, VerificationError

#: too many masks to enumerate
LAYER = LayerProblem(random_weight(3, 40, 1), random_gram(40, "full", 7), NM(keep=2, of=4))


@pytest.fixture(scope="module")
def relaxed():
    return solve(LAYER, "relax")


@pytest.mark.parametrize("kind", ["swap", "relax", "branch", "cuts"])
def test_a_solution_and_its_certificate_are_read_as_written(kind, tmp_path):
    problem, path = LAYER.take([0]) if kind == "branch" else LAYER, tmp_path / "s.npz"
    if kind == "cuts":
        cuts, mask = lower_bound(problem, "sdp", cuts=1), solve(problem, "wanda").mask
        more = {"lower_bound": cuts.value, "certificate": cuts.certificate}
        solution = Solution.of(problem, mask, **more)
    else:
        solution = solve(problem, kind, **({"node_limit": 1} if kind == "branch" else {}))
    solution.save(path)
    read = Solution.load(path)
    for what in ("mask", "objective", "lower_bound"):
        assert torch.equal(getattr(read, what), getattr(solution, what)), what
    for what in ("status", "solver", "trusted"):
        assert getattr(read, what) == getattr(solution, what), what
    assert read.seconds == pytest.approx(solution.seconds, nan_ok=True)
    assert type(read.trace) is type(solution.trace)
    assert read.columns().keys() == solution.columns().keys()
    assert str(read.columns()) == str(solution.columns())  # NaN is not equal to itself
    assert verify(problem, read).basis == verify(problem, solution).basis
    if kind in ("relax", "cuts"):
        solution.certificate.save(path)
        known = solution.certificate.check(problem)
        assert torch.equal(Certificate.load(path).check(problem), known)


def test_files_that_are_damaged_or_lack_a_part_are_named(relaxed, tmp_path):
    path = tmp_path / "s.npz"
    for kind, whole, other in (
        (Solution, relaxed, relaxed.certificate),
        (Certificate, relaxed.certificate, relaxed),
    ):
        whole.save(path)
        other.save(tmp_path / "other.npz")
        data = path.read_bytes()
        damaged = {
            "cut": data[: len(data) // 2],
            "empty": b"",
            "text": b"not a file of this kind",
            "flipped": bytes([*data[:-200], *(byte ^ 255 for byte in data[-200:])]),
        }
        refused = {name: name for name in damaged}
        for name, content in damaged.items():
            (tmp_path / name).write_bytes(content)
        refused |= {"nowhere.npz": "no such file", "other.npz": f"not a {kind.__name__.lower()}"}
        for name, message in refused.items():
            with pytest.raises(ProblemError, match=message):
                kind.load(tmp_path / name)
    relaxed.save(path)
    for missing in ("mask", "lower_bound", "certificate.point"):
        with np.load(path) as archive:
            parts = {name: archive[name] for name in archive.files if name != missing}
        np.savez(tmp_path / "less.npz", **parts)
        with pytest.raises(ProblemError, match="not a sound"):
            Solution.load(tmp_path / "less.npz")
    replace(relaxed, lower_bound=relaxed.objective).save(path)  # sound, and not true
    with pytest.raises(VerificationError, match="its certificate proves"):
        verify(LAYER, Solution.load(path))


def test_columns_and_frames_have_a_line_a_row(monkeypatch):
    solution = solve(LAYER, "swap")
    columns = solution.columns()
    assert {len(column) for column in columns.values()} == {3}
    assert columns["status"] == ["swap-optimal"] * 3
    assert columns["swaps"] == solution.trace.swaps.tolist()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(OptionError, match="pandas"):
        solution.to_frame()
    monkeypatch.undo()
    pandas = pytest.importorskip("pandas")
    frame = solution.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == list(columns)
    assert frame["objective"].tolist() == solution.objective.tolist()

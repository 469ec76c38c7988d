"""A solution made, listed and read back: bounds cut back by rounding alone, files that lie."""

import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from strategies import random_gram, random_weight

from maskopt import LayerProblem, Solution, Status, Unstructured, lower_bound, solve, verify
from maskopt.core.files import read_arrays, write_arrays
from maskopt.errors import ProblemError, SolverError
from maskopt.protocol.solution import is_bounded, relative_gap
from maskopt.solvers.bounds.conic import ConicBound


def problem(unit=1.0):
    weight = random_weight(2, 8, 1) * unit
    return LayerProblem(weight, random_gram(8, "full", 2), Unstructured(keep=4))


LAYER = problem()


@pytest.mark.parametrize("unit", [1e-5, 1.0, 1e5])
def test_a_bound_above_the_objective_by_rounding_is_cut_back_and_no_other(unit):
    layer = problem(unit)
    mask = solve(layer, "wanda").mask
    objective = layer.objective(mask)
    weight = layer.weight.clone()
    weight[:, :4] = 0
    free = LayerProblem(weight, layer.gram, layer.pattern)
    nothing = (torch.arange(8) >= 4).expand(2, 8)
    rounding = 1e-13 * free.diagonal_mass()
    for of, masks, bound, expected in (
        (layer, mask, objective * (1 + 0.5e-6), objective),
        (layer, mask, objective * (1 + 3e-6), objective * (1 + 3e-6)),
        (layer, mask, objective * 0.5, objective * 0.5),
        (layer, mask, -objective, 0 * objective),
        (free, nothing, 0.5 * rounding, 0 * rounding),
        (free, nothing, 3 * rounding, 3 * rounding),
    ):
        assert torch.equal(Solution.of(of, masks, lower_bound=bound).lower_bound, expected)
    single = Solution.of(layer, mask, lower_bound=(0.5 * objective).float())
    assert single.lower_bound.dtype == torch.float64


def test_a_row_is_answered_as_a_layer_of_one_and_traces_columns_and_words():
    row = LAYER.row(1)
    mask = solve(row, "wanda").mask[0]
    solution = Solution.of(row, mask, status=[Status.SWAP_OPTIMAL])
    assert (solution.mask.shape, solution.status) == ((1, 8), (Status.SWAP_OPTIMAL,))
    assert float(solution.objective) == row.objective(mask)
    began = time.perf_counter()
    bound = lower_bound(row, "box")
    assert 0 < bound.seconds <= time.perf_counter() - began
    assert torch.equal(bound.value, bound.certificate.check(row))
    trace, mask = solve(LAYER, "swap").trace, solve(LAYER, "wanda").mask
    solution = Solution.of(LAYER, mask, trace=trace, trusted=("", "SCIP 10.0"))
    assert solution.trace is trace
    assert solution.columns()["trusted"] == ["", "SCIP 10.0"]
    plain = Solution.of(LAYER, mask)
    assert (plain.columns()["trusted"], len(plain.columns())) == (["", ""], 5)
    problem = LayerProblem(torch.ones(2, 3), torch.eye(3), Unstructured(keep=2))
    found = Solution.of(problem, torch.tensor([[True, True, False]] * 2))
    assert repr(found) == "Solution(rows=2, objective=2, lower_bound=0, 2 feasible)"
    bound = repr(lower_bound(problem, "box"))
    assert bound.startswith("Bound(box, rows=2, value=0.666667 in all, ")
    # a gap is relative, and 0 where there is nothing to gain
    objective = torch.tensor([0.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    bound = torch.tensor([0.0, 1e-13, 0.125, 1.0], dtype=torch.float64)
    assert relative_gap(objective, bound).tolist() == [0.0, 0.0, 0.75, 0.5]
    assert [is_bounded(2.0, 0.0), is_bounded(0.0, 0.0), is_bounded(2.0, 1.0)] == [False, True, True]
    assert is_bounded(1e-300, 0.0, Status.OPTIMAL)


def test_what_is_unknown_is_null_in_a_file(tmp_path):
    """The header is JSON for any reader: it has no NaN."""
    path = tmp_path / "s.npz"
    solution = Solution.of(LAYER, solve(LAYER, "wanda").mask)
    assert math.isnan(solution.seconds)
    solution.save(path)
    with np.load(path) as archive:
        header = json.loads(str(archive["header"]), parse_constant=pytest.fail)
    assert header["seconds"] is None
    assert math.isnan(Solution.load(path).seconds)
    replace(solution, seconds=2.5).save(path)
    assert Solution.load(path).seconds == 2.5


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"seconds": 10**400}, {}), ({"seconds": "long"}, {}), ({"seconds": []}, {}),
        ({"status": None}, {}), ({"status": ["feasible", "perfect"]}, {}), ({"trusted": 3}, {}),
        ({"trace.winner": []}, {}), ({"trace.nodes": 3}, {}), ({"trace.nodes": {}}, {}),
        *(({}, {what: kind}) for kind in (">f8", "U1")
          for what in ("mask", "objective", "lower_bound", "certificate.point")),
    ],
    ids=lambda changes: str(changes)[:40],
)  # fmt: skip
def test_a_forged_file_is_named(changes, kinds, tmp_path):
    solve(LAYER, "relax" if kinds else "wanda").save(tmp_path / "s.npz")
    header, arrays = read_arrays(tmp_path / "s.npz", "solution")
    header = {k: v for k, v in header.items() if k not in ("format", "kind")} | changes
    arrays |= {name: arrays[name].astype(kind) for name, kind in kinds.items()}
    write_arrays(tmp_path / "f.npz", "solution", header, arrays)
    with pytest.raises(ProblemError, match=r"f\.npz: not a sound" + " solution" * bool(changes)):
        Solution.load(tmp_path / "f.npz")


def test_a_bound_takes_as_many_inputs_as_it_says(monkeypatch):
    monkeypatch.setattr(ConicBound, "unavailable", classmethod(lambda cls: None))
    box = lower_bound(LAYER, "box")
    monkeypatch.setattr(ConicBound, "certify", lambda *_: (box.certificate, box.trace))
    monkeypatch.setattr(ConicBound, "largest_n", 8)
    assert torch.equal(lower_bound(LAYER, "sdp-conic").value, box.value)
    gap = box.gap(LAYER.objective(solve(LAYER, "wanda").mask).float())
    assert gap.dtype == torch.float64
    monkeypatch.setattr(ConicBound, "largest_n", 7)
    with pytest.raises(SolverError, match="takes at most 7 inputs, the row has 8"):
        lower_bound(LAYER, "sdp-conic")


def test_parts_of_a_layer_are_joined_with_what_they_found():
    problem = LayerProblem(random_weight(7, 16, 3), random_gram(16, "full", 4), Unstructured(0.5))
    parts = [solve(problem.take(rows), "swap") for rows in (slice(0, 3), slice(3, 7))]
    joined, whole = Solution.joined(parts), solve(problem, "swap")
    assert torch.equal(joined.mask, whole.mask)
    assert joined.status == whole.status
    assert joined.trace.swaps.tolist() == whole.trace.swaps.tolist()
    ends = torch.cat([part.trace.history[:, -1] for part in parts])
    assert torch.equal(joined.trace.history[:, -1], ends)
    verify(problem, joined)

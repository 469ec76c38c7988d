"""improving_swap against brute force, and verify against every kind of forgery."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from strategies import problems, random_gram, random_weight

from maskopt import (
    NM,
    Certificate,
    LayerProblem,
    Solution,
    Status,
    Unstructured,
    available_solvers,
    improving_swap,
    lower_bound,
    solve,
    verify,
)
from maskopt.errors import OptionError, ProblemError, VerificationError
from maskopt.solution import SWAP_FLOOR, SWAP_TOLERANCE
from maskopt.solver import is_trusted


@given(problems(max_n=9, max_rows=2))
def test_improving_swap_is_the_best_pair_of_brute_force(problem):
    solution = solve(problem, "random")
    for i in range(problem.rows):
        row, mask = problem.row(i), solution.mask[i]
        q = row.q()
        group = problem.group_size

        def cost(m, q=q):
            p = (~m).double()
            return float(p @ q @ p)

        best = 0.0
        for u in range(row.n):
            for p in range(row.n):
                if mask[u] and not mask[p] and u // group == p // group:
                    other = mask.clone()
                    other[u], other[p] = False, True
                    best = min(best, cost(other) - cost(mask))
        swap = improving_swap(row, mask)
        slack = SWAP_TOLERANCE * cost(mask) + SWAP_FLOOR * float(q.diagonal().sum())
        if swap is None:
            assert best >= -slack * (1 + 1e-6) - 1e-13 * float(q.diagonal().sum())
        else:
            other = mask.clone()
            assert bool(mask[swap.kept])
            assert not bool(mask[swap.pruned])
            other[swap.kept], other[swap.pruned] = False, True
            assert swap.delta == pytest.approx(best, rel=1e-6, abs=1e-9 * float(q.diagonal().sum()))
            assert cost(other) < cost(mask)


@given(problems(max_n=10))
def test_verify_accepts_honest_solutions(problem):
    for name in ("wanda", "elimination", "exhaustive"):
        verify(problem, solve(problem, name))


WORDS = ("SCIP 10.0",) * 3


@pytest.fixture(params=[Unstructured(sparsity=0.5), NM(keep=2, of=4)], ids=str)
def problem(request):
    gram = random_gram(16, "full", 7)
    return LayerProblem(random_weight(3, 16, 1), gram, request.param)


def test_verify_catches_every_forgery(problem):
    honest = solve(problem, "magnitude")
    optimum = solve(problem, "exhaustive")
    flipped = honest.mask.clone()
    flipped[1, 0] = ~flipped[1, 0]
    swap_optimal = (Status.SWAP_OPTIMAL,) * 3
    optimal = (Status.OPTIMAL,) * 3
    forgeries = {
        "pattern: mask: row 1": replace(honest, mask=flipped),
        "pattern: mask has shape": replace(honest, mask=honest.mask[:2]),
        "objective: row 0": replace(honest, objective=honest.objective * 0.99),
        "objective must be float64": replace(honest, objective=honest.objective.float()),
        "f ≥ 0": replace(honest, lower_bound=honest.lower_bound - 1),
        "above the objective": replace(honest, lower_bound=honest.objective * 1.01, trusted=WORDS),
        "without a certificate": replace(honest, lower_bound=honest.objective * 0.1),
        "no exact solver is trusted with it": replace(
            honest, lower_bound=honest.objective * 0.1, trusted=("", "", "")
        ),
        "trusted: 2 names for 3 rows": replace(honest, trusted=WORDS[:2]),
        "statuses for": replace(honest, status=swap_optimal[:1]),
        "claims swap-optimal, yet": replace(honest, status=swap_optimal),
        "claims optimal": replace(honest, status=optimal),
        "claims optimal without proof": replace(optimum, lower_bound=optimum.objective * 0.9),
        "a mask of objective": replace(
            honest,
            lower_bound=(honest.objective + optimum.objective) / 2,
            trusted=WORDS,
        ),
    }
    for reason, forged in forgeries.items():
        with pytest.raises(VerificationError, match=reason):
            verify(problem, forged)


def test_a_swap_optimum_forged_into_an_optimum_is_caught():
    """Enumeration finds what no swap does."""
    for seed in range(200):
        problem = LayerProblem(
            random_weight(1, 12, seed * 5 + 1),
            random_gram(12, "low-rank", seed),
            Unstructured(keep=6),
        )
        mask = solve(problem, "wanda").mask[0]
        while swap := improving_swap(problem.row(0), mask):
            mask = mask.clone()
            mask[swap.kept], mask[swap.pruned] = False, True
        best = float(solve(problem, "exhaustive").objective)
        if float(problem.objective(mask[None])) > best * 1.01 + 1e-9:
            forged = Solution.of(
                problem,
                mask[None],
                status=Status.OPTIMAL,
                lower_bound=problem.objective(mask[None]),
                trusted=("SCIP 10.0",),
            )
            with pytest.raises(VerificationError, match="exists"):
                verify(problem, forged)
            return
    pytest.fail("no instance separates swap optima from optima")


def test_gap_and_repr():
    problem = LayerProblem(torch.zeros(1, 4), torch.eye(4), Unstructured(sparsity=0.5))
    solution = solve(problem, "exhaustive")
    assert solution.gap.tolist() == [0.0]
    assert "1 optimal" in repr(solution)
    half = replace(solution, objective=torch.tensor([4.0]), lower_bound=torch.tensor([1.0]))
    assert half.gap.tolist() == [0.75]


def too_many_to_enumerate(rows=3):
    return LayerProblem(random_weight(rows, 40, 1), random_gram(40, "full", 7), NM(keep=2, of=4))


def test_a_bound_is_checked_or_taken_on_a_word_that_is_named():
    problem = too_many_to_enumerate()
    start = solve(problem, "wanda")
    bound = lower_bound(problem, "sdp")
    proven = Solution.of(
        problem, start.mask, lower_bound=bound.value, certificate=bound.certificate
    )
    assert verify(problem, proven).basis == ("checked",) * 3
    assert verify(problem, start, require="checked").checked  # no bound, nothing to take on trust
    # row 1 claims more than its certificate proves
    higher = bound.value.clone()
    higher[1] = (higher[1] + start.objective[1]) / 2
    trusted = replace(proven, lower_bound=higher, trusted=("", "SCIP 10.0", ""))
    found = verify(problem, trusted)
    assert found.basis == ("checked", "trusted: SCIP 10.0", "checked")
    assert not found.checked
    assert str(found) == "2 rows checked, 1 row trusted: SCIP 10.0"
    with pytest.raises(VerificationError, match=r"row 1 is trusted \(SCIP 10\.0\)"):
        verify(problem, trusted, require="checked")
    with pytest.raises(VerificationError, match=r"row 1 .* its certificate proves"):
        verify(problem, replace(trusted, trusted=()))
    with pytest.raises(VerificationError, match="require"):
        verify(problem, proven, require="proven")


def test_a_forged_word_does_not_survive_enumeration(problem):
    """Whoever is trusted: where a row is small enough its bound is held against all masks."""
    optimum = solve(problem, "exhaustive")
    assert verify(problem, optimum, require="checked").basis == ("checked",) * 3
    start = solve(problem, "worst")
    forged = replace(start, lower_bound=start.objective, trusted=("SCIP 10.0",) * 3)
    with pytest.raises(VerificationError, match="a mask of objective"):
        verify(problem, forged)
    # a true bound under a forged word costs nothing: it was checked
    true = replace(start, lower_bound=optimum.objective, trusted=("SCIP 10.0",) * 3)
    assert verify(problem, true, require="checked").checked


@pytest.mark.parametrize(
    "name",
    [
        "SCIP", "SCIP ten", "scip 10.0", "a forger 1.0", "SCIP 10.0\nspoof: holds: 1 row checked",
        "SCIP 10.0 spoof: 1 row checked", "SCIP \x1b[2J10.0", "SCIP\n 10.0", "SCIP 10.0\n", " 10.0",
    ],
)  # fmt: skip
def test_only_registered_exact_solvers_with_a_version_are_trusted(name, tmp_path):
    problem = too_many_to_enumerate()
    start = solve(problem, "wanda")
    forged = replace(start, lower_bound=start.objective / 2, trusted=(name,) * 3)
    forged.save(tmp_path / "s.npz")
    with pytest.raises(
        VerificationError, match="is no registered exact solver with its version"
    ) as said:
        verify(problem, Solution.load(tmp_path / "s.npz"))
    assert str(said.value).isprintable()
    with pytest.raises(VerificationError, match="is no registered exact solver"):
        verify(problem, replace(start, trusted=(name, "", "")))  # whatever rests on it


def test_exact_solvers_are_registered_with_the_names_that_they_are_trusted_under():
    exact = [i.capabilities for i in available_solvers().values() if i.capabilities.trusted]
    assert len(exact) == 5
    for capabilities in exact:
        assert capabilities.proves == "optimality"
        assert all(is_trusted(f"{name} 1.0.1") for name in capabilities.trusted)


def test_a_word_is_no_certificate_of_another_problem():
    problem = too_many_to_enumerate()
    bound = lower_bound(problem, "sdp")
    other = LayerProblem(0.5 * problem.weight, problem.gram, problem.pattern)
    mask = solve(other, "wanda").mask
    value = bound.value.minimum(other.objective(mask))
    forged = Solution.of(other, mask, lower_bound=value, certificate=bound.certificate)
    with pytest.raises(VerificationError, match="its certificate proves"):
        verify(other, forged)


def solutions():
    problem = too_many_to_enumerate()
    cuts = lower_bound(problem, "sdp", cuts=1)
    mask = solve(problem, "wanda").mask
    yield problem, solve(problem, "swap")
    yield problem, solve(problem, "relax")
    yield problem.take([0]), solve(problem.take([0]), "branch", node_limit=1)
    yield problem, Solution.of(problem, mask, lower_bound=cuts.value, certificate=cuts.certificate)


def test_a_solution_is_read_as_it_was_written(tmp_path):
    for number, (problem, solution) in enumerate(solutions()):
        path = tmp_path / f"{number}.npz"
        solution.save(path)
        read = Solution.load(path)
        for what in ("mask", "objective", "lower_bound"):
            assert torch.equal(getattr(read, what), getattr(solution, what)), what
        assert (read.status, read.solver, read.trusted) == (
            solution.status, solution.solver, solution.trusted
        )  # fmt: skip
        assert read.seconds == pytest.approx(solution.seconds, nan_ok=True)
        assert type(read.trace) is type(solution.trace)
        assert read.columns().keys() == solution.columns().keys()
        assert str(read.columns()) == str(solution.columns())  # NaN is not equal to itself
        assert verify(problem, read).basis == verify(problem, solution).basis


def test_a_certificate_is_read_as_it_was_written(tmp_path):
    problem = too_many_to_enumerate()
    for cuts in (0, 1):
        certificate = lower_bound(problem, "sdp", cuts=cuts).certificate
        certificate.save(tmp_path / "c.npz")
        read = Certificate.load(tmp_path / "c.npz")
        assert torch.equal(read.check(problem), certificate.check(problem))


def test_what_was_tampered_with_on_disk_is_caught(tmp_path):
    problem = too_many_to_enumerate()
    solution = solve(problem, "relax")
    path = tmp_path / "s.npz"
    replace(solution, lower_bound=solution.objective).save(path)
    with pytest.raises(VerificationError, match="its certificate proves"):
        verify(problem, Solution.load(path))


@pytest.mark.parametrize("kind", [Solution, Certificate])
def test_damaged_files_are_named(kind, tmp_path):
    problem = too_many_to_enumerate()
    solution = solve(problem, "relax")
    path, other = tmp_path / "whole.npz", tmp_path / "other.npz"
    whole, stranger = (solution, solution.certificate)[:: 1 if kind is Solution else -1]
    whole.save(path)
    stranger.save(other)
    data = path.read_bytes()
    damaged = {
        "cut": data[: len(data) // 2],
        "empty": b"",
        "text": b"not a file of this kind",
        "flipped": bytes([*data[:-200], *(byte ^ 255 for byte in data[-200:])]),
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ProblemError, match=name):
            kind.load(tmp_path / name)
    with pytest.raises(ProblemError, match="no such file"):
        kind.load(tmp_path / "nowhere.npz")
    with pytest.raises(ProblemError, match=f"not a {kind.__name__.lower()}"):
        kind.load(other)


@pytest.mark.parametrize("missing", ["mask", "lower_bound", "certificate.point"])
def test_a_file_that_lacks_a_part_is_refused(missing, tmp_path):
    problem = too_many_to_enumerate()
    solve(problem, "relax").save(tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as archive:
        parts = {name: archive[name] for name in archive.files if name != missing}
    np.savez(tmp_path / "less.npz", **parts)
    with pytest.raises(ProblemError, match="not a sound"):
        Solution.load(tmp_path / "less.npz")


def test_columns_and_frames_have_a_line_a_row(monkeypatch):
    solution = solve(too_many_to_enumerate(), "swap")
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

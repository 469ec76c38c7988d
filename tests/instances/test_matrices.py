"""A matrix in a file or an array: solved, proven, verified, printed; and what is no such matrix."""

import json
from itertools import combinations

import numpy as np
import pytest
import scipy.io
import torch
from commands import run, shows
from forging import fails

from maskopt import LayerProblem, LeastSquaresUpdate, RowProblem, Solution, Unstructured

from maskopt import load_problem, minimize_quadratic, solve, verify  # isort: skip
from maskopt.errors import OptionError, ProblemError, VerificationError
from maskopt.experiments.prove import search
from maskopt.protocol.solution import Status

RNG = np.random.default_rng(0)
X = RNG.normal(size=(80, 14))
Q = X.T @ X / 80
VALUES = [Q[np.ix_(s, s)].sum() for s in combinations(range(14), 4)]
OFF, HOLE = Q.copy(), Q.copy()
OFF[2, 5] += 1
HOLE[3, 4] = HOLE[4, 3] = np.nan


def best_by_force(maximize):
    return max(VALUES) if maximize else min(VALUES)


def save(path, matrix=Q):
    if path.suffix == ".csv":
        np.savetxt(path, matrix, delimiter=",")
    elif path.suffix == ".mtx":
        scipy.io.mmwrite(path, matrix)
    else:
        (np.save if path.suffix == ".npy" else np.savez)(path, matrix)
    return path


@pytest.mark.parametrize("ending", [".npy", ".npz", ".csv", ".mtx"])
def test_a_matrix_in_a_file_is_solved_and_what_is_printed_is_its_own(ending, tmp_path):
    file, out = save(tmp_path / f"Q{ending}"), tmp_path / "s.json"
    maximize = ending in (".npy", ".csv")
    said = run("solve", file, "--cardinality", 4, *["--maximize"] * maximize, "--output", out)
    found = json.loads(out.read_text())
    chosen = found["selected"]
    assert (len(chosen), found["status"], found["solver"]) == (4, "optimal", "branch")
    assert found["value"] == pytest.approx(Q[np.ix_(chosen, chosen)].sum())
    assert found["value"] == pytest.approx(best_by_force(maximize))
    assert found["gap"] == pytest.approx(0, abs=1e-6)
    shows(said, "RowProblem('Q', n=14", f"selected, 4 of 14: {' '.join(map(str, chosen))}")
    assert ("maximized" in said) == maximize


def test_a_proof_of_a_matrix_is_of_that_sense_and_size(tmp_path):
    file, proof = save(tmp_path / "Q.npy"), tmp_path / "proof.npz"
    words = (file, "--cardinality", 4, "--maximize")
    proven = run("solve", *words, "--prove", "--output", proof).splitlines()
    plain = run("solve", *words).splitlines()
    assert proven[2].split() == plain[2].split() == ["status", "rows", "value", "bound", "gap"]
    assert max(map(len, plain)) <= 80
    shows(run("verify", file, proof, *words[1:], "--strict"), "1 row checked", *proven[2:5])
    assert "units" in run("verify", file, proof, "--cardinality", 4, fails=VerificationError)
    assert "name its solution" in run("verify", file, fails=OptionError)
    assert Solution.load(proof).value == pytest.approx(best_by_force(True))
    table = run("compare", *words[:3])
    assert all(name in table for name in ("wanda", "swap", "branch"))
    assert "scip" not in table
    for more in (["--prove"], []):
        rows = save_layer(tmp_path / "layer.npz") if not more else file
        given = ("solve", rows, "--output", tmp_path / "a.json", *more, *words[1:3] * bool(more))
        assert "written as .npz" in run(*given, fails=OptionError)


def save_layer(path):
    LayerProblem(np.ones((2, 14)), Q, Unstructured(keep=7)).save(path)
    assert load_problem(path).name == "layer"  # a file names what has no name
    return path


@pytest.mark.parametrize(("name", "matrix", "cardinality", "said"), [
    ("a.npy", Q[:3], 2, r"\[3, 14\], not square.*save X.T @ X"),
    ("a.mtx", Q[:3], 2, "3 × 14"),
    ("a.csv", OFF, 2, r"not symmetric.*\(Q \+ Q.T\) / 2"),
    ("a.npz", HOLE, 2, r"2 entries are NaN or infinite, the first at \[3, 4\]; replace"),
    ("a.npy", Q, 15, "cardinality must be a whole number, 0 … 14, not 15"),
    ("a.npy", Q, None, "give `cardinality`"),
    ("a.npy", np.array([[object()]]), 1, "not an array"),
    ("a.npy", np.array([["x"]]), 1, "of type"),
    ("a.mtx", "%%MatrixMarket matrix coordinate real general\n9 9 99999\n", 1, "99999 entries"),
    ("a.csv", "a,b\n1,2\n", 1, "no matrix"),
    ("none.csv", None, 1, "no such file"),
])  # fmt: skip
def test_what_is_no_such_matrix_names_the_file_and_the_remedy(
    name, matrix, cardinality, said, tmp_path
):
    if isinstance(matrix, str):
        (tmp_path / name).write_text(matrix)
    elif matrix is not None:
        save(tmp_path / name, matrix)
    fails(ProblemError, f"{name}: .*{said}", load_problem, tmp_path / name, cardinality)


def test_several_arrays_and_a_sense_that_a_file_has_are_refused(tmp_path):
    np.savez(tmp_path / "two.npz", a=Q, b=Q)
    fails(ProblemError, "holds 2 arrays", load_problem, tmp_path / "two.npz", 2)
    fails(ProblemError, "`maximize` is for matrices", load_problem, tmp_path / "a.mc", 2, True)


@pytest.mark.parametrize("maximize", [False, True])
def test_a_solution_speaks_in_the_units_of_the_matrix(maximize):
    found = minimize_quadratic(Q, cardinality=4, maximize=maximize, constant=2.0, proof=True)
    x = np.isin(np.arange(14), found.selected)
    assert found.value == pytest.approx(x @ Q @ x + 2) == best_by_force(maximize) + 2
    better = found.value - found.bound if not maximize else found.bound - found.value
    assert -1e-12 <= better <= 1e-6
    assert found.columns()["gap"] == [found.gap]
    problem = RowProblem.from_quadratic(Q, cardinality=4, maximize=maximize, constant=2.0)
    assert verify(problem, found, require="checked").checked
    large = RNG.normal(size=(200, 130))
    found = minimize_quadratic(large.T @ large, cardinality=60, time_limit=60, moves=50)
    assert 0 < found.bound <= found.value  # of a larger row, too
    row = RowProblem.from_quadratic(large.T @ large, cardinality=60)
    assert verify(row, found, require="checked").checked
    assert found.value <= solve(row, "sdp").value
    with_zeros = RowProblem.from_quadratic(np.diag([0.0] * 70 + [1.0] * 60), cardinality=60)
    assert search(with_zeros).status == (Status.OPTIMAL,)  # where bound and mask meet


def test_a_layer_of_inputs_is_pruned_by_its_solution():
    weight = RNG.normal(size=(3, 14)).astype(np.float32)
    problem = LayerProblem.from_inputs(weight, X, sparsity=0.5, name="up")
    assert np.allclose(problem.gram, Q)
    assert np.allclose(problem.moments[0], X.mean(0))
    found = solve(problem)
    pruned = found.apply(weight)
    assert pruned.dtype == np.float32
    assert (((pruned - weight) @ X.T) ** 2).mean(1).sum() == pytest.approx(found.value, rel=1e-5)
    assert str(found) == found.summary()
    shows(str(found), "swap", "3 rows of 14 inputs", "swap-optimal")
    updated = solve(problem.with_update(LeastSquaresUpdate(0.01)), "swap")
    assert torch.equal(updated.apply(torch.as_tensor(weight).double()), updated.weight)
    assert (solve(problem.row(0)).apply(weight[0]) != 0).sum() == 7
    fails(ProblemError, "weight has shape", found.apply, weight[:2])
    fails(ProblemError, "of one row", lambda: found.selected)
    fails(ProblemError, "inputs must be", LayerProblem.from_inputs, weight, X[0], 0.5)

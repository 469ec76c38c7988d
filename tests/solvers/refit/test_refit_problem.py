"""The problem object that means refitted weights: where it goes along, how it is kept, who refuses it."""

import numpy as np
import pytest
import torch
from strategies import random_gram, random_weight
from test_refit_objective import (
    PATTERNS,
    assert_equal_but_for_rounding,
    dense,
    layer,
    random_mask,
)

from maskopt import (
    NM,
    Certificate,
    LayerProblem,
    Refit,
    RowProblem,
    Unstructured,
    available_bounds,
    available_solvers,
    load_problem,
    lower_bound,
    solve,
    verify,
)
from maskopt.compare import compare
from maskopt.errors import (
    MaskoptError,
    OptionError,
    ProblemError,
    SolverError,
    VerificationError,
)
from maskopt.files import read_arrays, write_arrays
from maskopt.solver import make_start

KEEPING = [name for name, info in available_solvers().items() if not info.capabilities.refit]


def one_line(error):
    text = str(error.value)
    return len(text) < 250 and "\n" not in text


@pytest.mark.parametrize("linear", [False, True], ids=["plain", "linear"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_file_holds_it(tmp_path, pattern, linear):
    problem = layer(pattern, damping=0.03, linear=linear)
    mask = random_mask(problem)
    problem.save(tmp_path / "layer.npz")
    problem.row(2).save(tmp_path / "row.npz")
    for read in (LayerProblem.load, load_problem):
        whole = read(tmp_path / "layer.npz")
        assert whole.refit == Refit(0.03)
        assert torch.equal(whole.objective(mask), problem.objective(mask))
    for read in (RowProblem.load, load_problem):
        row = read(tmp_path / "row.npz")
        assert row.refit == Refit(0.03)
        assert row.objective(mask[2]) == problem.row(2).objective(mask[2])
    problem.refitting(None).save(tmp_path / "kept.npz")
    assert LayerProblem.load(tmp_path / "kept.npz").refit is None


@pytest.mark.parametrize(
    "words", [{"damping": -1.0}, {"damping": "x"}, {}, {"damping": 0.1, "more": 1}, 0.01, [0.01]]
)
def test_a_file_that_tells_it_wrongly_is_refused(tmp_path, words):
    layer().save(tmp_path / "layer.npz")
    header, arrays = read_arrays(tmp_path / "layer.npz", "layer")
    rest = {k: v for k, v in header.items() if k not in ("format", "kind", "refit")}
    arrays = {k: v for k, v in arrays.items() if k != "header"}
    write_arrays(tmp_path / "forged.npz", "layer", {**rest, "refit": words}, arrays)
    with pytest.raises(MaskoptError, match=r"damping|kept weights are refitted"):
        load_problem(tmp_path / "forged.npz")


def test_a_file_from_before_there_was_a_refit_keeps_its_weights(tmp_path):
    layer().save(tmp_path / "layer.npz")
    header, arrays = read_arrays(tmp_path / "layer.npz", "layer")
    rest = {k: v for k, v in header.items() if k not in ("format", "kind", "refit")}
    arrays = {k: v for k, v in arrays.items() if k != "header"}
    write_arrays(tmp_path / "old.npz", "layer", rest, arrays)
    assert load_problem(tmp_path / "old.npz").refit is None


def test_rows_parts_and_other_patterns_keep_it():
    problem = layer(linear=True, damping=0.1)
    mask = random_mask(problem)
    assert problem.row(1).refit == problem.take([0, 2]).refit == Refit(0.1)
    some = problem.take([0, 2])
    torch.testing.assert_close(some.objective(mask[[0, 2]]), problem.objective(mask)[[0, 2]])
    other = problem.under(NM(keep=1, of=2))
    assert other.refit == Refit(0.1)
    assert torch.equal(other.objective(mask), problem.objective(mask))


def test_a_restricted_row_is_damped_by_the_inputs_that_are_left():
    problem = layer(kind="outliers", linear=True)
    columns = [14, 3, 0, 7, 8, 1]
    row = problem.row(1).restrict(columns, Unstructured(keep=3))
    assert row.refit == problem.refit
    alone = row.as_layer()
    mask = random_mask(alone)
    expected, _ = dense(alone, mask)
    assert row.objective(mask[0]) == pytest.approx(float(expected), rel=1e-9)
    verify(row, solve(row, "exhaustive"))


def test_a_restricted_row_that_the_damping_leaves_indefinite_is_refused_like_any():
    """What is rounding beside a large input can be too much where that one is gone."""
    gram = torch.eye(6)
    gram[0, 0] = 1e6
    gram[1, 2] = gram[2, 1] = 1.01
    row = LayerProblem(torch.ones(1, 6), gram, Unstructured(0.5), refit=Refit(0)).row(0)
    with pytest.raises(ProblemError, match="damping"):
        row.restrict([1, 2, 3, 4])


def test_the_other_objective_of_the_same_rows():
    problem = layer(damping=0.01)
    mask = random_mask(problem)
    kept = problem.refitting(None)
    f = ((problem.weight * ~mask) @ problem.gram * (problem.weight * ~mask)).sum(1)
    torch.testing.assert_close(kept.objective(mask), f, rtol=1e-12, atol=0)
    assert torch.equal(kept.weights(mask), problem.weight * mask)
    assert kept.gram.data_ptr() == problem.gram.data_ptr()
    more = problem.refitting(Refit(0.3))
    assert_equal_but_for_rounding(more, more.objective(mask), dense(more, mask)[0])
    assert problem.refit == Refit(0.01)
    assert_equal_but_for_rounding(problem, problem.objective(mask), dense(problem, mask)[0])
    with pytest.raises(ProblemError, match=r"refit=Refit\(damping\)"):
        _ = kept.least_squares


def test_the_two_objectives_are_not_taken_for_each_other():
    problem = layer()
    kept, refitted = solve(problem.refitting(None), "random"), solve(problem, "random")
    assert torch.equal(kept.mask, refitted.mask)
    verify(problem, refitted)
    verify(problem.refitting(None), kept)
    for one, other in ((problem, kept), (problem.refitting(None), refitted)):
        with pytest.raises(VerificationError, match="objective: row 0"):
            verify(one, other)


@pytest.mark.parametrize("solver", KEEPING)
def test_solvers_that_know_f_alone_refuse(solver):
    problem = layer(Unstructured(keep=4), rows=1, n=8)
    with pytest.raises(SolverError, match=f"'{solver}' chooses for weights as they are") as error:
        solve(problem, solver)
    assert one_line(error)


def test_there_are_such_solvers_and_others():
    assert {"tabu", "highs", "relax"} <= set(KEEPING)
    assert {"swap", "admm", "obs", "branch", "scip", "exhaustive", "wanda"}.isdisjoint(KEEPING)


@pytest.mark.parametrize("method", sorted({*available_bounds()} - {"perspective"}))
def test_bounds_of_kept_weights_refuse(method):
    problem = layer(Unstructured(keep=4), rows=1, n=8)
    with pytest.raises(SolverError, match=f"'{method}' is of weights as they are") as error:
        lower_bound(problem, method)
    assert one_line(error)


def test_a_certificate_and_a_quadratic_form_refuse():
    problem = layer()
    kept = problem.refitting(None)
    certificate = Certificate.box(kept, torch.zeros(4, 16))
    assert bool((certificate.check(kept) >= 0).all())
    with pytest.raises(VerificationError, match="proves nothing of refitted weights") as error:
        certificate.check(problem)
    assert one_line(error)
    with pytest.raises(ProblemError, match="no quadratic form of the mask") as error:
        problem.row(0).q()
    assert one_line(error)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("maker", ["relax", "elimination"])
def test_a_solver_that_knows_f_alone_makes_a_start_all_the_same(pattern, maker):
    problem = layer(pattern)
    start = make_start(problem.refitting(None), maker).mask
    stopped = solve(problem, "swap", start=maker, max_swaps=0)
    assert torch.equal(stopped.mask, start)
    assert torch.equal(solve(problem, "swap", start=maker).mask, solve(problem, start=start).mask)


def test_a_damping_that_leaves_the_inputs_indefinite_is_refused():
    """A float32 G of few tokens, whose rounding is above 1e-6 of the mean of its diagonal."""
    x = torch.randn(8, 64, dtype=torch.float64)
    gram = x.T @ x / 8
    gram -= 3e-6 * gram.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    weight = random_weight(2, 64, 1, torch.float32)
    for make in (
        lambda how: LayerProblem(weight, gram.float(), Unstructured(0.5), name="q", refit=how),
        lambda how: LayerProblem(weight, gram.float(), Unstructured(0.5), name="q").refitting(how),
    ):
        with pytest.raises(ProblemError, match=r"layer 'q': .* take a larger damping") as error:
            make(Refit(0.0))
        assert one_line(error)
        problem = make(Refit(0.01))
        verify(problem, solve(problem, "swap"))
    row = RowProblem(weight[1], gram.float(), Unstructured(0.5), refit=Refit(0.01))
    assert row.refit == Refit(0.01)
    with pytest.raises(ProblemError, match="damping"):
        RowProblem(weight[1], gram.float(), Unstructured(0.5), refit=Refit(0))


@pytest.mark.parametrize(
    "damping", [-1, -1e-9, float("nan"), float("inf"), True, "x", None, [0.01]], ids=repr
)
def test_bad_dampings_are_refused(damping):
    with pytest.raises(OptionError, match="`damping` must be at least 0"):
        Refit(damping)


@pytest.mark.parametrize("damping", [np.float32(0.25), np.float64(0.25), np.int64(1), 1], ids=repr)
def test_a_number_of_numpy_is_a_damping(damping):
    found = Refit(damping)
    assert type(found.damping) is float
    assert found.damping == damping


def test_a_comparison_knows_its_objective():
    problem = layer(rows=1)
    rows = [p.row(0) for p in (problem, problem.refitting(Refit(0.3)), problem.refitting(None))]
    records = compare(rows, ["wanda"])
    assert len({record.key for record in records}) == 3
    mask = solve(problem, "wanda").mask[0]
    assert [r.objective for r in records] == [row.objective(mask) for row in rows]


def test_what_it_is_can_be_read():
    problem = layer(rows=2, damping=0.03)
    assert "Refit(damping=0.03)" in repr(problem)
    assert "Refit(damping=0.03)" in repr(problem.row(0))
    assert "Refit" not in repr(problem.refitting(None))


def test_rows_change_their_objective_as_layers_do():
    weight, gram = random_weight(1, 8, 1), random_gram(8, "full", 2)
    row = RowProblem(weight[0], gram, Unstructured(0.5), refit=Refit(0))
    assert row.refitting(None).refit is None
    assert row.refitting(None).refitting(Refit(0.1)).refit == Refit(0.1)
    assert repr(row.refit) == repr(Refit(0.0))  # what records of comparisons are known by

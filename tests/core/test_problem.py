"""LayerProblem and RowProblem: the objective, the checks at the door, save and load."""

import copy
import io
import json
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from strategies import problems, random_gram, random_weight

from maskopt import NM, LayerProblem, Refit, RowProblem, Unstructured, files, solve
from maskopt.errors import MaskoptError, PatternError, ProblemError, WarmStartError
from maskopt.formats import load_problem

HALF = Unstructured(sparsity=0.5)


@given(problems(linear=False))
def test_objective_is_the_mean_squared_change_of_the_output(problem):
    mask = solve(problem, "random").mask
    for i in range(problem.rows):
        p = (~mask[i]).double()
        expected = float(p @ problem.row(i).q() @ p)
        assert float(problem.objective(mask)[i]) == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert problem.row(i).objective(mask[i]) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_objective_in_blocks_equals_objective_at_once(monkeypatch):
    problem = LayerProblem(random_weight(3, 40, 1), random_gram(40, "full", 0), HALF)
    mask = solve(problem, "wanda").mask
    whole = problem.objective(mask)
    monkeypatch.setattr("maskopt.problem._OBJECTIVE_BLOCK_BYTES", 8 * 40 * 7)
    torch.testing.assert_close(problem.objective(mask), whole, rtol=1e-12, atol=0)


def test_numpy_and_half_precision_are_accepted():
    gram = random_gram(8, "full", 0, torch.float32)
    for weight in (
        np.ones((2, 8), dtype=">f8"),
        np.ones((2, 8), dtype=np.float16),
        torch.ones(2, 8, dtype=torch.bfloat16),
        torch.ones(2, 8).to(torch.float8_e4m3fn),
        torch.ones(2, 8).to(torch.float8_e5m2),
        np.ones((2, 8), dtype=np.longdouble),
    ):
        problem = LayerProblem(weight, gram.numpy(), HALF)
        assert problem.objective(torch.ones(2, 8, dtype=torch.bool)).dtype == torch.float64
    for dtype, kept in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        assert LayerProblem(torch.ones(2, 8), gram.to(dtype), HALF).gram.dtype == kept


def test_definiteness_may_be_taken_on_trust():
    indefinite = torch.diag(torch.tensor([1.0, 1.0, 1.0, -1.0]))
    problem = LayerProblem(torch.ones(1, 4), indefinite, HALF, assume_psd=True)
    assert torch.equal(problem.gram, indefinite)
    with pytest.raises(ProblemError, match="not positive semidefinite"):
        LayerProblem(torch.ones(1, 4), indefinite, HALF)


def test_under_another_pattern_it_is_the_same_problem():
    gram = random_gram(8, "full", 0)
    problem = LayerProblem(random_weight(3, 8, 1), gram, HALF, name="up", mean=gram[0])
    other = problem.under(NM(keep=2, of=4))
    assert (other.pattern, other.name, problem.pattern) == (NM(keep=2, of=4), "up", HALF)
    for name in ("weight", "gram", "mean"):
        assert getattr(other, name).data_ptr() == getattr(problem, name).data_ptr()
    with pytest.raises(PatternError, match="layer 'up'"):
        problem.under(NM(keep=1, of=3))


def test_costs_beyond_float64_are_refused():
    weight = torch.ones(2, 4, dtype=torch.float64)
    weight[1, 2] = 1e160
    with pytest.raises(
        ProblemError, match=r"a weight of 1e\+160 squared.*scale weight or gram down"
    ):
        LayerProblem(weight, torch.eye(4), HALF)
    weight[1, 2] = 1e150
    for name in ("swap", "sdp", "branch"):
        assert bool(
            torch.isfinite(solve(LayerProblem(weight, torch.eye(4), HALF), name).objective).all()
        )


def test_rounding_below_zero_is_forgiven_up_to_the_tolerance():
    """The least eigenvalue may be −2⁻²³ of the trace, as sums in float32 leave it."""
    for share, allowed in ((0.9, True), (1.1, False)):
        gram = torch.diag(torch.tensor([1.0, 1.0, 2.0, -share * 4 * 2.0**-23], dtype=torch.float64))
        if allowed:
            LayerProblem(torch.ones(1, 4), gram, HALF)
        else:
            with pytest.raises(ProblemError, match="not positive semidefinite"):
                LayerProblem(torch.ones(1, 4), gram, HALF)


def test_the_mean_has_an_entry_for_every_input():
    with pytest.raises(ProblemError, match=r"layer 'q': mean must be \[4\], not \[3\]"):
        LayerProblem(torch.ones(1, 4), torch.eye(4), HALF, name="q", mean=torch.ones(3))


def test_a_problem_shows_its_name_and_size():
    problem = LayerProblem(torch.ones(2, 4), torch.eye(4), HALF, name="q")
    assert repr(problem) == "LayerProblem('q', rows=2, n=4, pattern=0.5)"
    assert repr(problem.row(-1)) == "RowProblem('q[1]', n=4, pattern=0.5)"
    unnamed = LayerProblem(torch.ones(2, 4), torch.eye(4), NM(2, 4))
    assert repr(unnamed) == "LayerProblem(rows=2, n=4, pattern=2:4)"
    assert repr(RowProblem(torch.ones(4), torch.eye(4), HALF)) == "RowProblem(n=4, pattern=0.5)"


def test_a_legal_mask_is_handed_back():
    legal = torch.tensor([[True, False, True, False]])
    layer = LayerProblem(torch.ones(1, 4), torch.eye(4), HALF)
    assert torch.equal(layer.check_mask(legal), legal)
    assert torch.equal(layer.check_mask(legal[0]), legal)  # one row needs no second axis
    assert torch.equal(layer.check_mask([[True, False, True, False]]), legal)
    two = LayerProblem(torch.ones(2, 4), torch.eye(4), HALF)
    with pytest.raises(WarmStartError, match=r"shape \[4\], the problem \[2, 4\]"):
        two.check_mask(legal[0])


def test_a_row_has_one_axis():
    with pytest.raises(ProblemError, match=r"a row's weight must be \[n\], not \[1, 4\]"):
        RowProblem(torch.ones(1, 4), torch.eye(4), HALF)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
@pytest.mark.parametrize("kind", ["low-rank", "zero-columns", "duplicates", "outliers"])
def test_singular_grams_of_any_scale_are_ordinary(kind, scale):
    gram = (random_gram(12, kind, 3) * scale).float()
    assert LayerProblem(torch.ones(1, 12), gram, HALF).n == 12


def test_zero_gram_and_zero_weight_are_ordinary():
    problem = LayerProblem(torch.zeros(2, 4), torch.zeros(4, 4), HALF)
    assert problem.objective(solve(problem, "wanda").mask).tolist() == [0, 0]


def test_slight_asymmetry_is_rounded_away_and_a_large_one_refused():
    gram = random_gram(6, "full", 0)
    noisy = gram.clone()
    noisy[0, 1] += 1e-9
    problem = LayerProblem(torch.ones(1, 6), noisy, HALF)
    assert torch.equal(problem.gram, problem.gram.T)
    assert torch.equal(problem.gram, (noisy + noisy.T) / 2)
    gram[0, 1] += 100
    with pytest.raises(ProblemError, match="not symmetric"):
        LayerProblem(torch.ones(1, 6), gram, HALF)


@pytest.mark.parametrize(
    ("weight", "gram", "message"),
    [
        (torch.ones(4), torch.eye(4), r"must be \[rows, n\]"),
        (torch.ones(0, 4), torch.eye(4), r"at least 1"),
        (torch.ones(2, 4), torch.eye(5), r"gram must be \[4, 4\]"),
        (torch.ones(2, 4), -torch.eye(4), r"least eigenvalue is -1"),
        (torch.ones(2, 4), torch.eye(4) - 0.5, r"not positive semidefinite"),
        (torch.full((2, 4), torch.nan), torch.eye(4), r"weight holds 8 NaN"),
        (torch.ones(2, 4), torch.diag(torch.tensor([1, 1, 1, torch.inf])), r"gram holds 1 NaN"),
        (torch.ones(2, 4, dtype=torch.long), torch.eye(4), r"floating-point"),
        (np.ones((2, 4), dtype=complex), torch.eye(4), r"floating-point"),
        ({"w": 1.0}, torch.eye(4), r"torch tensor or a NumPy array"),
    ],
)
def test_bad_input_names_the_thing(weight, gram, message):
    with pytest.raises(ProblemError, match=message):
        LayerProblem(weight, gram, HALF, name="q_proj")


def test_errors_carry_the_layers_name():
    with pytest.raises(PatternError, match="q_proj"):
        LayerProblem(torch.ones(2, 5), torch.eye(5), NM(keep=2, of=4), name="q_proj")
    with pytest.raises(ProblemError, match="q_proj"):
        LayerProblem(torch.full((2, 4), torch.nan), torch.eye(4), HALF, name="q_proj")


@pytest.mark.parametrize("rows", [[], [3], [-4], [0.5], [True, False, True], [0, 5]])
def test_rows_that_are_none_are_refused(rows):
    layer = LayerProblem(torch.ones(3, 4), torch.eye(4), Unstructured(0.5))
    with pytest.raises(ProblemError, match=r"rows must be a list of indices within 0 … 2"):
        layer.take(rows)
    assert layer.take([-1, 0]).rows == 2
    assert layer.take(torch.tensor([1])).rows == 1
    assert layer.take(torch.tensor([True, False, True])).rows == 2
    none = (torch.tensor([3]), torch.tensor([0.0]), torch.tensor([True, False]))
    for bad in (0, torch.tensor(0), (1,), torch.zeros(1, 1, dtype=torch.long), *none):
        with pytest.raises(ProblemError, match="rows must be a list of indices"):
            layer.take(bad)


def test_row_restrict_takes_the_columns_in_order():
    problem = LayerProblem(random_weight(2, 8, 1), random_gram(8, "full", 0), HALF)
    row = problem.row(1)
    sub = row.restrict([5, 2, 7])
    assert torch.equal(sub.weight, row.weight[[5, 2, 7]])
    assert torch.equal(sub.gram, row.gram[[5, 2, 7]][:, [5, 2, 7]])
    assert sub.as_layer().pruned_per_group == 1
    assert row.restrict([0, 1, 2, 3], NM(keep=1, of=2)).pattern == NM(keep=1, of=2)
    for columns in ([], [1, 1], [8], [-1], [[1]], [0.5, 2], [True, False]):
        with pytest.raises(ProblemError):
            row.restrict(columns)
    with pytest.raises(PatternError):
        row.restrict([0, 1], Unstructured(keep=3))
    with pytest.raises(ProblemError):
        problem.row(2)


@pytest.mark.parametrize("pattern", [HALF, Unstructured(keep=3), NM(keep=2, of=4)])
def test_save_and_load_round_trip(tmp_path, pattern):
    mean = torch.arange(8.0) if pattern is HALF else None
    gram = random_gram(8, "full", 0)
    problem = LayerProblem(
        random_weight(2, 8, 1), gram, pattern, name="a.b", mean=mean, variance=mean
    )
    problem.save(tmp_path / "layer.npz")
    back = LayerProblem.load(tmp_path / "layer.npz")
    assert torch.equal(back.weight, problem.weight)
    assert torch.equal(back.gram, problem.gram)
    for found in (back.mean, back.variance):
        assert found is None if mean is None else torch.equal(found, mean)
    assert (back.pattern, back.name) == (pattern, "a.b")
    problem.row(1).save(tmp_path / "row.npz")
    row = RowProblem.load(tmp_path / "row.npz")
    assert torch.equal(row.weight, problem.weight[1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["layer.npz", "row.npz"]
    with pytest.raises(ProblemError, match="holds a row, not a layer"):
        LayerProblem.load(tmp_path / "row.npz")


def test_load_refuses_pickles_and_rubbish(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, header=np.array({"a": 1}, dtype=object))
    with pytest.raises(ProblemError, match="not a maskopt instance"):
        RowProblem.load(path)
    path.write_bytes(b"rubbish")
    with pytest.raises(ProblemError, match="not a maskopt instance"):
        RowProblem.load(path)
    with pytest.raises(ProblemError, match="no such file"):
        RowProblem.load(tmp_path / "missing.npz")


def test_load_refuses_what_it_would_misread(tmp_path):
    path = tmp_path / "x.npz"
    LayerProblem(torch.ones(2, 4), torch.eye(4), HALF).save(path)
    with np.load(path) as archive:
        parts = dict(archive)
    header = json.loads(str(parts["header"]))
    for change, message in (
        ({"format": "maskopt-9"}, "not a maskopt instance of a format"),
        ({"kind": "row"}, r"a row's weight must be \[1, n\], not \[2, 4\]"),
    ):
        np.savez(path, **{**parts, "header": np.array(json.dumps({**header, **change}))})
        with pytest.raises(ProblemError, match=message):
            RowProblem.load(path)
    np.savez(path, **{**parts, "header": np.array("[]")})
    with pytest.raises(ProblemError, match="not a maskopt instance of a format"):
        RowProblem.load(path)


def forged(path, case):
    """A layer's file with zeros for 590 MB in it, in a few kB; or one that lies of what it holds."""
    LayerProblem(torch.ones(2, 4), torch.eye(4), HALF).save(path)
    with np.load(path) as archive:
        parts = dict(archive)
    if case == "unknown":
        np.savez(path, **parts, extra=np.zeros(3))
    elif case == "text":
        np.savez(path, **{**parts, "gram": np.array([["x"] * 4] * 4)})
    elif case == "compressed":
        np.savez_compressed(path, **parts, extra=np.zeros(2**20))
    else:
        members = {name: io.BytesIO() for name in parts}
        for name, array in parts.items():
            np.save(members[name], array)
        with zipfile.ZipFile(path, "w") as archive:
            for name, member in members.items():
                data = member.getvalue()
                if case == "shape" and name == "gram":
                    data = data.replace(b"(4, 4), }    ", b"(4, 99999), }")
                archive.writestr(f"{name}.npy", data)
    if case == "overlap":  # the same bytes, named once more
        with zipfile.ZipFile(path, "a") as archive:
            again = copy.copy(archive.getinfo("gram.npy"))
            archive.filelist += [again] * 100
            archive._didModify = True


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("unknown", "x.npz: not a sound layer: it has no array 'extra'"),
        ("text", r"x.npz: not a sound file: array 'gram.npy' is of type <U1"),
        ("compressed", "x.npz: its arrays are compressed, or overlap; write them with numpy.savez"),
        ("overlap", "x.npz: its arrays are compressed, or overlap"),
        ("shape", r"x.npz: not a sound file: array 'gram.npy' is no float32 \[4, 99999\]"),
    ],
)
def test_an_array_is_read_once_its_header_is_sound(case, message, tmp_path, monkeypatch):
    forged(tmp_path / "x.npz", case)
    read, sizes = files.npy.read_array, []

    def watched(*args, **options):
        sizes.append((found := read(*args, **options)).nbytes)
        return found

    monkeypatch.setattr(files.npy, "read_array", watched)
    with pytest.raises(ProblemError, match=message):
        load_problem(tmp_path / "x.npz")
    assert sum(sizes) < 4096


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    row = RowProblem(torch.ones(4), torch.eye(4), HALF)

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="No space"):
        row.save(tmp_path / "row.npz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 3, dtype=torch.bool), "shape"),
        (torch.ones(2, 4), "must be bool"),
        (torch.ones(2, 4, dtype=torch.bool), "row 0 prunes 0 of 4"),
        ("not-a-solver", "unknown solver"),
        ([[True]], "shape"),
    ],
)
def test_bad_warm_starts(mask, message):
    problem = LayerProblem(torch.ones(2, 4), torch.eye(4), HALF)
    with pytest.raises(MaskoptError, match=message):
        solve(problem, "elimination", warm_start=mask)
    if not isinstance(mask, str):
        with pytest.raises(WarmStartError):
            problem.check_mask(mask)


def test_masks_may_be_arrays_and_weights_nested_lists():
    problem = LayerProblem(
        [[1, 2.0, 3], [3, 2, 1]], [[2.0, 0, 0], [0, 1, 0], [0, 0, 1]], Unstructured(keep=2)
    )
    assert problem.weight.dtype == torch.float64
    mask = torch.tensor([[False, True, True], [True, True, False]])
    assert torch.equal(problem.objective(mask.numpy()), problem.objective(mask))
    assert torch.equal(problem.weights(mask.numpy()), problem.weights(mask))
    refit = problem.refitting(Refit(0.01))
    assert torch.equal(refit.objective(mask.numpy()), refit.objective(mask))
    with pytest.raises(ProblemError, match="weight: lists must hold numbers"):
        LayerProblem([[1.0, 2], [3]], torch.eye(2), Unstructured(keep=1))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 3, dtype=torch.bool), r"mask has shape \[1, 3\], the problem \[2, 3\]"),
        (torch.ones(2, 3), "mask must be bool"),
    ],
)
def test_the_cost_of_what_is_no_mask_is_refused(mask, message):
    problem = LayerProblem(torch.ones(2, 3), torch.eye(3), Unstructured(keep=2))
    for cost in (problem.objective, problem.weights, problem.refitting(Refit(0.01)).refitted):
        with pytest.raises(ProblemError, match=message):
            cost(mask)

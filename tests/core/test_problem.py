"""LayerProblem and RowProblem: the objective, the checks at the door, save and load."""

import copy
import json
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import HALF, problems, random_gram, random_linear, random_weight

from maskopt import NM, LayerProblem, Refit, RowProblem, Unstructured, files, load_problem, solve
from maskopt.errors import MaskoptError, PatternError, ProblemError, WarmStartError

EYE, ONES, ALL = torch.eye(4), torch.ones(2, 4), torch.ones(2, 4, dtype=torch.bool)
PLAIN = LayerProblem(ONES, EYE, HALF)
FORM = "not a maskopt instance"
close = torch.testing.assert_close


def with_least(eigenvalue):
    return torch.diag(torch.tensor([1.0, 1.0, 2.0, eigenvalue], dtype=torch.float64))


@pytest.mark.parametrize("linear", [False, True])
@given(data=st.data())
def test_objective_is_the_mean_squared_change_of_the_output(linear, data):
    problem = data.draw(problems(linear=linear))
    mask = solve(problem, "random").mask
    for i in range(problem.rows if problem.pruned_per_group or not linear else 0):
        p, q = (~mask[i]).double(), problem.row(i).q()
        floor = 1e-12 * (float(problem.diagonal_mass()[i]) if linear else 1.0)
        expected = pytest.approx(float(p @ q @ p), rel=1e-9, abs=floor)
        assert float(problem.objective(mask)[i]) == expected
        assert problem.row(i).objective(mask[i]) == expected
        assert float(torch.linalg.eigvalsh(q)[0]) >= -1e-9 * float(q.trace()) - 1e-300


def test_objective_in_blocks_equals_objective_at_once(monkeypatch):
    problem = LayerProblem(random_weight(3, 40, 1), random_gram(40, "full", 0), HALF)
    mask = solve(problem, "wanda").mask
    whole = problem.objective(mask)
    monkeypatch.setattr("maskopt.problem._OBJECTIVE_BLOCK_BYTES", 8 * 40 * 7)
    close(problem.objective(mask), whole, rtol=1e-12, atol=0)


def test_numpy_and_half_precision_are_accepted():
    kinds = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    arrays = [np.ones((2, 4), dtype=kind) for kind in (">f8", np.float16, np.longdouble)]
    for weight in (*arrays, *(ONES.to(kind) for kind in kinds)):
        assert LayerProblem(weight, EYE.numpy(), HALF).objective(ALL).dtype == torch.float64
    for dtype, kept in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        assert LayerProblem(ONES, EYE.to(dtype), HALF).gram.dtype == kept


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
    weight = ONES.double()
    weight[1, 2] = 1e160
    message = r"a weight of 1e\+160 squared.*scale weight or gram down"
    with pytest.raises(ProblemError, match=message):
        LayerProblem(weight, EYE, HALF)
    weight[1, 2] = 1e150
    problem = LayerProblem(weight, EYE, HALF)
    for name in ("swap", "sdp", "branch"):
        assert bool(torch.isfinite(solve(problem, name).objective).all())


def test_definiteness():
    """The least eigenvalue may be −2⁻²³ of the trace, as sums in float32 leave it, or is not asked for."""
    LayerProblem(ONES, with_least(-0.9 * 4 * 2.0**-23), HALF)
    for least in (-1.1 * 4 * 2.0**-23, -1.0):
        with pytest.raises(ProblemError, match="not positive semidefinite"):
            LayerProblem(ONES, with_least(least), HALF)
    trusted = LayerProblem(ONES, with_least(-1.0), HALF, assume_psd=True)
    assert torch.equal(trusted.gram, with_least(-1.0))


def test_a_problem_shows_its_name_and_size():
    problem = LayerProblem(ONES, EYE, HALF, name="q")
    assert repr(problem) == "LayerProblem('q', rows=2, n=4, pattern=0.5)"
    assert repr(problem.row(-1)) == "RowProblem('q[1]', n=4, pattern=0.5)"
    assert repr(PLAIN.under(NM(2, 4))) == "LayerProblem(rows=2, n=4, pattern=2:4)"
    assert repr(RowProblem(torch.ones(4), EYE, HALF)) == "RowProblem(n=4, pattern=0.5)"


def test_a_legal_mask_is_handed_back():
    legal = torch.tensor([[True, False, True, False]])
    layer = PLAIN.take([0])
    for given_mask in (legal, legal[0], legal.tolist()):  # one row needs no second axis
        assert torch.equal(layer.check_mask(given_mask), legal)
    with pytest.raises(WarmStartError, match=r"shape \[4\], the problem \[2, 4\]"):
        PLAIN.check_mask(legal[0])


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
@pytest.mark.parametrize("kind", ["low-rank", "zero-columns", "duplicates", "outliers"])
def test_singular_grams_of_any_scale_are_ordinary(kind, scale):
    gram = (random_gram(12, kind, 3) * scale).float()
    assert LayerProblem(torch.ones(1, 12), gram, HALF).n == 12
    zero = LayerProblem(0 * ONES, 0 * EYE, HALF)
    assert zero.objective(solve(zero, "wanda").mask).tolist() == [0, 0]


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
        (torch.ones(4), EYE, r"must be \[rows, n\]"),
        (torch.ones(0, 4), EYE, r"at least 1"),
        (ONES, torch.eye(5), r"gram must be \[4, 4\]"),
        (ONES, -EYE, r"least eigenvalue is -1"),
        (ONES, EYE - 0.5, r"not positive semidefinite"),
        (ONES * torch.nan, EYE, r"layer 'q_proj'.*weight holds 8 NaN"),
        (ONES, torch.diag(torch.tensor([1, 1, 1, torch.inf])), r"gram holds 1 NaN"),
        (ONES.long(), EYE, r"floating-point"),
        (np.ones((2, 4), dtype=complex), EYE, r"floating-point"),
        ({"w": 1.0}, EYE, r"torch tensor or a NumPy array"),
        ([[1.0, 2], [3]], EYE, "weight: lists must hold numbers"),
    ],
)
def test_bad_input_names_the_thing(weight, gram, message):
    with pytest.raises(ProblemError, match=message):
        LayerProblem(weight, gram, HALF, name="q_proj")


def test_other_bad_input_names_the_thing():
    with pytest.raises(PatternError, match="q_proj"):
        LayerProblem(ONES, EYE, NM(keep=2, of=3), name="q_proj")
    with pytest.raises(ProblemError, match=r"layer 'q': mean must be \[4\], not \[3\]"):
        LayerProblem(ONES, EYE, HALF, name="q", mean=torch.ones(3))
    with pytest.raises(ProblemError, match=r"a row's weight must be \[n\], not \[1, 4\]"):
        RowProblem(torch.ones(1, 4), EYE, HALF)


def test_rows_are_taken_by_lists_and_tensors_of_indices():
    layer = LayerProblem(torch.ones(3, 4), EYE, HALF)
    for rows, count in (
        ([-1, 0], 2),
        (torch.tensor([1]), 1),
        (torch.tensor([True, False, True]), 2),
    ):
        assert layer.take(rows).rows == count
    lists = ([], [3], [-4], [0.5], [True, False, True], [0, 5])
    tensors = [torch.tensor(rows) for rows in (0, [3], [0.0], [True, False], [[0]])]
    for bad in (*lists, *tensors, 0, (1,)):
        with pytest.raises(ProblemError, match=r"rows must be a list of indices within 0 … 2"):
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
    weight, gram, more = random_weight(2, 8, 1), random_gram(8, "full", 0), {"name": "a.b"}
    if pattern is HALF:
        linear = random_linear(weight, gram, 1)
        more |= {"mean": torch.arange(8.0), "variance": torch.arange(8.0), "linear": linear}
    problem = LayerProblem(weight, gram, pattern, **more)
    problem.save(tmp_path / "layer.npz")
    problem.row(1).save(tmp_path / "row.npz")
    back, row = LayerProblem.load(tmp_path / "layer.npz"), RowProblem.load(tmp_path / "row.npz")
    pairs = [
        (getattr(back, x), getattr(problem, x)) for x in ("weight", "gram", "mean", "variance")
    ]
    pairs += [(row.weight, problem.weight[1])]
    if pattern is HALF:
        pairs += [
            (getattr(back.linear, x), getattr(linear, x)) for x in ("correlation", "constant")
        ]
        pairs += [(row.linear.correlation, linear.correlation[1:2])]
    for one, other in pairs:
        assert one is other is None or torch.equal(one, other)
    assert (back.pattern, back.name) == (pattern, "a.b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["layer.npz", "row.npz"]
    with pytest.raises(ProblemError, match="holds a row, not a layer"):
        LayerProblem.load(tmp_path / "row.npz")


def refused(path, message):
    with pytest.raises(ProblemError, match=message):
        RowProblem.load(path)


def saved(path):
    """The arrays of a sound file of a layer."""
    PLAIN.save(path)
    with np.load(path) as archive:
        return dict(archive)


def test_load_refuses_rubbish_and_what_it_would_misread(tmp_path):
    path = tmp_path / "x.npz"
    refused(path, "no such file")
    np.savez(path, header=np.array({"a": 1}, dtype=object))  # a pickle
    refused(path, FORM)
    path.write_bytes(b"rubbish")
    refused(path, FORM)
    parts = saved(path)
    header = json.loads(str(parts["header"]))
    for changed, message in (
        ({**header, "format": "maskopt-9"}, f"{FORM} of a format"),
        ({**header, "kind": "row"}, r"a row's weight must be \[1, n\], not \[2, 4\]"),
        ([], f"{FORM} of a format"),
    ):
        np.savez(path, **{**parts, "header": np.array(json.dumps(changed))})
        refused(path, message)


def forged(path, case):
    """A layer's file with zeros for 590 MB in it, in a few kB; or one that lies of what it holds."""
    parts = saved(path)
    if case == "overlap":  # the same bytes, named once more
        with zipfile.ZipFile(path, "a") as archive:
            archive.filelist += [copy.copy(archive.getinfo("gram.npy"))] * 100
            archive._didModify = True
    elif case == "shape":
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data.replace(b"(4, 4), }    ", b"(4, 99999), }"))
    else:
        size = 2**20 if case == "compressed" else 3
        extra = {"gram": np.array([["x"] * 4] * 4)} if case == "text" else {"extra": np.zeros(size)}
        (np.savez_compressed if case == "compressed" else np.savez)(path, **(parts | extra))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("unknown", "not a sound layer: it has no array 'extra'"),
        ("text", r"not a sound file: array 'gram.npy' is of type <U1"),
        ("compressed", "its arrays are compressed, or overlap; write them with numpy.savez"),
        ("overlap", "its arrays are compressed, or overlap"),
        ("shape", r"not a sound file: array 'gram.npy' is no float32 \[4, 99999\]"),
    ],
)
def test_an_array_is_read_once_its_header_is_sound(case, message, tmp_path, monkeypatch):
    forged(tmp_path / "x.npz", case)
    read, sizes = files.npy.read_array, []

    def watched(*args, **options):
        sizes.append((found := read(*args, **options)).nbytes)
        return found

    monkeypatch.setattr(files.npy, "read_array", watched)
    with pytest.raises(ProblemError, match=f"x.npz: {message}"):
        load_problem(tmp_path / "x.npz")
    assert sum(sizes) < 4096


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="No space"):
        PLAIN.row(0).save(tmp_path / "row.npz")
    assert list(tmp_path.iterdir()) == []


def test_masks_may_be_arrays_and_weights_nested_lists():
    problem = LayerProblem([[1, 2.0, 3], [3, 2, 1]], [[2.0, 0, 0], [0, 1, 0], [0, 0, 1]], HALF)
    assert problem.weight.dtype == torch.float64
    mask = torch.tensor([[False, True, True], [True, True, False]])
    refit = problem.refitting(Refit(0.01))
    for cost in (problem.objective, problem.weights, refit.objective):
        assert torch.equal(cost(mask.numpy()), cost(mask))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (ALL[:, :3], r"has shape \[2, 3\], the problem \[2, 4\]"),
        ([[True]], r"has shape \[1, 1\]"),
        (ONES, "must be bool"),
        (ALL, "row 0 prunes 0 of 4"),
        ("not-a-solver", "unknown solver"),
    ],
)
def test_bad_masks(mask, message):
    with pytest.raises(MaskoptError, match=message):
        solve(PLAIN, "elimination", warm_start=mask)
    if not isinstance(mask, str):
        with pytest.raises(WarmStartError):
            PLAIN.check_mask(mask)
    if "shape" in message or "bool" in message:  # no cost can be named
        for cost in (PLAIN.objective, PLAIN.weights, PLAIN.refitting(Refit(0.01)).refitted):
            with pytest.raises(ProblemError, match=f"mask {message}"):
                cost(mask)

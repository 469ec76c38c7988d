"""Problems: objectives, checks of arguments, files, the limits of float64; and solutions."""

import copy
import itertools
import json
import math
import time
import zipfile
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from forging import fails, rewrite
from hypothesis import given, strategies as st
from strategies import HALF, TWO_FOUR, drawn, problems, random_gram, random_weight, verified

from maskopt import NM, Certificate, LayerProblem, RowProblem, Unstructured, errors, solve, verify
from maskopt.core import files
from maskopt.core.least_squares import LeastSquaresUpdate
from maskopt.core.objective import LinearTerm
from maskopt.errors import PatternError, ProblemError, SolverError, VerificationError
from maskopt.instances.formats import load_problem
from maskopt.protocol.bounds import available_bounds, lower_bound
from maskopt.protocol.solution import Solution, Status, is_bounded, relative_gap
from maskopt.protocol.solver import available_solvers
from maskopt.solvers import Relax
from maskopt.solvers.bounds.box import BoxBound

EYE, ONES, ALL = torch.eye(4), torch.ones(2, 4), torch.ones(2, 4, dtype=torch.bool)
PLAIN = LayerProblem(ONES, EYE, HALF)
FORM = "not a maskopt instance"
close = torch.testing.assert_close
SOLVERS = [name for name, info in available_solvers().items() if info.available]
EXACT = ("branch", "exhaustive", "gurobi", "highs", "scip")
#: but that of updated weights
BOUNDS = [n for n, i in available_bounds().items() if i.unavailable is None and n != "perspective"]
PATTERNS = (Unstructured(keep=4), TWO_FOUR)
SAME = ("swap", "relax", "tabu", "memetic", "frank_wolfe", "elimination", "sdp")
LAYER = drawn(2, 8)


@pytest.mark.parametrize("linear", [False, True])
@given(data=st.data())
def test_objective_is_the_mean_squared_change_of_the_output(linear, data):
    problem = data.draw(problems(linear=linear))
    mask = solve(problem, "random").mask
    for i in range(problem.rows if problem.pruned_per_group or not linear else 0):
        p, q = (~mask[i]).double(), problem.row(i).q()
        floor = 1e-12 * (float(problem.diagonal_mass()[i]) if linear else 1.0)
        expected = pytest.approx(float(p @ q @ p), rel=1e-9, abs=floor)
        for found in (problem.objective(mask)[i], problem.row(i).objective(mask[i])):
            assert float(found) == expected
        assert float(torch.linalg.eigvalsh(q)[0]) >= -1e-9 * float(q.trace()) - 1e-300


def test_arrays_lists_and_half_precision_are_accepted():
    kinds = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    arrays = [np.ones((2, 4), dtype=kind) for kind in (">f8", np.float16, np.longdouble)]
    for weight in (*arrays, *(ONES.to(kind) for kind in kinds)):
        assert LayerProblem(weight, EYE.numpy(), HALF).objective(ALL).dtype == torch.float64
    for dtype, kept in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        assert LayerProblem(ONES, EYE.to(dtype), HALF).gram.dtype == kept
    problem = LayerProblem([[1, 2.0, 3], [3, 2, 1]], [[2.0, 0, 0], [0, 1, 0], [0, 0, 1]], HALF)
    assert problem.weight.dtype == torch.float64
    mask = torch.tensor([[False, True, True], [True, True, False]])
    updated = problem.with_update(LeastSquaresUpdate(0.01))
    for cost in (problem.objective, problem.weights, updated.objective):
        assert torch.equal(cost(mask.numpy()), cost(mask))
    legal = torch.tensor([[True, False, True, False]])
    for given_mask in (legal, legal[0], legal.tolist()):  # one row needs no second axis
        assert torch.equal(PLAIN.take([0]).check_mask(given_mask), legal)


def test_a_problem_shows_its_name_and_is_the_same_under_another_pattern(monkeypatch):
    problem = drawn(3, 40, seeds=(1, 0), name="up", moments=torch.arange(40.0))
    other = problem.under(TWO_FOUR)
    assert (other.pattern, other.name, problem.pattern) == (TWO_FOUR, "up", HALF)
    for name in ("weight", "gram", "moments"):
        assert getattr(other, name).data_ptr() == getattr(problem, name).data_ptr()
    fails(PatternError, "layer 'up'", problem.under, NM(keep=1, of=3))
    assert repr(problem) == "LayerProblem('up', rows=3, n=40, pattern=0.5)"
    assert repr(problem.row(-1)) == "RowProblem('up[2]', n=40, pattern=0.5)"
    assert repr(PLAIN.under(NM(2, 4))) == "LayerProblem(rows=2, n=4, pattern=2:4)"
    assert repr(RowProblem(torch.ones(4), EYE, HALF)) == "RowProblem(n=4, pattern=0.5)"
    mask = solve(problem, "wanda").mask
    whole = problem.objective(mask)
    monkeypatch.setattr("maskopt.core.objective._BLOCK_BYTES", 8 * 40 * 7)
    close(problem.objective(mask), whole, rtol=1e-12, atol=0)


def test_a_gram_matrix_is_symmetric_and_definite_but_for_rounding():
    """The least eigenvalue may be −2⁻²³ of the trace, as sums in float32 leave it, or is not asked for."""

    def with_least(eigenvalue, **more):
        gram = torch.diag(torch.tensor([1.0, 1.0, 2.0, eigenvalue], dtype=torch.float64))
        return LayerProblem(ONES, gram, HALF, **more)

    with_least(-0.9 * 4 * 2.0**-23)
    for least in (-1.1 * 4 * 2.0**-23, -1.0):
        fails(ProblemError, "not positive semidefinite", with_least, least)
    trusted = with_least(-1.0, assume_psd=True)
    assert torch.equal(trusted.gram, torch.diag(torch.tensor([1.0, 1.0, 2.0, -1.0]).double()))
    gram, one = random_gram(6, "full", 0), torch.ones(1, 6)
    gram[0, 1] += 1e-9
    problem = LayerProblem(one, gram, HALF)
    for same in (problem.gram.T, (gram + gram.T) / 2):
        assert torch.equal(problem.gram, same)
    gram[0, 1] += 100
    fails(ProblemError, "not symmetric", LayerProblem, one, gram, HALF)
    # singular ones of any scale are ordinary
    for kind in ("low-rank", "zero-columns", "duplicates", "outliers"):
        for scale in (1e-30, 1e-12, 1.0, 1e12, 1e30):
            gram = (random_gram(12, kind, 3) * scale).float()
            assert LayerProblem(torch.ones(1, 12), gram, HALF).n == 12
    zero = LayerProblem(0 * ONES, 0 * EYE, HALF)
    assert zero.objective(solve(zero, "wanda").mask).tolist() == [0, 0]


@pytest.mark.parametrize(("weight", "gram", "message"), [
    (torch.ones(4), EYE, r"must be \[rows, n\]"), (torch.ones(0, 4), EYE, r"at least 1"),
    (ONES, torch.eye(5), r"gram must be \[4, 4\]"), (ONES, -EYE, r"least eigenvalue is -1"),
    (ONES, EYE - 0.5, r"not positive semidefinite"),
    (ONES * torch.nan, EYE, r"layer 'q_proj'.*weight holds 8 NaN"),
    (ONES, torch.diag(torch.tensor([1, 1, 1, torch.inf])), r"gram holds 1 NaN"),
    (ONES.long(), EYE, r"floating-point"), (np.ones((2, 4), dtype=complex), EYE, r"floating-point"),
    ({"w": 1.0}, EYE, r"torch tensor or a NumPy array"),
    ([[1.0, 2], [3]], EYE, "weight: lists must hold numbers"),
])  # fmt: skip
def test_bad_input_names_the_thing(weight, gram, message):
    fails(ProblemError, message, LayerProblem, weight, gram, HALF, name="q_proj")


def test_bad_patterns_means_rows_and_columns_name_the_thing():
    fails(PatternError, "q_proj", LayerProblem, ONES, EYE, NM(keep=2, of=3), name="q_proj")
    message = r"layer 'q': moments must be \[4\] or \[2, 4\], not \[1, 3\]"
    fails(ProblemError, message, LayerProblem, ONES, EYE, HALF, name="q", moments=torch.ones(3))
    moments = torch.tensor([[0.0] * 4, [-1.0] * 4])
    fails(ProblemError, "variance", LayerProblem, ONES, EYE, HALF, moments=moments)
    message = r"a row's weight must be \[n\], not \[1, 4\]"
    fails(ProblemError, message, RowProblem, torch.ones(1, 4), EYE, HALF)
    layer = LayerProblem(torch.ones(3, 4), EYE, HALF)
    for rows in ([-1, 0], torch.tensor([True, False, True]), torch.tensor([1])):
        assert layer.take(rows).rows == 2 - (len(rows) == 1)
    tensors = [torch.tensor(rows) for rows in (0, [3], [0.0], [True, False], [[0]])]
    for bad in ([], [3], [-4], [0.5], [True, False, True], [0, 5], *tensors, 0, (1,)):
        message = r"rows must be a list of indices within 0 … 2"
        fails(ProblemError, message, layer.take, bad)
    problem = drawn(2, 8, seeds=(1, 0))
    row = problem.row(1)
    sub = row.restrict([5, 2, 7])
    assert torch.equal(sub.weight, row.weight[[5, 2, 7]])
    assert torch.equal(sub.gram, row.gram[[5, 2, 7]][:, [5, 2, 7]])
    assert sub.as_layer().pruned_per_group == 1
    assert row.restrict([0, 1, 2, 3], NM(keep=1, of=2)).pattern == NM(keep=1, of=2)
    for columns in ([], [1, 1], [8], [-1], [[1]], [0.5, 2], [True, False]):
        fails(ProblemError, None, row.restrict, columns)
    fails(PatternError, None, row.restrict, [0, 1], Unstructured(keep=3))
    fails(ProblemError, None, problem.row, 2)


@pytest.mark.parametrize("pattern", [HALF, Unstructured(keep=3), TWO_FOUR])
def test_save_and_load_round_trip(tmp_path, pattern):
    more = {"moments": torch.arange(16.0).view(2, 8), "linear": 1}
    more = {"name": "a.b", **(more if pattern is HALF else {})}
    problem = drawn(2, 8, pattern=pattern, seeds=(1, 0), **more)
    problem.save(tmp_path / "layer.npz")
    problem.row(1).save(tmp_path / "row.npz")
    back, row = (load_problem(tmp_path / f"{kind}.npz") for kind in ("layer", "row"))
    names = ("weight", "gram", "moments")
    pairs = [(getattr(back, x), getattr(problem, x)) for x in names]
    pairs.append((row.weight, problem.weight[1]))
    if pattern is HALF:
        linear, own = problem.linear, row.linear.correlation
        pairs += [(getattr(back.linear, x), y) for x, y in vars(linear).items()]
        pairs.append((own, linear.correlation[1:2]))
    for one, other in pairs:
        assert one is other is None or torch.equal(one, other)
    assert (back.pattern, back.name) == (pattern, "a.b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["layer.npz", "row.npz"]
    assert (type(back), type(row)) == (LayerProblem, RowProblem)


def saved(path):
    PLAIN.save(path)
    with np.load(path) as archive:
        return dict(archive)


def test_load_refuses_rubbish_and_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", Mock(side_effect=OSError("No space left on device")))
        fails(OSError, "No space", PLAIN.row(0).save, tmp_path / "row.npz")
    assert list(tmp_path.iterdir()) == []
    path = tmp_path / "x.npz"
    parts = saved(path)
    header = json.loads(str(parts["header"]))
    for content, message in (
        (None, "no such file"),
        ({"a": 1}, FORM),  # a pickle
        (b"rubbish", FORM),
        (json.dumps({**header, "format": "maskopt-9"}), f"{FORM} of a format"),
        (json.dumps({**header, "kind": "row"}), r"a row's weight must be \[1, n\], not \[2, 4\]"),
        ("[]", f"{FORM} of a format"),
    ):
        path.unlink(missing_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            arrays = parts if isinstance(content, str) else {}
            np.savez(path, **{**arrays, "header": np.array(content)})
        fails(ProblemError, message, load_problem, path)
    linear_layer(HALF).save(path)
    for gone, message in (("constant", "half a linear part"), ("gram", "lacks weight or gram")):
        rewrite(path, arrays=lambda held, gone=gone: held.pop(gone), kind="layer")
        fails(ProblemError, message, load_problem, path)


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
    fails(ProblemError, f"x.npz: {message}", load_problem, tmp_path / "x.npz")
    assert sum(sizes) < 4096


@pytest.mark.parametrize(("mask", "message"), [
    (ALL[:, :3], r"has shape \[2, 3\], the problem \[2, 4\]"), ([[True]], r"has shape \[1, 1\]"),
    (ONES, "must be bool"), (ALL, "row 0 prunes 0 of 4"), ("not-a-solver", "unknown solver"),
])  # fmt: skip
def test_bad_masks(mask, message):
    fails(errors.WarmStartError, r"shape \[4\], the problem \[2, 4\]", PLAIN.check_mask, ALL[0])
    fails(errors.MaskoptError, message, solve, PLAIN, "elimination", start=mask)
    if not isinstance(mask, str):
        fails(errors.WarmStartError, None, PLAIN.check_mask, mask)
    if "shape" in message or "bool" in message:  # no cost can be named
        updated = PLAIN.with_update(LeastSquaresUpdate(0.01))
        for cost in (PLAIN.objective, PLAIN.weights, updated.weights):
            fails(ProblemError, f"mask {message}", cost, mask)


# --- with a linear part: the same promises, kept by every solver and every bound


def linear_layer(pattern, rows=3, kind="full", seed=1):
    mean = random_gram(8, kind, seed).diagonal().sqrt() / 2
    return drawn(rows, 8, kind, pattern, (seed, seed), linear=seed, moments=mean)


def test_the_objective_is_the_error_of_the_outputs_against_their_targets():
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(2, 50, 8, generator=generator, dtype=torch.float64)
    weight, moved = random_weight(3, 8, 1), target - x
    error = moved @ weight.double().T
    linear = LinearTerm(error.T @ x / 50, error.square().mean(0))
    problem = LayerProblem(weight, x.T @ x / 50, Unstructured(keep=4), linear=linear)
    mask = solve(problem, "random").mask
    expected = (target @ weight.T - x @ (weight * mask).T).square().mean(0)
    close(problem.objective(mask), expected, rtol=1e-12, atol=0)
    close(problem.output_energy(), (target @ weight.T).square().mean(0), rtol=1e-6, atol=0)
    # of inputs 0 and 1, which cost the same by themselves, 0 brings the output nearer to its target
    linear = LinearTerm(torch.tensor([[-0.5, 0.5, 0.0]]), torch.tensor([1.0]))
    problem = LayerProblem(torch.ones(1, 3), torch.eye(3), Unstructured(keep=2), linear=linear)
    found = solve(problem, "elimination")
    answer = found.mask.tolist(), float(found.objective)
    assert answer == ([[False, True, True]], pytest.approx(1.0))


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_answers_for_the_whole_objective(name):
    for problem in map(linear_layer, PATTERNS):
        best = solve(problem, "exhaustive").objective
        solution = verified(problem, name)
        assert bool((solution.objective >= best * (1 - 1e-9)).all())
        if name in EXACT:
            assert solution.status == (Status.OPTIMAL,) * 3
            close(solution.objective, best, rtol=1e-6, atol=1e-12)
    for keep in (8, 0):  # nothing to prune, and everything
        solution = verified(linear_layer(Unstructured(keep=keep), rows=1), name)
        assert int(solution.mask.sum()) == keep


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("kind", ["full", "low-rank", "outliers"])
def test_no_bound_is_above_the_optimum(name, kind):
    reached = []
    for pattern, seed in itertools.product(PATTERNS, range(1, 4)):
        problem = linear_layer(pattern, kind=kind, seed=seed)
        best = solve(problem, "exhaustive").objective
        value = lower_bound(problem, name).value
        assert bool((value <= best * (1 + 1e-9) + 1e-12).all())
        reached += (value / best.clamp(min=1e-300))[best > 0].tolist()
    assert np.median(reached) > (0.9 if name.startswith("sdp") else 0.5)


@pytest.mark.parametrize("name", SAME)
def test_a_part_of_zeros_changes_nothing(name):
    plain, zeros = drawn(4, 24), LinearTerm(torch.zeros(4, 24), torch.zeros(4))
    options = {"frank_wolfe": {"iterations": 50}, "memetic": {"generations": 4}}.get(name, {})
    both = plain, LayerProblem(plain.weight, plain.gram, HALF, linear=zeros)
    expected, found = (solve(problem, name, **options) for problem in both)
    assert torch.equal(expected.mask, found.mask)
    assert torch.equal(expected.objective, found.objective)
    close(found.lower_bound, expected.lower_bound, rtol=1e-12, atol=0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_permuted_scaled_and_restricted(pattern):
    problem = linear_layer(pattern)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    if isinstance(pattern, NM):
        order = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
    linear = LinearTerm(problem.linear.correlation[:, order] * 64, problem.linear.constant * 256)
    weight, gram = problem.weight[:, order] * 4, problem.gram[order][:, order] * 16
    moved = LayerProblem(weight, gram, pattern, linear=linear)
    wanda = solve(problem, "wanda").mask
    for name in ("swap", "elimination", "exhaustive"):
        start, other = (wanda, wanda[:, order]) if name == "swap" else (None, None)
        expected, found = solve(problem, name, start=start), solve(moved, name, start=other)
        close(found.objective, expected.objective * 256, rtol=1e-9, atol=0)
    row, columns = problem.row(1), [1, 3, 4, 6]
    part = row.restrict(columns)
    mask, full = solve(part, "wanda").mask[0], torch.ones(8, dtype=torch.bool)
    full[columns] = mask
    assert part.objective(mask) == pytest.approx(row.objective(full), rel=1e-12)
    assert problem.take([2, 0]).linear.constant.tolist() == problem.linear.constant[[2, 0]].tolist()
    bare = LayerProblem(problem.weight, problem.gram, pattern)
    for name in ("swap", "branch"):  # claims for the quadratic part alone
        fails(VerificationError, None, verify, problem, solve(bare, name))


def test_what_is_no_linear_part():
    plain, zeros = drawn(2, 8), torch.zeros(2, 8)
    for correlation, constant, message in (
        (zeros[:, :7], torch.zeros(2), r"linear: correlation must be \[2, 8\]"),
        (zeros, torch.zeros(3), r"linear: constant must be \[2\]"),
        (zeros, torch.tensor([0.0, -1.0]), "not below 0"),
        (zeros * torch.nan, torch.zeros(2), "NaN"),
        (zeros + 1, torch.tensor([100.0, 0.01]), "constant of row 1 .* same r"),
    ):
        given = plain.weight, torch.eye(8), HALF
        fails(ProblemError, message, LayerProblem, *given, linear=LinearTerm(correlation, constant))


# --- at the edges of float64
def scaled(weight_scale=1.0, gram_scale=1.0, update=None, n=8):
    weight, gram = random_weight(2, n, 3) * weight_scale, random_gram(n, "full", 4) * gram_scale
    return LayerProblem(weight, gram, HALF, update=update)


@pytest.mark.parametrize("seed", range(16))
def test_grams_that_are_indefinite_by_rounding_and_hardly_damped(seed):
    """Masks exist whose sum is below 0, where objectives are 0; and a linear part with hardly any damping."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 6, generator=generator)
    x[:, 1] = -0.3 * x[:, 0]
    weight = torch.randn(1, 6, generator=generator)
    weight[0, 1] = weight[0, 0] / 0.3
    problem = LayerProblem(weight, x.T @ x / 3, Unstructured(keep=4))
    for name in ("magnitude", "swap", "exhaustive"):
        verified(problem, name)
    x, other = (torch.randn(4, n, generator=generator, dtype=torch.float64) for n in (8, 2))
    other *= 10
    linear = LinearTerm(other.T @ x / 4, other.square().mean(0) * (1 + 1e-9))
    how = {"linear": linear, "update": LeastSquaresUpdate(0.0)}
    verified(LayerProblem(random_weight(2, 8, seed), x.T @ x / 4, HALF, **how), "exhaustive")


@pytest.mark.parametrize("scale", [1e-170, 1e-165, 1e-100, 1.0, 1e100, 1e160])
def test_refitted_rows_at_any_scale_of_the_gram_matrix(scale):
    problem = scaled(gram_scale=scale, update=LeastSquaresUpdate())
    found, best = verified(problem, "swap"), verified(problem, "exhaustive")
    bound = lower_bound(problem, "perspective").value
    assert bool(((bound <= best.objective * (1 + 1e-9)) & (bound > 0.1 * best.objective)).all())
    worst = solve(problem, "random", seed=1).mask
    for row in range(2):
        one, mask = problem.row(row), worst[row : row + 1]
        if float(one.objective(mask)) > 1.01 * float(found.objective[row]):
            claim = Solution.of(one.as_layer(), mask, status=Status.SWAP_OPTIMAL)
            fails(VerificationError, None, verify, one, claim)
    for wrong in (1e6, float("nan"), 0.0):
        with pytest.raises(VerificationError, match="weights"):
            verify(problem, replace(found, weight=torch.full_like(found.weight, wrong)))


def test_rows_of_any_scale_but_no_costs_beyond_float64_and_no_subnormal_gram_matrix():
    scales = (1e-310, 1e-200, 1e-160, 1e-155, 1e-150, 1e140)
    for update, scale in itertools.product((None, LeastSquaresUpdate()), scales):
        verified(scaled(scale, update=update), "swap")
    tiny, message = EYE.double() * 1e-315, r"float64 has few digits; scale it"
    fails(ProblemError, message, LayerProblem, torch.ones(1, 4), tiny, HALF)
    weight, message = ONES.double(), r"a weight of 1e\+160 squared.*scale weight or gram"
    weight[1, 2] = 1e160
    fails(ProblemError, message, LayerProblem, weight, EYE, HALF)
    weight[1, 2] = 1e150
    problem = LayerProblem(weight, EYE, HALF)
    for name in ("swap", "sdp", "branch"):
        assert bool(torch.isfinite(solve(problem, name).objective).all())


def test_a_certificate_of_many_rows_whose_weights_squared_are_subnormal():
    """λ/w² would be understated, if squares were."""
    weight, gram = random_weight(2, 24, 3).abs() + 0.5, random_gram(24, "full", 4)
    problem = LayerProblem(weight * 1e-151, gram * 1e3, HALF)
    size = 1e3 * float(torch.linalg.eigvalsh(gram)[-1])
    best = solve(problem, "swap").objective
    zeros, halves = torch.zeros(2, 1).double(), torch.full((2, 24), 0.5).double()
    for share in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        certificate = Certificate(-share * size * problem.weight**2, zeros, halves)
        assert bool((certificate.check(problem) <= best * (1 + 1e-9)).all())


@pytest.mark.parametrize("solver", [Relax(), Relax(max_iterations=0), "admm"], ids=str)
@pytest.mark.parametrize("pattern", [HALF, Unstructured(0.5, per="layer"), TWO_FOUR])
def test_weights_beyond_float32_are_pruned_as_others_are(solver, pattern):
    """Scaled by a power of ten: the same masks but for the last bits, so the same objective within them."""
    weight, gram = random_weight(3, 48, 3), random_gram(48, "full", 4).float()
    objectives = []
    for scale in (1.0, 1e-60, 1e30, 1e60):
        update = LeastSquaresUpdate() if solver == "admm" else None
        problem = LayerProblem(weight * scale, gram, pattern, update=update)
        objectives.append(float(verified(problem, solver).objective.sum()) / scale**2)
    assert objectives == [pytest.approx(objectives[0], rel=1e-3)] * 4


# --- solutions: bounds cut back by rounding alone, files that lie


@pytest.mark.parametrize("unit", [1e-5, 1.0, 1e5])
def test_a_bound_above_the_objective_by_rounding_is_cut_back_and_no_other(unit):
    layer = LayerProblem(LAYER.weight * unit, LAYER.gram, LAYER.pattern)
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
        (layer, mask, objective * 0.5, objective * 0.5), (layer, mask, -objective, 0 * objective),
        (free, nothing, 0.5 * rounding, 0 * rounding), (free, nothing, 3 * rounding, 3 * rounding),
    ):  # fmt: skip
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
    plain = Solution.of(LAYER, mask).columns()
    assert (plain["trusted"], len(plain)) == (["", ""], 5)
    problem = LayerProblem(torch.ones(2, 3), torch.eye(3), Unstructured(keep=2))
    found = Solution.of(problem, torch.tensor([[True, True, False]] * 2))
    assert repr(found) == "Solution(rows=2, objective=2, lower_bound=0, 2 feasible)"
    said = "Bound(box, rows=2, value=0.666667 in all, "
    assert repr(lower_bound(problem, "box")).startswith(said)
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
    solution.save(path)
    with np.load(path) as archive:
        header = json.loads(str(archive["header"]), parse_constant=pytest.fail)
    assert header["seconds"] is None
    assert all(math.isnan(one.seconds) for one in (solution, Solution.load(path)))
    replace(solution, seconds=2.5).save(path)
    assert Solution.load(path).seconds == 2.5


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"seconds": 10**400}, {}), ({"seconds": "long"}, {}), ({"seconds": []}, {}),
        ({"status": None}, {}), ({"status": ["feasible", "perfect"]}, {}), ({"trusted": 3}, {}),
        ({"trace.stopped": []}, {}), ({"trace.nodes": 3}, {}), ({"trace.nodes": {}}, {}),
        *(({}, {what: kind}) for kind in (">f8", "U1")
          for what in ("mask", "objective", "lower_bound", "certificate.point")),
    ],
    ids=lambda changes: str(changes)[:40],
)  # fmt: skip
def test_a_forged_file_is_named(changes, kinds, tmp_path):
    def retyped(arrays):
        arrays.update({name: arrays[name].astype(kind) for name, kind in kinds.items()})

    solve(LAYER, "relax" if kinds else "wanda").save(path := tmp_path / "s.npz")
    rewrite(path, changes, retyped)
    fails(ProblemError, r"s\.npz: not a sound" + " solution" * bool(changes), Solution.load, path)


def test_a_bound_takes_as_many_inputs_as_it_says(monkeypatch):
    box = lower_bound(LAYER, "box")
    monkeypatch.setattr(BoxBound, "largest_n", 8)
    assert torch.equal(lower_bound(LAYER, "box").value, box.value)
    assert box.gap(solve(LAYER, "wanda").objective.float()).dtype == torch.float64
    monkeypatch.setattr(BoxBound, "largest_n", 7)
    fails(SolverError, "takes at most 7 inputs, the row has 8", lower_bound, LAYER, "box")


def test_parts_of_a_layer_are_joined_with_what_they_found():
    problem = drawn(7, 16, seeds=(3, 4))
    parts = [solve(problem.take(rows), "swap") for rows in (slice(0, 3), slice(3, 7))]
    joined, whole = Solution.joined(parts), solve(problem, "swap")
    assert torch.equal(joined.mask, whole.mask)
    known = [(one.status, one.trace.swaps.tolist()) for one in (joined, whole)]
    assert known[0] == known[1]
    ends = torch.cat([part.trace.history[:, -1] for part in parts])
    assert torch.equal(joined.trace.history[:, -1], ends)
    verify(problem, joined)

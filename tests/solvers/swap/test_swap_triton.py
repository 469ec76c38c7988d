"""The Triton kernels against float64 torch: on a CUDA device, else in Triton's interpreter."""

import math
import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from commands import TESTS
from forging import fails
from hypothesis import given, settings, strategies as st

pytest.importorskip("triton", reason="the package triton is not installed")

from strategies import HALF, KINDS, TWO_FOUR, problems, random_gram, random_weight, slow, verified

from maskopt import NM, LayerProblem, Solution, Status, Unstructured, solve, verify
from maskopt.solvers.shared_budget import statuses
from maskopt.solvers.swap import engine, triton as triton_kernels
from maskopt.solvers.swap.engine import Batch
from maskopt.solvers.swap.literal import refine_literally
from maskopt.solvers.swap.triton import launch
from maskopt.solvers.swap.triton.steps import TritonKernel

# without a CUDA device conftest.py puts Triton into its interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERY = torch.arange(4, device=DEVICE)
SIXTY = Unstructured(sparsity=0.6)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
SHAPES = [
    (1, 1, "full", 1), (1, 2, "full", 1), (3, 7, "outliers", 3), (1, 65, "zero-columns", 26),
    (2, 65, "full", 65), (2, 65, "full", 1), (2, 65, "low-rank", 64), (1, 128, "full", 51),
    slow(3, 193, "low-rank", 77), slow(33, 9, "duplicates", 4),
]  # fmt: skip


def linear_terms(x, diagonal, c, kept):
    """a and b in float64: +inf where a column is not kept (a) or not pruned (b)."""
    square = x.double().square() * diagonal.double()
    linear = 2.0 * x.double() * c.double()
    a, b = square + linear, square - linear
    return a.masked_fill_(~kept, math.inf), b.masked_fill_(kept, math.inf)


def spans(reach, x):
    """|x_j| d_j, rounded up."""
    return ((x.double().abs() * reach.d) * (1 + 2.0**-20)).to(x.dtype)


class Rows:
    """Scaled random rows, their masks, and everything of them in float64."""

    def __init__(self, rows, n, kind, seed=0, keep=None, dtype=torch.float32, group=None):
        keep = round(0.4 * n) if keep is None else keep
        generator = torch.Generator().manual_seed(seed)
        gram = random_gram(n, kind, seed, dtype)
        x = random_weight(rows, n, seed + 1)
        x = x / (x.square() @ gram.diagonal().double()).sqrt().clamp(min=1e-30)[:, None]
        size, most = (n, keep) if group is None else (group, group // 2)
        order = torch.rand(rows, n // size, size, generator=generator).argsort(2)
        kept = torch.zeros(order.shape, dtype=torch.bool)
        kept = kept.scatter_(2, order[..., :most], True).view(rows, n)
        self.gram, self.x, self.kept = gram.to(DEVICE), x.to(dtype).to(DEVICE), kept.to(DEVICE)
        exact = self.x.double()
        self.c = exact.masked_fill(self.kept, 0.0) @ self.gram.double()
        self.a, self.b = linear_terms(self.x, self.gram.diagonal(), self.c, self.kept)
        self.reach = launch.Reach.of(self.gram)
        self.e = spans(self.reach, self.x)
        # less what rounding in `dtype` can add to them and to their pairs
        margin, square = 4.0 * torch.finfo(dtype).eps, self.e.double().square()
        lower = (side - margin * (side.abs() + square) - 2.0**-80 for side in (self.a, self.b))
        self.low_a, self.low_b = (side.nan_to_num(math.inf).to(dtype) for side in lower)
        cross = 2 * exact[:, :, None] * exact[:, None, :] * self.gram.double()
        self.delta = self.a[:, :, None] + self.b[:, None, :] - cross
        if group is not None:
            team = torch.arange(n, device=DEVICE) // group
            self.delta.masked_fill_(team[:, None] != team, math.inf)
        self.best = self.delta.min(2).values
        self.state = self.gram, self.x, self.c, self.kept

    def scan(self, limit, group=None):
        """For every column the best value and partner, and pairs; the same limit for every row."""
        limits = torch.full((len(self.x),), limit, device=DEVICE)
        sides = self.low_a, self.low_b, self.e
        group = group or self.x.shape[1]
        return launch.scan(self.gram, self.x, *sides, self.reach, limits, group)

    def proves(self, limit):
        """Whether no pair, found or not, is better in float64 than what a scan says of it."""
        value, *_ = self.scan(limit)
        return bool((self.best >= torch.where(value < math.inf, value.double(), -limit)).all())


def best_swaps_one_by_one(rows, row, columns, limit, most, group):
    """The inner loop, by the objective of every mask: how many it swaps, and the mask at the end."""
    x, kept, made = rows.x[row].double().cpu(), rows.kept[row].cpu().clone(), 0
    q = x[:, None] * rows.gram.double().cpu() * x

    def cost(u, p):
        pruned = (~kept).double()
        pruned[u], pruned[p] = 1.0, 0.0
        return float(pruned @ q @ pruned)

    while made < most:
        inside = [(u, p) for u, p in product(columns, columns) if u // group == p // group]
        pairs = [(cost(*pair), *pair) for pair in inside if kept[pair[0]] and not kept[pair[1]]]
        least, u, p = min(pairs, default=(math.inf, 0, 0))
        if least - float((~kept).double() @ q @ (~kept).double()) >= -limit:
            break
        kept[u], kept[p] = False, True
        made += 1
    return made, kept


@pytest.mark.parametrize(
    ("n", "kind", "keep", "group"),
    [
        (7, "full", 3, None), (33, "outliers", 13, None), (33, "low-rank", 32, None),
        (33, "full", 33, None), (20, "full", 0, None), (24, "full", 1, None),
        (24, "zero-columns", 12, 4), (21, "low-rank", 9, 3),
    ],
)  # fmt: skip
def test_candidate_block_makes_the_best_swaps(n, kind, keep, group):
    rows = Rows(3, n, kind, seed=n, keep=keep, dtype=torch.float64, group=group)
    width = 16
    columns = torch.full((3, width), -1, dtype=torch.int32, device=DEVICE)
    chosen = []
    for row in range(3):
        some = torch.randperm(n)[: min(n, width - row)].sort().values
        columns[row, : len(some)] = some.int()
        chosen.append(some.tolist())
    limit = torch.full((3,), 1e-9, device=DEVICE)
    before = rows.kept.clone(), rows.c.clone()
    how = {"group": group or n, "room": torch.full((3,), 32, device=DEVICE), "dtype": torch.float64}
    made, after = launch.swap_block(*rows.state, columns, limit, EVERY[:3], **how)
    assert torch.equal(rows.kept, before[0])
    assert torch.equal(rows.c, before[1])
    for row, some in enumerate(chosen):
        expected, kept = best_swaps_one_by_one(rows, row, some, 1e-9, 2 * width, group or n)
        assert int(made[row]) == expected
        assert torch.equal(after[row, : len(some)].cpu(), kept[some])
        assert not after[row, len(some) :].any()


def tied(n, cheap):
    """Columns of which the kept are equally cheap to prune: G, x, c and the mask."""
    gram, x = torch.eye(n, device=DEVICE), torch.ones(1, n, device=DEVICE)
    kept = torch.zeros(1, n, dtype=torch.bool, device=DEVICE)
    x[0, cheap], kept[0, cheap] = 0.5, True
    return gram, x, x.masked_fill(kept, 0.0) @ gram, kept


def test_candidate_block_has_room_for_so_many_and_a_width():
    rows = Rows(3, 40, "full", seed=3)
    columns = torch.arange(32, dtype=torch.int32, device=DEVICE).repeat(3, 1)
    arguments = *rows.state, columns, torch.zeros(3, device=DEVICE), EVERY[:3]
    how = {"group": 40, "room": torch.tensor([0, 1, 2], device=DEVICE), "dtype": torch.float32}
    made, after = launch.swap_block(*arguments, **how)
    assert made.tolist() == [0, 1, 2]
    for row in range(3):
        inside = range(32), 0.0, row, 40
        assert torch.equal(after[row].cpu(), best_swaps_one_by_one(rows, row, *inside)[1][:32])
    for width in (8, 48, 256):
        given_width = *rows.state, columns[:, :1].repeat(1, width), *arguments[-2:]
        fails(ValueError, "power of two", launch.swap_block, *given_width, **how)


def test_ties_are_broken_by_lowest_index():
    limit = torch.zeros(1, device=DEVICE)
    columns = torch.arange(2, 18, dtype=torch.int32, device=DEVICE)[None]
    how = {"group": 24, "dtype": torch.float32}
    for room, kept in enumerate([{3, 5, 9}, {2, 5, 9}, {2, 4, 9}, {2, 4, 6}]):
        how["room"] = torch.tensor([room], device=DEVICE)
        made, after = launch.swap_block(*tied(24, [3, 5, 9]), columns, limit, EVERY[:1], **how)
        assert (int(made), {*columns[after].tolist()}) == (room, kept)
    gram, x, c, kept = tied(150, [70, 80])
    a, b = (side.float() for side in linear_terms(x, gram.diagonal(), c, kept))
    reach = launch.Reach.of(gram)
    value, partner, _ = launch.scan(gram, x, a, b, spans(reach, x), reach, limit, 150)
    assert value[0, 70] == value[0, 80] == -0.75
    assert partner[0, 70] == partner[0, 80] == 0


@DTYPES
def test_row_wise_kernels_are_the_torch_ones(dtype):
    wide = 1030 if dtype == torch.float32 else 37
    rows = Rows(3, wide, "low-rank", seed=2, dtype=dtype)
    columns = torch.tensor([[0, 5, -1, 36], [1, 2, 3, 4], [36, 9, 8, 7]], device=DEVICE)
    change = torch.tensor([[0.5, -1, 0, 2], [0, 0, 0, 0], [1, 0, 3, -2.0]], device=DEVICE)
    expected = rows.c.clone()
    for row in range(3):
        for column, by in zip(columns[row].tolist(), change[row].tolist(), strict=True):
            expected[row] += by * rows.gram[column].double()
    unchanged = rows.c[1].clone()
    launch.move_correlation(rows.gram, rows.c, columns, change, EVERY[:3])
    torch.testing.assert_close(rows.c, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(rows.c[1], unchanged)
    data = Rows(4, wide, "outliers", seed=8, dtype=dtype)
    some = torch.tensor([2, 0], device=DEVICE)
    arguments = (data.x, data.c, data.kept, data.gram.diagonal(), data.reach, dtype, some)
    a, b, e = launch.column_terms(*arguments, lowered=True)
    exact_a, exact_b, _ = launch.column_terms(*arguments, lowered=False)
    sides = (a, data.low_a, exact_a, data.a), (b, data.low_b, exact_b, data.b)
    for found, low, exact, value in sides:
        torch.testing.assert_close(found, low[some], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(exact, value[some].to(dtype), rtol=1e-6, atol=1e-12)
        finite = found < math.inf
        assert (found.double()[finite] < value[some][finite]).all()
    assert (e.double() >= data.x[some].double().abs() * data.reach.d).all()


def test_reach_bounds_every_entry():
    indefinite = torch.tensor([[1.0, 1e-4, 0.5], [1e-4, 0.0, 0.0], [0.5, 0.0, 0.2]])
    for gram in (indefinite, *(random_gram(150, kind, 5, torch.float32) for kind in KINDS)):
        reach = launch.Reach.of(gram.to(DEVICE))
        entries, most = gram.to(DEVICE).double().abs(), reach.d[:, None] * reach.d
        assert (entries <= most * (1 + 1e-6)).all()
        entries.fill_diagonal_(0.0)
        assert (entries <= reach.rho[:, None] * most * (1 + 1e-12)).all()
        assert bool(reach.rho.isfinite().all())


@pytest.mark.parametrize(("rows", "n", "kind", "keep"), SHAPES)
@DTYPES
def test_scans_find_the_best_partner_of_every_kept_column(rows, n, kind, keep, dtype):
    data = Rows(rows, n, kind, seed=n, keep=keep, dtype=dtype)
    value, partner, pairs = data.scan(1e-3)
    assert ((pairs >= (data.delta < -1e-3).sum((1, 2))) & (pairs <= keep * (n - keep))).all()
    best, found = data.best, value < math.inf
    # never above the truth: what is not found is proven not to gain more than the limit
    assert (best[~found] >= -1e-3).all()
    assert (value.double()[found] <= best[found]).all()
    slack = 64 * torch.finfo(dtype).eps * (1 + data.a.nan_to_num(posinf=0.0).abs().amax())
    assert (value.double()[found] >= best[found] - slack).all()
    line, u = found.nonzero(as_tuple=True)
    assert (data.delta[line, u, partner[found].long()] <= best[found] + slack).all()
    assert (partner[~found] == -1).all()


@pytest.mark.parametrize(
    ("n", "group"), [(12, 2), (80, 2), (21, 3), (40, 4), (40, 5), (64, 32), (8, 8), (80, 40)]
)
def test_scans_of_groups_stay_inside_and_find_the_best_swap_of_each(n, group):
    data = Rows(3, n, "low-rank", seed=n, group=group)
    value, partner, _ = data.scan(0.0, group)
    found = value < math.inf
    assert found.any()
    torch.testing.assert_close(value[found].double(), data.best[found], rtol=1e-5, atol=1e-5)
    assert torch.equal(partner[found] // group, found.nonzero()[:, 1] // group)
    columns = torch.arange(n, device=DEVICE).view(-1, group)
    arguments = data.gram[columns[:, :, None], columns[:, None, :]], data.x, data.low_a, data.low_b
    if group > 32:
        fails(ValueError, "at most 32", launch.scan_groups, *arguments)
        return
    value, kept, pruned = launch.scan_groups(*arguments)
    best = data.best.view(3, -1, group).min(2).values
    assert (value.double() <= best).all()
    line = torch.arange(3, device=DEVICE)[:, None]
    for found in (value.double(), data.delta[line, kept.long(), pruned.long()]):
        torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-5)


@settings(max_examples=12)
@given(st.integers(2, 40), st.sampled_from(KINDS), st.integers(0, 10**6), st.integers(-12, 12))
def test_a_single_precision_scan_is_a_proof(n, kind, seed, power):
    assert Rows(2, n, kind, seed=seed, keep=n // 2).proves(10.0**power)


def _refine(problem, mask, *, memory=2**24, **limits):
    """Searched by the kernel, and verified: the solution and its state."""
    batch = Batch.of(problem, mask)
    engine.refine(batch, TritonKernel(batch, memory=memory), **limits)
    solution = Solution.of(problem, batch.kept, status=statuses(batch.proven))
    verify(problem, solution)
    slack = 1e-12 * float(problem.diagonal_mass().max())
    found = batch.objective * batch.scale
    torch.testing.assert_close(found, solution.objective, rtol=1e-9, atol=slack)
    return solution, batch


def proven_from_random(problem):
    """The start and what `_refine` finds from it, every row of which is proven."""
    start = solve(problem, "random").mask
    solution, batch = _refine(problem, start)
    assert set(solution.status) == {Status.SWAP_OPTIMAL}
    return start, solution, batch


def _layer(rows, n, kind, pattern, dtype=torch.float32):
    gram = random_gram(n, kind, n, dtype)
    return LayerProblem(random_weight(rows, n, n + 1, dtype).to(DEVICE), gram.to(DEVICE), pattern)


@pytest.mark.parametrize(("rows", "n", "kind", "pattern", "dtype"), [
    slow(1, 150, "low-rank", SIXTY, torch.float32), (1, 65, "outliers", SIXTY, torch.float64),
    (1, 64, "duplicates", HALF, torch.float32),
    *((2, n, "full", Unstructured(keep=k), torch.float32) for n, k in ((33, 33), (33, 0), (33, 1), (1, 1))),
    (1, 64, "low-rank", TWO_FOUR, torch.float32), (1, 40, "full", NM(2, 5), torch.float64),
    slow(1, 96, "low-rank", NM(20, 48), torch.float32), (1, 64, "full", NM(8, 32), torch.float32),
])  # fmt: skip
def test_search_ends_at_proven_optima(rows, n, kind, pattern, dtype):
    problem = _layer(rows, n, kind, pattern, dtype)
    start, solution, batch = proven_from_random(problem)
    assert (solution.objective <= problem.objective(start) * (1 + 1e-12)).all()
    # where the paper's algorithm finds nothing to do, neither does this one, and vice versa
    literal, limits = Batch.of(problem, start), {"deadline": math.inf, "memory": 2**24}
    refine_literally(literal, max_swaps=None, progress=lambda done: None, **limits)
    assert torch.equal(literal.swaps > 0, batch.swaps > 0)


@settings(max_examples=6)
@given(problem=problems(max_n=12, max_rows=2))
def test_search_is_right_on_small_problems_of_every_kind(problem):
    weight, gram = problem.weight.to(DEVICE), problem.gram.to(DEVICE)
    proven_from_random(LayerProblem(weight, gram, problem.pattern, assume_psd=True))


@pytest.mark.slow
def test_a_search_stops_and_goes_on_in_chunks_of_any_size_and_order():
    problem = _layer(3, 40, "low-rank", SIXTY)
    start = solve(problem, "random").mask
    solution, batch = _refine(problem, start)
    assert batch.rounds.min() >= 1
    mask, order = solution.mask, torch.tensor([2, 0, 1])
    assert torch.equal(_refine(problem, start, memory=1)[0].mask, mask)
    assert torch.equal(_refine(problem.take(order), start[order])[0].mask, mask[order])
    two, batch = _refine(problem, start, max_swaps=2)
    assert batch.swaps.tolist() == [2, 2, 2]
    assert set(two.status) == {Status.FEASIBLE}
    for none in ({"max_swaps": 0}, {"deadline": -math.inf}):
        assert torch.equal(_refine(problem, start, **none)[0].mask, start)
    more, *_ = _refine(problem, two.mask)
    assert set(more.status) == {Status.SWAP_OPTIMAL}
    assert (more.objective < two.objective).all()


@pytest.mark.parametrize("pattern", [HALF, TWO_FOUR], ids=str)
def test_the_solver_takes_the_kernel(pattern):
    solution = verified(_layer(2, 24, "low-rank", pattern), "swap", kernel="triton")
    assert (solution.trace.kernel, {*solution.status}) == ("triton", {Status.SWAP_OPTIMAL})
    assert solution.trace.scans.min() >= 1


def test_a_machine_without_triton_or_a_device_learns_the_reason(monkeypatch):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "triton", None)
        assert "pip install triton" in triton_kernels.unavailable()
    if DEVICE == "cuda":
        return
    reason = "torch finds no CUDA device"
    assert triton_kernels.unavailable() is triton_kernels.unavailable("cpu") is None  # interpreted
    assert triton_kernels.unavailable("cuda") == reason
    monkeypatch.delenv("TRITON_INTERPRET")
    assert triton_kernels.unavailable() == triton_kernels.unavailable("cpu") == reason


@pytest.mark.slow
def test_every_program_compiles_without_spills(tmp_path, capsys):
    # in a process of its own: the other tests may have put Triton into its interpreter
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(TESTS / "benchmarks" / "triton_programs.py"), "80", "90"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    with capsys.disabled():
        print("\n" + result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    kernels = {"swap_block", "move_correlation", "column_terms", "lower_envelope", "list_finite"}
    kernels |= {"scan_survivors", "scan_groups"}
    lines = result.stdout.splitlines()[1:]
    for architecture in ("sm_80", "sm_90"):
        assert {line.split()[0] for line in lines if architecture in line} == kernels


def test_a_faulty_program_is_named(benchmarks):
    from triton_programs import Report

    assert Report("k", "fp32", 90, 4, 128, 1024, 0, 0, 100).fault is None
    for report, fault in (
        (Report("k", "v", 90, 4, 255, 1024, 8, 2, 100), "spills"),
        (Report("k", "v", 90, 4, 128, 10**5, 0, 0, 100), "shared"),
        (Report("k", "v", 90, 16, 255, 1024, 0, 0, 100), "registers"),
        (Report("k", "fp32", 90, 8, 200, 1024, 0, 0, 100), "registers"),
    ):
        assert fault in str(report.fault)


@pytest.mark.cuda
def test_on_a_device_large_layers_are_proven_and_scans_agree_with_float64():
    for n, pattern in ((1000, SIXTY), (2048, HALF), (1024, TWO_FOUR)):
        problem = _layer(64, n, "low-rank", pattern)
        solution, *_ = _refine(problem, solve(problem, "wanda").mask, memory=2**30)
        assert set(solution.status) == {Status.SWAP_OPTIMAL}
    for n in (1, 7, 65, 640, 1000, 1024):
        assert Rows(16, n, "outliers", seed=n, keep=max(1, n // 2)).proves(1e-6), n

"""Solvers without a search; DSnoT and SparseGPT against literal transcriptions of their papers."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from forging import fails
from hypothesis import given, settings, strategies as st
from strategies import HALF, TWO_FOUR, alone, drawn, patterns, problems, random_weight, verified

from maskopt import NM, LayerProblem, Solution, Status, Unstructured, solve, verify
from maskopt.core.least_squares import LeastSquaresUpdate
from maskopt.errors import ProblemError, SolverError, VerificationError
from maskopt.solvers.greedy.scores import keep_highest
from maskopt.solvers.greedy.sparsegpt import SparseGPT

SIXTY = Unstructured(sparsity=0.6)


@settings(max_examples=settings.default.max_examples // 2)
@given(problems())
def test_every_mask_is_legal_verified_the_one_of_each_row_and_never_below_the_optimum(problem):
    best = solve(problem, "exhaustive").objective
    slack = 1e-9 * problem.diagonal_mass() + 1e-12
    for name in ("magnitude", "wanda", "ria", "random", "worst", "elimination", "sparsegpt"):
        solution = verified(problem, name)
        assert bool((solution.objective >= best - slack).all())
        whole = name in ("ria", "random", "sparsegpt")  # look at the layer, or draw for it
        assert whole or torch.equal(alone(problem, name), solution.mask)
    # on a diagonal Gram matrix two are optimal
    diagonal = LayerProblem(problem.weight, torch.diag(problem.gram.diagonal()), problem.pattern)
    best, *found = (solve(diagonal, x).objective for x in ("exhaustive", "wanda", "elimination"))
    torch.testing.assert_close(found, [best, best], rtol=1e-9, atol=1e-12)


@given(st.data(), st.integers(1, 9), st.integers(1, 24), st.integers(0, 10**6))
def test_of_equal_scores_the_lowest_index_goes(data, rows, n, seed):
    """As by a stable sort, with ties and infinities, on few threads (numpy) and on many (torch)."""
    pattern = data.draw(patterns(n))
    if data.draw(st.booleans()):
        pattern = Unstructured(sparsity=data.draw(st.floats(0, 0.99)), per="layer")
    problem = LayerProblem(torch.ones(rows, n), torch.eye(n), pattern)
    score = torch.randint(-2, 3, (rows, n), generator=torch.Generator().manual_seed(seed)).double()
    score[score == 2] = torch.inf
    grouped, pruned = score.reshape(1, -1), problem.pruned
    if not problem.shared_budget:
        grouped, pruned = score.reshape(-1, problem.group_size), problem.pruned_per_group
    order = grouped.argsort(dim=1, stable=True)[:, :pruned]
    expected = torch.ones_like(grouped, dtype=torch.bool).scatter_(1, order, False)
    for threads in (1, 64):
        with patch.object(torch, "get_num_threads", return_value=threads):
            assert torch.equal(keep_highest(problem, score), expected.view(rows, n))


def test_formulas_ties_and_seeds():
    weight = torch.tensor([[3.0, -1.0, 2.0, 0.5], [1.0, 1.0, 1.0, 1.0]])
    gram = torch.diag(torch.tensor([0.01, 4.0, 1.0, 100.0]))
    problem = LayerProblem(weight, gram, Unstructured(keep=2))
    assert solve(problem, "magnitude").mask[0].tolist() == [True, False, True, False]
    # |w|·‖x‖ = 0.3, 2, 2, 5: the tie keeps the higher index
    assert solve(problem, "wanda").mask[0].tolist() == [False, False, True, True]
    # RIA, a = 0.5: (|w|/column sum + |w|/row sum)·‖x‖^0.5
    columns, rows = weight.abs().sum(0), weight.abs().sum(1, keepdim=True)
    score = (weight.abs() / columns + weight.abs() / rows) * gram.diagonal().sqrt() ** 0.5
    assert torch.equal(solve(problem, "ria").mask, score >= score.sort(1).values[:, 2:3])
    flat = LayerProblem(torch.ones(3, 10), torch.eye(10), Unstructured(sparsity=0.3))
    assert solve(flat, "wanda").mask.tolist() == [[False] * 3 + [True] * 7] * 3
    grouped = LayerProblem(torch.ones(1, 8), torch.eye(8), NM(keep=1, of=4))
    assert solve(grouped, "wanda").mask[0].tolist() == [False, False, False, True] * 2
    one, two, other = (solve(flat, "random", seed=seed).mask for seed in (4, 4, 5))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("gram", "found", "cost"),
    [
        # inputs 0 and 1 nearly cancel: with 0 gone, pruning 1 as well wins something back, whatever its
        # own size; no score can see that
        ([[1.0, -1.2, 0.0], [-1.2, 1.5, 0.0], [0.0, 0.0, 1.2]], [False, False, True], 0.1),
        # 0 and 1 cancel, but 2 alone is cheaper than either: elimination has no way back from it
        ([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.9]], [False, True, False], 1.9),
    ],
)
def test_what_elimination_sees_and_what_it_misses(gram, found, cost, monkeypatch):
    problem = LayerProblem(torch.ones(1, 3), torch.tensor(gram), Unstructured(keep=1))
    solution = solve(problem, "elimination")
    assert (solution.mask[0].tolist(), solution.objective.item()) == (found, pytest.approx(cost))
    masks = [solve(problem, name).mask[0].tolist() for name in ("wanda", "exhaustive")]
    assert masks == [[False, True, False], [False, False, True]]
    problem = drawn(7, 12, pattern=TWO_FOUR)
    whole = solve(problem, "elimination").mask
    monkeypatch.setattr("maskopt.solvers.greedy.scores._TILE_BYTES", 1)
    assert torch.equal(solve(problem, "elimination").mask, whole)


def biased_problem(n, rows, seed, pattern):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * n, n, generator=generator, dtype=torch.float64)
    x += torch.randn(n, generator=generator, dtype=torch.float64)
    weight = random_weight(rows, n, seed + 1)
    within = x.view(4, n, n).var(1, unbiased=False).mean(0)  # four sequences
    moments = torch.stack([x.mean(0), within])
    return LayerProblem(weight, x.T @ x / len(x), pattern, moments=moments)


def literal_dsnot(problem, start, threshold, cycles):
    """The reference's rules, weight by weight: lists sorted once, of which each entry is taken once."""
    group, n = problem.group_size, problem.n
    mask = start.clone()
    c = problem.weight * problem.moments[0]
    wanda = problem.weight.abs() * problem.gram.diagonal().sqrt()
    for row in range(problem.rows):
        pruned = (~start[row]).nonzero()[:, 0].tolist()
        kept = sorted(start[row].nonzero()[:, 0].tolist(), key=lambda j: float(wanda[row, j]))
        came = sorted(pruned, key=lambda j: float(c[row, j] / problem.moments[1, j]))
        error = float(c[row, pruned].sum())
        sign = error > 0
        for _ in range(cycles):
            way = 1 if error > 0 else -1
            back = [j for j in came[::-way] if way * float(c[row, j]) > 0]
            if abs(error) <= threshold or not back:
                break
            regrown = back[0]
            if group < n:
                gone = [j for j in kept if j // group == regrown // group]
            else:
                gone = [j for j in kept if way * float(c[row, j]) < 0]
            after = error - float(c[row, regrown]) + (float(c[row, gone[0]]) if gone else 0.0)
            if not gone or (group < n and (after > 0) != sign):
                break
            mask[row, regrown], mask[row, gone[0]] = True, False
            came.remove(regrown)
            kept.remove(gone[0])
            error = after
    return mask


@given(st.data(), st.integers(1, 16), st.integers(1, 4), st.integers(0, 10**6))
def test_dsnot_is_legal_verified_and_batched_equals_single(data, n, rows, seed):
    problem = biased_problem(n, rows, seed, data.draw(patterns(n)))
    assert torch.equal(alone(problem, "dsnot", cycles=5), verified(problem, "dsnot", cycles=5).mask)
    bare = LayerProblem(problem.weight, problem.gram, problem.pattern)
    fails(ProblemError, "mean", solve, bare, "dsnot")


@pytest.mark.parametrize("pattern", [SIXTY, TWO_FOUR], ids=str)
def test_dsnot_equals_the_literal_algorithm(pattern):
    problem = biased_problem(40, 12, 5, pattern)
    start = solve(problem, "wanda").mask
    for cycles in (1, 3, 50):
        found = solve(problem, "dsnot", cycles=cycles, threshold=0.5, sequence_length=10)
        expected = literal_dsnot(problem, start, 0.05, cycles)
        assert torch.equal(found.mask, expected)
        assert (found.trace.swaps == (expected & ~start).sum(1)).all()
    assert not torch.equal(expected, start)
    # without a variance the tokens are one sequence
    weight, gram, mean = problem.weight, problem.gram, problem.moments[0]
    given = mean, torch.stack([mean, gram.diagonal() - mean.square()])
    both = (LayerProblem(weight, gram, pattern, moments=moments) for moments in given)
    assert torch.equal(*(solve(problem, "dsnot").mask for problem in both))


def test_the_first_swap_of_dsnot_is_the_one_of_the_paper_and_the_mean_error_shrinks():
    # pruned: 0, 1 with c = 3, 1: ε = 4 > 0, so 0 comes back; of the kept with c < 0 the least Wanda
    # score leaves: input 3 (score 2), not 2 (score 4)
    weight = torch.tensor([[3.0, 1.0, -4.0, -2.0, 5.0]], dtype=torch.float64)
    mean = torch.ones(5, dtype=torch.float64)
    gram = torch.outer(mean, mean) + torch.eye(5, dtype=torch.float64) * 0.5
    problem = LayerProblem(weight, gram, Unstructured(keep=3), moments=mean)
    start = torch.tensor([[False, False, True, True, True]])
    solution = solve(problem, "dsnot", start=start, cycles=1)
    found = solution.mask[0].tolist(), solution.trace.swaps.tolist()
    assert found == ([True, False, True, False, True], [1])
    problem = biased_problem(64, 8, 3, SIXTY)
    start = solve(problem, "wanda").mask
    after = solve(problem, "dsnot", threshold=0.0, cycles=1).mask
    lost = problem.weight * problem.moments[0]
    before, now = (float(torch.where(m, 0.0, lost).sum(1).abs().mean()) for m in (start, after))
    assert now < before


def literal_sparsegpt(problem, damping):
    """One column at a time, by elimination in the inverse Hessian: the mask, and the weights."""
    gram = problem.gram.double().clone()
    alive = gram.diagonal() > 0
    gram.diagonal()[~alive] = gram.diagonal()[alive].mean()
    hessian = gram + damping * gram.diagonal()[alive].mean() * torch.eye(problem.n)
    group, n = problem.group_size, problem.n
    kept = torch.ones(problem.rows, n, dtype=torch.bool)
    w = problem.weight.double().clone()
    w[:, ~alive] = 0
    inverses = [torch.linalg.inv(hessian)]
    for j in range(n):
        one = inverses[-1]
        inverses.append(one - one[:, j, None] * one[None, j] / one[j, j])
    d = torch.stack([inverses[j][j, j] for j in range(n)])
    for j in range(n):
        if j % group == 0:  # an unstructured row is one group, and fits one block
            score = w[:, j : j + group].square() / d[j : j + group]
            if problem.shared_budget:
                kept.view(-1)[score.flatten().argsort(stable=True)[: problem.pruned]] = False
            else:
                order = score.argsort(dim=1, stable=True)[:, : problem.pruned_per_group]
                kept.scatter_(1, j + order, False)
        lost = torch.where(kept[:, j], 0.0, w[:, j])
        w[:, j:] -= lost[:, None] / d[j] * inverses[j][j, j:]
    return kept, torch.where(kept, w, 0.0)


@pytest.mark.parametrize("pattern", [HALF, TWO_FOUR, Unstructured(0.5, per="layer")], ids=str)
@pytest.mark.parametrize("kind", ["full", "zero-columns"])
def test_sparsegpt_equals_the_literal_algorithm(pattern, kind):
    problem = drawn(4, 24, kind, pattern)
    mask, weight = literal_sparsegpt(problem, 0.01)
    assert torch.equal(solve(problem, "sparsegpt").mask, mask)
    message = r"update=LeastSquaresUpdate\(damping"
    fails(SolverError, message, solve, problem, "sparsegpt", update=True)
    updated = solve(problem.with_update(LeastSquaresUpdate(0.02)), "sparsegpt", update=True)
    assert torch.equal(updated.mask, mask)
    torch.testing.assert_close(updated.weight, weight, rtol=1e-8, atol=1e-9)


@given(problems(), st.booleans())
def test_its_own_weights_are_verified_and_never_better_than_least_squares(problem, float32):
    if float32:
        problem = LayerProblem(problem.weight.float(), problem.gram.float(), problem.pattern)
    problem = problem.with_update(LeastSquaresUpdate(0.01))
    solution = solve(problem, "sparsegpt", update=True)
    assert (solution.own_weight, verify(problem, solution).checked) == (True, True)
    best = problem.objective(solution.mask)
    assert bool((solution.objective >= best * (1 - 1e-9) - 1e-12 * problem.diagonal_mass()).all())


@pytest.mark.parametrize("pattern", [SIXTY, NM(keep=1, of=3)], ids=str)
def test_over_many_blocks_counts_are_exact_and_pooled_rows_have_the_layers(pattern):
    problem = drawn(3, 300, pattern=pattern)
    solution = verified(problem, "sparsegpt")
    scaled = LayerProblem(problem.weight * 1024, problem.gram / 4096, pattern)
    assert torch.equal(solve(scaled, "sparsegpt").mask, solution.mask)
    assert torch.equal(solve(problem.row(1), "sparsegpt").mask[0], solution.mask[1])
    shared = Unstructured(sparsity=0.6, per="layer")
    problem = drawn(5, 300, pattern=shared, update=LeastSquaresUpdate(0.01))
    solution = verified(problem, "sparsegpt", update=True)
    assert len(set((~solution.mask).sum(1).tolist())) > 1
    assert int((~solution.mask[:, :128]).sum()) == problem.pruned * 128 // 300
    alone = problem.under(problem.pattern.uniform())
    row = solve(alone.row(2), "sparsegpt", update=True)
    torch.testing.assert_close(row.weight[0], solve(alone, "sparsegpt", update=True).weight[2])


def test_weights_that_are_not_what_they_are_said_to_be_are_found(tmp_path):
    problem = drawn(3, 24, update=LeastSquaresUpdate(0.01))
    start = solve(problem, "swap", start=SparseGPT(update=True))
    assert torch.equal(start.mask, solve(problem, "swap", start="sparsegpt").mask)
    solution = solve(problem, "sparsegpt", update=True)
    solution.save(tmp_path / "own.npz")
    verify(problem, Solution.load(tmp_path / "own.npz"))
    weight = solution.weight
    kept, pruned = (tuple(mask.nonzero()[0]) for mask in (solution.mask, ~solution.mask))

    def forged(where, value):
        other = weight.clone()
        other[where] = value
        return {"weight": other}

    for change, message in [
        (forged(kept, 9.0), "objective: row 0 states"),
        (forged(kept, torch.nan), "those of row 0 are not finite"),
        (forged(pruned, 0.1), "not 0 where it prunes"), ({"weight": None}, "must be float64"),
        ({"weight": weight.float()}, "must be float64"), ({"own_weight": False}, "objective: row 0 states"),
        ({"status": (Status.SWAP_OPTIMAL,) * 3}, "only FEASIBLE rows"),
    ]:  # fmt: skip
        fails(VerificationError, message, verify, problem, replace(solution, **change))
    kept_weights = problem.with_update(None)
    fails(VerificationError, "of a problem with update", verify, kept_weights, solution)

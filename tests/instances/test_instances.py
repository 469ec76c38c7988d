"""Quadratic objectives, maximum diversity, files of other libraries, and whole inputs of a layer."""

import itertools
import json
import os
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from certificates import claimed, proven
from commands import run, scip_value, shows
from diversity import RECIPES, diversity
from forging import fails
from hypothesis import given, strategies as st
from strategies import KINDS, TWO_FOUR, drawn, legal_masks, random_gram, random_weight, verified

from maskopt import LayerProblem, LeastSquaresUpdate, LinearTerm, RowProblem, Unstructured, verify
from maskopt.core.units import ObjectiveTransform
from maskopt.errors import OptionError, PatternError, ProblemError, VerificationError
from maskopt.instances.formats import load_problem, save_problem
from maskopt.instances.structure import change, refit_inputs, structure_problem
from maskopt.protocol.bounds import lower_bound
from maskopt.protocol.solution import Solution, Status
from maskopt.protocol.solver import make_solver, solve

NAMES = "#g.mc", "!%x", "#", "two words", os.fsdecode(b"gr\xfcn")
EYE = np.eye(3)
NO_MATRICES = (
    EYE * 1j, torch.eye(3) * 1j, EYE * 1e308, [[1, 2], [3]], "x", [["a"]], [[10**400]], [[None]],
    [], np.ones((2, 3)), [[float("nan")]],
)  # fmt: skip
NO_UNITS = ((2, 0, 0), (1, np.nan, 0), (1, 0, "a"), (-1, 10**400, 0.0))


def values_of(u, count):
    """The value of every set of so many elements."""
    sets = itertools.combinations(range(len(u)), count)
    return {chosen: u[np.ix_(chosen, chosen)].sum() for chosen in sets}


@given(st.integers(0, 10**9), st.booleans(), st.booleans())
def test_any_quadratic_objective_is_solved_in_its_own_units(seed, maximize, whole):
    random = np.random.default_rng(seed)
    n = int(random.integers(1, 8))
    u = random.normal(size=(n, n)) * 10.0 ** random.integers(-3, 4)
    if whole:
        u = random.integers(-9, 10, (n, n)).astype(float)
    count, constant = int(random.integers(0, n + 1)), float(random.normal())
    problem = RowProblem.from_quadratic(u, cardinality=count, maximize=maximize, constant=constant)
    best = (max if maximize else min)(values_of(u, count).values()) + constant
    solution = solve(problem, "branch", workers=0, proof=True)
    found = problem.value(float(solution.objective[0]))
    scale = np.abs(u).sum() + 1
    assert found == pytest.approx(best, abs=1e-6 * scale)
    assert problem.integral or not whole
    bound = problem.value(float(solution.lower_bound[0]))
    assert bound >= found - 1e-9 * scale if maximize else bound <= found + 1e-9 * scale
    own, same = problem.quadratic()
    np.testing.assert_allclose(own, (u + u.T) / 2, atol=1e-9 * scale)
    assert same == constant


def test_a_quadratic_is_given_back_with_its_sense():
    u = np.array([[0.0, 2.0, 1.0], [2.0, 0.0, 3.0], [1.0, 3.0, 0.0]])
    problem = RowProblem.from_quadratic(u, cardinality=2, maximize=True, constant=1.0)
    assert problem.as_layer().units.sign == -1
    posed = problem.to_original_units(problem.objective(np.array([True, False, False])), 0.0)
    assert posed.value == pytest.approx(7.0)
    assert posed.gap == pytest.approx((posed.bound - 7.0) / 7.0)
    assert RowProblem.from_quadratic(u, cardinality=2).as_layer().units.sign == 1
    eye = torch.eye(3)
    for u in (eye.bfloat16(), eye.clone().requires_grad_(), np.eye(3, dtype=bool)):
        assert RowProblem.from_quadratic(u, cardinality=1).value(1.0) == 1.0


def penalised(penalty):
    """Choose three of ten without a conflict: the penalties make f millions of times the value."""
    rng = np.random.default_rng(0)
    u = np.diag(rng.random(10))
    pairs = np.tril(rng.random((10, 10)) < 0.3, -1)
    return RowProblem.from_quadratic(u + penalty * pairs, cardinality=3)


@pytest.mark.parametrize("penalty", [1.0, 1e3, 1e6, 1e9])
@pytest.mark.parametrize("name", ["exhaustive", "branch", "scip", "highs"])
def test_what_is_called_optimal_is_so_in_the_units_of_the_problem(name, penalty):
    problem, known = penalised(penalty), penalised(1e3)
    best = known.value(float(solve(known, "exhaustive").objective[0]))
    found = verified(problem, name)
    posed = problem.to_original_units(float(found.objective[0]), float(found.lower_bound[0]))
    assert posed.value == pytest.approx(best, rel=1e-6 + 1e-15 * penalty)
    if found.status[0] is Status.OPTIMAL:
        assert posed.gap <= 1e-6


def test_one_element_that_must_not_be_chosen_hides_nothing():
    """Of f, which has the penalty's rounding in it, every choice costs nothing to speak of."""
    u = np.random.default_rng(3).normal(size=(12, 12))
    u = u @ u.T
    u[0, 0] = 1e15
    row, least = RowProblem.from_quadratic(u, cardinality=4), min(values_of(u, 4).values())
    found = verified(row, "branch")
    value = row.value(float(found.objective))
    assert (found.status, value) == ((Status.OPTIMAL,), pytest.approx(least, rel=1e-6))
    whole = np.diag([1.0, 2, 3, 4])
    whole[1, 2] = 2e12  # whole numbers are exact however far apart
    problem = RowProblem.from_quadratic(whole, cardinality=2)
    assert problem.value(float(solve(problem, "exhaustive").objective)) == 3


def test_a_worse_mask_is_not_optimal_however_large_the_penalties_are():
    problem = penalised(1e6)
    layer, best = problem.as_layer(), solve(problem, "exhaustive")
    costs = {float(layer.objective(mask[None])): mask for mask in legal_masks(layer)}
    worse = sorted(costs)[1]
    assert 1e-3 < worse - float(best.objective[0]) < 1e-6 * worse  # part of f it is nothing
    claim = Solution.of(layer, costs[worse], status=Status.OPTIMAL, lower_bound=best.lower_bound)
    word = {"lower_bound": claim.objective, "trusted": ("SCIP 10.0",)}
    low = {"objective": best.objective - 1e-3, "status": (Status.FEASIBLE,)}
    for base, changes, message in (
        (claim, {}, "claims optimal without proof"),
        (claim, word, "a mask of objective"),
        (best, low, "objective: row 0 states"),
    ):
        fails(VerificationError, message, verify, problem, replace(base, **changes))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_farthest_elements_are_found_bounded_from_above_written_and_read(recipe, tmp_path):
    problem = diversity(recipe, 12, 4, 1)
    distance = RECIPES[recipe](12, np.random.default_rng([1, 12]))
    assert ((distance == distance.T) & (np.diagonal(distance) == 0)).all()
    best = max(values_of(distance / 2, 4).values())
    for name in ("branch", "scip", "tabu"):
        solution = verified(problem, name)
        assert problem.value(float(solution.objective[0])) == pytest.approx(best), name
    assert solve(problem, "branch").status == (Status.OPTIMAL,)
    for cuts in (0, 2):
        bound = problem.value(float(lower_bound(problem, "sdp", cuts=cuts).value[0]))
        assert bound >= best * (1 - 1e-9)
    save_problem(problem, tmp_path / "some.qplib")
    again = load_problem(tmp_path / "some.qplib")
    assert again.value(float(solve(again, "tabu").objective[0])) == pytest.approx(best, rel=1e-9)


CLUSTER = "5 3 4\n1 2 0.500000\n2 3 0.5\n1 3 0.5\n4 5 0.5\n"
RUDY = "4 3\n1 2 3\n2 3 -1\n3 4 2.5\n"
DIVERSITY = "4 2\n0 1 1.5\n0 2 7.25\n0 3 2\n1 2 3\n1 3 4\n2 3 5\n"
QPLIB = (
    "! a comment\ntoy # its name\nQBL\nmaximize\n3 # variables\n1 # constraint\n"
    "3 # quadratic terms\n1 1 2.0\n2 1 -1.0\n3 2 4\n0.5 # default linear\n1\n3 -1\n"
    "10 # constant\n3\n1 1 2\n1 2 2\n1 3 2\n1e30\n4 # left\n0\n0\n1\n1 4\n" + "0\n" * 8
)
TEXTS = {"dat": CLUSTER, "mc": RUDY, "mdp": DIVERSITY, "qplib": QPLIB}


def read(tmp_path, name, text, cardinality=None):
    (tmp_path / name).write_text(text)
    return load_problem(tmp_path / name, cardinality)


def best(problem):
    """The best value by enumeration, as posed, and the set."""
    quadratic, constant = problem.quadratic()
    values = values_of(quadratic, problem.as_layer().pruned)
    units = problem.as_layer().units
    chosen = (max if units and units.sign < 0 else min)(values, key=values.get)
    return values[chosen] + constant, chosen


@pytest.mark.parametrize(
    ("name", "text", "cardinality", "value", "chosen"),
    [
        ("graph.dat", CLUSTER, None, 3, (0, 1, 2)),
        ("graph.mc", RUDY, 2, 3, (0, 1)),
        ("graph.rudy", RUDY, 3, 3, (0, 1, 3)),
        ("far.mdp", DIVERSITY, None, 7.25, (0, 2)),
        ("GKD-a_1_n4_m2.txt", DIVERSITY, None, 7.25, (0, 2)),
        # x₁² − x₁x₂ + 4x₂x₃ + ½x₁ + ½x₂ − x₃ + 10
        ("toy.qplib", QPLIB, None, 13.5, (1, 2)),
    ],
)
def test_the_library_s_own_value_is_found(tmp_path, name, text, cardinality, value, chosen):
    problem = read(tmp_path, name, text, cardinality)
    solution = solve(problem, "exhaustive")
    assert problem.value(float(solution.objective[0])) == pytest.approx(value, abs=1e-9)
    assert tuple((~solution.mask[0]).nonzero()[:, 0].tolist()) == chosen
    assert (best(problem)[0], problem.integral) == (pytest.approx(value), name == "graph.dat")


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("ending", ["qplib", "npz"])
def test_what_is_written_is_the_same_problem(tmp_path, kind, ending):
    problem = read(tmp_path, f"a.{kind}", TEXTS[kind], 2 if kind == "mc" else None)
    target = tmp_path / f"again.{ending}"
    save_problem(problem, target)
    again = load_problem(target)
    for one, two in zip(problem.quadratic(), again.quadratic(), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-9)
    assert best(problem)[0] == pytest.approx(best(again)[0])
    assert again.integral == problem.integral
    if ending == "npz":
        assert again.as_layer().units == problem.as_layer().units
        assert again.value(1.0) == problem.value(1.0)


def test_a_row_of_a_layer_is_written_for_qplib(tmp_path):
    row = drawn(1, 8, pattern=Unstructured(keep=3)).row(0)
    save_problem(row, tmp_path / "row.qplib")
    assert best(row)[0] == pytest.approx(best(load_problem(tmp_path / "row.qplib"))[0])
    for problem, ending, message in (
        (RowProblem(row.weight, row.gram, TWO_FOUR), "qplib", "one set of a given size"),
        (row.with_update(LeastSquaresUpdate(0.1)), "qplib", "one set of a given size"),
        (row, "dat", "no known format"),
    ):
        fails(ProblemError, message, save_problem, problem, tmp_path / f"row.{ending}")


def changed(kind, old, new):
    return (f"a.{kind}", TEXTS[kind].replace(old, new))


cluster, qplib = partial(changed, "dat"), partial(changed, "qplib")


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (("a.dat", ""), "ends early"),
        (("a.dat", "3 2 x\n"), "expected 3 numbers"),
        (cluster("5 3 4", "5 3 9"), "4 edges where the first line says 9"),
        *((cluster("4 5", bad), "no new pair") for bad in ("4 6", "2 1", "4 4")),
        (cluster("5 3 4", "5 7 4"), "cardinality must be a whole number, 0 … 5, not 7"),
        (cluster("4 5 0.5", "4 5 nan"), "must be finite"),
        ((*cluster("", ""), 2), "leave `cardinality` out"),
        (("a.mc", RUDY), "pass cardinality"),
        (("a.mc", "# a\n3 2\n\n1 3 4\n1 2 x\n", 2), "line 5: expected 3 numbers, not '1 2 x'"),
        (("a.mc", "3 2\n1 3 4\n3 1 5\n", 2), "line 3: '3 1 5' is no new pair of two of 3"),
        (("a.mdp", "0 0\n"), "0 vertices"),
        (("a.mdp", "4 2\n0 1 1\n"), "1 edges where the first line says 6"),
        (("a.dat", "300000 2 1\n1 2 1\n"), "a dense matrix holds 1 to 16384"),
        (qplib("QBL", "QML"), "type QML; only binary"),
        (qplib("QBL", "QBN"), "type QBN; only binary"),
        (qplib("1 # constraint", "2"), "2 constraints"),
        (qplib("1 2 2", "1 2 3"), "not that a given number"),
        (qplib("4 # left", "2 # left"), "not that a given number"),
        (qplib("3 2 4", "3 9 4"), "'3 9 4' is no new entry of 3"),
        (qplib("maximize", "sideways"), "no sense"),
        (qplib("3 2 4", "1 2 4"), "'1 2 4' is no new entry of 3; of a symmetric matrix"),
        (qplib("1\n3 -1\n", "2\n3 -1\n3 2\n"), "'3 2' is no new entry of 3"),
        (qplib("1 2 2", "1 1 2"), "'1 1 2' is no new entry of 3"),
        (("a.qplib", QPLIB[:60]), "ends early"),
        (qplib("2 1 -1.0", "2 1 x"), "line 9: expected 3 numbers"),
        (("a.edges", "1 2"), r"no known format by its ending; one of: \.npz"),
    ],
)
def test_what_does_not_map_is_refused_with_the_reason(tmp_path, file, reason):
    fails(ProblemError, f"{file[0]}: .*{reason}", read, tmp_path, *file)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_that_begin_comments_or_are_no_text_can_be_read_again(tmp_path, name):
    u = np.diag([3.0, 1.0, 2.0])
    save_problem(RowProblem.from_quadratic(u, cardinality=2, name=name), tmp_path / "a.qplib")
    assert np.allclose(load_problem(tmp_path / "a.qplib").quadratic()[0], u)
    # a byte order mark is no part of the text
    for name, text, *count in (("a.mc", "3 1\n1 2 4\n", 2), ("a.dat", "3 2 1\n1 2\n")):
        both = (read(tmp_path, name, mark + text, *count).quadratic() for mark in ("", "\ufeff"))
        assert np.array_equal(*(u for u, _ in both))


def pose(u, **more):
    return lambda _: RowProblem.from_quadratic(u, **{"cardinality": 1, **more})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: load_problem(path / "none.dat"), "no such file"),
        (lambda path: load_problem(path / "bytes.dat"), "not a text file"),
        (lambda path: load_problem(path / "a.npz", 3), "graphs that name no number"),
        (pose(np.ones((2, 3))), r"is \[n, n\]"),
        (pose(np.full((2, 2), np.inf)), "finite"),
        *((pose(u), "quadratic objective") for u in NO_MATRICES),
        *((pose(EYE, constant=bad), None) for bad in (None, [1.0, 2.0])),
        *((pose(EYE, cardinality=bad), f"cardinality must be a whole number, 0 … 3, not {bad!r}")
          for bad in ("1", 1.5, None, 4)),
        # what penalties round off
        (lambda _: penalised(1e11), "scale penalties down to what they need"),
        *((lambda _, units=units: ObjectiveTransform(*units), "units") for units in NO_UNITS),
    ],
)  # fmt: skip
def test_bad_calls_are_named(tmp_path, call, message):
    (tmp_path / "bytes.dat").write_bytes(b"\xff\xfe\x00")
    fails(ProblemError, message, call, tmp_path)


def test_a_graph_on_the_command_line(tmp_path):
    graph, proof = tmp_path / "graph.dat", tmp_path / "proof.npz"
    graph.write_text(CLUSTER)
    text = run("solve", graph, "--prove", "--output", proof)
    shows(text, "value", "maximized", " 3 ", "1 of 1 rows proven")
    assert "holds: 1 row checked" in run("verify", graph, proof)
    (tmp_path / "graph.mc").write_text(RUDY)
    arrays, library = tmp_path / "graph.npz", tmp_path / "out.qplib"
    run("export", tmp_path / "graph.mc", arrays, "--cardinality", 2)
    assert solve(load_problem(arrays), "branch").status == (Status.OPTIMAL,)
    run("export", arrays, library)
    assert "maximized" in run("solve", library, "--output", tmp_path / "s.npz", "--solver", "tabu")
    assert "tabu" in run("compare", graph, "--solvers", "wanda,tabu")
    # a model for other solvers says what its objective is
    said = run("export", graph, tmp_path / "a.lp")
    shift = load_problem(graph).as_layer().units.shift * 3
    assert f"value = −(objective − {shift:g}) + 0" in " ".join(said.split())
    # the instance is not overwritten with what comes of it
    solved = ("solve", graph, "--output"), ("solve", graph, "--prove", "--output")
    for words in (*solved, ("export", "--format", "npz", graph)):
        said = run(*words, graph, "--overwrite", fails=OptionError)
        assert "is the instance itself" in said
    assert graph.read_text() == CLUSTER


def test_every_command_speaks_of_the_graph_and_not_of_the_shift(tmp_path):
    graph, table = tmp_path / "graph.mc", tmp_path / "table.jsonl"
    problem = read(tmp_path, "graph.mc", RUDY, 2)
    best = problem.value(float(solve(problem, "branch").objective[0]))

    def of_graph(command, *words):
        return run(command, graph, "--cardinality", 2, *words)

    of_graph("compare", "--solvers", "branch,wanda", "--output", table)
    branch, wanda = map(json.loads, table.read_text().splitlines())
    assert (branch["solver"], wanda["solver"]) == ("branch", "wanda")
    found = [branch[name] for name in ("value", "value_bound", "gap")]
    assert found == pytest.approx([best, best, 0], rel=1e-6, abs=1e-6)
    assert wanda["excess"] == pytest.approx((best - wanda["value"]) / best)
    of_graph("bound", "--solver", "wanda", "--output", tmp_path / "b.jsonl")
    record = json.loads((tmp_path / "b.jsonl").read_text())
    assert record["value_bound"] >= best - 1e-9
    gap = (record["value_bound"] - record["value"]) / record["value"]
    assert record["gap"] == pytest.approx(gap)
    assert f"{gap:.2%}" in of_graph("bound", "--solver", "wanda")
    assert "–" in of_graph("compare", "--solvers", "wanda")
    of_graph("solve", "--solver", "branch", "--output", tmp_path / "s.npz")
    assert "holds: 1 row" in of_graph("verify", tmp_path / "s.npz")


def test_a_bound_of_whole_numbers_is_one_of_them_and_nothing_can_be_refitted(tmp_path):
    problem = read(tmp_path, "a.dat", CLUSTER)
    bound = lower_bound(problem, "box")
    value = problem.value(float(bound.value))
    assert value == round(value) >= 3
    claimed(problem, solve(problem, "swap"), bound)
    message = "has no weights to update"
    fails(ProblemError, message, problem.with_update, LeastSquaresUpdate())
    assert problem.with_update(None).value(0.0) == problem.value(0.0)
    units = problem.as_layer().units
    parts = problem.weight[None], problem.gram, problem.pattern
    updated = LayerProblem(*parts, update=LeastSquaresUpdate())
    fails(ProblemError, message, updated.with_units, units)
    words = ("--update", "least-squares", "--solvers", "swap", "--output", tmp_path / "o.csv")
    assert message in run("compare", tmp_path / "a.dat", *words, fails=ProblemError)


def test_the_constant_of_a_row_that_prunes_nothing_is_written(tmp_path):
    linear = LinearTerm(torch.ones(1, 6).double(), torch.tensor([50.0]))
    gram = 9 * torch.eye(6).double()
    row = RowProblem(torch.ones(6).double(), gram, Unstructured(keep=6), linear=linear)
    assert float(row.objective(torch.ones(6, dtype=torch.bool))) == row.value(50.0) == 50
    save_problem(row, tmp_path / "z.qplib")
    again = load_problem(tmp_path / "z.qplib")
    assert again.value(float(solve(again, "swap").objective)) == 50
    for form in ("lp", "cip"):
        path = tmp_path / f"z.{form}"
        make_solver("scip").write_instance(row, path, form=form, formulation="linear")
        assert scip_value(path) == 50


def removed(weight, gram, kept):
    """By the definition: the mean squared change of all outputs together."""
    return float(change(torch.where(kept, weight.double(), 0.0), weight, gram).sum())


@given(st.sampled_from(KINDS), st.integers(0, 10**6), st.integers(1, 5), st.sampled_from([1, 2, 3]))
def test_the_objective_is_the_change_of_the_outputs(kind, seed, rows, width):
    n = 6 * width
    weight, gram = random_weight(rows, n, seed), random_gram(n, kind, seed + 1)
    groups = torch.arange(n) // width
    problem = structure_problem(weight, gram, Unstructured(keep=3), groups=groups)
    assert problem.n == 6
    assert float(torch.linalg.eigvalsh(problem.gram)[0]) >= -1e-9 * float(problem.gram.trace())
    scale = float(gram.double().trace() * weight.double().square().sum())
    for kept in itertools.combinations(range(6), 3):
        mask = torch.zeros(6, dtype=torch.bool)
        mask[list(kept)] = True
        expected = removed(weight, gram, mask[groups])
        assert problem.objective(mask) == pytest.approx(expected, rel=1e-9, abs=1e-12 * scale)


def test_groups_may_lie_anywhere_and_scaling_and_order_do_not_matter():
    weight, gram = random_weight(3, 8, 1), random_gram(8, "full", 2)
    groups = torch.tensor([2, 0, 1, 2, 2, 0, 1, 1])
    best = solve(structure_problem(weight, gram, Unstructured(keep=2), groups=groups), "exhaustive")
    costs = [removed(weight, gram, groups != gone) for gone in range(3)]
    found = int((~best.mask[0]).nonzero()), float(best.objective)
    assert found == (costs.index(min(costs)), pytest.approx(min(costs)))
    weight, gram = random_weight(5, 12, 7), random_gram(12, "full", 8)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    given = (weight, gram), (8 * weight, gram / 4), (weight[:, order], gram[order][:, order])
    problems = (structure_problem(*parts, Unstructured(keep=6)) for parts in given)
    mask, scaled, moved = (solve(problem, "exhaustive").mask[0] for problem in problems)
    assert torch.equal(scaled, mask)
    assert torch.equal(moved, mask[order])
    row = drawn(1, 10, "outliers", Unstructured(keep=4), (5, 6)).row(0)
    one = structure_problem(row.weight[None], row.gram, row.pattern)
    torch.testing.assert_close(one.q(), row.q().double())


@pytest.mark.parametrize("pattern", [Unstructured(keep=6), TWO_FOUR], ids=str)
def test_everything_that_solves_and_proves_rows_does_so_here(pattern):
    weight, gram = random_weight(20, 24, 3), random_gram(24, "low-rank", 4)
    problem = structure_problem(weight, gram, pattern, groups=torch.arange(24) // 2)
    best = solve(problem, "exhaustive")
    found = proven(problem)
    assert found.status == (Status.OPTIMAL,)
    torch.testing.assert_close(found.objective, best.objective)
    swap = solve(problem, "swap", start="wanda")
    assert verify(problem, swap).checked
    assert float(swap.objective) >= float(best.objective) - 1e-12
    assert float(lower_bound(problem, "sdp").value) <= float(best.objective) * (1 + 1e-9)


@given(st.sampled_from(KINDS), st.integers(0, 10**6), st.sampled_from([0.0, 0.01, 0.3]))
def test_refitted_inputs_solve_the_least_squares_of_every_row(kind, seed, damping):
    weight, gram = random_weight(4, 9, seed), random_gram(9, kind, seed + 1)
    kept = torch.rand(9, generator=torch.Generator().manual_seed(seed)) < 0.6
    kept[0] = True
    update, pattern = LeastSquaresUpdate(damping), Unstructured(keep=int(kept.sum()))
    new = refit_inputs(weight, gram, kept, update)
    problem = LayerProblem(weight, gram, pattern, update=update)
    expected = change(problem.weights(kept.expand(4, 9)), weight, gram)
    assert bool((new[:, ~kept] == 0).all())
    own = change(torch.where(kept, weight.double(), 0.0), weight, gram)
    floor = 1e-12 * float(gram.double().trace()) * weight.double().square().sum(1)
    most = torch.minimum(own, expected + 1e-6 * own) + floor
    assert bool((change(new, weight, gram) <= most).all())


@pytest.mark.parametrize(
    ("shape", "groups", "keep", "error", "said"),
    [
        ((3, 4), [0, 1, 2, 3], 9, PatternError, "keep=9"),
        ((3, 4), [0, 1, 3, 3], 1, ProblemError, "without a gap"),
        ((3, 4), [0, 1, -1, 1], 1, ProblemError, "whole numbers"),
        ((3, 4), [0, 1], 1, ProblemError, "each of the 4 inputs"),
        ((3, 5), None, 1, ProblemError, "must be"),
    ],
)
def test_what_does_not_fit_is_refused(shape, groups, keep, error, said):
    index, pattern = groups and torch.tensor(groups), Unstructured(keep=keep)
    fails(error, said, structure_problem, torch.ones(shape), torch.eye(4), pattern, groups=index)

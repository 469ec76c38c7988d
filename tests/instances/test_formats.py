"""Other libraries' instances: read, written, solved on the command line, in their units."""

import itertools
import json
import os
from dataclasses import replace

import numpy as np
import pyscipopt
import pytest
import torch
from commands import run
from strategies import random_gram, random_weight

from maskopt import NM, Linear, Refit, RowProblem, Status, Unstructured, lower_bound, verify
from maskopt.errors import OptionError, ProblemError
from maskopt.formats import load_problem, save_problem
from maskopt.solver import make_solver, solve
from maskopt.units import units_from_dict

CLUSTER = "5 3 4\n1 2 0.500000\n2 3 0.5\n1 3 0.5\n4 5 0.5\n"
RUDY = "4 3\n1 2 3\n2 3 -1\n3 4 2.5\n"
DIVERSITY = "4 2\n0 1 1.5\n0 2 7.25\n0 3 2\n1 2 3\n1 3 4\n2 3 5\n"
QPLIB = """! a comment
toy # its name
QBL
maximize
3 # variables
1 # constraint
3 # quadratic terms
1 1 2.0
2 1 -1.0
3 2 4
0.5 # default linear
1
3 -1
10 # constant
3
1 1 2
1 2 2
1 3 2
1e30
4 # left
0
0
1
1 4
0
0
0
0
0
0
0
0
"""


TEXTS = {"dat": CLUSTER, "mc": RUDY, "mdp": DIVERSITY, "qplib": QPLIB}


def read(tmp_path, name, text, select=None):
    (tmp_path / name).write_text(text)
    return load_problem(tmp_path / name, select)


def best(problem):
    """The best value by enumeration, as posed, and the set."""
    quadratic, constant = problem.quadratic()
    count = problem.as_layer().pruned
    values = {
        chosen: quadratic[np.ix_(chosen, chosen)].sum() + constant
        for chosen in itertools.combinations(range(problem.n), count)
    }
    chosen = (max if problem.maximised else min)(values, key=values.get)
    return values[chosen], chosen


@pytest.mark.parametrize(
    ("name", "text", "select", "value", "chosen"),
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
def test_the_library_s_own_value_is_found(tmp_path, name, text, select, value, chosen):
    problem = read(tmp_path, name, text, select)
    solution = solve(problem, "exhaustive")
    assert problem.value(float(solution.objective[0])) == pytest.approx(value, abs=1e-9)
    assert tuple((~solution.mask[0]).nonzero()[:, 0].tolist()) == chosen
    assert best(problem)[0] == pytest.approx(value)
    assert problem.integral == (name == "graph.dat")


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("ending", [*TEXTS, "npz"])
def test_what_is_written_is_the_same_problem(tmp_path, kind, ending):
    problem = read(tmp_path, f"a.{kind}", TEXTS[kind], 2 if kind == "mc" else None)
    target = tmp_path / f"again.{ending}"
    if kind == "qplib" and ending not in ("qplib", "npz"):
        with pytest.raises(ProblemError, match=r"take \.qplib"):
            save_problem(problem, target)
        return
    save_problem(problem, target)
    again = load_problem(target, problem.as_layer().pruned if ending == "mc" else None)
    for one, two in zip(problem.quadratic(), again.quadratic(), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-9)
    assert best(problem)[0] == pytest.approx(best(again)[0])
    assert again.integral == problem.integral
    if ending == "npz":
        assert again.as_layer().units == problem.as_layer().units
        assert again.value(1.0) == problem.value(1.0)


def test_a_row_of_a_layer_is_written_for_qplib_alone(tmp_path):
    row = RowProblem(random_weight(1, 8, 1)[0], random_gram(8, "full", 2), Unstructured(keep=3))
    save_problem(row, tmp_path / "row.qplib")
    again = load_problem(tmp_path / "row.qplib")
    assert best(row)[0] == pytest.approx(best(again)[0])
    other = RowProblem(row.weight, row.gram, NM(keep=2, of=4))
    for problem, ending, message in (
        *((row, ending, "to be minimised") for ending in ("dat", "mc", "mdp")),
        (other, "qplib", "one set of given size"),
        (row.refitting(Refit(0.1)), "qplib", "one set of given size"),
        (row, "xyz", "no known format"),
    ):
        with pytest.raises(ProblemError, match=message):
            save_problem(problem, tmp_path / f"row.{ending}")


def cluster(old, new):
    return ("a.dat", CLUSTER.replace(old, new))


def qplib(old, new):
    return ("a.qplib", QPLIB.replace(old, new))


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (("a.dat", ""), "expected 3 numbers"),
        (("a.dat", "3 2 x\n"), "expected 3 numbers"),
        (cluster("5 3 4", "5 3 9"), "4 edges where the first line says 9"),
        (cluster("4 5", "4 6"), "no new pair"),
        (cluster("4 5", "2 1"), "no new pair"),
        (cluster("4 5", "4 4"), "no new pair"),
        (cluster("5 3 4", "5 7 4"), "7 of 5 cannot be chosen"),
        (cluster("4 5 0.5", "4 5 nan"), "must be finite"),
        ((*cluster("", ""), 2), "leave `select` out"),
        (("a.mc", RUDY), "pass select"),
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
        (qplib("3 2 4", "3 9 4"), "9 is none of 1"),
        (qplib("maximize", "sideways"), "no sense"),
        (qplib("3 2 4", "1 2 4"), "quadratic term 1 2 is given twice"),
        (qplib("1\n3 -1\n", "2\n3 -1\n3 2\n"), "entry 3 is given twice"),
        (qplib("1 2 2", "1 1 2"), "variable 1 of the constraint is given twice"),
        (("a.qplib", QPLIB[:60]), "ends early"),
        (qplib("2 1 -1.0", "2 1 x"), "expected a number"),
        (("a.edges", "1 2"), r"no known format by its ending; one of \.npz"),
    ],
)
def test_what_does_not_map_is_refused_with_the_reason(tmp_path, file, reason):
    with pytest.raises(ProblemError, match=f"{file[0]}: .*{reason}"):
        read(tmp_path, *file)


@pytest.mark.parametrize(
    "name", ["#g.mc", "!%x", "#", "two words", os.fsdecode(b"gr\xfcn")], ids=ascii
)
def test_names_that_begin_comments_or_are_no_text_can_be_read_again(tmp_path, name):
    u = np.diag([3.0, 1.0, 2.0])
    save_problem(RowProblem.from_quadratic(u, select=2, name=name), tmp_path / "a.qplib")
    assert np.allclose(load_problem(tmp_path / "a.qplib").quadratic()[0], u)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: load_problem(path / "none.dat"), "no such file"),
        (lambda path: load_problem(path / "bytes.dat"), "not a text file"),
        (lambda path: load_problem(path / "a.npz", 3), "graphs that name no number"),
        (lambda _: RowProblem.from_quadratic(np.eye(3)), "one of keep"),
        (lambda _: RowProblem.from_quadratic(np.eye(3), keep=1, select=1), "one of keep"),
        (lambda _: RowProblem.from_quadratic(np.ones((2, 3)), keep=1), r"is \[n, n\]"),
        (lambda _: RowProblem.from_quadratic(np.full((2, 2), np.inf), keep=1), "finite"),
        (lambda _: units_from_dict(3), "units"),
        (lambda _: units_from_dict({"sign": 1}), "units"),
        (lambda _: units_from_dict({"sign": 2, "shift": 0, "constant": 0}), "units"),
        (lambda _: units_from_dict({"sign": 1, "shift": np.nan, "constant": 0}), "units"),
    ],
)
def test_bad_calls_are_named(tmp_path, call, message):
    (tmp_path / "bytes.dat").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProblemError, match=message):
        call(tmp_path)


def test_a_graph_on_the_command_line(tmp_path):
    graph, proof = tmp_path / "graph.dat", tmp_path / "proof.npz"
    graph.write_text(CLUSTER)
    text = run("prove", graph, "--output", proof)
    for said in ("value", "at most", " 3 ", "1 of 1 rows proven"):
        assert said in text
    assert "holds: 1 row checked" in run("check", graph, proof)
    (tmp_path / "graph.mc").write_text(RUDY)
    run("extract", tmp_path / "graph.mc", tmp_path / "graph.npz", "--select", 2)
    assert solve(load_problem(tmp_path / "graph.npz"), "branch").status == (Status.OPTIMAL,)
    run("extract", tmp_path / "graph.npz", tmp_path / "out.qplib")
    text = run("solve", tmp_path / "out.qplib", "--output", tmp_path / "s.npz", "--solver", "tabu")
    assert "at most" in text
    assert "tabu" in run("compare", graph, "--solvers", "wanda,tabu")
    # a model for other solvers says what its objective is
    said = run("extract", graph, tmp_path / "a.lp")
    shift = load_problem(graph).as_layer().units.shift * 3
    assert f"value = −(objective − {shift:g}) + 0" in " ".join(said.split())
    # the instance is not overwritten with what comes of it
    for words in (("solve", graph, "--output"), ("prove", graph, "--output"), ("extract", graph)):
        message = run(*words, graph, "--overwrite", fails=OptionError)
        assert "is the instance itself" in message
    assert graph.read_text() == CLUSTER


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    for name, text, select in (("a.mc", "3 1\n1 2 4\n", 2), ("a.dat", "3 2 1\n1 2\n", None)):
        plain, marked = (read(tmp_path, name, mark + text, select) for mark in ("", "\ufeff"))
        assert np.array_equal(plain.quadratic()[0], marked.quadratic()[0])


def test_every_command_speaks_of_the_graph_and_not_of_the_shift(tmp_path):
    """Values, bounds from above, and one gap for one mask wherever it is printed."""
    graph, table = tmp_path / "graph.mc", tmp_path / "table.jsonl"
    problem = read(tmp_path, "graph.mc", RUDY, 2)
    best = problem.value(float(solve(problem, "branch").objective[0]))

    def of_graph(command, *words):
        return run(command, graph, "--select", 2, *words)

    of_graph("compare", "--solvers", "branch,wanda", "--output", table)
    branch, wanda = map(json.loads, table.read_text().splitlines())
    assert (branch["solver"], wanda["solver"]) == ("branch", "wanda")
    assert branch["value"] == pytest.approx(best)
    assert branch["value_bound"] == pytest.approx(best, rel=1e-6)
    assert branch["gap"] == pytest.approx(0, abs=1e-6)
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
    solution = solve(problem, "swap")
    verify(problem, replace(solution, lower_bound=bound.value, certificate=bound.certificate))
    message = "no weights that could be refitted"
    with pytest.raises(ProblemError, match=message):
        problem.refitting(Refit())
    assert problem.refitting(None).value(0.0) == problem.value(0.0)
    units = problem.as_layer().units
    with pytest.raises(ProblemError, match=message):
        RowProblem(problem.weight, problem.gram, problem.pattern, refit=Refit(), units=units)
    words = ("--weights", "refit", "--solvers", "swap", "--output", tmp_path / "o.csv")
    assert message in run("compare", tmp_path / "a.dat", *words, fails=ProblemError)


def test_the_constant_of_a_row_that_prunes_nothing_is_written(tmp_path):
    linear, ones = Linear(torch.ones(1, 6).double(), torch.tensor([50.0])), torch.ones(6).double()
    row = RowProblem(ones, 9 * torch.eye(6).double(), Unstructured(keep=6), linear=linear)
    assert float(row.objective(torch.ones(6, dtype=torch.bool))) == row.value(50.0) == 50
    save_problem(row, tmp_path / "z.qplib")
    again = load_problem(tmp_path / "z.qplib")
    assert again.value(float(solve(again, "swap").objective)) == 50
    for form in ("lp", "cip"):
        path = tmp_path / f"z.{form}"
        make_solver("scip").write_instance(row, path, form=form, formulation="linear")
        model = pyscipopt.Model()
        model.hideOutput()
        model.readProblem(str(path))
        model.optimize()
        assert model.getObjVal() == 50

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

from maskopt import (
    NM,
    Linear,
    Refit,
    RowProblem,
    Status,
    Unstructured,
    load_problem,
    lower_bound,
    make_solver,
    save_problem,
    solve,
    verify,
)
from maskopt.errors import OptionError, ProblemError

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


def read(tmp_path, name, text, select=None):
    (tmp_path / name).write_text(text)
    return load_problem(tmp_path / name, select)


def best(problem):
    """The best value by enumeration, as posed, and the set."""
    quadratic, constant = problem.quadratic()
    count = problem.as_layer().pruned
    units = problem.as_layer().units
    values = {
        chosen: quadratic[np.ix_(chosen, chosen)].sum() + constant
        for chosen in itertools.combinations(range(problem.n), count)
    }
    pick = max if units is not None and units.sign < 0 else min
    chosen = pick(values, key=values.get)
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


@pytest.mark.parametrize(
    ("name", "text"), [("a.dat", CLUSTER), ("a.mc", RUDY), ("a.mdp", DIVERSITY), ("a.qplib", QPLIB)]
)
@pytest.mark.parametrize("ending", ["dat", "mc", "mdp", "qplib", "npz"])
def test_what_is_written_is_the_same_problem(tmp_path, name, text, ending):
    select = 2 if name.endswith("mc") else None
    problem = read(tmp_path, name, text, select)
    target = tmp_path / f"again.{ending}"
    if name.endswith("qplib") and ending not in ("qplib", "npz"):
        with pytest.raises(ProblemError, match=r"take \.qplib"):
            save_problem(problem, target)
        return
    save_problem(problem, target)
    again = load_problem(target, problem.as_layer().pruned if ending == "mc" else None)
    for one, two in zip(problem.quadratic(), again.quadratic(), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-9)
    assert best(problem)[0] == pytest.approx(best(again)[0])
    assert again.integral == problem.integral


def test_a_row_of_a_layer_is_written_for_qplib_alone(tmp_path):
    row = RowProblem(random_weight(1, 8, 1)[0], random_gram(8, "full", 2), Unstructured(keep=3))
    save_problem(row, tmp_path / "row.qplib")
    again = load_problem(tmp_path / "row.qplib")
    assert best(row)[0] == pytest.approx(best(again)[0])
    for ending in ("dat", "mc", "mdp"):
        with pytest.raises(ProblemError, match="to be minimised"):
            save_problem(row, tmp_path / f"row.{ending}")
    for other in (
        RowProblem(row.weight, row.gram, NM(keep=2, of=4)),
        row.refitting(Refit(0.1)),
    ):
        with pytest.raises(ProblemError, match="one set of given size"):
            save_problem(other, tmp_path / "row.qplib")
    with pytest.raises(ProblemError, match="no known format"):
        save_problem(row, tmp_path / "row.xyz")


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.dat", "", "expected 3 numbers"),
        ("a.dat", "3 2 x\n", "expected 3 numbers"),
        ("a.dat", CLUSTER.replace("5 3 4", "5 3 9"), "4 edges where the first line says 9"),
        ("a.dat", CLUSTER.replace("4 5", "4 6"), "no new pair"),
        ("a.dat", CLUSTER.replace("4 5", "2 1"), "no new pair"),
        ("a.dat", CLUSTER.replace("4 5", "4 4"), "no new pair"),
        ("a.dat", CLUSTER.replace("5 3 4", "5 7 4"), "7 of 5 cannot be chosen"),
        ("a.dat", CLUSTER.replace("4 5 0.5", "4 5 nan"), "must be finite"),
        ("a.mc", RUDY, "pass select"),
        ("a.mdp", "0 0\n", "0 vertices"),
        ("a.mdp", "4 2\n0 1 1\n", "1 edges where the first line says 6"),
        ("a.dat", "300000 2 1\n1 2 1\n", "a dense matrix holds 1 to 16384"),
        ("a.qplib", QPLIB.replace("QBL", "QML"), "type QML; only binary"),
        ("a.qplib", QPLIB.replace("QBL", "QBN"), "type QBN; only binary"),
        ("a.qplib", QPLIB.replace("1 # constraint", "2"), "2 constraints"),
        ("a.qplib", QPLIB.replace("1 2 2", "1 2 3"), "not that a given number"),
        ("a.qplib", QPLIB.replace("4 # left", "2 # left"), "not that a given number"),
        ("a.qplib", QPLIB.replace("3 2 4", "3 9 4"), "9 is none of 1"),
        ("a.qplib", QPLIB.replace("maximize", "sideways"), "no sense"),
        ("a.qplib", QPLIB.replace("3 2 4", "1 2 4"), "quadratic term 1 2 is given twice"),
        ("a.qplib", QPLIB.replace("1\n3 -1\n", "2\n3 -1\n3 2\n"), "entry 3 is given twice"),
        ("a.qplib", QPLIB.replace("1 2 2", "1 1 2"), "variable 1 of the constraint is given twice"),
        ("a.qplib", QPLIB[:60], "ends early"),
        ("a.qplib", QPLIB.replace("2 1 -1.0", "2 1 x"), "expected a number"),
    ],
)
def test_what_does_not_map_is_refused_with_the_reason(tmp_path, name, text, reason):
    with pytest.raises(ProblemError, match=f"{name}: .*{reason}"):
        read(tmp_path, name, text)


@pytest.mark.parametrize("name", ["#g.mc", "!%x", "#", "two words"])
def test_names_that_begin_comments_can_be_read_again(tmp_path, name):
    u = np.diag([3.0, 1.0, 2.0])
    save_problem(RowProblem.from_quadratic(u, select=2, name=name), tmp_path / "a.qplib")
    again = load_problem(tmp_path / "a.qplib")
    assert np.allclose(again.quadratic()[0], u)


def test_bad_calls_are_named(tmp_path):
    with pytest.raises(ProblemError, match="no such file"):
        load_problem(tmp_path / "none.dat")
    (tmp_path / "bytes.dat").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProblemError, match="not a text file"):
        load_problem(tmp_path / "bytes.dat")
    with pytest.raises(ProblemError, match="leave `select` out"):
        read(tmp_path, "a.dat", CLUSTER, select=2)
    with pytest.raises(ProblemError, match="graphs that name no number"):
        load_problem(tmp_path / "a.npz", 3)
    for more in ({}, {"keep": 1, "select": 1}):
        with pytest.raises(ProblemError, match="one of keep"):
            RowProblem.from_quadratic(np.eye(3), **more)
    for bad, reason in ((np.ones((2, 3)), "is \\[n, n\\]"), (np.full((2, 2), np.inf), "finite")):
        with pytest.raises(ProblemError, match=reason):
            RowProblem.from_quadratic(bad, keep=1)


def test_units_survive_a_file_and_a_forged_header_is_refused(tmp_path):
    problem = read(tmp_path, "a.qplib", QPLIB)
    problem.save(tmp_path / "a.npz")
    again = RowProblem.load(tmp_path / "a.npz")
    assert again.as_layer().units == problem.as_layer().units
    assert again.value(1.0) == problem.value(1.0)
    from maskopt.units import units_from_dict

    none = {"sign": 1, "shift": float("nan"), "constant": 0}
    for bad in (3, {"sign": 1}, {"sign": 2, "shift": 0, "constant": 0}, none):
        with pytest.raises(ProblemError, match="units"):
            units_from_dict(bad)
    plain = RowProblem(torch.ones(4), torch.eye(4), Unstructured(keep=2))
    assert plain.value(3.5) == 3.5


def test_a_graph_on_the_command_line(tmp_path):
    graph, proof = tmp_path / "graph.dat", tmp_path / "proof.npz"
    graph.write_text(CLUSTER)
    text = run("prove", graph, "--output", proof)
    assert "value" in text
    assert "at most" in text
    assert " 3 " in text
    assert "1 of 1 rows proven" in text
    assert "holds: 1 row checked" in run("check", graph, proof)
    (tmp_path / "graph.mc").write_text(RUDY)
    run("extract", tmp_path / "graph.mc", tmp_path / "graph.npz", "--select", 2)
    assert solve(load_problem(tmp_path / "graph.npz"), "branch").status == (Status.OPTIMAL,)
    run("extract", tmp_path / "graph.npz", tmp_path / "out.qplib")
    text = run("solve", tmp_path / "out.qplib", "--output", tmp_path / "s.npz", "--solver", "tabu")
    assert "at most" in text
    text = run("compare", graph, "--solvers", "wanda,tabu")
    assert "tabu" in text


def test_an_unknown_ending_is_named(tmp_path):
    path = tmp_path / "graph.edges"
    path.write_text("1 2")
    with pytest.raises(ProblemError, match=r"no known format by its ending; one of \.npz"):
        load_problem(path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    texts = {"graph.mc": "3 1\n1 2 4\n", "graph.dat": "3 2 1\n1 2\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / f"marked-{name}").write_text(text, encoding="utf-8-sig")
        more = {"select": 2} if name.endswith(".mc") else {}
        plain, marked = (
            load_problem(tmp_path / n, **more).quadratic() for n in (name, f"marked-{name}")
        )
        assert np.array_equal(plain[0], marked[0])


def test_a_line_that_will_not_do_is_named_by_its_number(tmp_path):
    with pytest.raises(ProblemError, match="line 5: expected 3 numbers, not '1 2 x'"):
        read(tmp_path, "a.mc", "# a graph\n3 2\n\n1 3 4\n1 2 x\n", select=2)
    with pytest.raises(ProblemError, match="line 3: '3 1 5' is no new pair of two of 3"):
        read(tmp_path, "a.mc", "3 2\n1 3 4\n3 1 5\n", select=2)


def test_every_command_speaks_of_the_graph_and_not_of_the_shift(tmp_path):
    """Values, bounds from above, and one gap for one mask wherever it is printed."""
    graph, table = tmp_path / "graph.mc", tmp_path / "table.jsonl"
    graph.write_text(RUDY)
    problem = load_problem(graph, 2)
    assert problem.maximised
    found = solve(problem, "branch")
    best = problem.value(float(found.objective[0]))
    run("compare", graph, "--select", 2, "--solvers", "branch,wanda", "--output", table)
    by_solver = {r["solver"]: r for r in map(json.loads, table.read_text().splitlines())}
    assert by_solver["branch"]["value"] == pytest.approx(best)
    assert by_solver["branch"]["value_bound"] == pytest.approx(best, rel=1e-6)
    assert by_solver["branch"]["gap"] == pytest.approx(0, abs=1e-6)
    wanda = by_solver["wanda"]
    assert wanda["excess"] == pytest.approx((best - wanda["value"]) / best)
    run("bound", graph, "--select", 2, "--solver", "wanda", "--output", tmp_path / "b.jsonl")
    record = json.loads((tmp_path / "b.jsonl").read_text())
    assert record["value_bound"] >= best - 1e-9
    gap = (record["value_bound"] - record["value"]) / record["value"]
    assert record["gap"] == pytest.approx(gap)
    assert f"{gap:.2%}" in run("bound", graph, "--select", 2, "--solver", "wanda")
    assert "–" in run("compare", graph, "--select", 2, "--solvers", "wanda")
    run("solve", graph, "--select", 2, "--solver", "branch", "--output", tmp_path / "s.npz")
    assert "holds: 1 row" in run("verify", graph, tmp_path / "s.npz", "--select", 2)


def test_a_bound_of_whole_numbers_is_one_of_them(tmp_path):
    problem = read(tmp_path, "a.dat", CLUSTER)
    bound = lower_bound(problem, "box")
    value = problem.value(float(bound.value))
    assert value == round(value) >= 3
    solution = solve(problem, "swap")
    verify(problem, replace(solution, lower_bound=bound.value, certificate=bound.certificate))


def test_an_objective_of_somebody_s_has_nothing_to_refit(tmp_path):
    problem = read(tmp_path, "a.dat", CLUSTER)
    with pytest.raises(ProblemError, match="no weights that could be refitted"):
        problem.refitting(Refit())
    assert problem.refitting(None).value(0.0) == problem.value(0.0)
    units = problem.as_layer().units
    with pytest.raises(ProblemError, match="no weights that could be refitted"):
        RowProblem(problem.weight, problem.gram, problem.pattern, refit=Refit(), units=units)
    message = run(
        "compare", tmp_path / "a.dat", "--weights", "refit", "--solvers", "swap", "--output",
        tmp_path / "o.csv", fails=ProblemError,
    )  # fmt: skip
    assert "no weights that could be refitted" in message


def test_the_constant_of_a_row_that_prunes_nothing_is_written(tmp_path):
    linear = Linear(torch.ones(1, 6).double(), torch.tensor([50.0]).double())
    row = RowProblem(
        torch.ones(6).double(), 9 * torch.eye(6).double(), Unstructured(keep=6), linear=linear
    )
    assert float(row.objective(torch.ones(6, dtype=torch.bool))) == 50
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


def test_a_name_that_is_no_text_is_written_as_near_as_can_be(tmp_path):
    row = RowProblem(torch.ones(4), torch.eye(4), Unstructured(0.5), name=os.fsdecode(b"gr\xfcn"))
    save_problem(row, tmp_path / "row.qplib")
    assert load_problem(tmp_path / "row.qplib").n == 4


def test_the_instance_is_not_overwritten_with_what_comes_of_it(tmp_path):
    (tmp_path / "a.dat").write_text(CLUSTER)
    for command in ("solve", "prove"):
        message = run(
            command,
            tmp_path / "a.dat",
            "--output",
            tmp_path / "a.dat",
            "--overwrite",
            fails=OptionError,
        )
        assert "is the instance itself" in message
    message = run(
        "extract", tmp_path / "a.dat", tmp_path / "a.dat", "--overwrite", fails=OptionError
    )
    assert "is the instance itself" in message
    assert (tmp_path / "a.dat").read_text() == CLUSTER


def test_a_model_for_other_solvers_says_what_its_objective_is(tmp_path):
    (tmp_path / "a.dat").write_text(CLUSTER)
    said = run("extract", tmp_path / "a.dat", tmp_path / "a.lp")
    shift = load_problem(tmp_path / "a.dat").as_layer().units.shift * 3
    assert f"value = −(objective − {shift:g}) + 0" in " ".join(said.split())

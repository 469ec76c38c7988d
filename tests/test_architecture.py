"""The rules of the house: which way imports point, and what installs."""

import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

from maskopt.solver import ENTRY_POINT_GROUP, Solver

ROOT = Path(__file__).parents[1]


def test_import_contracts_hold():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_entry_point_loads_and_is_a_solver():
    points = entry_points(group=ENTRY_POINT_GROUP)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["entry-points"][ENTRY_POINT_GROUP]
    assert {point.name: point.value for point in points} == declared, "install maskopt again"
    for point in points:
        solver = point.load()()
        assert isinstance(solver, Solver)
        assert solver.name == point.name


def test_importing_maskopt_loads_no_backend():
    code = "import sys, maskopt; print([m for m in sys.modules if m.startswith('maskopt.solvers')])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"

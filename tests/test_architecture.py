"""The rules of the house: which way imports point, and what installs."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

from maskopt.solver import ENTRY_POINT_GROUP, Solver

ROOT = Path(__file__).parents[1]
#: extras that no module imports from
TOOLS = ("test", "docs")


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


def test_every_import_is_declared_and_every_dependency_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = set()
    for name in (
        *project["dependencies"],
        *(d for e in extras if e not in TOOLS for d in extras[e]),
    ):
        declared.add(re.match(r"[\w-]+", name)[0].replace("-", "_"))
    imported = set()
    for file in (*ROOT.glob("maskopt/**/*.py"), *ROOT.glob("solvers/**/*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    foreign = imported - sys.stdlib_module_names - {"maskopt", "llvmlite"}  # a part of numba
    assert foreign == declared


def test_the_page_of_dependencies_names_them_all():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (ROOT / "docs" / "dependencies.md").read_text()
    named = {cell for line in page.splitlines() for cell in re.findall(r"[\w-]+", line)}
    for requirement in project["dependencies"]:
        name, low = re.match(r"([\w-]+)>=([\d.]+)", requirement).groups()
        assert name in named
        assert f"≥ {low}" in page, requirement
    for extra in project["optional-dependencies"]:
        assert f"`{extra}`" in page

"""The rules of the house: which way imports point, and what installs."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import maskopt
from maskopt.demo.model import MODELS
from maskopt.protocol.solver import ENTRY_POINT_GROUP, Solver

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: but for those that no module imports from
EXTRAS = PROJECT["optional-dependencies"]
EXTRAS = {extra: EXTRAS[extra] for extra in EXTRAS if extra not in ("test", "docs")}


def output_of(code):
    command = [sys.executable, "-c", "\n".join(map(str.strip, code.splitlines()))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


def test_import_contracts_hold():
    output_of("from importlinter.cli import lint_imports_command as c; c()")


def test_every_entry_point_loads_and_is_a_solver():
    points = entry_points(group=ENTRY_POINT_GROUP)
    declared = PROJECT["entry-points"][ENTRY_POINT_GROUP]
    assert {point.name: point.value for point in points} == declared, "install maskopt again"
    for point in points:
        solver = point.load()()
        assert isinstance(solver, Solver)
        assert solver.name == point.name


def test_what_importing_leaves_out():
    """A help page of all commands needs no torch, and no solver is loaded before it is asked for; nor is
    transformers, which takes as long to import as torch: `solve` and `bound` have no use for it."""
    code = """import sys, maskopt, maskopt.cli
    print("torch" in sys.modules, len(dir(maskopt)) == len(maskopt.__all__))
    maskopt.solve, maskopt.cli.all_commands()
    print([name for name in sys.modules if name.startswith("maskopt.solvers")])
    print("transformers" in sys.modules, "torch" in sys.modules)"""
    assert output_of(code) == ["False True", "[]", "False True"]


def test_every_import_is_declared_and_every_dependency_imported():
    names = sum(EXTRAS.values(), PROJECT["dependencies"])
    declared = {re.match(r"[\w-]+", name)[0].replace("-", "_") for name in names}
    declared = {{"pillow": "PIL"}.get(package, package) for package in declared}
    imported = set()
    for file in (*ROOT.glob("maskopt/**/*.py"), *ROOT.glob("solvers/**/*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    # the demo asks whether these are there before anything imports them
    imported |= {"accelerate", "gguf", MODELS["gemma3"].module}
    foreign = imported - sys.stdlib_module_names - {"maskopt", "llvmlite"}  # a part of numba
    assert foreign == declared


def rows_of(page, heading):
    """The rows of the first table under a heading, as cells; the head is left out."""
    section = page.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_the_table_of_dependencies_is_what_is_declared():
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set()
    for packages, ranges, _ in rows_of(page, "Always installed"):
        names, limits = packages.split(", "), ranges.replace("≥ ", ">=").replace("< ", "<")
        limits = limits.split(", ") if len(names) > 1 else [limits.replace(", ", ",")]
        named |= {n + limit for n, limit in zip(names, limits, strict=True)}
    assert named == set(PROJECT["dependencies"])
    extras = {}
    for names, packages, _ in rows_of(page, "Extras"):
        extra, *others = names.replace("`", "").split(", ")
        if not others:
            extras[extra] = packages.split(", ")
        elif packages:  # one row for several extras: one package each
            each = zip((extra, *others), packages.split(", "), strict=True)
            extras |= {name: [package] for name, package in each}
    assert extras == {k: [re.match(r"[\w-]+", x)[0] for x in v] for k, v in EXTRAS.items()}


def expanded(cell):
    """`maskopt/{a,b}.py`, `c/` as paths."""
    for text in re.findall(r"`([^`]+)`", cell):
        head, inside, tail = re.fullmatch(r"([^{]*)(?:\{(.*)\})?(.*)", text).groups()
        yield from (head + part + tail for part in (inside or "").split(","))


def test_the_page_of_architecture_names_every_module():
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = [path for room, *_ in rows_of(page, "The rooms") for path in expanded(room)]
    there = set()
    for home in ("maskopt", "maskopt/models", "solvers"):
        for path in (ROOT / home).iterdir():
            folder = (path / "__init__.py").exists() and not path.is_symlink()
            if folder or (path.suffix == ".py" and path.name != "__init__.py"):
                there.add(f"{home}/{path.name}" + "/" * folder)
    assert sorted(named) == sorted(there)


def test_one_version_everywhere():
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert {PROJECT["version"], cited[1]} == {maskopt.__version__}
    assert f"## {maskopt.__version__}" in (ROOT / "CHANGELOG.md").read_text()

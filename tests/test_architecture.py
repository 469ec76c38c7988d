"""The rules of the house: which way imports point, what installs, which cases are drawn."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import warnings
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from commands import ROOT, TESTS
from forging import fails

import maskopt
from maskopt.demo import MODELS
from maskopt.errors import ModelError
from maskopt.models.architecture.transformers_adapter import SUPPORTED, check_version
from maskopt.protocol.solver import ENTRY_POINT_GROUP, Solver

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: but for those that no module imports from
EXTRAS = {k: v for k, v in PROJECT["optional-dependencies"].items() if k not in ("test", "docs")}


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
    """Help needs no torch, `solve` no transformers, and no solver is loaded before it is needed."""
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


#: a docstring opens with a verb in the imperative or with a noun, and never with one of these
NO_OPENING = re.compile(
    r"(As|By|For|From|How|In|Its?|Itself|Of|On|That|They|This|Those|What|Where|Whether|Which|With)\b"
)


def test_docstrings_open_with_a_verb_or_a_noun():
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    rooms = tuple(room.removesuffix("/**") for room in ruff["per-file-ignores"])
    bad = []
    for file in [*PACKAGE.rglob("*.py"), *(ROOT / "solvers").rglob("*.py")]:
        path = str(file.relative_to(ROOT))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        for node in ast.walk(ast.parse(file.read_text())):
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            if text and NO_OPENING.match(text) and not path.startswith(rooms):
                bad.append(f"{path}: {text.splitlines()[0]}")
    assert bad == []


def test_one_version_everywhere():
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert {PROJECT["version"], cited[1]} == {maskopt.__version__}
    assert f"## {maskopt.__version__}" in (ROOT / "CHANGELOG.md").read_text()


# --- transformers
PACKAGE = Path(maskopt.__file__).parent
ADAPTER = PACKAGE / "models" / "architecture" / "transformers_adapter.py"
#: documented, so every file may import from them
PUBLIC = {"transformers", "transformers.utils", "transformers.pytorch_utils"}
PRIVATE = {"_init_weights", "_weight_conversions", "_experts_implementation", "hf_quantizer"}


def private_uses(source):
    """Imports from transformers' undocumented modules, and its private attributes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
            if node.module not in PUBLIC:
                yield str(node.module)
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            yield from (n for n in names if n.startswith("transformers.") and n not in PUBLIC)
        elif isinstance(node, ast.Attribute) and node.attr in PRIVATE:
            yield node.attr


def test_only_the_adapter_knows_private_parts():
    private = {str(x): set(private_uses(x.read_text())) for x in PACKAGE.rglob("*.py")}
    used = private.pop(str(ADAPTER))
    assert used >= {"_init_weights", "_experts_implementation"}
    assert used >= {f"transformers.{x}" for x in ("core_model_loading", "conversion_mapping")}
    assert {file: found for file, found in private.items() if found} == {}


def test_the_range_of_transformers_is_the_one_that_is_installed():
    entry = next(d for d in PROJECT["dependencies"] if d.startswith("transformers"))
    major, minor = SUPPORTED[1].split(".")
    assert entry == f"transformers>={SUPPORTED[0]},<{major}.{int(minor) + 1}"


def test_other_versions_of_transformers_are_refused_or_warned_of():
    for version in ("5.5.4", "4.57.6", "5.0.0rc1"):
        fails(ModelError, rf"{re.escape(version)} is too old.*>=5\.6", check_version, version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for version in ("5.25.0", "5.100.0.dev0", "6.0.0"):
            check_version.cache_clear()
            said = rf"{re.escape(version)} is newer than maskopt was"
            with pytest.warns(UserWarning, match=said):
                check_version(version)
            check_version(version)  # says it once
        for version in SUPPORTED:  # both ends of the range
            check_version.cache_clear()
            check_version(version + ".0")


# --- profiles
SUITE = """
from hypothesis import given, settings, strategies

own = settings(max_examples=30)

def test_a_test_with_settings_of_its_own_follows_the_profile():
    print("derandomize", own.derandomize, settings.default.max_examples)

@own
@given(strategies.integers(0, 2**60))
def test_draws(number):
    print("drawn", number)
    assert number < 0
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("examples", "options"), [(20, []), (60, ["--slow"]), (300, ["--hypothesis-profile=explore"])]
)
def test_the_profile_decides_which_cases_are_drawn(examples, options, tmp_path):
    (tmp_path / "test_case.py").write_text(SUITE)
    # CI: derandomised by default
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "CI": "true"}
    command = [sys.executable, "-m", "pytest", "-s", "-p", "conftest", *options, "test_case.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    said, explores = result.stdout, examples == 300
    assert "1 failed, 1 passed" in said, said + result.stderr
    assert f"derandomize {not explores} {examples}" in said
    assert said.count("drawn") > 1
    assert not explores or "@reproduce_failure(" in said

"""What maskopt uses of transformers beyond its documented interface sits in one file."""

import ast
import re
import tomllib
import warnings
from pathlib import Path

import pytest

import maskopt
from maskopt.errors import ModelError
from maskopt.models.architecture.transformers_adapter import SUPPORTED, check_version

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
    assert set(private_uses(ADAPTER.read_text())) >= {
        "transformers.core_model_loading",
        "transformers.conversion_mapping",
        "_init_weights",
        "_experts_implementation",
    }
    found = {
        str(file.relative_to(PACKAGE)): used
        for file in PACKAGE.rglob("*.py")
        if file != ADAPTER and (used := list(private_uses(file.read_text())))
    }
    assert found == {}


def test_the_range_is_the_one_that_is_installed():
    """pip enforces what the adapter says."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    entry = next(d for d in project["dependencies"] if d.startswith("transformers"))
    major, minor = SUPPORTED[1].split(".")
    assert entry == f"transformers>={SUPPORTED[0]},<{major}.{int(minor) + 1}"


def test_other_versions_of_transformers_are_refused_or_warned_of():
    for version in ("5.5.4", "4.57.6", "5.0.0rc1"):
        with pytest.raises(ModelError, match=rf"{re.escape(version)} is too old.*>=5\.6"):
            check_version(version)
    for version in ("5.25.0", "5.100.0.dev0", "6.0.0"):
        check_version.cache_clear()
        with pytest.warns(UserWarning, match=rf"{re.escape(version)} is newer than maskopt was"):
            check_version(version)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_version(version)  # says it once
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for version in SUPPORTED:  # both ends of the range
            check_version.cache_clear()
            check_version(version + ".0")

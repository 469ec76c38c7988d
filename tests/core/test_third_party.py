"""The package of docs/adding-a-solver.md, built and installed as it stands there, and used."""

import os
import re
import subprocess
import sys

import pytest
from commands import ROOT

PAGE = ROOT / "docs" / "adding-a-solver.md"


@pytest.mark.slow
def test_a_backend_of_another_distribution(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"

    def python(*words):
        done = subprocess.run(
            [sys.executable, *map(str, words)], capture_output=True, text=True, cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(site)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    blocks = re.findall(r'```\w+ title="(\S+)"\n(.*?)```', PAGE.read_text(), re.DOTALL)
    for name, text in blocks:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    assert len((source / "exchange" / "__init__.py").read_text().strip().splitlines()) <= 45
    # nothing is fetched: setuptools is that of the tests
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    python("-m", "pip", "install", "-q", *offline, "--target", site, source)
    used = python(source / "use.py")
    assert "8 rows checked" in used
    assert "random_exchange" in used
    main = "from maskopt.cli import main; main()"
    assert "tries" in python("-c", main, "solvers", "random_exchange")

"""The package of docs/adding-a-solver.md, built and installed as it stands there, and used."""

import os
import re
import subprocess
import sys

from commands import ROOT

PAGE = ROOT / "docs" / "adding-a-solver.md"


def test_a_backend_of_another_distribution(tmp_path):
    blocks = re.findall(r'```\w+ title="(\S+)"\n(.*?)```', PAGE.read_text(), re.DOTALL)
    source = tmp_path / "source"
    for name, text in blocks:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    lines = (source / "exchange" / "__init__.py").read_text().strip().splitlines()
    assert len(lines) <= 45
    site = tmp_path / "site"
    # nothing is fetched: setuptools is that of the tests
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    install = [sys.executable, "-m", "pip", "install", "-q", *offline, "--target", str(site)]
    done = subprocess.run([*install, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    environment = {**os.environ, "PYTHONPATH": str(site)}
    used = subprocess.run(
        [sys.executable, str(source / "use.py")],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert used.returncode == 0, used.stderr
    assert "8 rows checked" in used.stdout
    assert "random_exchange" in used.stdout
    command = [sys.executable, "-c", "from maskopt.cli import main; main()"]
    listed = subprocess.run(
        [*command, "solvers", "random_exchange"], capture_output=True, text=True, env=environment
    )
    assert listed.returncode == 0, listed.stderr
    assert "tries" in listed.stdout

"""Property tests draw the same cases every time, unless asked to explore."""

import os
import re
import subprocess
import sys

import pytest
from commands import TESTS

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
    ("options", "examples"), [((), 20), (("--slow",), 60), (("--hypothesis-profile=explore",), 300)]
)
def test_the_profile_decides_which_cases_are_drawn(options, examples, tmp_path):
    (tmp_path / "test_case.py").write_text(SUITE)
    # CI: derandomised by default
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "CI": "true"}
    command = [sys.executable, "-m", "pytest", "-s", "-p", "conftest", *options, "test_case.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "1 failed, 1 passed" in result.stdout, result.stdout + result.stderr
    explores = examples == 300
    assert f"derandomize {not explores} {examples}" in result.stdout
    assert len(re.findall("drawn", result.stdout)) > 1
    if explores:
        assert "@reproduce_failure(" in result.stdout

"""Property tests draw the same cases every time, unless asked to explore."""

import os
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
PROFILES = {20: [], 60: ["--slow"], 300: ["--hypothesis-profile=explore"]}
#: all in one process, which imports torch but once; a file each, which is imported under its profile
RUN = """import pytest, sys
for number, *options in {}:
    pytest.main(["-s", "-p", "conftest", *options, f"test_case_{{number}}.py"])
    print("END OF A RUN")"""


@pytest.mark.slow
def test_the_profile_decides_which_cases_are_drawn(tmp_path):
    for examples in PROFILES:
        (tmp_path / f"test_case_{examples}.py").write_text(SUITE)
    # CI: derandomised by default
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "CI": "true"}
    command = [sys.executable, "-c", RUN.format([(n, *o) for n, o in PROFILES.items()])]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    runs = result.stdout.split("END OF A RUN")[:-1]
    for examples, said in zip(PROFILES, runs, strict=True):
        assert "1 failed, 1 passed" in said, said + result.stderr
        explores = examples == 300
        assert f"derandomize {not explores} {examples}" in said
        assert said.count("drawn") > 1
        assert not explores or "@reproduce_failure(" in said

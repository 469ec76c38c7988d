"""Every Triton program compiles for sm_80 and sm_90, without spills; no GPU is needed for that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import TESTS

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="the package triton is not installed")

SCRIPT = TESTS / "benchmarks" / "triton_programs.py"


@pytest.mark.parametrize("architecture", [80, 90])
def test_every_program_compiles_without_spills(
    architecture: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # in a process of its own: the other tests may have put Triton into its interpreter
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(SCRIPT), str(architecture)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    with capsys.disabled():
        print("\n" + result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert {line.split()[0] for line in result.stdout.splitlines()[1:]} == {
        "swap_block", "move_correlation", "column_terms", "lower_envelope", "list_finite", "scan_survivors",
        "scan_groups",
    }  # fmt: skip


def test_a_faulty_program_is_named(benchmarks: None) -> None:
    from triton_programs import Report

    good = Report("k", "fp32", 90, 4, 128, 1024, 0, 0, 100)
    assert good.fault is None
    assert "spills" in str(Report("k", "v", 90, 4, 255, 1024, 8, 2, 100).fault)
    assert "shared" in str(Report("k", "v", 90, 4, 128, 10**5, 0, 0, 100).fault)
    assert "registers" in str(Report("k", "v", 90, 16, 255, 1024, 0, 0, 100).fault)
    assert "registers" in str(Report("k", "fp32", 90, 8, 200, 1024, 0, 0, 100).fault)

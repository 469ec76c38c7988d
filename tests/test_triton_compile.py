"""Every Triton program compiles for sm_80 and sm_90, without spills; no GPU is needed for that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")


@pytest.mark.parametrize("architecture", [80, 90])
def test_every_program_compiles_without_spills(
    architecture: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # in a process of its own: the other tests may have put Triton into its interpreter
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "maskopt.solvers.swap.triton.aot", "--json", str(architecture)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.stdout, result.stderr
    from maskopt.solvers.swap.triton import aot

    reports = [aot.Report(**one) for one in json.loads(result.stdout)]
    with capsys.disabled():
        print("\n" + aot.table(reports))
    assert {one.kernel for one in reports} == {
        "swap_block", "move_correlation", "column_terms", "lower_envelope", "list_finite", "scan_survivors",
        "scan_tiles", "best_partners", "scan_groups",
    }  # fmt: skip
    assert [one for one in reports if one.fault] == []
    assert result.returncode == 0
    # at least two blocks of the single-precision search and scans fit a multiprocessor
    for one in reports:
        if one.variant.startswith("fp32"):
            assert one.registers * 32 * one.warps * 2 <= aot.REGISTER_FILE, one


def test_a_faulty_program_is_told() -> None:
    from maskopt.solvers.swap.triton.aot import Report

    good = Report("k", "v", 90, 4, 128, 1024, 0, 0, 100)
    assert good.fault is None
    assert "spills" in str(Report("k", "v", 90, 4, 255, 1024, 8, 2, 100).fault)
    assert "shared" in str(Report("k", "v", 90, 4, 128, 10**5, 0, 0, 100).fault)
    assert "registers" in str(Report("k", "v", 90, 16, 255, 1024, 0, 0, 100).fault)

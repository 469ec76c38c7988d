"""Solutions of finished jobs, one file each: an interrupted run reads them back, and verifies them."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Literal

from maskopt.checks.verification import verify
from maskopt.core.files import check_writable
from maskopt.core.problem import LayerProblem, RowProblem
from maskopt.errors import MaskoptError, printable
from maskopt.protocol.solution import Solution

_log = logging.getLogger("maskopt.experiments.kept")


class Kept:
    """The folder `<output>.rows`, which holds a solution for the key of every finished job.

    Anybody can write into that folder, so a solution that `verify` refuses is dropped, and its job runs
    again. A bound that nothing proves stays named as trusted. Without an output it keeps nothing.
    """

    def __init__(self, output: Path | None) -> None:
        """Errors are those of `check_writable`."""
        if output is not None:
            check_writable(output, overwrite=None if output.suffix == ".jsonl" else True)
        self.folder = None if output is None else output.with_name(output.name + ".rows")

    def read(
        self,
        key: str,
        problem: LayerProblem | RowProblem,
        require: Literal["claims", "checked"] = "claims",
    ) -> Solution | None:
        """The solution of a job, verified against its problem; None where there is none that holds."""
        path = self.folder and self.folder / f"{key}.npz"
        if path is None or not path.exists():
            return None
        try:
            solution = Solution.load(path)
            verify(problem, solution, require=require)
        except MaskoptError as error:
            _log.warning("%s", printable(f"{path}: dropped and solved again: {error}"))
            return None
        return solution

    def write(self, key: str, solution: Solution) -> None:
        if self.folder is not None:
            self.folder.mkdir(exist_ok=True)
            solution.save(self.folder / f"{key}.npz")

    def remove(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

"""What decides the result of a walk through a model: for the manifest, and for `resume` to compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maskopt.models.blockwise.job import Job
from maskopt.models.checkpoints.report import versions


def fingerprint_of(
    job: Job, options: Mapping[str, Any], calibration: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Versions, options, text, precision, device and the model's digest.

    Args:
        calibration: what an earlier walk recorded of the text, where the job has none.
    """
    source = job.source
    fingerprint = {
        "versions": versions(),
        "options": dict(options),
        "calibration": _calibration(job) if calibration is None else dict(calibration),
        "dtype": str(next(source.model.parameters()).dtype).removeprefix("torch."),
        "device": source.device.type,
    }
    if source.checkpoint is not None:
        fingerprint["model"] = source.checkpoint.digest
    return fingerprint


def _calibration(job: Job) -> dict[str, Any]:
    windows = job.windows
    assert windows is not None
    return {
        "source": windows.source,
        "samples": len(windows),
        "length": windows.length,
        "beginning": windows.beginning.record(),
        "sha256": windows.digest,
    }

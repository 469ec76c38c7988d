"""That a written model computes what the original computes with a change: the last look before it appears."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from maskopt.errors import ModelError
from maskopt.model.job import Block, Job, open_job
from maskopt.model.options import WalkOptions

#: relative difference of the last hidden states
_SAME = 1e-2


def check_same_output(job: Job, folder: Path, prepare: Callable[[Block], None], why: str) -> None:
    """Send a window through both, the original's blocks changed by `prepare`, which may also leave them by
    itself.

    Args:
        job: of the original, a folder.
        why: in words, what it means if they differ.

    Raises:
        ModelError: they do.
    """
    assert job.windows is not None
    assert job.source.checkpoint is not None
    options, states = job.options, []
    walk = WalkOptions(device=options.device, dtype=options.dtype, threads=options.threads)
    for model, change in ((job.source.checkpoint.folder, prepare), (folder, lambda _: None)):
        with open_job(model, job.windows.tokens[:1], walk, whole=True) as one, torch.no_grad():
            for block in one.blocks():
                change(block)
                block.advance()
            states.append(one.last_state(0).double())
    apart = float((states[1] - states[0]).norm() / states[0].norm())
    if not apart <= _SAME:
        raise ModelError(f"the smaller model's output is off by {apart:.1e}: {why}")

"""The folder of a distilled model: that of the pruned one, with new weights where its masks keep them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from maskopt.files import atomic_write
from maskopt.model.blocks import Layer
from maskopt.model.distill_options import DistillOptions
from maskopt.model.edits import Edits, write_values
from maskopt.model.fingerprint import fingerprint_of
from maskopt.model.job import Job
from maskopt.model.maskfile import MaskFile
from maskopt.model.smaller import folder_source
from maskopt.model.workspace import CARD, MASKS, Workspace
from maskopt.model.write import copy_file, copy_side_files, write_shard

FORMAT = "maskopt-distill-1"
#: what was done, and how well it went
RECORD = "maskopt-distill.json"
_NOTE = """

## Trained after pruning

The weights that the masks keep were trained together afterwards, towards the predictions of the dense
model (`maskopt distill`; `maskopt-distill.json` has the figures). What is said above of errors, and the
commands that make the same bytes, are of the model before that. `maskopt verify FOLDER --masks PRUNED`
holds the zeros of both against each other.
"""


def write_distilled(
    student: Job,
    dense: Job,
    options: DistillOptions,
    masks: MaskFile,
    new: Mapping[str, tuple[Layer, Tensor]],
    result: Mapping[str, Any],
    work: Workspace,
) -> None:
    """Write the folder and move it into view.

    Args:
        student: of the pruned folder.
        masks: its own.
        new: weights [rows, n] of the layers with masks, by name.
        result: for the record.
    """
    source, staging = folder_source(student.source), work.staging
    checkpoint = source.checkpoint
    values = work.blocks / "distilled.values"
    write_values(values, source.stored_values(new))
    edits = Edits.of(masks, [values])
    files = {
        shard: write_shard(checkpoint, shard, edits, staging / shard) for shard in checkpoint.shards
    }
    copy_side_files(checkpoint, staging)
    copy_file(masks.path, staging / MASKS)
    card = staging / CARD
    before = card.read_text(encoding="utf-8") if card.exists() else f"# {work.output.name}"
    _write(card, before.rstrip() + _NOTE)
    record = {
        "format": FORMAT,
        "fingerprint": {
            **fingerprint_of(student, options.record()),
            "teacher": folder_source(dense.source).checkpoint.digest,
        },
        **result,
        "files": files,
    }
    _write(staging / RECORD, json.dumps(record, indent=1, sort_keys=True) + "\n")
    work.commit()


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())

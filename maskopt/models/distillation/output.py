"""The folder of a distilled model: that of the pruned one, with new weights where its masks keep them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from maskopt.core.files import atomic_write
from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Layer
from maskopt.models.architecture.source import FolderSource
from maskopt.models.checkpoints.checkpoint import damage, file_digest, read_json
from maskopt.models.checkpoints.journal import differences, in_words
from maskopt.models.checkpoints.mask_file import MaskFile
from maskopt.models.checkpoints.weight_edits import Edits, write_values
from maskopt.models.checkpoints.workspace import CARD, HIDDEN, MASKS, Workspace
from maskopt.models.checkpoints.write import copy_file, copy_side_files, write_shard
from maskopt.models.training.trainer import Losses, Trained

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
    source: FolderSource,
    masks: MaskFile,
    new: Mapping[str, tuple[Layer, Tensor]],
    trained: Trained,
    fingerprint: Mapping[str, Any],
    work: Workspace,
) -> None:
    """Write the folder and move it into view.

    Args:
        source: the pruned folder's.
        masks: its own.
        new: weights [rows, n] of the layers with masks, by name.
        trained, fingerprint: for the record.
    """
    staging, checkpoint = work.staging, source.checkpoint
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
    # of a folder that was trained so before it is there
    _write(card, before if _NOTE.strip() in before else before.rstrip() + _NOTE)
    files |= {f.name: file_digest(f) for f in staging.iterdir() if f.name not in files}
    record = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "before": trained.before._asdict(),
        "after": trained.after._asdict(),
        "epoch": trained.epoch,
        "diverged": trained.diverged,
        "files": files,
    }
    _write(staging / RECORD, json.dumps(record, indent=1, sort_keys=True) + "\n")
    work.commit()


def finished_result(output: Path, fingerprint: Mapping[str, Any]) -> Trained | None:
    """What a run that is complete recorded; None where there is something left to do.

    Raises:
        ModelError: it is complete, but another run than this one, or its record or files are damaged.
    """
    if (output / HIDDEN).exists() or not (output / RECORD).exists():
        return None
    record = read_json(output / RECORD)
    lines = differences(record.get("fingerprint"), dict(fingerprint))
    if lines:
        raise ModelError(
            f"{output}: holds the result of another run: {in_words(lines)}; `overwrite` replaces it"
        )
    try:
        before, after = (Losses(**record[name]) for name in ("before", "after"))
        trained = Trained(before, after, record["epoch"], record["diverged"])
        files = {name: digest for name, digest in record["files"].items() if name != CARD}
    except (KeyError, TypeError, AttributeError):
        raise ModelError(f"{output / RECORD}: is damaged; start over with `overwrite`") from None
    if what := damage(output, files):
        raise ModelError(
            f"{output}: holds the result of this run, but {what}; `overwrite` writes it again"
        )
    return trained


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())

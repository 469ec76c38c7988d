"""Measured perplexity in the model card of a pruned folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from maskopt.core.files import atomic_write
from maskopt.errors import ModelError
from maskopt.models.checkpoints.workspace import CARD
from maskopt.models.evaluation.evaluate import Evaluation, PanelRatio

#: heading of the section that `add_evaluation` writes, the last of a card
EVALUATION = "## Perplexity"


def add_evaluation(
    folder: Path, evaluations: Sequence[Evaluation], mean: PanelRatio | None = None
) -> None:
    """Write what `maskopt eval` measured at the end of the folder's README.md, over an earlier measurement.

    Args:
        evaluations: the model on each text, compared with the dense one.
        mean: over the texts.

    Raises:
        ModelError: a folder without README.md.
    """
    lines = ["| text | perplexity | ratio to dense (95%) | windows |", "|---|---|---|---|"]
    for evaluation in evaluations:
        p, c = evaluation.perplexity, evaluation.change
        ratio = "" if c is None else f"{c.ratio:.3f} ({c.ratio_low:.3f} to {c.ratio_high:.3f})"
        name = Path(p.source).name.replace("|", " ")
        lines.append(f"| {name} | {p.value:.2f} | {ratio} | {p.windows} of {p.length} tokens |")
    if mean is not None and len(evaluations) > 1:
        lines.append(f"| geometric mean | | {mean} | |")
    text = check_card(folder).read_text(encoding="utf-8").partition(f"\n{EVALUATION}\n")[0]
    with atomic_write(folder / CARD) as file:
        file.write("\n".join([text.rstrip("\n"), "", EVALUATION, "", *lines, ""]).encode())


def check_card(folder: Path) -> Path:
    """Return the path of a folder's model card; ModelError where there is none."""
    if not (folder / CARD).is_file():
        raise ModelError(f"`card`: {folder} has no {CARD}; name folders that maskopt wrote")
    return folder / CARD

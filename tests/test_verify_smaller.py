"""Folders of smaller models that say of themselves what is not so, every digest being right."""

from __future__ import annotations

from pathlib import Path

from tiny_models import save, tiny, tokens

from maskopt import shrink_model
from maskopt.model.verify_smaller import verify_smaller


def test_a_link_out_of_the_original_is_no_file_of_it(tmp_path: Path) -> None:
    """It is not copied, as `maskopt prune` copies none."""
    dense = save(tiny("llama"), tmp_path / "dense")
    (tmp_path / "vocab.txt").write_text("elsewhere")
    (dense / "vocab.txt").symlink_to(tmp_path / "vocab.txt")
    shrink_model(dense, tokens(6), output=tmp_path / "out", channels=0.25, solver="wanda")
    assert not (tmp_path / "out" / "vocab.txt").exists()
    assert "other tensors" in verify_smaller(tmp_path / "out", dense).checked

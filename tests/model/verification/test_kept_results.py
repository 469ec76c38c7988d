"""Results that earlier versions wrote still verify, also after options were added."""

import dataclasses

import pytest
from forging import edit, fails, forge_manifest
from kept_results import NAMES, verify_kept

from maskopt.core.fields import UPDATE, option
from maskopt.errors import VerificationError
from maskopt.models.options import prune, walk
from maskopt.models.verification import manifest
from maskopt.models.verification.verify import verify_model


@pytest.mark.parametrize("name", NAMES)
def test_a_kept_result_verifies(name, tmp_path):
    result = verify_kept(name, tmp_path)
    assert result.files or result.others  # of a fine-tuned model tensors are compared, and no files


def _with_added(kind, group):
    added = ("added", int, option(3, "An option of a later version.", group))
    return dataclasses.make_dataclass(kind.__name__, [added], bases=(kind,), frozen=True)


def test_an_added_option_leaves_older_results_valid(tmp_path, monkeypatch):
    """The stored result has no value of an option that a later version adds with a default."""
    monkeypatch.setattr(prune, "Reconstruction", _with_added(walk.Reconstruction, UPDATE))
    monkeypatch.setattr(prune, "DistillOptions", _with_added(walk.DistillOptions, UPDATE))
    monkeypatch.setattr(prune, "DISTILLATION", (*walk.DISTILLATION, "added"))
    monkeypatch.setattr(manifest, "PruneOptions", _with_added(prune.PruneOptions, UPDATE))
    assert verify_kept("prune-trained", tmp_path).files
    for path in (("training", "batch"), ("distillation", "batch")):
        forge_manifest(tmp_path / "result", edit("fingerprint", "options", *path, to=2.5))
        fails(VerificationError, "damaged", verify_model, tmp_path / "result")
        forge_manifest(tmp_path / "result", edit("fingerprint", "options", *path, to=2))
    verify_model(tmp_path / "result")

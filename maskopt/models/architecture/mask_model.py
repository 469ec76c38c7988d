"""The masks of a pruned folder in the shape of a model's layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor

from maskopt.models.architecture.blocks import Layer, matrix
from maskopt.models.architecture.source import FolderSource
from maskopt.models.checkpoints.checkpoint import Checkpoint
from maskopt.models.checkpoints.mask_file import MaskFile


@dataclass(frozen=True)
class MasksAsWeights(Checkpoint):
    """A checkpoint of which every tensor is its mask, 1 = kept, or 0 where it has none: loaded like the
    weights, it gives masks in the shape of the model's layers."""

    masks: MaskFile

    def read(self, name: str) -> Tensor:
        if name in self.masks:
            return self.masks.read(name).kept.to(torch.bfloat16)
        return torch.zeros(self.entry(name).shape, dtype=torch.bfloat16)


def masks_as_model(checkpoint: Checkpoint, path: Path, *, trust_remote_code: bool) -> FolderSource:
    """The checkpoint's model, whose weights are the masks in a file."""
    as_weights = MasksAsWeights(
        checkpoint.folder, checkpoint.config, checkpoint.shards, checkpoint.where, MaskFile(path)
    )
    cpu = torch.device("cpu")
    return FolderSource(as_weights, cpu, torch.bfloat16, trust_remote_code=trust_remote_code)


def layer_masks(
    checkpoint: Checkpoint, path: Path, *, trust_remote_code: bool = False
) -> Iterator[tuple[Layer, Bool[Tensor, "rows n"]]]:
    """Masks of the layers that have one, True = kept, a block's at a time in memory."""
    source = masks_as_model(checkpoint, path, trust_remote_code=trust_remote_code)
    masked = set(MaskFile(path).names)
    for index in range(len(source.blocks)):
        mine = [x for x in source.blocks.layers(index) if masked & {*source.tensors_of(x)}]
        if mine:
            with source.open(index):
                for layer in mine:
                    yield layer, matrix(source.model, layer) != 0

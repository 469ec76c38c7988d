"""Where the weights come from: a model in memory, or a folder read block by block.

Both offer the same: a model whose parts outside the decoder blocks are in memory, and `open(index)`,
inside which the weights of one block are. The rest of the pipeline knows only this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from maskopt.errors import ModelError
from maskopt.models.architecture.blocks import Blocks, Layer
from maskopt.models.architecture.loading import (
    Loader,
    check_buffers,
    check_finite,
    real_buffers,
    release,
    return_memory,
    share_equal,
)
from maskopt.models.architecture.stored_masks import stored_masks, stored_values
from maskopt.models.architecture.transformers_adapter import set_eager_experts
from maskopt.models.checkpoints.checkpoint import Checkpoint
from maskopt.models.checkpoints.mask_file import Edits, TensorMask


class Source(Protocol):
    """A model, one block of it in memory at a time (or all of it)."""

    model: nn.Module
    blocks: Blocks
    device: torch.device

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The folder that it is read from; None where it came in memory."""
        ...

    def load_outside(self) -> None:
        """Bring everything outside the blocks into memory, but for an output head of its own."""
        ...

    def load_whole(self) -> Any:
        """The model with all its weights in memory, for what calls it as a whole."""
        ...

    def open(self, index: int, edits: Edits | None = None) -> Any:
        """Context in which the weights of block `index` are in memory; yields the block.

        `edits` are applied to the checkpoint's tensors on reading.
        """
        ...

    def head(self, like: Source | None = None) -> AbstractContextManager[None]:
        """Context in which all is in memory that follows the blocks; it may be entered again. What equals
        the parameter of that name of `like`, where it is in memory, is held once."""
        ...

    def drop(self) -> None:
        """Hold nothing in memory until `head` or `load_outside`; a model that came in memory stays."""
        ...

    def stored(
        self, index: int, masks: Mapping[str, tuple[Layer, Tensor]]
    ) -> dict[str, TensorMask]:
        """Masks of layers [rows, n] as masks of the tensors that the checkpoint stores."""
        ...

    def stored_dtype(self, layer: Layer) -> torch.dtype:
        """In which the layer's weights are kept."""
        ...

    def vectors(self, index: int) -> Mapping[str, tuple[str, torch.dtype]]:
        """Norms and biases of a block that are stored as they are: the tensor of each, and its dtype, by the
        parameter's name."""
        ...

    def block_memory(self) -> int:
        """Bytes of the blocks' weights that are in memory at the peak."""
        ...


class MemorySource:
    """A model that is in memory as a whole; pruning changes it in place."""

    checkpoint = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.blocks = Blocks(model)
        self.device = next(model.parameters()).device
        meta = [name for name, p in model.named_parameters() if p.is_meta]
        if meta:
            raise ModelError(f"parameter {meta[0]!r} has no data; load the model fully first")

    def load_outside(self) -> None:
        """It is in memory already."""

    def load_whole(self) -> Any:
        return self.model

    @contextmanager
    def open(self, index: int, edits: Edits | None = None) -> Iterator[nn.Module]:
        if edits is not None:
            raise ModelError("a model in memory cannot be resumed; prune its folder instead")
        block = self.blocks.modules[index]
        for name, parameter in block.named_parameters():
            check_finite(self.blocks.prefix(index) + name, parameter)
        yield block

    def head(self, like: Source | None = None) -> AbstractContextManager[None]:
        return nullcontext()

    def drop(self) -> None:
        return None

    def stored(
        self, index: int, masks: Mapping[str, tuple[Layer, Tensor]]
    ) -> dict[str, TensorMask]:
        return stored_masks(self.model, masks, None)

    def stored_dtype(self, layer: Layer) -> torch.dtype:
        return self.model.get_parameter(layer.parameter).dtype

    def vectors(self, index: int) -> dict[str, tuple[str, torch.dtype]]:
        named = vectors_of(self.blocks, index)
        return {name: (name, self.model.get_parameter(name).dtype) for name in named}

    def block_memory(self) -> int:
        return sum(p.nbytes for block in self.blocks.modules for p in block.parameters())


class FolderSource:
    """A model folder; only what lies outside the blocks and the open block are in memory.

    Args:
        checkpoint: the checked folder.
        device, dtype: where and in which precision the forward passes run. The stored weights
            keep theirs.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype | None,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self.checkpoint: Checkpoint = checkpoint
        self.device = device
        self.model = skeleton(checkpoint, dtype, trust_remote_code=trust_remote_code)
        self.blocks = Blocks(self.model)
        self._loader = Loader(self.model, checkpoint, device)
        real_buffers(self.model, device)
        self._outside = [name for name, _ in self.blocks.outside()]

    def tensors_of(self, layer: Layer) -> list[str]:
        """The checkpoint tensors that the layer's parameter is made of."""
        return self._loader.conversion.sources(layer.parameter)

    def load_outside(self) -> None:
        return_memory()  # a large vocabulary's text and tokenizer take half a gigabyte
        self._loader.load(self._outside)
        check_buffers(self.model)

    def load_whole(self) -> Any:
        """The model with all its weights in memory, for what calls it as a whole."""
        self._loader.load([name for name, _ in self.model.named_parameters()])
        check_buffers(self.model)
        return self.model

    @contextmanager
    def open(self, index: int, edits: Edits | None = None) -> Iterator[nn.Module]:
        block = self.blocks.modules[index]
        prefix = self.blocks.prefix(index)
        self._loader.load([prefix + name for name, _ in block.named_parameters()], edits)
        try:
            yield block
        finally:
            release(block)

    @contextmanager
    def head(self, like: Source | None = None) -> Iterator[None]:
        """As in `Source`. An input embedding that the head does not share makes room for it, and gives
        zeros meanwhile. Afterwards nothing of the model is in memory until `load_outside`."""
        own = [name for name, _ in self.blocks.own_head()]
        embedding: Any = self.blocks.embedding
        needed = self._outside
        if own:
            release(embedding)
            looked_up = {id(p) for p in embedding.parameters()}
            needed = own + [n for n, p in self.blocks.outside() if id(p) not in looked_up]
            embedding.forward = _zeros(embedding.weight, self.device)
        try:
            self._loader.load(name for name in needed if self.model.get_parameter(name).is_meta)
            if like is not None:
                share_equal(self.model, like.model)
            yield
        finally:
            embedding.__dict__.pop("forward", None)
            self.drop()

    def drop(self) -> None:
        release(self.model)

    def stored(
        self, index: int, masks: Mapping[str, tuple[Layer, Tensor]]
    ) -> dict[str, TensorMask]:
        return stored_masks(self.model, masks, self._loader)

    def stored_dtype(self, layer: Layer) -> torch.dtype:
        return self.checkpoint.entry(self.tensors_of(layer)[0]).torch_dtype

    def stored_values(self, values: Mapping[str, tuple[Layer, Tensor]]) -> dict[str, Tensor]:
        """New weights of layers [rows, n], float64, as the tensors that the checkpoint stores; NaN where
        none are new."""
        typed = {k: (x, v.to(self.stored_dtype(x))) for k, (x, v) in values.items()}
        return stored_values(self.model, typed, self._loader)

    def vectors(self, index: int) -> dict[str, tuple[str, torch.dtype]]:
        found = {}
        for name in vectors_of(self.blocks, index):
            tensor = self.stored_as_is(name)
            if tensor is not None:
                found[name] = tensor, self.checkpoint.entry(tensor).torch_dtype
        return found

    def stored_as_is(self, parameter: str) -> str | None:
        """The checkpoint's tensor that is the parameter; None where it is made of others, or turned."""
        sources = self._loader.conversion.sources(parameter)
        as_is = len(sources) == 1 and parameter not in self._loader.conversion.converted
        return sources[0] if as_is else None

    def stored_parts(self, parameter: str) -> list[str]:
        """The checkpoint's tensors that a parameter is made of."""
        return self._loader.conversion.sources(parameter)

    def stored_inside(self, module: str) -> set[str]:
        """The checkpoint's tensors that a module's parameters and buffers are made of."""
        names = [name for name in self.model.state_dict() if name.startswith(f"{module}.")]
        return set(self._loader.conversion.needed(names))

    def block_memory(self) -> int:
        """A block is read in its stored dtype and converted; one tensor of it is held twice."""
        working = next(self.model.parameters()).dtype.itemsize
        stored = stored_dtype(self.checkpoint).itemsize
        largest = max(
            sum(p.numel() for p in block.parameters()) * working for block in self.blocks.modules
        )
        return largest + (largest * stored // working if stored != working else 0)


def as_stored(source: Source, layer: Layer, weight: Tensor) -> Tensor:
    """New weights of a layer [rows, n] as they can be stored, float64.

    Raises:
        ModelError: one is beyond the dtype's range.
    """
    dtype = source.stored_dtype(layer)
    rounded = weight.to(dtype).double()
    if not bool(torch.isfinite(rounded).all()):
        raise ModelError(
            f"layer {layer.name!r}: a new weight is beyond the range of {dtype}; take a larger `damping`"
        )
    return rounded


def vectors_of(blocks: Blocks, index: int) -> list[str]:
    """Names in the model of a block's parameters with one dimension, but for those that it shares with
    another block."""
    others = {
        id(p)
        for number, block in enumerate(blocks.modules)
        if number != index
        for p in block.parameters()
    }
    named = blocks.modules[index].named_parameters()
    return [blocks.prefix(index) + name for name, p in named if p.ndim == 1 and id(p) not in others]


def _zeros(table: Tensor, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What stands in for an embedding [tokens, width] that has no data."""
    width, dtype = table.shape[1], table.dtype
    return lambda ids: torch.zeros(*ids.shape, width, dtype=dtype, device=device)


def skeleton(
    checkpoint: Checkpoint, dtype: torch.dtype | None, *, trust_remote_code: bool = False
) -> Any:
    """The model without any weights, in evaluation mode.

    Raises:
        ModelError: transformers does not know the model, or its configuration is impossible.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = checkpoint.folder
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype or stored_dtype(checkpoint),
                trust_remote_code=trust_remote_code,
            )
    except ModelError:
        raise
    except Exception as error:  # configurations fail in as many ways as there are models
        line = (str(error).splitlines() or [""])[0]
        raise ModelError(f"{folder}: {type(error).__name__}: {line}") from error
    set_eager_experts(model)
    return model.eval()


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating dtype that most of the checkpoint's bytes are in."""
    sizes: dict[torch.dtype, int] = {}
    for shard in checkpoint.shards.values():
        for entry in shard.entries.values():
            if entry.torch_dtype.is_floating_point:
                sizes[entry.torch_dtype] = sizes.get(entry.torch_dtype, 0) + entry.size
    if not sizes:
        raise ModelError(f"{checkpoint.folder}: the shards hold no floating-point weights")
    return max(sizes, key=lambda dtype: sizes[dtype])

"""Where the weights come from: a model in memory, or a folder read block by block.

Both offer the same: a model whose parts outside the decoder blocks are in memory, and `open(index)`,
inside which the weights of one block are. The rest of the pipeline knows only this.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from maskopt.errors import ModelError
from maskopt.model.blocks import Blocks, Layer
from maskopt.model.checkpoint import Checkpoint
from maskopt.model.maskfile import MaskFile, TensorMask
from maskopt.model.transformers_adapter import (
    Conversion,
    initialise,
    revert,
    set_eager_experts,
    tie,
)

if TYPE_CHECKING:
    from maskopt.model.output import Run


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

    def open(self, index: int, masks: MaskFile | None = None) -> Any:
        """Context in which the weights of block `index` are in memory; yields the block.

        `masks` are applied to the checkpoint's tensors on reading.
        """
        ...

    def head(self) -> AbstractContextManager[None]:
        """Context in which the output head is in memory, too."""
        ...

    def stored(
        self, index: int, masks: Mapping[str, tuple[Layer, Tensor]]
    ) -> dict[str, TensorMask]:
        """Masks of layers [rows, n] as masks of the tensors that the checkpoint stores."""
        ...

    def block_memory(self) -> int:
        """Bytes of the blocks' weights that are in memory at the peak."""
        ...

    def start_run(
        self,
        layers: Sequence[Layer],
        output: Path | None,
        *,
        tokenizer: Any,
        overwrite: bool,
        resume: bool,
    ) -> Run:
        """Where the masks of a prune go.

        Raises:
            ModelError: such a model cannot be written there, or not be resumed.
        """
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

    @contextmanager
    def open(self, index: int, masks: MaskFile | None = None) -> Iterator[nn.Module]:
        if masks is not None:
            raise ModelError("a model in memory cannot be resumed; prune its folder instead")
        block = self.blocks.modules[index]
        for name, parameter in block.named_parameters():
            _check_finite(self.blocks.prefix(index) + name, parameter)
        yield block

    def head(self) -> AbstractContextManager[None]:
        return nullcontext()

    def stored(
        self, index: int, masks: Mapping[str, tuple[Layer, Tensor]]
    ) -> dict[str, TensorMask]:
        merged = merge_experts(self.model, masks)
        return to_checkpoint(self.model, merged, None)

    def block_memory(self) -> int:
        return sum(p.nbytes for block in self.blocks.modules for p in block.parameters())

    def start_run(
        self,
        layers: Sequence[Layer],
        output: Path | None,
        *,
        tokenizer: Any,
        overwrite: bool,
        resume: bool,
    ) -> Run:
        from maskopt.model.output import MemoryRun

        if resume:
            raise ModelError("resume needs a model folder; a model in memory is pruned in one go")
        return MemoryRun(self, output, tokenizer, overwrite)


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
        self._loader = _Loader(self.model, checkpoint, device)
        _real_buffers(self.model, device)
        self._outside = [name for name, _ in self.blocks.outside()]

    def tensors_of(self, layer: Layer) -> list[str]:
        """The checkpoint tensors that the layer's parameter is made of."""
        return self._loader.conversion.sources(layer.parameter)

    def load_outside(self) -> None:
        return_memory()  # a large vocabulary's text and tokenizer take half a gigabyte
        self._loader.load(self._outside)
        _check_buffers(self.model)

    @contextmanager
    def open(self, index: int, masks: MaskFile | None = None) -> Iterator[nn.Module]:
        block = self.blocks.modules[index]
        prefix = self.blocks.prefix(index)
        self._loader.load([prefix + name for name, _ in block.named_parameters()], masks)
        try:
            yield block
        finally:
            _release(block)

    @contextmanager
    def head(self) -> Iterator[None]:
        """As in `Source`. An input embedding that is not shared makes room for the head: it gives
        zeros until it is loaded again."""
        own = [name for name, _ in self.blocks.own_head()]
        if not own:
            yield
            return
        embedding: Any = self.blocks.embedding
        width, dtype = embedding.weight.shape[1], embedding.weight.dtype
        _release(embedding)

        def zeros(ids: Tensor) -> Tensor:
            return torch.zeros(*ids.shape, width, dtype=dtype, device=self.device)

        self._loader.load(own)
        embedding.forward = zeros
        try:
            yield
        finally:
            del embedding.forward

    def stored(
        self, index: int, masks: Mapping[str, tuple[Layer, Tensor]]
    ) -> dict[str, TensorMask]:
        merged = merge_experts(self.model, masks)
        return to_checkpoint(self.model, merged, self._loader)

    def block_memory(self) -> int:
        """A block is read in its stored dtype and converted; one tensor of it is held twice."""
        working = next(self.model.parameters()).dtype.itemsize
        stored = stored_dtype(self.checkpoint).itemsize
        largest = max(
            sum(p.numel() for p in block.parameters()) * working for block in self.blocks.modules
        )
        return largest + (largest * stored // working if stored != working else 0)

    def start_run(
        self,
        layers: Sequence[Layer],
        output: Path | None,
        *,
        tokenizer: Any,
        overwrite: bool,
        resume: bool,
    ) -> Run:
        from maskopt.model.output import FolderRun

        if output is None:
            raise ModelError("pruning a model folder needs an output folder: name `output`")
        return FolderRun(self, layers, output, overwrite=overwrite, resume=resume)


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


def merge_experts(
    model: nn.Module, masks: Mapping[str, tuple[Layer, Tensor]]
) -> dict[str, TensorMask]:
    """Masks of layers as masks of parameters, in their stored layout."""
    merged: dict[str, TensorMask] = {}
    for layer, kept in masks.values():
        oriented = kept if layer.input_axis == 1 else kept.T
        if layer.expert is None:
            merged[layer.parameter] = TensorMask(oriented.contiguous(), layer.input_axis)
            continue
        if layer.parameter not in merged:
            shape = model.get_parameter(layer.parameter).shape
            whole = torch.ones(shape, dtype=torch.bool)
            merged[layer.parameter] = TensorMask(whole, layer.input_axis + 1)
        merged[layer.parameter].kept[layer.expert] = oriented
    return merged


def to_checkpoint(
    model: nn.Module, masks: Mapping[str, TensorMask], loader: _Loader | None
) -> dict[str, TensorMask]:
    """Masks of parameters as masks of checkpoint tensors.

    Where the checkpoint stores a parameter otherwise (experts one by one, say), transformers' own
    conversion for saving is applied to the mask.
    """
    result: dict[str, TensorMask] = {}
    for name, mask in masks.items():
        sources = None if loader is None else loader.conversion.sources(name)
        if sources is not None and len(sources) == 1 and not loader_converts(loader, name):
            result[sources[0]] = mask
            continue
        reverted = revert(model, {name: mask.kept})
        if sources is not None and set(reverted) != set(sources):
            raise ModelError(
                f"parameter {name!r} is stored as {', '.join(sources[:3])}, which cannot be matched"
            )
        kept_axis = mask.input_axis - mask.kept.ndim
        for key, part in reverted.items():
            axis = kept_axis + part.ndim
            if _swapped(mask, part):
                axis = part.ndim - 2 if axis == part.ndim - 1 else part.ndim - 1
            result[key] = TensorMask(part.contiguous(), axis)
    if loader is not None:
        for key, mask in result.items():
            if loader.checkpoint.entry(key).shape != tuple(mask.kept.shape):
                raise ModelError(f"tensor {key!r} is not stored in the shape of its parameter")
    return result


def loader_converts(loader: _Loader | None, name: str) -> bool:
    return loader is not None and name in loader.conversion.converted


def _swapped(mask: TensorMask, part: Tensor) -> bool:
    """Did a conversion exchange inputs and outputs? The number of inputs tells."""
    n = mask.kept.shape[mask.input_axis]
    axis = mask.input_axis - mask.kept.ndim
    return part.shape[axis] != n


class _Loader:
    """Loads named parameters out of a checkpoint."""

    def __init__(self, model: Any, checkpoint: Checkpoint, device: torch.device) -> None:
        self.model, self.checkpoint, self.device = model, checkpoint, device
        self.conversion = Conversion(model, checkpoint.where, str(checkpoint.folder))
        self._loaded_buffers = False

    def load(self, names: Iterable[str], masks: MaskFile | None = None) -> None:
        """Bring parameters into memory, masked where `masks` knows their tensors.

        Raises:
            ModelError: a parameter without a tensor, or of another shape.
        """
        wanted = list(names)
        buffers = [] if self._loaded_buffers else [key for key, _ in self.model.named_buffers()]
        self._loaded_buffers = True
        state = {key: self._read(key, masks) for key in self.conversion.needed([*wanted, *buffers])}
        with quietly(), torch.no_grad():
            self.conversion.load(state, self.device)
            missing = self._without_data(wanted)
            if missing:
                tie(self.model, missing)
                missing = self._without_data(wanted)
            if missing:
                raise ModelError(
                    f"{self.checkpoint.folder}: no tensor for parameter {min(missing)!r}"
                )
        for name in wanted:
            parameter = self.model.get_parameter(name)
            parameter.requires_grad_(False)
            _check_finite(name, parameter)

    def _without_data(self, names: Iterable[str]) -> set[str]:
        return {name for name in names if self.model.get_parameter(name).is_meta}

    def _read(self, key: str, masks: MaskFile | None) -> Tensor:
        tensor = self.checkpoint.read(key)
        if masks is not None and key in masks:
            tensor.masked_fill_(~masks.read(key).kept, 0)
        return tensor


def _check_finite(name: str, parameter: Tensor) -> None:
    """Slab by slab: a whole embedding's answer would take a quarter of its size again."""
    if parameter.is_floating_point():
        for slab in parameter.detach().split(4096):
            if not bool(torch.isfinite(slab).all()):
                raise ModelError(f"parameter {name!r} holds NaN or infinite weights")


def _release(module: nn.Module) -> None:
    """Leave the module's parameters without data."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            empty = torch.empty_like(parameter, device="meta")
            setattr(part, name, nn.Parameter(empty, requires_grad=False))
    return_memory()


def return_memory() -> None:
    """Ask the C library to give freed memory back to the system, where it can be asked (glibc)."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def quietly() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _real_buffers(model: Any, device: torch.device) -> None:
    """Give every buffer memory and its initial value (position frequencies and the like)."""
    from transformers import PreTrainedModel

    owners = [(name, m) for name, m in model.named_modules() if isinstance(m, PreTrainedModel)]
    with torch.no_grad():
        for path, module in model.named_modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                real = torch.empty_like(buffer, device=device)
                module._buffers[name] = real.fill_(_unset(real.dtype))
            if any(True for _ in module.named_buffers(recurse=False)):
                inside = [o for o in owners if not o[0] or (path + ".").startswith(o[0] + ".")]
                initialise(max(inside, key=lambda owner: len(owner[0]))[1], module)


def _check_buffers(model: nn.Module) -> None:
    for name, buffer in model.named_buffers():
        unset = _unset(buffer.dtype)
        same = torch.isnan(buffer) if isinstance(unset, float) else buffer == unset
        if buffer.numel() and buffer.dtype != torch.bool and bool(same.all()):
            raise ModelError(
                f"buffer {name!r} is neither stored nor computed by transformers; "
                "load the model in memory and give it to prune_model"
            )


def _unset(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return math.nan
    return False if dtype == torch.bool else torch.iinfo(dtype).min if dtype.is_signed else 255

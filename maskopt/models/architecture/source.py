"""Sources of weights: a model in memory, or a folder read block by block.

Both are a `Source`: a model whose parts outside the decoder blocks are in memory, and `open(index)`, inside
which one block's weights are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from maskopt.core.inputs import all_finite
from maskopt.errors import DataError, ModelError, first_line
from maskopt.models.architecture.blocks import Blocks, Layer, matrix, merged, text_config
from maskopt.models.architecture.transformers_adapter import (
    Conversion,
    check_buffers,
    check_finite,
    empty_model,
    quietly,
    real_buffers,
    release,
    return_memory,
    revert,
    set_eager_experts,
    share_equal,
    tie,
)
from maskopt.models.checkpoints.bos import no_panic
from maskopt.models.checkpoints.checkpoint import Checkpoint, open_checkpoint, resolve_model
from maskopt.models.checkpoints.result import Edits, MaskFile, TensorMask

DTYPES = {x: getattr(torch, x) for x in ("float32", "float64", "bfloat16", "float16")}


class Source:
    """Model that is in memory as a whole; `checkpoint`: the folder that it was read from, if any."""

    checkpoint: Checkpoint | None = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.blocks = Blocks(model)
        self.device = next(model.parameters()).device
        meta = [name for name, p in model.named_parameters() if p.is_meta]
        if meta:
            raise ModelError(f"parameter {meta[0]!r} has no data; load the model fully first")

    def load_outside(self) -> None:
        """Bring everything outside the blocks into memory, but for an output head of its own."""

    def load_whole(self) -> None:
        """Bring all weights into memory."""

    @contextmanager
    def open(self, index: int, edits: Edits | None = None) -> Iterator[nn.Module]:
        """Enter a context in which a block's weights are in memory, after `edits`; yield the block."""
        if edits is not None:
            raise ModelError("a model in memory cannot be resumed; prune its folder instead")
        block = self.blocks.modules[index]
        for name, parameter in block.named_parameters():
            check_finite(self.blocks.prefix(index) + name, parameter)
        yield block

    @contextmanager
    def head(self, like: Source | None = None) -> Iterator[None]:
        """Enter a context in which all after the blocks is in memory, what `like` has, too, once."""
        yield

    def drop(self) -> None:
        """Hold nothing in memory until `head` or `load_outside`; a model that came in memory stays."""

    def stored_as_is(self, name: str) -> str | None:
        """Return the tensor that a parameter is stored as; None where it is stored in another form."""
        return name

    def parameter_dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a parameter is stored in."""
        return self.model.get_parameter(name).dtype

    def vectors(self, index: int) -> Mapping[str, tuple[str, torch.dtype]]:
        """Return norms and biases of a block that are stored unchanged: tensor and dtype by parameter."""
        others = [block for number, block in enumerate(self.blocks.modules) if number != index]
        shared = {id(p) for block in others for p in block.parameters()}
        prefix, vectors = self.blocks.prefix(index), {}
        for name, parameter in self.blocks.modules[index].named_parameters():
            if parameter.ndim == 1 and id(parameter) not in shared:
                tensor = self.stored_as_is(prefix + name)
                if tensor is not None:
                    vectors[prefix + name] = tensor, self.parameter_dtype(prefix + name)
        return vectors

    def block_memory(self) -> int:
        """Return the bytes of the blocks' weights that are in memory at the peak."""
        return sum(p.nbytes for block in self.blocks.modules for p in block.parameters())


class FolderSource(Source):
    """Model folder of which only the open block and what lies outside the blocks are in memory."""

    checkpoint: Checkpoint
    model: Any

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype | None,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        dtype = dtype or stored_dtype(checkpoint)
        trusted = trust_remote_code
        self.model = empty_model(checkpoint.folder, dtype=dtype, trust_remote_code=trusted).eval()
        set_eager_experts(self.model)
        self.blocks = Blocks(self.model)
        self.conversion = Conversion(self.model, checkpoint.where, str(checkpoint.folder))
        self._loaded_buffers = False
        real_buffers(self.model, device)
        self._outside = [name for name, _ in self.blocks.outside()]

    def load_outside(self) -> None:
        return_memory()  # a large vocabulary's text and tokenizer take half a gigabyte
        self._load(self._outside)
        check_buffers(self.model)

    def load_whole(self) -> None:
        self._load([name for name, _ in self.model.named_parameters()])
        check_buffers(self.model)

    @contextmanager
    def open(self, index: int, edits: Edits | None = None) -> Iterator[nn.Module]:
        block = self.blocks.modules[index]
        prefix = self.blocks.prefix(index)
        self._load([prefix + name for name, _ in block.named_parameters()], edits)
        try:
            yield block
        finally:
            release(block)

    @contextmanager
    def head(self, like: Source | None = None) -> Iterator[None]:
        """Load what comes after the blocks.

        An input embedding that the head does not share makes room for it, and returns zeros meanwhile.
        Afterwards nothing of the model is in memory until `load_outside`.
        """
        needed = self._outside
        embedding: Any = self.blocks.embedding
        head = [name for name, _ in self.blocks.own_head()]
        if head:
            release(embedding)
            looked_up = {id(p) for p in embedding.parameters()}
            needed = head + [n for n, p in self.blocks.outside() if id(p) not in looked_up]
            more = {"dtype": embedding.weight.dtype, "device": self.device}
            width = embedding.weight.shape[1]
            embedding.forward = lambda ids: torch.zeros(*ids.shape, width, **more)
        try:
            self._load(name for name in needed if self.model.get_parameter(name).is_meta)
            if like is not None:
                share_equal(self.model, like.model)
            yield
        finally:
            embedding.__dict__.pop("forward", None)
            self.drop()

    def drop(self) -> None:
        release(self.model)

    def _load(self, names: Iterable[str], edits: Edits | None = None) -> None:
        """Bring parameters into memory, after edits; ModelError for one without a tensor of its shape."""
        wanted = list(names)
        buffers = [] if self._loaded_buffers else [key for key, _ in self.model.named_buffers()]
        self._loaded_buffers = True
        needed = self.conversion.needed([*wanted, *buffers])
        state = {key: self.checkpoint.read(key) for key in needed}
        if edits is not None:
            for key, tensor in state.items():
                edits.apply(key, tensor)
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
            check_finite(name, parameter)

    def _without_data(self, names: Iterable[str]) -> set[str]:
        return {name for name in names if self.model.get_parameter(name).is_meta}

    def stored(self, masks: Mapping[str, tuple[Layer, Tensor]]) -> dict[str, TensorMask]:
        """Return masks of layers [rows, n] as masks of the tensors that the checkpoint stores."""
        result: dict[str, TensorMask] = {}
        axes = {x.parameter: x.input_axis + (x.expert is not None) for x, _ in masks.values()}
        for name, kept in merged(self.model, masks, True).items():
            from_end = axes[name] - kept.ndim
            for key, part in self._as_stored(name, kept).items():
                axis = part.ndim + from_end
                if part.shape[axis] != kept.shape[from_end]:  # the conversion exchanged both
                    axis = part.ndim - 2 if axis == part.ndim - 1 else part.ndim - 1
                result[key] = TensorMask(part.contiguous(), axis)
        return result

    def _as_stored(self, name: str, whole: Tensor) -> dict[str, Tensor]:
        """Return a parameter as the tensors that the checkpoint stores."""
        tensor, sources = self.conversion.stored_as_is(name), self.conversion.sources(name)
        stored = revert(self.model, {name: whole}) if tensor is None else {tensor: whole}
        if set(stored) != set(sources):
            raise ModelError(
                f"parameter {name!r} is stored as {', '.join(sources[:3])}, which cannot be matched"
            )
        for key, part in stored.items():
            if self.checkpoint.entry(key).shape != tuple(part.shape):
                raise ModelError(f"tensor {key!r} is not stored in the shape of its parameter")
        return stored

    def stored_as_is(self, name: str) -> str | None:
        return self.conversion.stored_as_is(name)

    def parameter_dtype(self, name: str) -> torch.dtype:
        return self.checkpoint.entry(self.conversion.sources(name)[0]).torch_dtype

    def stored_parameters(self, free: Mapping[str, Bool[Tensor, ...]]) -> dict[str, Tensor]:
        """Return parameters in memory as tensors of the checkpoint; NaN where `free` is False."""
        result: dict[str, Tensor] = {}
        for name, entries in free.items():
            value = self.model.get_parameter(name).detach().to("cpu", self.parameter_dtype(name))
            value = value.masked_fill(~entries.cpu(), torch.nan)
            result |= {key: x.contiguous() for key, x in self._as_stored(name, value).items()}
        return result

    def stored_values(self, values: Mapping[str, tuple[Layer, Tensor]]) -> dict[str, Tensor]:
        """Return new weights of layers [rows, n], float64, as tensors of the checkpoint; NaN elsewhere."""
        typed = {k: (x, v.to(self.parameter_dtype(x.parameter))) for k, (x, v) in values.items()}
        result: dict[str, Tensor] = {}
        for name, whole in merged(self.model, typed, torch.nan).items():
            result |= {key: x.contiguous() for key, x in self._as_stored(name, whole).items()}
        return result

    def block_memory(self) -> int:
        """Return the bytes of the largest block, read in its stored dtype and converted."""
        working = next(self.model.parameters()).dtype.itemsize
        stored = stored_dtype(self.checkpoint).itemsize
        sizes = [sum(p.numel() for p in block.parameters()) for block in self.blocks.modules]
        largest = max(sizes) * working
        return largest + (largest * stored // working if stored != working else 0)


def as_stored(source: Source, layer: Layer, weight: Tensor) -> Tensor:
    """Round new weights of a layer [rows, n] to the stored dtype, float64; ModelError beyond its range."""
    dtype = source.parameter_dtype(layer.parameter)
    rounded = weight.to(dtype).double()
    if not all_finite(rounded):
        raise ModelError(
            f"layer {layer.name!r}: a new weight is beyond the range of {dtype}; take a larger `damping`"
        )
    return rounded


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the floating dtype that most of the checkpoint's bytes are in."""
    sizes: dict[torch.dtype, int] = {}
    for shard in checkpoint.shards.values():
        for entry in shard.entries.values():
            if entry.torch_dtype.is_floating_point:
                sizes[entry.torch_dtype] = sizes.get(entry.torch_dtype, 0) + entry.size
    if not sizes:
        raise ModelError(f"{checkpoint.folder}: the shards hold no floating-point weights")
    return max(sizes, key=lambda dtype: sizes[dtype])


def open_source(
    model: nn.Module | str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Source:
    """Open a model as a `Source`, in evaluation mode; ModelError for a device, dtype or model of no use."""
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"`dtype` must be one of: auto, {', '.join(DTYPES)}; not {dtype!r}")
    if isinstance(model, nn.Module):
        if dtype != "auto":
            raise ModelError("`dtype` is for model folders; convert a model in memory beforehand")
        if device != "auto":
            model.to(choose_device(device))
        model.eval()
        set_eager_experts(model)
        return Source(model)
    target = choose_device(device)
    folder = resolve_model(model, trust_remote_code=trust_remote_code)
    checkpoint = open_checkpoint(folder, trust_remote_code=trust_remote_code)
    working = DTYPES.get(dtype, torch.float32 if target.type == "cpu" else None)
    return FolderSource(checkpoint, target, working, trust_remote_code=trust_remote_code)


def choose_device(device: str) -> torch.device:
    """Return `cpu`, `cuda`, `cuda:N` or `auto` as a device; ModelError where there is no such device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise ModelError(f"unknown device {device!r}; use cpu, cuda or auto")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("no CUDA device is available here; use `device` cpu or auto")
    return chosen


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load the folder's tokenizer; None where it has none (token tensors need none)."""
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    try:
        with no_panic(folder):
            return AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except DataError:
        raise
    except Exception as error:  # tokenizers fail in as many ways as there are of them
        reason = f"{folder}: the tokenizer cannot be loaded: {first_line(error)}"
        raise ModelError(reason) from error


def capped_length(model: nn.Module, seq_len: int) -> int:
    """Return the length of a window: `seq_len`, or all positions of the model where it has fewer."""
    positions = getattr(text_config(model), "max_position_embeddings", None)
    return min(seq_len, positions) if isinstance(positions, int) and positions > 0 else seq_len


@dataclass(frozen=True)
class MasksAsWeights(Checkpoint):
    """Checkpoint whose tensors are their masks, 1 = kept, and 0 where there is none."""

    masks: MaskFile

    def read(self, name: str) -> Tensor:
        if name in self.masks:
            return self.masks.read(name).kept.to(torch.bfloat16)
        return torch.zeros(self.entry(name).shape, dtype=torch.bfloat16)


def masks_as_model(checkpoint: Checkpoint, path: Path, *, trust_remote_code: bool) -> FolderSource:
    """Return the checkpoint's model, whose weights are the masks in a file."""
    as_weights = MasksAsWeights(
        checkpoint.folder, checkpoint.config, checkpoint.shards, checkpoint.where, MaskFile(path)
    )
    cpu = torch.device("cpu")
    return FolderSource(as_weights, cpu, torch.bfloat16, trust_remote_code=trust_remote_code)


def layer_masks(
    checkpoint: Checkpoint, path: Path, *, trust_remote_code: bool = False
) -> Iterator[tuple[Layer, Bool[Tensor, "rows n"]]]:
    """Yield the layers that have a mask, and the mask, True = kept; those of one block are in memory."""
    source = masks_as_model(checkpoint, path, trust_remote_code=trust_remote_code)
    masked = set(MaskFile(path).names)
    for index in range(len(source.blocks)):
        layers = source.blocks.layers(index)
        layers = [x for x in layers if masked & {*source.conversion.sources(x.parameter)}]
        if layers:
            with source.open(index):
                for layer in layers:
                    yield layer, matrix(source.model, layer) != 0

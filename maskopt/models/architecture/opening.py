"""Open a model: in memory or a folder, on the right device, in the right precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskopt.errors import DataError, ModelError
from maskopt.models.architecture.source import FolderSource, MemorySource, Source, stored_dtype
from maskopt.models.architecture.transformers_adapter import set_eager_experts
from maskopt.models.checkpoints.bos import no_panic
from maskopt.models.checkpoints.checkpoint import open_checkpoint, resolve_model

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def open_source(
    model: nn.Module | str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Source:
    """A model as a `Source`; one in memory is put into evaluation mode.

    Raises:
        ModelError: no CUDA where `cuda` is asked, an unknown device or dtype, or a model that
            cannot be read.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"`dtype` must be auto or one of {', '.join(DTYPES)}, not {dtype!r}")
    if isinstance(model, nn.Module):
        if dtype != "auto":
            raise ModelError("`dtype` is for model folders; convert a model in memory beforehand")
        if device != "auto":
            model.to(choose_device(device))
        model.eval()
        set_eager_experts(model)
        return MemorySource(model)
    target = choose_device(device)
    folder = resolve_model(model, trust_remote_code=trust_remote_code)
    checkpoint = open_checkpoint(folder, trust_remote_code=trust_remote_code)
    if dtype == "auto":
        working = torch.float32 if target.type == "cpu" else stored_dtype(checkpoint)
    else:
        working = DTYPES[dtype]
    return FolderSource(checkpoint, target, working, trust_remote_code=trust_remote_code)


def choose_device(device: str) -> torch.device:
    """cpu, cuda, cuda:N or auto as a device that is there.

    Raises:
        ModelError: no CUDA, or no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ModelError(f"unknown device {device!r}; use cpu, cuda or auto") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ModelError(f"unknown device {device!r}; use cpu, cuda or auto")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("no CUDA device is available here; use `device` cpu or auto")
    return chosen


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer, or None where it has none (token tensors need none)."""
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
        line = (str(error).splitlines() or [""])[0]
        raise ModelError(f"{folder}: the tokenizer cannot be loaded: {line}") from error


def capped_length(model: nn.Module, seq_len: int) -> int:
    """Never longer than the model has positions; never longer because it has more of them."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    return min(seq_len, positions) if isinstance(positions, int) and positions > 0 else seq_len

"""A pruned folder without its zeros: kept values and masks, and back again, bit for bit.

Each shard becomes a safetensors file: the shard's header, tensors without a mask unchanged (`=name`), and of
the others the kept values in the order of the tensor (`~name`). Their places are in the folder's mask file,
one bit a weight: 1 − s + 1/16 of the size of bfloat16 weights at sparsity s.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from maskopt.errors import ModelError
from maskopt.models.checkpoints.checkpoint import (
    SafeFile,
    TensorEntry,
    bytes_of,
    damage,
    open_checkpoint,
    open_safe,
    safe_header,
    write_file,
)
from maskopt.models.checkpoints.result import (
    MaskFile,
    check_masks,
    copy_file,
    is_side_file,
    side_files,
)
from maskopt.models.checkpoints.schema import BASES, MANIFEST, MASKS, WRITTEN, read_manifest
from maskopt.models.checkpoints.workspace import check_output, open_workspace

FORMAT = "maskopt-packed-1"
#: in place of `.safetensors`: nothing takes it for weights
SUFFIX = ".packed"
#: lists the files of a packed folder: its manifest is that of the pruned one
PACKED = "maskopt-pack.json"
#: tokenizers that were saved from memory may have these, too
_SAVED = (".bpe", ".codes", ".spm", ".vocab")
_HEADER, _WHOLE, _KEPT = "header", "=", "~"


def pack(
    pruned: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    tick: Callable[[int], None] = lambda _: None,
) -> Path:
    """Write a pruned folder without its zeros; `tick` is called with bytes done."""
    checkpoint, target = open_checkpoint(pruned), Path(output)
    check_output(target, overwrite=overwrite, model=checkpoint.folder)
    masks = MaskFile(checkpoint.folder / MASKS)
    digests = read_manifest(checkpoint.folder / MANIFEST)["files"]
    check_masks(checkpoint, masks)
    others = _others(checkpoint.folder, digests, checkpoint.shards)
    _check_unchanged(checkpoint.folder, {**dict.fromkeys(checkpoint.shards, ""), **digests})
    with open_workspace(target, overwrite=overwrite) as work:
        for name, shard in checkpoint.shards.items():
            write_file(work.staging / _packed_name(name), _packed(shard, masks, tick))
        for name in others:
            copy_file(checkpoint.folder / name, work.staging / name)
        work.write_record(PACKED)
        work.commit()
    return target


def unpack_folder(
    packed: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    tick: Callable[[int], None] = lambda _: None,
) -> Path:
    """Restore the folder that was packed, bit for bit; ModelError for what `pack` did not write."""
    folder, target = Path(packed), Path(output)
    check_output(target, overwrite=overwrite, model=folder)
    masks, digests = MaskFile(folder / MASKS), read_manifest(folder / MANIFEST)["files"]
    packed_shards = {_packed_name(n): n for n in digests if n.endswith(".safetensors")}
    if not any((folder / name).is_file() for name in packed_shards):
        raise ModelError(f"{folder}: holds no file that `maskopt masks pack` wrote")
    others = _others(folder, digests, packed_shards.values())
    _check_unchanged(folder, {name: x for name, x in digests.items() if name in others})
    with open_workspace(target, overwrite=overwrite) as work:
        for packed_name, name in packed_shards.items():
            path = folder / packed_name
            digest = write_file(work.staging / name, _unpacked(_open_packed(path), masks, tick))
            open_safe(work.staging / name)
            if digest != digests[name]:
                raise ModelError(f"{path}: does not give the file of the manifest: it was changed")
        for name in others:
            copy_file(folder / name, work.staging / name)
        work.commit()
    return target


def load_packed(packed: str | Path, **options: Any) -> Any:
    """The model of a packed folder; `options` as for `AutoModelForCausalLM.from_pretrained`."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory(prefix="maskopt-packed-") as home:
        folder = unpack_folder(packed, Path(home) / "model")
        return AutoModelForCausalLM.from_pretrained(folder, **options)


def _others(folder: Path, digests: dict[str, str], shards: Collection[str]) -> list[str]:
    """Names of all files but shards; ModelError for one that is no part of a model."""
    for name in digests:
        ours = name in (MASKS, BASES, WRITTEN) or name.endswith((".safetensors", *_SAVED))
        known = ours or is_side_file(name)
        if name.startswith(".") or not known:
            raise ModelError(
                f"{folder / MANIFEST}: lists {name!r}, and packed folders hold no hidden files and no code"
            )
    return sorted({*digests, MASKS, MANIFEST, *side_files(folder, shards)} - {*shards})


def _check_unchanged(folder: Path, digests: dict[str, str]) -> None:
    if what := damage(folder, digests):
        raise ModelError(
            f"{folder}: {what}, and could not be packed and unpacked; take what `maskopt prune` wrote"
        )


def _packed(shard: SafeFile, masks: MaskFile, tick: Callable[[int], None]) -> Iterator[Any]:
    """The bytes of a packed shard."""
    head = shard.header_bytes()
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {_HEADER: ("U8", (len(head),))}
    for entry in shard.entries.values():
        if entry.name in masks:
            shapes[_KEPT + entry.name] = entry.dtype, (int(_kept(masks, entry.name).sum()),)
        else:
            shapes[_WHOLE + entry.name] = "U8", (entry.size,)
    yield safe_header(shapes, {"format": FORMAT})
    yield head
    for entry in shard.entries.values():
        if entry.name in masks:
            words, kept = _words(shard, entry), _kept(masks, entry.name)
            if words[~kept].any():
                raise ModelError(
                    f"{shard.path}: {entry.name!r} holds weights that its mask prunes; pack what `maskopt "
                    "prune` wrote"
                )
            yield words[kept].view(np.uint8)
        else:
            yield from shard.chunks(entry)
        tick(entry.size)


def _unpacked(
    packed: SafeFile, masks: MaskFile, tick: Callable[[int], None]
) -> Iterator[np.ndarray]:
    """The bytes of a shard out of a packed one."""
    for entry in packed.entries.values():
        if entry.name.startswith(_KEPT):
            name, values = entry.name.removeprefix(_KEPT), _words(packed, entry)
            if name not in masks:
                raise ModelError(f"{packed.path}: {name!r} has no mask")
            kept = _kept(masks, name)
            if len(values) != kept.sum():
                raise ModelError(
                    f"{packed.path}: {name!r} holds another number of values than its mask"
                )
            words = np.zeros(len(kept), values.dtype)
            words[kept] = values
            yield words.view(np.uint8)
        else:
            yield from packed.chunks(entry)
        tick(entry.size)


def _words(file: SafeFile, entry: TensorEntry) -> np.ndarray:
    """A tensor's elements, as whole numbers of their size."""
    return bytes_of(file.read(entry.name)).view(f"u{entry.torch_dtype.itemsize}")


def _kept(masks: MaskFile, name: str) -> np.ndarray:
    return masks.read(name).kept.view(-1).numpy()


def _open_packed(path: Path) -> SafeFile:
    found = open_safe(path)
    first, *names = found.entries or ("",)
    right = found.metadata.get("format") == FORMAT and first == _HEADER
    if not right or not all(name[0] in (_WHOLE, _KEPT) for name in names):
        raise ModelError(f"{path}: is not what `maskopt masks pack` writes")
    return found


def _packed_name(shard: str) -> str:
    return shard.removesuffix(".safetensors") + SUFFIX

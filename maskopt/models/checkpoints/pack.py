"""A pruned folder without its zeros: kept values and masks, and back again, bit for bit.

Each shard becomes a safetensors file: the shard's header, tensors without a mask unchanged (`=name`), and of
the others the kept values in the order of the tensor (`~name`). Their places are in the folder's mask file,
one bit a weight: 1 − s + 1/16 of the size of bfloat16 weights at sparsity s.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from maskopt.errors import ModelError
from maskopt.models.checkpoints.checkpoint import (
    CHUNK,
    SafeFile,
    TensorEntry,
    file_digest,
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
    unpack,
)
from maskopt.models.checkpoints.schema import MANIFEST, MASKS, read_manifest
from maskopt.models.checkpoints.workspace import check_output, open_workspace

FORMAT = "maskopt-packed-1"
#: in place of `.safetensors`: nothing takes it for weights
SUFFIX = ".packed"
#: lists the files of a packed folder: its manifest is that of the pruned one
PACKED = "maskopt-pack.json"
#: tokenizers that were saved from memory may have these, too
_SAVED = (".bpe", ".codes", ".spm", ".vocab")
_HEADER, _WHOLE, _KEPT = "header", "=", "~"
#: elements at a time; a multiple of 8, so that masks are cut between bytes
_STEP = CHUNK // 8


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
    for name, digest in checkpoint.shard_digests.items():
        if digests.get(name) != digest:
            raise _changed(checkpoint.folder / name)
    others = _others(checkpoint.folder, digests, checkpoint.shards)
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
    missing = [name for name in packed_shards if not (folder / name).is_file()]
    if len(missing) == len(packed_shards):
        raise ModelError(f"{folder}: holds no file that `maskopt masks pack` wrote")
    if missing:
        raise ModelError(f"{folder / missing[0]}: is missing")
    others = _others(folder, digests, packed_shards.values())
    with open_workspace(target, overwrite=overwrite) as work:
        for packed_name, name in packed_shards.items():
            path = folder / packed_name
            digest = write_file(work.staging / name, _unpacked(_open_packed(path), masks, tick))
            open_safe(work.staging / name)
            if digest != digests.get(name):
                raise ModelError(f"{path}: does not give the file of the manifest: it was changed")
        for name in others:
            copy_file(folder / name, work.staging / name)
        work.commit()
    return target


def load_packed(packed: str | Path, **options: Any) -> Any:
    """The model of a packed folder; `options` as for `AutoModelForCausalLM.from_pretrained`."""
    import tempfile

    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory(prefix="maskopt-packed-") as home:
        folder = unpack_folder(packed, Path(home) / "model")
        return AutoModelForCausalLM.from_pretrained(folder, **options)


def _others(folder: Path, digests: dict[str, str], shards: Collection[str]) -> list[str]:
    """Names of all files but shards; ModelError for a missing, changed or unknown one."""
    for name in digests:
        known = is_side_file(name) or name == MASKS or name.endswith((".safetensors", *_SAVED))
        if name.startswith(".") or not known:
            raise ModelError(
                f"{folder / MANIFEST}: lists {name!r}, and packed folders hold no hidden files and no code"
            )
    listed = [name for name in {**digests, MASKS: ""} if name not in shards]
    for name in listed:
        path = folder / name
        if not path.is_file():
            raise ModelError(f"{path}: is missing")
        if digests.get(name, "") not in ("", file_digest(path)):
            raise _changed(path)
    return sorted({*listed, MANIFEST, *side_files(folder, shards)})


def _changed(path: Path) -> ModelError:
    return ModelError(
        f"{path}: was changed since the prune, and could not be packed and unpacked; take what "
        "`maskopt prune` wrote"
    )


def _packed(shard: SafeFile, masks: MaskFile, tick: Callable[[int], None]) -> Iterator[Any]:
    """The bytes of a packed shard."""
    head = shard.header_bytes()
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {_HEADER: ("U8", (len(head),))}
    for entry in shard.entries.values():
        if entry.name in masks:
            kept = sum(int(part.sum()) for part in _parts(masks, entry.name))
            shapes[_KEPT + entry.name] = entry.dtype, (kept,)
        else:
            shapes[_WHOLE + entry.name] = "U8", (entry.size,)
    yield safe_header(shapes, {"format": FORMAT})
    yield head
    for entry in shard.entries.values():
        yield from _packed_chunks(shard, entry, masks)
        tick(entry.size)


def _packed_chunks(shard: SafeFile, entry: TensorEntry, masks: MaskFile) -> Iterator[np.ndarray]:
    if entry.name not in masks:
        yield from shard.chunks(entry, CHUNK)
        return
    size = entry.torch_dtype.itemsize
    chunks = shard.chunks(entry, _STEP * size)
    for chunk, kept in zip(chunks, _parts(masks, entry.name), strict=True):
        words = chunk.view(f"u{size}")
        if words[~kept].any():
            raise ModelError(
                f"{shard.path}: {entry.name!r} holds weights that its mask prunes; pack what `maskopt prune` "
                "wrote"
            )
        yield words[kept].view(np.uint8)


def _unpacked(
    packed: SafeFile, masks: MaskFile, tick: Callable[[int], None]
) -> Iterator[np.ndarray]:
    """The bytes of a shard out of a packed one."""
    for entry in packed.entries.values():
        kept = entry.name.startswith(_KEPT)
        yield from _whole_chunks(packed, entry, masks) if kept else packed.chunks(entry, CHUNK)
        tick(entry.size)


def _whole_chunks(packed: SafeFile, entry: TensorEntry, masks: MaskFile) -> Iterator[np.ndarray]:
    """A tensor with its zeros, out of its kept values."""
    name, size = entry.name.removeprefix(_KEPT), entry.torch_dtype.itemsize
    if name not in masks:
        raise ModelError(f"{packed.path}: {name!r} has no mask")
    done = 0
    for kept in _parts(masks, name):
        count = int(kept.sum())
        words = np.zeros(len(kept), f"u{size}")
        words[kept] = packed.part(entry, done * size, count * size).view(f"u{size}")
        done += count
        yield words.view(np.uint8)
    if done * size != entry.size:
        raise ModelError(f"{packed.path}: {name!r} holds another number of values than its mask")


def _parts(masks: MaskFile, name: str) -> Iterator[np.ndarray]:
    """A tensor's mask, _STEP elements at a time, True = kept."""
    bits, count = masks.packed(name), int(np.prod(masks.shape(name)))
    for start in range(0, count, _STEP):
        yield unpack(bits, start, min(_STEP, count - start)).numpy()


def _open_packed(path: Path) -> SafeFile:
    found = open_safe(path)
    first, *names = found.entries or ("",)
    right = found.metadata.get("format") == FORMAT and first == _HEADER
    if not right or not all(name[0] in (_WHOLE, _KEPT) for name in names):
        raise ModelError(f"{path}: is not what `maskopt masks pack` writes")
    return found


def _packed_name(shard: str) -> str:
    return shard.removesuffix(".safetensors") + SUFFIX

"""Files of a folder, and the model that a loader makes of them.

A folder holds what a loader takes and nothing else that it could take. All files but the weights are those of
the original. Weights are read by the safetensors library.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maskopt.errors import MaskoptError, VerificationError, first_line
from maskopt.models.architecture.transformers_adapter import Conversion, empty_model, quietly
from maskopt.models.checkpoints.schema import (
    BASES,
    CONFIG,
    INDEX,
    LEGAL_NAMES,
    LEGAL_SUFFIXES,
    MANIFEST,
    MASKS,
    PRUNE,
    SINGLE,
    WRITTEN,
    check_link,
    check_settings,
    far_more_than_stored,
    file_digest,
    is_copied,
    manifest_digest,
    plain_name,
    read_index,
    read_json,
    read_value,
    shards_of,
)

#: what no loader reads; such files may be added to a result
HARMLESS_NAMES = ("README", *LEGAL_NAMES, ".gitattributes", ".gitignore")


@contextmanager
def refusing() -> Iterator[None]:
    """Raise VerificationError in place of other errors of this package."""
    try:
        yield
    except VerificationError:
        raise
    except MaskoptError as error:
        raise VerificationError(str(error)) from None


@dataclass(frozen=True)
class Weights:
    """Tensors that `from_pretrained` loads from a folder.

    Attributes:
        where: the file of every tensor.
        files: names of the shards and their index.
        unnamed: tensors that the index does not name.
    """

    folder: Path
    where: dict[str, Path]
    files: tuple[str, ...]
    unnamed: frozenset[str]

    def read(self, name: str) -> Tensor:
        return read_tensor(self.where[name], name)

    def wrong(self, fault: str) -> VerificationError:
        return VerificationError(f"{self.folder}: {fault}")

    def shapes(self) -> Iterator[tuple[str, list[int]]]:
        """Yield names and shapes of the tensors; no weight is read."""
        for path in sorted(set(self.where.values())):
            with opened(path) as file:
                yield from ((name, file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def read_weights(folder: Path) -> Weights:
    """Find tensors as transformers does: one file goes before an index, and all of a shard is loaded.

    Raises:
        VerificationError: an index leads out of the folder or names a missing tensor, or a tensor is in two
            shards.
    """
    index = {} if (folder / SINGLE).is_file() else read_index(folder)
    held: dict[str, list[str]] = {}
    for shard in sorted(set(index.values())) or [SINGLE]:
        with opened(folder / shard) as file:
            held[shard] = list(file.keys())
    shards = shards_of(folder, held, index)
    where = {name: folder / shard for name, shard in shards.items()}
    if not index:
        return Weights(folder, where, (SINGLE,), frozenset())
    return Weights(folder, where, (*held, INDEX), frozenset(where) - frozenset(index))


def check_entries(
    weights: Weights, listed: Mapping[str, str], needed: Collection[str] = (MASKS, CONFIG)
) -> None:
    """Compare every file with its digest in `listed`, which must name all `needed` ones.

    Everything else that a loader could take for weights, configuration or code is refused.
    """
    folder = weights.folder
    check_beside(weights, lambda name: name in listed or name == MANIFEST)
    for name, digest in sorted(listed.items()):
        if not os.path.lexists(folder / name):
            raise weights.wrong(f"file {name[:200]!r} of the manifest is not there")
        ours = name in weights.files or name in (MASKS, BASES, WRITTEN)
        if not (ours or is_copied(name) or _is_harmless(name)):
            raise _could_be_taken(folder / name)
        check_regular(folder / name)
        if file_digest(folder / name) != digest:
            raise VerificationError(f"{folder / name}: was changed: its digest is another one")
    for name in (*weights.files, *needed):
        if name not in listed:
            raise VerificationError(f"{folder / name}: the manifest does not know this file")


def check_beside(weights: Weights, is_known: Callable[[str], bool]) -> None:
    """Refuse links out of the folder, and unknown entries that a loader could take."""
    folder = weights.folder
    if SINGLE in weights.files and os.path.lexists(folder / INDEX):
        raise weights.wrong(
            f"a loader could take either {SINGLE} or the shards of {INDEX}; "
            "a result holds one of them"
        )
    for entry in sorted(folder.iterdir()):
        if not is_known(entry.name) and (entry.is_dir() or not _is_harmless(entry.name)):
            raise _could_be_taken(entry)
        if not entry.is_dir():
            check_regular(entry)


def check_configuration(
    folder: Path,
    names: Iterable[str],
    compared: Collection[str],
    remedy: str = "whether the original does, too, only a comparison with it (`original`) can show",
) -> None:
    """Refuse configuration that makes a loader take other weights, or run code.

    Args:
        names: of the files in the folder.
        compared: files that are the original's: code that they ask for is the original's, too.
    """
    for name in sorted(names):
        if not name.endswith(".json") or name in (INDEX, MANIFEST):
            continue
        check_regular(folder / name)
        settings = read_value(folder / name)
        check_settings(folder / name, settings, None if name in compared else remedy)
    read_object(folder / CONFIG)


def same_files(record: Mapping[str, Any], weights: Weights, original: Weights) -> set[str]:
    """Return the names of the files besides the weights that are those of the original.

    Pruning copies them all, and the manifest (`record`) holds the model's digest. Tensors, index and
    configuration of a smaller model are checked elsewhere.
    """
    folder, home, smaller = weights.folder, original.folder, record["kind"] != PRUNE
    changed = {CONFIG} if smaller else set()
    theirs = {x.name for x in home.iterdir() if _is_taken(x)} - changed
    ours = set(filter(is_copied, record["files"])) - changed
    same = {n for n in ours & theirs if file_digest(folder / n) == file_digest(home / n)}
    if not smaller:
        if odd := weights.where.keys() ^ original.where.keys():
            raise weights.wrong(f"tensor {min(odd)!r} is in only one of the two models")
        if weights.unnamed != original.unnamed:
            raise VerificationError(
                f"{folder / INDEX}: the index does not name the same tensors as the original's"
            )
    hashed = {n: file_digest(home / n) for n in (CONFIG, *original.files) if n != INDEX}
    if record["fingerprint"]["model"] != manifest_digest(hashed):
        raise VerificationError(
            f"{folder / MANIFEST}: holds the digest of another model than {home}"
        )
    if not smaller and (
        weights.files != original.files
        or (INDEX in weights.files and file_digest(folder / INDEX) != file_digest(home / INDEX))
    ):
        raise VerificationError(f"{folder / INDEX}: the index is not that of the original")
    for name in sorted((ours | theirs) - same):
        both = name in ours & theirs
        where = "differs from the original" if both else "is in only one of the two"
        raise VerificationError(f"{folder / name}: {where}; configuration and tokenizer are copied")
    return same


def _is_taken(file: Path) -> bool:
    """Return whether a file of an original is copied. Links out of it are not followed."""
    if not (is_copied(file.name) and plain_name(file.name) and file.is_file()):
        return False
    try:
        check_regular(file)
    except MaskoptError:
        return False
    return True


def check_regular(file: Path) -> None:
    """Raise VerificationError for a pipe, a device, or a link out of the folder and the hub's cache."""
    check_link(file)
    if file.exists() and not file.is_file():
        raise VerificationError(f"{file}: not a regular file, so a loader could hang on it")


def opened(path: Path) -> Any:
    check_regular(path)
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise VerificationError(
            f"{path}: cannot be read as safetensors: {first_line(error)}"
        ) from None


def read_tensor(path: Path, name: str) -> Tensor:
    with opened(path) as file:
        try:
            return file.get_tensor(name)
        except SafetensorError as error:
            raise VerificationError(f"{path}: {name!r}: {error}") from None


def check_finite(weights: Weights, name: str, tensor: Tensor) -> None:
    """Raise VerificationError for NaN or infinite weights."""
    if tensor.dtype.itemsize < 4:
        tensor = tensor.float()  # torch knows no infinity of some small types
    if not bool(torch.isfinite(tensor).all()):
        raise weights.wrong(f"{name!r} holds NaN or infinite weights")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; ModelError where it is none, or a link out of the folder."""
    check_link(path)
    return read_json(path)


def _is_harmless(name: str) -> bool:
    ending = Path(name).suffix
    read = name.startswith(HARMLESS_NAMES) and (ending in LEGAL_SUFFIXES or ending[1:].isdigit())
    return read or ending == ".md"


def _could_be_taken(path: Path) -> VerificationError:
    return VerificationError(
        f"{path}: is not of the result, and a loader could take it for weights, configuration or code; "
        "move it elsewhere"
    )


# --- the model


class Loading:
    """Model that a folder's configuration describes, without weights, and its tensors."""

    def __init__(self, weights: Weights, *, trust_remote_code: bool = False) -> None:
        self.weights, self.config = weights, weights.folder / CONFIG
        if fault := far_more_than_stored(read_object(self.config), dict(weights.shapes())):
            raise self.wrong(fault)
        # A configuration may name another attention, a kernel that would be fetched and run.
        self.model: Any = empty_model(
            weights.folder, trust_remote_code=trust_remote_code, attn_implementation="eager"
        )
        self.conversion = Conversion(self.model, weights.where, str(weights.folder))
        self.shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}

    def wrong(self, fault: str) -> VerificationError:
        return VerificationError(f"{self.config}: {fault}")

    @cached_property
    def missing(self) -> frozenset[str]:
        """Parameters that nothing is stored for."""
        return frozenset(name for name in self.shapes if not self.conversion.needed([name]))

    @cached_property
    def unused(self) -> frozenset[str]:
        """Tensors that no parameter or buffer is made of."""
        return frozenset(self.weights.where) - {*self.conversion.needed(self.model.state_dict())}

    def check_shapes(self) -> None:
        """Raise VerificationError where a tensor has another shape than the configuration says."""
        empty = {n: torch.empty(shape, device="meta") for n, shape in self.weights.shapes()}
        with quietly():
            self.conversion.load(empty, torch.device("meta"))


def check_loads(ours: Loading, theirs: Loading | None) -> None:
    """Require that the model takes all tensors that the original's model takes, in their shapes."""
    if odd := ours.missing - (frozenset() if theirs is None else theirs.missing):
        raise ours.wrong(f"describes a model with {min(odd)!r}, of which there is no tensor")
    if theirs is not None and (odd := ours.unused - theirs.unused):
        raise ours.wrong(
            f"describes a model that takes no tensor {min(odd)!r}; remove the tensor"
            if min(odd) not in theirs.weights.where
            else f"describes a model that leaves out tensor {min(odd)!r}, which the original takes"
        )
    ours.check_shapes()

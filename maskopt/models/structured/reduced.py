"""The smaller model: its configuration, checked before anything heavy, and its tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from maskopt.core.files import atomic_write
from maskopt.errors import ModelError
from maskopt.models.architecture.source import FolderSource, Source
from maskopt.models.architecture.structures import CHANNELS, Cut, Structures, attention_of
from maskopt.models.checkpoints.checkpoint import INDEX, SINGLE, Checkpoint, file_digest, read_json
from maskopt.models.checkpoints.safefile import CHUNK, SafeFile, TensorEntry, open_safe, write_safe
from maskopt.models.checkpoints.weight_edits import Edits

CONFIG = "config.json"
#: what configurations call the channels of an MLP
_WIDTHS = ("ffn_dim", "ffn_hidden_size", "intermediate_size")


@dataclass(frozen=True)
class StoredCut:
    """How a tensor of the checkpoint is cut.

    Attributes:
        cuts: one or two axes of it, each by the structures of a consumer, named by its layer.
    """

    cuts: Sequence[tuple[str, Cut]]

    def shape(self, entry: TensorEntry, kept: Mapping[str, Bool[Tensor, " m"]]) -> tuple[int, ...]:
        left = list(entry.shape)
        for consumer, cut in self.cuts:
            left[cut.axis] = len(cut.inside(kept[consumer]))
        return tuple(left)

    def apply(self, tensor: Tensor, kept: Mapping[str, Bool[Tensor, " m"]]) -> Tensor:
        for consumer, cut in self.cuts:
            tensor = tensor.index_select(cut.axis, cut.inside(kept[consumer]))
        return tensor


def folder_source(source: Source) -> FolderSource:
    """The source of a model that is made smaller.

    Raises:
        ModelError: the model came in memory.
    """
    if not isinstance(source, FolderSource):
        raise ModelError("only model folders can be made smaller; save the model first")
    return source


def new_settings(source: FolderSource, every: Sequence[Structures]) -> dict[str, int]:
    """What of the configuration changes, by key.

    Raises:
        ModelError: blocks of different sizes; a family whose configuration cannot say the new ones.
    """
    text: Any = source.model.config.get_text_config()
    found: dict[str, set[int]] = {}
    for one in every:
        if one.kind == CHANNELS:
            keys = [key for key in _WIDTHS if getattr(text, key, None) == one.count]
            if not keys:
                raise _cannot_say(source, f"{one.count} channels")
            found.setdefault(keys[0], set()).add(one.kept)
        else:
            numbers = attention_of(source.model, one.consumer)
            each = numbers.heads // numbers.groups
            whole = one.count == numbers.groups and each > 1
            heads = one.kept * each if whole else one.kept
            groups = one.kept if one.count == numbers.groups else numbers.groups
            for key, value in (
                ("num_attention_heads", heads),
                ("num_key_value_heads", groups),
                ("head_dim", numbers.width),
            ):
                found.setdefault(key, set()).add(value)
    for key, values in found.items():
        if len(values) > 1:
            raise _cannot_say(source, f"{key} of {', '.join(map(str, sorted(values)))}")
    settings = {key: values.pop() for key, values in found.items()}
    if getattr(text, "num_key_value_heads", None) is None:
        settings.pop("num_key_value_heads", None)
    return settings


def check_family(
    source: FolderSource, settings: Mapping[str, int], every: Sequence[Structures]
) -> None:
    """Compare the model that the new configuration describes with what the cuts leave.

    Raises:
        ModelError: as for `check_shapes`.
    """
    wanted = {name: tuple(p.shape) for name, p in source.model.named_parameters()}
    for one in every:
        some = torch.zeros(one.count, dtype=torch.bool)
        some[_any_legal(one)] = True
        for name, cut in one.cuts.items():
            shape = list(wanted[name])
            shape[cut.axis] = len(cut.inside(some))
            wanted[name] = tuple(shape)
    check_shapes(source, settings, wanted)


def check_shapes(
    source: FolderSource, settings: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Build the model that the new configuration describes, without weights, and compare all of its shapes.

    Raises:
        ModelError: the family's configuration does not say these.
    """
    from transformers import AutoModelForCausalLM

    before = source.model.config
    record = changed(before.to_dict(), settings)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(type(before).from_dict(record))
    except Exception as error:  # configurations fail in as many ways as there are models
        raise _cannot_say(source, str(error).splitlines()[-1].strip()) from error
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(name) != shapes.get(name):
            raise _cannot_say(
                source,
                f"parameter {name!r} is {list(shapes.get(name, ()))} in the model that it describes and "
                f"would be {list(wanted.get(name, ()))}",
            )


def stored_cuts(source: FolderSource, every: Sequence[Structures]) -> dict[str, StoredCut]:
    """The cuts of the checkpoint's tensors, by their names.

    Raises:
        ModelError: a parameter that is not stored as it is.
    """
    cuts: dict[str, list[tuple[str, Cut]]] = {}
    for one in every:
        for name, cut in one.cuts.items():
            tensor = source.stored_as_is(name)
            if tensor is None:
                raise ModelError(
                    f"parameter {name!r} is stored in another form than the model's; it cannot be cut"
                )
            cuts.setdefault(tensor, []).append((one.consumer.name, cut))
    return {name: StoredCut(tuple(found)) for name, found in cuts.items()}


def write_smaller_shard(
    checkpoint: Checkpoint,
    shard: str,
    edits: Edits,
    cuts: Mapping[str, StoredCut],
    kept: Mapping[str, Bool[Tensor, " m"]],
    target: Path,
) -> str:
    """One shard with its edits, cut; the digest of what was written."""
    file = checkpoint.shards[shard]
    shapes = {
        name: (entry.dtype, cuts[name].shape(entry, kept) if name in cuts else entry.shape)
        for name, entry in file.entries.items()
    }
    with atomic_write(target) as output:
        write_safe(output, shapes, file.metadata)
        for entry in file.entries.values():
            for chunk in _left(file, entry, edits, cuts.get(entry.name), kept):
                output.write(chunk)
    return file_digest(target)


def write_renamed_shards(
    checkpoint: Checkpoint,
    names: Mapping[str, str | None],
    cuts: Mapping[str, StoredCut],
    kept: Mapping[str, Bool[Tensor, " m"]],
    target: Path,
) -> dict[str, str]:
    """The shards without what is gone, under new names, and cut; and their index.

    Args:
        names: of every tensor; None: it is gone.
        cuts, kept: as for `write_smaller_shard`, by the old names.

    Returns:
        The digests of the written files.
    """
    digests: dict[str, str] = {}
    where: dict[str, str] = {}
    total = 0
    for shard, file in checkpoint.shards.items():
        entries = [entry for entry in file.entries.values() if names[entry.name] is not None]
        if not entries:
            continue
        shapes = {
            str(names[e.name]): (
                e.dtype,
                cuts[e.name].shape(e, kept) if e.name in cuts else e.shape,
            )
            for e in entries
        }
        with atomic_write(target / shard) as output:
            write_safe(output, shapes, file.metadata)
            for entry in entries:
                for chunk in _left(file, entry, None, cuts.get(entry.name), kept):
                    output.write(chunk)
        digests[shard] = file_digest(target / shard)
        where |= dict.fromkeys(shapes, shard)
        total += sum(entry.size for entry in open_safe(target / shard).entries.values())
    if SINGLE not in checkpoint.shards:
        write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
        digests[INDEX] = file_digest(target / INDEX)
    return digests


def _left(
    file: SafeFile,
    entry: TensorEntry,
    edits: Edits | None,
    cut: StoredCut | None,
    kept: Mapping[str, Bool[Tensor, " m"]],
) -> Iterator[Any]:
    """The bytes of a tensor with its edits, cut."""
    if cut is None:
        if edits is None:
            yield from (chunk.data for chunk in file.chunks(entry, CHUNK))
        else:
            yield from edits.chunks(entry, file, CHUNK)
        return
    tensor = file.read(entry.name)
    if edits is not None:
        edits.apply(entry.name, tensor)
    left = cut.apply(tensor, kept).contiguous()
    yield left.view(-1).view(torch.uint8).numpy()


def write_index(checkpoint: Checkpoint, target: Path, total: int) -> None:
    """The index of the shards, where there is one, with the new number of bytes."""
    if SINGLE not in checkpoint.shards:
        index = read_json(checkpoint.folder / INDEX)
        index["metadata"] = {**index.get("metadata", {}), "total_size": total}
        index["metadata"].pop("total_parameters", None)
        write_json(target / INDEX, index)


def write_config(checkpoint: Checkpoint, target: Path, settings: Mapping[str, Any]) -> None:
    """config.json with other settings, all else as it was."""
    write_json(target / CONFIG, changed(read_json(checkpoint.folder / CONFIG), settings))


def changed(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with other settings of its text model, all else as it was."""
    nested = config.get("text_config")
    if isinstance(nested, dict) and not any(key in config for key in settings):
        return {**config, "text_config": {**nested, **settings}}
    return {**config, **settings}


def write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _any_legal(one: Structures) -> Tensor:
    """Some structures that may stay: as many of every group as must."""
    size = one.pattern.group_size(one.count)
    keep = size - one.pattern.pruned_per_group(one.count)
    return torch.arange(one.count).view(-1, size)[:, :keep].reshape(-1)


def _cannot_say(source: FolderSource, what: str) -> ModelError:
    family = getattr(source.model.config, "model_type", type(source.model).__name__)
    return ModelError(
        f"the configuration of {family} models cannot describe the smaller model: {what}; ask for "
        "another share or number, or for other structures"
    )

"""What a removal takes from the original's tensors: derived from the original, never from what a folder says
of its own.

Shares no code with what writes models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskopt.errors import VerificationError
from maskopt.models.verification.folder import CONFIG
from maskopt.models.verification.loading import Loading

#: what takes the channels of an MLP → what gives them
_MLPS = {
    "down_proj": ("gate_proj", "up_proj", "gate_up_proj"),
    "fc2": ("fc1",),
    "dense_4h_to_h": ("dense_h_to_4h",),
}
#: what takes the heads of an attention, and what gives them
_ATTENTIONS = ("o_proj", "out_proj", "dense")
_GIVERS = ("q_proj", "k_proj", "v_proj", "qkv_proj")
#: what modules are called that route
_ROUTERS = ("gate", "router")
#: a tensor of one expert: what those of all of them are called alike
_HOME = re.compile(r"(.*\bexperts)\.\d+\.")

#: of a tensor, the steps of its cut
Cuts = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Heads:
    """An attention's heads, as the original's configuration has them, and in what units they are removed.

    Attributes:
        groups: key–value heads.
        each: query heads of a group.
        width: of a head.
        whole: groups go, each with all its heads; else as many heads of every group.
    """

    groups: int
    each: int
    width: int
    whole: bool

    @classmethod
    def of(cls, consumer: str, size: int, shrunk: Mapping[str, Any], theirs: Loading) -> Heads:
        """Args: size: inputs of what takes the heads."""
        heads = int(value(theirs, "num_attention_heads"))
        groups = int(value(theirs, "num_key_value_heads") or heads)
        width = int(value(theirs, "head_dim") or size // heads)
        each = heads // groups
        steps = shrunk["tensors"].get(_stored(theirs, f"{consumer}.weight"), [])
        whole = steps == [_step(1, [(size, each * width)], consumer)]
        kept = shrunk["kept"][consumer]
        if heads * width != size or heads % groups:
            raise _odd(
                theirs, consumer, f"has {size} inputs, which are no {heads} heads of {width}"
            )
        if not whole and len({sum(k // each == g for k in kept) for g in range(groups)}) > 1:
            raise _odd(theirs, consumer, "loses more heads of one key–value group than of another")
        return cls(groups, each, width, whole)


def value(loading: Loading, key: str) -> Any:
    return getattr(loading.settings, key, None)


def loses_channels(consumer: str) -> bool:
    return consumer.rpartition(".")[2] in _MLPS


def consumers(shrunk: Mapping[str, Any], theirs: Loading) -> dict[str, int]:
    """The layers that take what was removed, channels or heads, and how many inputs they have.

    Raises:
        VerificationError: a layer that is not there, or takes nothing that can be removed.
    """
    found = {}
    for consumer in shrunk["kept"]:
        shape = theirs.shapes.get(f"{consumer}.weight", ())
        if consumer.rpartition(".")[2] not in (*_MLPS, *_ATTENTIONS) or len(shape) != 2:
            raise _odd(theirs, consumer, "is not a layer that takes channels or heads")
        found[consumer] = shape[1]
    return found


def check_cuts(folder: Path, shrunk: Mapping[str, Any], theirs: Loading) -> None:
    """Every tensor is cut as what was removed asks, and no other; weights are set anew only where what takes
    the channels or heads makes good for them, in all blocks.

    Raises:
        VerificationError: not so.
    """
    expected, anew = _expected(shrunk, theirs)
    for name in sorted({*expected, *shrunk["tensors"]}):
        if expected.get(name) != shrunk["tensors"].get(name):
            raise VerificationError(
                f"{folder}: tensor {name!r} is not cut as what was removed asks; all that a block's "
                "channels, heads or experts run through loses the same of them"
            )
    said = set(shrunk["set_anew"])
    if odd := said - anew or (anew - said if said else set()):
        raise VerificationError(
            f"{folder}: tensor {min(odd)!r} is updated, or not, unlike a least-squares update of all "
            "layers that take channels or heads"
        )


def _expected(shrunk: Mapping[str, Any], theirs: Loading) -> tuple[Cuts, set[str]]:
    """The cuts of the tensors, and those that may be set anew."""
    if "blocks" in shrunk:
        return {}, set()
    if "experts" in shrunk:
        return _of_experts(shrunk, theirs), set()
    cuts: Cuts = {}
    for consumer, size in consumers(shrunk, theirs).items():
        if loses_channels(consumer):
            cuts |= _of_channels(consumer, size, theirs)
        else:
            cuts |= _of_heads(consumer, size, Heads.of(consumer, size, shrunk, theirs), theirs)
    return cuts, {_stored(theirs, f"{consumer}.weight") for consumer in shrunk["kept"]}


def _of_channels(consumer: str, size: int, theirs: Loading) -> Cuts:
    home, _, last = consumer.rpartition(".")
    cuts = {_stored(theirs, f"{consumer}.weight"): [_step(1, [(size, 1)], consumer)]}
    for giver in _MLPS[last]:
        parts = [(size, 1)] * (2 if giver == "gate_up_proj" else 1)
        cuts |= _rows(f"{home}.{giver}", parts, consumer, theirs)
    return cuts


def _of_heads(consumer: str, size: int, heads: Heads, theirs: Loading) -> Cuts:
    home = consumer.rpartition(".")[0]
    query = (size, heads.width * (heads.each if heads.whole else 1))
    key = (heads.groups * heads.width, heads.width if heads.whole else 0)
    cuts = {_stored(theirs, f"{consumer}.weight"): [_step(1, [query], consumer)]}
    for giver in _GIVERS:
        parts = {"q_proj": [query], "qkv_proj": [query, key, key]}.get(giver, [key])
        if any(width for _, width in parts):
            cuts |= _rows(f"{home}.{giver}", parts, consumer, theirs)
    return cuts


def _rows(layer: str, parts: Sequence[tuple[int, int]], consumer: str, theirs: Loading) -> Cuts:
    """The cuts of weight and bias of a layer, where there are such."""
    there = [f"{layer}.{kind}" for kind in ("weight", "bias") if f"{layer}.{kind}" in theirs.shapes]
    return {_stored(theirs, name): [_step(0, parts, consumer)] for name in there}


def count_of(mixture: str, theirs: Loading) -> int:
    """How many experts a mixture has.

    Raises:
        VerificationError: there is no such mixture.
    """
    own = [shape for name, shape in theirs.shapes.items() if name.startswith(f"{mixture}.")]
    counts = {shape[0] for shape in own if len(shape) == 3}
    if len(counts) != 1:
        raise _odd(theirs, mixture, "holds no experts that tokens are routed to")
    return counts.pop()


def _of_experts(shrunk: Mapping[str, Any], theirs: Loading) -> Cuts:
    cuts: Cuts = {}
    homes: dict[str, str] = {}
    for mixture in shrunk["kept"]:
        count = count_of(mixture, theirs)
        for name in _along_experts(mixture, count, theirs):
            if theirs.is_stored_as_is(name):
                cuts[_stored(theirs, name)] = [_step(0, [(count, 1)], mixture)]
                continue
            for part in theirs.parts(name):
                found = _HOME.match(part)
                homes[found[1] if found else part] = mixture
    if homes != shrunk["experts"]:
        raise VerificationError(
            f"{theirs.weights.folder}: the manifest says otherwise than the model where experts lie that are "
            "stored one by one"
        )
    return cuts


def _along_experts(mixture: str, count: int, theirs: Loading) -> Iterator[str]:
    """The parameters of a mixture and its router that have an entry an expert."""
    parent = mixture.rpartition(".")[0]
    begins = (f"{mixture}.", *(f"{parent}.{router}." for router in _ROUTERS))
    for name, shape in theirs.shapes.items():
        if name.startswith(begins) and shape[0] == count:
            yield name


def _stored(theirs: Loading, parameter: str) -> str:
    """The tensor that a parameter is."""
    if not theirs.is_stored_as_is(parameter):
        raise _odd(theirs, parameter, "is not stored as it is, and cannot be cut")
    return theirs.parts(parameter)[0]


def _step(axis: int, parts: Sequence[tuple[int, int]], by: str) -> dict[str, Any]:
    return {"axis": axis, "parts": [list(part) for part in parts], "by": by}


def _odd(theirs: Loading, name: str, what: str) -> VerificationError:
    return VerificationError(f"{theirs.weights.folder / CONFIG}: {name!r} of the manifest {what}")

"""What a manifest says: its schema, its options, and how much of every layer they prune.

Options and patterns have the schema that `PruneOptions` and `parse_sparsity` declare. How much a pattern
prunes is computed here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from maskopt.core.pattern import NM, Pattern, Unstructured, parse_sparsity
from maskopt.errors import MaskoptError, VerificationError
from maskopt.models.checkpoints.schema import (
    BLOCKS,
    EXPERTS,
    MANIFEST_FORMAT,
    PRUNE,
    STRUCTURES,
    fits,
    has_keys_of_its_kind,
    is_amount,
    is_count,
    is_number,
    is_size,
)
from maskopt.models.options.prune import BLOCKWISE, BOTH, LAYERS, ROWS, UNIFORM, PruneOptions
from maskopt.models.verification.folder import MANIFEST, check_regular

STATUSES = ("optimal", "swap-optimal", "feasible")
#: options of the solver, which nothing here depends on and which may be of a solver that is not installed
OF_SOLVER = ("solver", "start", "solver_options")

#: the numbers in a layer's name (block, expert), and its inputs
Key = tuple[tuple[int, ...], int]


MAYBE_AMOUNT, MAYBE_COUNT = (None, is_amount), (None, is_count)
_COMMON = {
    "format": MANIFEST_FORMAT,
    "sparsity": is_amount, "seconds": is_amount, "memory": {...: MAYBE_COUNT},
    "layers": [{
        **dict.fromkeys(("name", "pattern", "kind"), str),
        **dict.fromkeys(("rows", "n"), is_size),
        **dict.fromkeys(("pruned", "tokens", "block"), is_count),
        **dict.fromkeys(("error", "lower_bound", "energy", "gram_shrinkage"), is_amount),
        **dict.fromkeys(("seconds", "sparsity"), is_amount),
        **dict.fromkeys(("error_held", "energy_held", "error_kept"), MAYBE_AMOUNT),
        **dict.fromkeys(("error_wanda", "damping"), MAYBE_AMOUNT),
        **dict.fromkeys(("swaps", "scans"), MAYBE_COUNT),
        "improvement_quantiles": (None, lambda v: fits(v, [is_number]) and len(v) == 5),
        "statuses": lambda v: fits(v, {...: is_size}) and set(v) <= set(STATUSES),
        "fallback": bool, "objective": ("kept", "least-squares", "updated"),
    }],
    "trained": [{
        **dict.fromkeys(("fitted_before", "fitted_after", "held_before", "held_after"), is_number),
        "block": is_count, "epoch": is_count, "diverged": bool, "seconds": is_amount,
    }],
    "distillation": (None, {
        "before": {"fitted": is_number, "held": is_number},
        "after": {"fitted": is_number, "held": is_number},
        "epoch": is_count, "diverged": bool,
    }),
    "bad_samples": [{"sample": is_count, "layer": str}],
    "files": {...: str},
}  # fmt: skip
_SMALLER = {
    **_COMMON, "fingerprint": {"model": str, "options": {"removed?": ()}},
    "shrunk": {"kept": {...: [is_count]}, "updated": [str]},
}  # fmt: skip
_FEWER = {"model": str, "options": {"removed": [is_count]}}
#: of a manifest, by its kind
SHAPES: dict[str, dict[str, Any]] = {
    PRUNE: {
        **_COMMON,
        "fingerprint": {
            "options": {
                "sparsity": parse_sparsity, "counts?": {...: is_count},
                "training?": dict, "distillation?": dict,
            },
            "dtype": str, "model?": str,
        },
    },
    STRUCTURES: _SMALLER,
    EXPERTS: _SMALLER,
    BLOCKS: {**_SMALLER, "fingerprint": _FEWER},
}  # fmt: skip


def read_record(folder: Path) -> dict[str, Any]:
    """A manifest; VerificationError where it is missing, of an unknown kind, or damaged."""
    path = folder / MANIFEST
    if not path.is_symlink() and not path.exists():
        raise VerificationError(
            f"{folder}: no manifest; the folder was not written by maskopt prune"
        )
    check_regular(path)
    try:
        record = json.loads(path.read_bytes().decode("utf-8"), parse_constant=_no_number)
        rest = {key: value for key, value in record.items() if key != "sha256"}
        text = json.dumps(rest, sort_keys=True).encode()
        sound, kind = hashlib.sha256(text).hexdigest() == record["sha256"], record["kind"]
        if sound and kind not in SHAPES:
            known = ", ".join(SHAPES)
            raise VerificationError(f"{path}: is of kind {kind!r:.50}, which is none of {known}")
        sound = sound and has_keys_of_its_kind(record) and fits(record, SHAPES[kind])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise damaged(folder)
    return dict(record)


def is_smaller(folder: Path) -> bool:
    """Does a manifest say that `maskopt prune-structured` wrote the folder?"""
    try:
        return bool(read_record(folder)["kind"] != PRUNE)
    except VerificationError:
        return False  # what is wrong is found where the folder is verified


def damaged(folder: Path) -> VerificationError:
    return VerificationError(f"{folder / MANIFEST}: the manifest is damaged or was changed")


def _no_number(constant: str) -> float:
    """For `json.loads`: NaN and infinities are no numbers."""
    raise ValueError(constant)


def numbers(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdecimal())


def key_of(layer: Mapping[str, Any]) -> Key:
    """A layer's place: the same for the matrices of tensors that its parameter is stored in."""
    return numbers(layer["name"]), layer["n"]


class Manifest:
    """A manifest whose digest and schema are right; whether it is true is another matter. `options`: all but
    those of the solver. Raises VerificationError where `PruneOptions` makes other ones of them."""

    def __init__(self, folder: Path, record: Mapping[str, Any]) -> None:
        self.path, self.record = folder / MANIFEST, record
        self.layers: Sequence[Mapping[str, Any]] = record["layers"]
        self.options = _options(self.path, record)

    @property
    def distilled(self) -> bool:
        """Whether kept weights of all layers may have changed after their errors were measured."""
        return bool(self.record["distillation"]) and self.record["distillation"]["epoch"] > 0

    @property
    def unlimited(self) -> bool:
        """Whether the rows of a layer have only its budget, and no limits of their own."""
        return self.options.rows_differ and self.options.max_deviation == 1

    def pattern(self, layer: Mapping[str, Any]) -> Pattern:
        """The layer's own where the options have counts."""
        counts, options = self.options.counts, self.options
        if not counts:
            return options.pattern
        keep = layer["n"] - counts[layer["name"]]
        if not options.rows_differ:
            return Unstructured(keep=keep)
        within = None if self.unlimited else options.max_deviation
        return Unstructured(keep=keep, per="layer", max_deviation=within)

    def pruned(self, layer: Mapping[str, Any]) -> int:
        """Pruned entries of a layer."""
        return pruned_of(self.pattern(layer), layer["rows"], layer["n"])

    @cached_property
    def limits_at(self) -> dict[Key, set[tuple[int, int, int]]]:
        """Of the layers of a place: inputs of a group, and the least and the most that a row prunes of it."""
        found: dict[Key, set[tuple[int, int, int]]] = {}
        for layer in self.layers:
            limits = _limits(self.pattern(layer), layer["rows"], layer["n"])
            found.setdefault(key_of(layer), set()).add(limits)
        return found

    def wrong(self, what: str) -> VerificationError:
        return VerificationError(f"{self.path}: {what}")


def _options(path: Path, record: Mapping[str, Any]) -> PruneOptions:
    said = record["fingerprint"]["options"]
    given = {key: value for key, value in said.items() if key not in OF_SOLVER}
    allocation, training = given.get("allocation", UNIFORM), given.get("training")
    pattern = parse_sparsity(given["sparsity"])
    if (allocation in (LAYERS, BOTH)) != bool(given.get("counts")):
        what = "has counts of its layers, or none, otherwise than its allocation says"
    elif (allocation == ROWS) != pattern.shared_budget:
        what = "has an allocation that is not its pattern's"
    elif given.get("update") != BLOCKWISE and (training or record["trained"]):
        what = "has trained parts, and its options train none"
    elif bool(given.get("distillation")) != bool(record["distillation"]):
        what = "has losses of a distillation, or none, otherwise than its options say"
    elif given.get("update") == BLOCKWISE and not training:
        what = "does not say how its weights were trained"
    else:
        if allocation != UNIFORM and given.get("max_deviation") is None:
            given["max_deviation"] = 1.0  # limits that are not named are none
        try:
            options = PruneOptions(**{**given, "sparsity": pattern}, solver="magnitude")
        except (MaskoptError, ValueError, TypeError, AttributeError, OverflowError):
            raise damaged(path.parent) from None
        made = options.record()
        if any(key not in made or made[key] != value for key, value in given.items()):
            raise damaged(path.parent)
        return options
    raise VerificationError(f"{path}: {what}")


def groups(pattern: Pattern, n: int) -> tuple[int, int]:
    """Size of a group of a row's inputs, and how many of it are pruned, where every row prunes as many."""
    if isinstance(pattern, NM):
        if n % pattern.of:
            raise VerificationError(f"{n} inputs do not divide into groups of {pattern.of}")
        return pattern.of, pattern.of - pattern.keep
    return n, _part_of(pattern, n) if pattern.keep is None else n - pattern.keep


def pruned_of(pattern: Pattern, rows: int, n: int) -> int:
    """Pruned entries of a layer."""
    if isinstance(pattern, Unstructured) and pattern.shared_budget and pattern.keep is None:
        return _part_of(pattern, rows * n)
    group, pruned = groups(pattern, n)
    return rows * (n // group) * pruned


def _part_of(pattern: Unstructured, entries: int) -> int:
    return math.floor(Fraction(repr(pattern.sparsity)) * entries)


def _limits(pattern: Pattern, rows: int, n: int) -> tuple[int, int, int]:
    """Inputs of a group, and the least and the most that a row prunes of it: of rows with a shared budget,
    whole numbers no further from the mean than `max_deviation`, and those next to the mean in any case."""
    if not pattern.shared_budget:
        group, pruned = groups(pattern, n)
        return group, pruned, pruned
    if pattern.max_deviation is None:
        return n, 0, n
    mean = Fraction(pruned_of(pattern, rows, n), rows)
    reach = Fraction(repr(float(pattern.max_deviation))) * n
    least = min(math.ceil(mean - reach), math.floor(mean))
    most = max(math.floor(mean + reach), math.ceil(mean))
    return n, max(0, least), min(n, most)

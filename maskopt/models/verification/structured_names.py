"""What the tensors of a smaller model were called: the kept blocks and experts follow one another.

Shares no code with what writes models.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maskopt.errors import VerificationError
from maskopt.models.verification.folder import Weights
from maskopt.models.verification.loading import Loading
from maskopt.models.verification.structured_config import depth_of, renumbered


@dataclass(frozen=True)
class Names:
    """What tensors are called in the original, where they are called otherwise, and those that are gone."""

    renamed: Mapping[str, str]
    gone: Sequence[str]

    def before(self, name: str) -> str:
        return self.renamed.get(name, name)


@dataclass(frozen=True)
class Blocks:
    """What the tensors of the blocks are called in the original, and which blocks are gone.

    Attributes:
        home: what the names begin with, before the block's number.
        count: of blocks.
        unused: tensors that no parameter is made of; they stay as they are.
    """

    home: str
    count: int
    removed: Sequence[int]
    unused: frozenset[str]

    @classmethod
    def of(cls, shrunk: Mapping[str, Any], names: Names, theirs: Loading) -> Blocks:
        parts = min(names.gone, default="").split(".")
        home = itertools.takewhile(lambda part: not part.isdecimal(), parts)
        _, count = depth_of(shrunk["settings"], theirs)
        return cls(".".join(home), count, shrunk["blocks"], theirs.unused)

    def without(self, name: str) -> str | None:
        """What a tensor of the original is called without the blocks; None: it is of one of them."""
        number, _, rest = name.removeprefix(f"{self.home}.").partition(".")
        inside = name.startswith(f"{self.home}.") and number.isdecimal()
        if not inside or name in self.unused or int(number) >= self.count:
            return name
        new = renumbered([int(number)], self.removed)
        return f"{self.home}.{new[0]}.{rest}" if new else None


def check_names(
    shrunk: Mapping[str, Any], names: Names, weights: Weights, blocks: Blocks | None = None
) -> None:
    """Tensors are called what they were, but that blocks, and experts that are stored one by one, are
    numbered as the kept ones follow one another.

    Raises:
        VerificationError: not so.
    """

    def after(name: str) -> str | None:
        new = _without_experts(name, shrunk)
        return new if new is None or blocks is None else blocks.without(new)

    for name in names.gone:
        if after(name) == name:
            raise VerificationError(
                f"{weights.folder}: tensor {name!r} is gone, and is of no removed block or expert; it stays "
                "where the kept ones put it"
            )
    for name in (*map(names.before, weights.where), *names.gone):
        new = after(name)
        if (new is None) != (name in names.gone) or (new is not None and names.before(new) != name):
            raise VerificationError(
                f"{weights.folder}: tensor {name!r} of the original is not where the kept blocks and experts "
                "put it"
            )


def _without_experts(name: str, shrunk: Mapping[str, Any]) -> str | None:
    """What a tensor of the original is called without the removed experts; None: it is of one of them."""
    for home, mixture in shrunk.get("experts", {}).items():
        number, _, rest = name.removeprefix(f"{home}.").partition(".")
        if name.startswith(f"{home}.") and number.isdigit():
            kept = shrunk["kept"][mixture]
            return f"{home}.{kept.index(int(number))}.{rest}" if int(number) in kept else None
    return name

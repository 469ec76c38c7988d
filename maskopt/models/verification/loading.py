"""What transformers makes of a folder: a model's parameters, and the tensors that they are made of. No weight
is read.

Shares no code with what writes models. Which tensors become which parameters
is transformers' own rule, asked where its versions are known (`transformers_adapter`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from maskopt.errors import ModelError, VerificationError
from maskopt.models.architecture.transformers_adapter import Conversion, quietly
from maskopt.models.verification.folder import CONFIG, Weights, shapes
from maskopt.models.verification.manifest import empty_model


class Loading:
    """The model that a folder's configuration describes, and what becomes of the folder's tensors in it.

    Attributes:
        model: without weights.
        shapes: of the parameters, by name.

    Raises:
        VerificationError: the configuration describes no model, or two tensors are the same parameter.
    """

    def __init__(self, weights: Weights, *, trust_remote_code: bool = False) -> None:
        self.weights = weights
        self.model: Any = empty_model(weights.folder, trust_remote_code=trust_remote_code)
        self.shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        with _refusing():
            self._conversion = Conversion(self.model, weights.where, str(weights.folder))

    @property
    def settings(self) -> Any:
        """The configuration of the language model, defaults filled in."""
        return self.model.config.get_text_config()

    def parts(self, parameter: str) -> list[str]:
        """The tensors that a parameter is made of; none where nothing is stored for it."""
        return self._conversion.needed([parameter])

    def is_stored_as_is(self, parameter: str) -> bool:
        return len(self.parts(parameter)) == 1 and parameter not in self._conversion.converted

    @cached_property
    def missing(self) -> frozenset[str]:
        """Parameters that nothing is stored for."""
        return frozenset(name for name in self.shapes if not self.parts(name))

    @cached_property
    def unused(self) -> frozenset[str]:
        """Tensors that no parameter or buffer is made of."""
        return frozenset(self.weights.where) - {*self._conversion.needed(self.model.state_dict())}

    def check_shapes(self) -> None:
        """Raise VerificationError where a tensor has another shape than the configuration says."""
        empty = {n: torch.empty(shape, device="meta") for n, shape in shapes(self.weights)}
        with _refusing(), quietly():
            self._conversion.load(empty, torch.device("meta"))


def check_loads(ours: Loading, theirs: Loading | None) -> None:
    """The configuration describes the model that the tensors make: all of them are taken that the original's
    model takes, in the shapes that they have.

    Args:
        theirs: of the original; without it, tensors that nothing takes are not looked at.

    Raises:
        VerificationError: not so.
    """
    where = ours.weights.folder / CONFIG
    if odd := ours.missing - (frozenset() if theirs is None else theirs.missing):
        raise VerificationError(
            f"{where}: describes a model with {min(odd)!r}, of which there is no tensor"
        )
    if theirs is not None and (odd := ours.unused - theirs.unused):
        raise VerificationError(
            f"{where}: describes a model that takes no tensor {min(odd)!r}; remove the tensor"
            if min(odd) not in theirs.weights.where
            else f"{where}: describes a model that leaves out tensor {min(odd)!r}; the original's takes it"
        )
    ours.check_shapes()


@contextmanager
def _refusing() -> Iterator[None]:
    """What transformers cannot load is what does not hold."""
    try:
        yield
    except ModelError as error:
        raise VerificationError(str(error)) from None

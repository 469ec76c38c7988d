"""What transformers makes of a folder: a model's parameters, its layers, and the tensors that they are made
of. No weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from maskopt.errors import MaskoptError, VerificationError
from maskopt.models.architecture.blocks import Blocks, choose
from maskopt.models.architecture.transformers_adapter import Conversion, quietly
from maskopt.models.checkpoints.schema import far_more_than_stored
from maskopt.models.verification.folder import CONFIG, Weights, first_line, read_object
from maskopt.models.verification.manifest import Manifest


class Loading:
    """The model that a folder's configuration describes, without weights, and its tensors."""

    def __init__(self, weights: Weights, *, trust_remote_code: bool = False) -> None:
        self.weights, self.config = weights, weights.folder / CONFIG
        if what := far_more_than_stored(read_object(self.config), dict(weights.shapes())):
            raise self.wrong(what)
        self.model: Any = _empty_model(weights.folder, trust_remote_code)
        self.shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        with refusing():
            self.conversion = Conversion(self.model, weights.where, str(weights.folder))

    def wrong(self, what: str) -> VerificationError:
        return VerificationError(f"{self.config}: {what}")

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
        with refusing(), quietly():
            self.conversion.load(empty, torch.device("meta"))


def check_loads(ours: Loading, theirs: Loading | None) -> None:
    """The model takes all tensors that the original's model takes, in their shapes."""
    if odd := ours.missing - (frozenset() if theirs is None else theirs.missing):
        raise ours.wrong(f"describes a model with {min(odd)!r}, of which there is no tensor")
    if theirs is not None and (odd := ours.unused - theirs.unused):
        raise ours.wrong(
            f"describes a model that takes no tensor {min(odd)!r}; remove the tensor"
            if min(odd) not in theirs.weights.where
            else f"describes a model that leaves out tensor {min(odd)!r}, which the original takes"
        )
    ours.check_shapes()


def check_names(manifest: Manifest, loading: Loading) -> None:
    """Compare the manifest's layers with those of the model that `include` and `exclude` choose."""
    options, said = manifest.options, {layer["name"]: layer for layer in manifest.layers}
    with refusing():
        layers = choose(Blocks(loading.model).all_layers(), options.include, options.exclude)
    found = {layer.name: layer for layer in layers}
    if odd := said.keys() ^ found.keys():
        where = "in the manifest" if min(odd) in said else "in the model"
        raise manifest.wrong(f"layer {min(odd)[:200]!r} is only {where}")
    if list(said) != list(found):
        raise manifest.wrong("names the layers in another order than the model has them")
    for name, layer in found.items():
        if (said[name]["rows"], said[name]["n"]) != (layer.rows, layer.n):
            raise manifest.wrong(f"layer {name!r} has another shape than in the model")
        if (said[name]["block"], said[name]["kind"]) != (layer.block, layer.kind):
            raise manifest.wrong(f"layer {name!r} has another block or kind than its name")


def _empty_model(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        with torch.device("meta"):
            # a configuration may name another attention, a kernel that would be fetched and run
            return AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code, attn_implementation="eager"
            )
    except Exception as error:  # configurations fail in as many ways as there are models
        raise VerificationError(
            f"{folder / CONFIG}: makes no model: {first_line(error)}"
        ) from error


@contextmanager
def refusing() -> Iterator[None]:
    """What cannot be loaded or derived is what does not hold."""
    try:
        yield
    except MaskoptError as error:
        raise VerificationError(str(error)) from None

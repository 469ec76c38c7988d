"""Our masks as PyTorch's own pruning tools hold theirs, for code that is written for those."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from maskopt.model.keep import Masks, parameter_masks


def with_torch_prune(
    model: nn.Module, masks: str | Path | Masks, *, trust_remote_code: bool = False
) -> list[str]:
    """Put the masks on a model by `torch.nn.utils.prune`: each pruned parameter becomes NAME_orig and a
    buffer NAME_mask, and NAME their product, made anew in every forward pass.

    `torch.nn.utils.prune.remove(module, NAME)` makes them parameters again; before that the model cannot be
    saved as what transformers loads.

    Args:
        model: the pruned model or the dense one, as transformers loads it.
        masks: as for `keep_masks`.
        trust_remote_code: run code that comes with the folder to find the layers of its masks.

    Returns:
        The names of the parameters.

    Raises:
        ModelError: as for `keep_masks`.
    """
    from torch.nn.utils import prune

    found = parameter_masks(model, masks, trust_remote_code=trust_remote_code)
    for name, kept in found.items():
        owner, _, last = name.rpartition(".")
        prune.custom_from_mask(model.get_submodule(owner), last, kept)
    return list(found)


def with_fake_sparsity(
    model: nn.Module, masks: str | Path | Masks, *, trust_remote_code: bool = False
) -> list[str]:
    """Put the masks on a model as `torch.ao.pruning` does: a parametrization `FakeSparsity` on each pruned
    parameter, which multiplies it by its mask whenever it is read.

    `torch.nn.utils.parametrize.remove_parametrizations(module, NAME)` leaves the product (the default) or
    what is below it. Arguments, result and errors are those of `with_torch_prune`.
    """
    from torch.ao.pruning import FakeSparsity
    from torch.nn.utils import parametrize

    found = parameter_masks(model, masks, trust_remote_code=trust_remote_code)
    for name, kept in found.items():
        owner, _, last = name.rpartition(".")
        parametrize.register_parametrization(model.get_submodule(owner), last, FakeSparsity(kept))
    return list(found)

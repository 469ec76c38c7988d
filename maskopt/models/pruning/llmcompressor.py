"""Our masks by one line of a recipe of llm-compressor.

    from llmcompressor import oneshot
    from maskopt.models.pruning.llmcompressor import SparseSwapsModifier

    oneshot(model="MODEL", dataset=…, recipe=SparseSwapsModifier(sparsity=0.5, ignore=["re:.*lm_head"]))

Importing this module makes the modifier known to recipes in YAML, too. It needs `maskopt[llmcompressor]`.
"""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.utils import (
    align_module_device,
    get_execution_device,
    update_offload_parameter,
)
from llmcompressor.modifiers.factory import ModifierFactory
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
from llmcompressor.utils.metric_logging import CompressionLogger
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from maskopt.core.gram import Gram
from maskopt.core.pattern import NM, Pattern, Unstructured
from maskopt.errors import OptionError
from maskopt.models.options.prune import LEAST_SQUARES, NONE, PruneOptions, prune_options
from maskopt.models.options.walk import check_solver
from maskopt.models.pruning.prune_layer import layer_problem, solve_layer


class SparseSwapsModifier(SparsityModifierBase):
    """Prunes every target with a solver of maskopt: by default the 1-swap search of SparseSwaps (arXiv
    2512.10922), whose masks are proven 1-swap optimal.

    Takes llm-compressor's `sparsity`, `mask_structure` (N:M: N of M are pruned), `targets` and `ignore`, as
    its `SparseGPTModifier` does, and:

    Args:
        solver: any that `maskopt solvers` lists.
        start: a solver that makes the start; None: the default of `maskopt prune`.
        update: of kept weights, `none` or `least-squares`.
        damping: its λ, relative to G's mean diagonal; None: the default of `maskopt prune`.
        gram_shrinkage: α, how far the Gram matrix is shrunk to its diagonal, 0 to 1.
        solver_options: of the solver.
        seed: of solvers that draw.

    Padding tokens count: calibrate without padding, every sample beginning with the tokenizer's BOS token.

    Raises:
        MaskoptError: on construction, options that `maskopt prune` refuses; a sparsity other than that of
            `mask_structure`; a `sparsity_profile`.
    """

    solver: str = "swap"
    start: str | None = None
    update: str = "none"
    damping: float | None = None
    gram_shrinkage: float = 0.0
    solver_options: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0

    _grams: dict[nn.Linear, Gram] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def check_options(self) -> SparseSwapsModifier:
        """Refuse options that cannot be used."""
        if self.sparsity_profile is not None:
            raise OptionError("`sparsity_profile` is not for SparseSwapsModifier; leave it out")
        if self.update not in (NONE, LEAST_SQUARES):
            raise OptionError(
                f"`update` must be one of: {NONE}, {LEAST_SQUARES}; not {self.update!r}"
            )
        for sparsity in self.sparsity if isinstance(self.sparsity, list) else [self.sparsity]:
            options = self._options(sparsity)
            check_solver(options.solver, options.solver_options, options.start_solver)
        return self

    def calibrate_module(
        self, module: nn.Module, args: tuple[Tensor, ...], _output: Tensor
    ) -> None:
        """Add a module's input, [batch, tokens, n] or [tokens, n], to its Gram matrix."""
        inputs = args[0].detach()
        if module not in self._grams:
            if not isinstance(module, nn.Linear):
                raise OptionError(
                    f"{self._module_names[module]} is a {type(module).__name__}; SparseSwapsModifier prunes "
                    "nn.Linear alone: put the others into `ignore`"
                )
            self._grams[module] = Gram(inputs.shape[-1], get_execution_device(module))
        if not inputs.numel():  # an expert that no token was sent to
            return
        for sequence in inputs.reshape(-1, *inputs.shape[-2:]):
            self._grams[module].add(sequence)

    def compress_modules(self) -> None:
        """Prune the calibrated modules."""
        for module in list(self._grams):
            options = self._options(self._module_sparsities[module])
            with torch.no_grad(), align_module_device(module), CompressionLogger(module) as log:
                weight, error = pruned(module.weight, self._grams.pop(module), options)
                log.set_results(name="SparseSwaps", loss=error)
            update_offload_parameter(module, "weight", weight)

    def on_finalize(self, state: Any, **kwargs: Any) -> bool:
        if not self.ended_:
            self.on_end(state, None)
        if self._grams:
            names = ", ".join(self._module_names[module] for module in self._grams)
            raise ValueError(f"calibrated and never pruned: {names}")
        self._module_names.clear()
        self._module_sparsities.clear()
        return True

    def _options(self, sparsity: Any) -> PruneOptions:
        names = ("solver", "start", "update", "gram_shrinkage", "solver_options", "seed")
        given = {name: getattr(self, name) for name in names}
        damping = {"damping": self.damping} if self.damping is not None else {}
        return prune_options(None, {"sparsity": self._pattern(sparsity), **given, **damping})

    def _pattern(self, sparsity: Any) -> Pattern:
        """Their N:M counts pruned weights, ours kept ones."""
        gone, of = self._split_mask_structure(self.mask_structure)
        if not of:
            return Unstructured(sparsity=sparsity)
        if sparsity is not None and sparsity != gone / of:
            raise OptionError(
                f"`sparsity` {sparsity} is not that of `mask_structure` {gone}:{of}, {gone / of}; give that"
            )
        return NM(keep=of - gone, of=of)


def pruned(weight: Tensor, gram: Gram, options: PruneOptions) -> tuple[Tensor, float]:
    """The pruned weight [rows, n] in its own dtype, and its error summed over rows."""
    how = options.pattern, float(options.gram_shrinkage), options.least_squares
    problem = layer_problem("", weight.detach().float(), gram, *how)
    found, _ = solve_layer(problem, options)
    mask, own = found.mask, None if options.least_squares is None else found.weight
    left = problem.weights(mask) if own is None else own
    return torch.where(mask, left.to(weight.dtype), 0), float(problem.error(left).sum())


ModifierFactory.register("SparseSwapsModifier", SparseSwapsModifier)

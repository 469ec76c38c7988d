"""Pruning masks for linear layers, with proofs of how good they are."""

import importlib
from typing import TYPE_CHECKING, Any

from maskopt._version import __version__

if TYPE_CHECKING:
    from maskopt.certificates.certificate import Certificate as Certificate
    from maskopt.certificates.proof import RowProof as RowProof
    from maskopt.checks.swap_check import SwapMove as SwapMove, improving_swap as improving_swap
    from maskopt.checks.verification import Verification as Verification, verify as verify
    from maskopt.core.least_squares import LeastSquaresUpdate as LeastSquaresUpdate
    from maskopt.core.limits import Limits as Limits, Progress as Progress
    from maskopt.core.objective import LinearTerm as LinearTerm
    from maskopt.core.pattern import NM as NM, Unstructured as Unstructured
    from maskopt.core.problem import LayerProblem as LayerProblem, RowProblem as RowProblem
    from maskopt.errors import MaskoptError as MaskoptError
    from maskopt.experiments.prove import minimize_quadratic as minimize_quadratic
    from maskopt.instances.formats import load_problem as load_problem, save_problem as save_problem
    from maskopt.instances.structure import structure_problem as structure_problem
    from maskopt.models.blockwise.job import open_job as open_job
    from maskopt.models.distillation import distill_model as distill_model
    from maskopt.models.evaluation.evaluate import perplexity as perplexity
    from maskopt.models.options.prune import PruneOptions as PruneOptions
    from maskopt.models.pruning.gram_store import collect_grams as collect_grams
    from maskopt.models.pruning.prune import (
        collect_problems as collect_problems,
        prune_model as prune_model,
    )
    from maskopt.models.structured.blocks import remove_blocks as remove_blocks
    from maskopt.models.structured.channels import shrink_model as shrink_model
    from maskopt.models.structured.experts import remove_experts as remove_experts
    from maskopt.models.training.held_masks import keep_masks as keep_masks
    from maskopt.protocol.bounds import (
        Bound as Bound,
        available_bounds as available_bounds,
        lower_bound as lower_bound,
    )
    from maskopt.protocol.solution import Solution as Solution, Status as Status
    from maskopt.protocol.solver import (
        available_solvers as available_solvers,
        make_solver as make_solver,
        solve as solve,
    )

#: Public names by module. Modules are imported on first use, since torch and transformers take seconds.
_MODULES = {
    "maskopt.certificates.certificate": ("Certificate",),
    "maskopt.certificates.proof": ("RowProof",),
    "maskopt.checks.swap_check": ("SwapMove", "improving_swap"),
    "maskopt.checks.verification": ("Verification", "verify"),
    "maskopt.core.least_squares": ("LeastSquaresUpdate",),
    "maskopt.core.limits": ("Limits", "Progress"),
    "maskopt.core.objective": ("LinearTerm",),
    "maskopt.core.pattern": ("NM", "Unstructured"),
    "maskopt.core.problem": ("LayerProblem", "RowProblem"),
    "maskopt.instances.structure": ("structure_problem",),
    "maskopt.errors": ("MaskoptError",),
    "maskopt.experiments.prove": ("minimize_quadratic",),
    "maskopt.instances.formats": ("load_problem", "save_problem"),
    "maskopt.models.blockwise.job": ("open_job",),
    "maskopt.models.distillation": ("distill_model",),
    "maskopt.models.evaluation.evaluate": ("perplexity",),
    "maskopt.models.options.prune": ("PruneOptions",),
    "maskopt.models.pruning.gram_store": ("collect_grams",),
    "maskopt.models.pruning.prune": ("collect_problems", "prune_model"),
    "maskopt.models.structured.blocks": ("remove_blocks",),
    "maskopt.models.structured.channels": ("shrink_model",),
    "maskopt.models.structured.experts": ("remove_experts",),
    "maskopt.models.training.held_masks": ("keep_masks",),
    "maskopt.protocol.bounds": ("Bound", "available_bounds", "lower_bound"),
    "maskopt.protocol.solution": ("Solution", "Status"),
    "maskopt.protocol.solver": ("available_solvers", "make_solver", "solve"),
}
_EXPORTS = {name: module for module, names in _MODULES.items() for name in names}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

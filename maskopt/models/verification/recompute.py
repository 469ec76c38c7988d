"""Errors and statuses of a pruned model computed again, from the calibration text of its prune.

The walk through the model is that of a prune (`_Walk` holds all of it): each layer's Gram matrix is
collected again on the inputs that the prune's options give it, with the masks of the result in place of
a solver. What is then computed from the Gram matrix shares no code with any solver.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskopt.checks.swap_check import costs_of, improving_swap, improving_swap_between_rows
from maskopt.core.least_squares import LeastSquaresUpdate
from maskopt.core.pattern import Unstructured
from maskopt.core.problem import LayerProblem
from maskopt.errors import VerificationError
from maskopt.models.architecture.blocks import Layer, choose, matrix
from maskopt.models.architecture.source import FolderSource, masks_as_model
from maskopt.models.blockwise.collect import Grams
from maskopt.models.blockwise.forward import Threads
from maskopt.models.blockwise.job import Block, open_job
from maskopt.models.calibration.tokens import CALIBRATION, are_tokens, tokens_or_tokenizer
from maskopt.models.checkpoints.bos import BOS, TEMPLATE
from maskopt.models.checkpoints.checkpoint import open_checkpoint
from maskopt.models.checkpoints.result import read_bases, read_windows
from maskopt.models.checkpoints.schema import BASES, IN_DENSE
from maskopt.models.options.prune import AUTO, BLOCKWISE, NONE
from maskopt.models.pruning.prune_layer import counting, held_problem, layer_problem
from maskopt.models.verification.folder import MASKS
from maskopt.models.verification.manifest import Manifest, groups
from maskopt.protocol.solution import SWAP_TOLERANCE, Status

#: relative difference at which a stated error is wrong, by the precision of the passes. On one machine
#: they give the same bits; another processor rounds otherwise, and each block adds to that
ERROR_TOLERANCES = {"float64": 1e-9, "float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-2}
#: relative difference up to which the Gram matrices are taken for those of the prune, bit for bit
SAME_BITS = 1e-12
#: of a layer, about how many rows' least squares are solved again
LEAST_SQUARES_ROWS = 16


@dataclass(frozen=True)
class LayerState:
    """Layer as its prune met it.

    Attributes:
        stated: the report of the layer in the manifest.
        problem: original weights and Gram matrix.
        kept: the mask of the result.
        result: weights of the result in the stored dtype; None: the kept weights are unchanged.
        held: the problem on held-out windows; None without any.
    """

    manifest: Manifest
    stated: Mapping[str, Any]
    problem: LayerProblem
    kept: Tensor
    result: Tensor | None
    tokens: int
    held: LayerProblem | None

    @property
    def tolerance(self) -> float:
        """Relative difference at which a stated error is wrong."""
        return ERROR_TOLERANCES[self.manifest.record["fingerprint"]["dtype"]]

    def wrong(self, fault: str) -> VerificationError:
        return self.manifest.wrong(f"layer {self.stated['name']!r}{fault}")


def recheck_layers(
    manifest: Manifest,
    output: Path,
    model: Path,
    calibration: Any,
    layers: Sequence[str],
    **machine: Any,
) -> tuple[list[str], float]:
    """Compute tokens, errors and statuses of the layers that patterns choose again, and compare them.

    Args:
        machine: other options of a walk.

    Returns:
        The names of the layers, and the relative difference up to which errors had to agree.
    """
    _check_recorded(manifest)
    walk = _Walk(manifest, output, model, calibration, machine)
    chosen = [layer.name for layer in choose(walk.job.layers, layers)]
    with walk.job, torch.no_grad():
        for state in walk.states(set(chosen)):
            _check_layer(state, walk.job.pool)
    return chosen, ERROR_TOLERANCES[manifest.record["fingerprint"]["dtype"]]


def _check_recorded(manifest: Manifest) -> None:
    """Raise VerificationError where errors cannot be computed again from what a manifest records."""
    options, device = manifest.options, manifest.record["fingerprint"]["device"]
    if device != "cpu" and not (device == "cuda" and torch.cuda.is_available()):
        raise manifest.wrong("its run was on a GPU, which rounds otherwise; check it on one")
    if manifest.distilled and options.update != NONE:
        raise manifest.wrong(
            "its updated weights were distilled since, so that their errors cannot be checked on text"
        )
    by_solver = any(layer["objective"] == "updated" for layer in manifest.layers)
    if options.update == BLOCKWISE and options.true_sequential and by_solver:
        raise manifest.wrong(
            "later layers of a block saw its solver's own weights, which training has "
            "changed since: it cannot be checked on text"
        )


# --- one layer


def _check_layer(state: LayerState, pool: Threads) -> None:
    """Raise VerificationError for the first figure that the layer states wrongly."""
    stated, problem, options = state.stated, state.problem, state.manifest.options
    damping, unchanged = stated["damping"], problem.with_update(None)
    if stated["tokens"] != state.tokens:
        raise state.wrong(
            f" is said to have seen {stated['tokens']} tokens; it sees {state.tokens}"
        )
    used = 0.0 if stated["fallback"] else options.gram_shrinkage
    if used != AUTO and stated["gram_shrinkage"] != used:
        raise state.wrong(" was shrunk by another α than the options say")
    if damping is not None and options.damping not in (AUTO, damping):
        raise state.wrong(" was updated with another damping than the options say")
    _check_sums(state, "energy", LayerProblem.output_energy)
    if damping is None:
        same = _check_sums(state, "error", lambda x: x.objective(state.kept))
    else:
        before = float(unchanged.objective(state.kept).sum())
        same = _check_sum(state, "error_kept", before, " before its weights were updated")
    wanda = float(unchanged.objective(_wanda(problem)).sum())
    _check_sum(state, "error_wanda", wanda, " for Wanda's mask")
    if damping is not None and state.result is not None:
        if stated["objective"] != "updated":
            _check_weights(state)
        new = state.result.to(problem.device).double()
        same = _check_sums(state, "error", lambda x: x.error(new))
    _check_statuses(state, SWAP_TOLERANCE if same else state.tolerance, pool)


def _wanda(problem: LayerProblem) -> Tensor:
    """Return the mask, True = kept, that prunes the least |wᵢ|·√Gᵢᵢ of every row or group."""
    group, pruned = groups(problem.pattern, problem.n)
    scores = problem.weight.double().abs() * problem.gram.diagonal().double().clamp(min=0).sqrt()
    least = scores.view(problem.rows, -1, group).topk(pruned, largest=False).indices
    kept = torch.ones(problem.rows, problem.n // group, group, dtype=torch.bool)
    return kept.to(scores.device).scatter_(-1, least, False).view(problem.rows, problem.n)


def _check_sums(state: LayerState, key: str, by_row: Callable[[LayerProblem], Tensor]) -> bool:
    """Compare a sum over all rows, as `_check_sum` does, and the same on held-out windows."""
    same = _check_sum(state, key, float(by_row(state.problem).sum()))
    held = None if state.held is None else float(by_row(state.held).sum())
    _check_sum(state, f"{key}_held", held, " on held-out windows")
    return same


def _check_sum(state: LayerState, key: str, value: float | None, which: str = "") -> bool:
    """Compare a sum with the report; return whether the Gram matrix seems to have the same bits."""
    stated = state.stated[key]
    if stated is None and value is None:
        return True
    if stated is not None and value is not None:
        floor = SAME_BITS * float(state.problem.diagonal_mass().sum())
        if math.isclose(stated, value, rel_tol=state.tolerance, abs_tol=floor):
            return math.isclose(stated, value, rel_tol=SAME_BITS, abs_tol=floor)
    quantity = key.partition("_")[0]
    raise state.wrong(
        f" states an {quantity} of {_short(stated)}{which}; its mask has {_short(value)}"
    )


def _short(value: float | None) -> str:
    return str(value) if value is None else f"{value:.9g}"


def _check_weights(state: LayerState) -> None:
    """Solve least squares of a sample of rows: their weights cost no more, but for the rounding."""
    result = state.result
    assert result is not None
    rows = list(range(0, state.problem.rows, max(1, state.problem.rows // LEAST_SQUARES_ROWS)))
    problem, mask = state.problem.take(rows), state.kept[rows]
    new = result[rows].to(problem.device).double()
    cost, diagonal = problem.cost(new), problem.least_squares.damped.diagonal()
    rounding = 10 * torch.finfo(result.dtype).eps ** 2 * (new.square() @ diagonal)
    for index, row in enumerate(rows):
        best = float(costs_of(problem).cost(mask, index))
        if not float(cost[index]) <= best * (1 + state.tolerance) + float(rounding[index]):
            raise state.wrong(
                f", row {row}: its weights are not those of least squares: they cost "
                f"{float(cost[index]):.6g}, the best {best:.6g}"
            )


def _check_statuses(state: LayerState, tolerance: float, pool: Threads) -> None:
    """Look for improving swaps in rows that are said to have none."""
    kept, problem, statuses = state.kept, state.problem, state.stated["statuses"]
    if state.stated["objective"] != "least-squares":
        problem = problem.with_update(None)
    count = sum(statuses.get(status, 0) for status in (Status.SWAP_OPTIMAL, Status.OPTIMAL))
    if not count:
        return

    def swap_of(row: int) -> Any:
        if not problem.shared_budget:
            return improving_swap(problem.row(row), kept[row], tolerance)
        pattern = Unstructured(keep=int(kept[row].sum()))
        return improving_swap(problem.take([row]).under(pattern), kept[row], tolerance)

    swaps = pool.run([partial(swap_of, row) for row in range(problem.rows)])
    improvable = [(row, swap) for row, swap in enumerate(swaps) if swap is not None]
    if problem.rows - len(improvable) < count:
        row, swap = improvable[0]
        raise state.wrong(
            f" states that {count} of {problem.rows} rows are {Status.SWAP_OPTIMAL}; "
            f"{problem.rows - len(improvable)} are: in row {row}, keeping input {swap.pruned} "
            f"instead of {swap.kept} changes the error by {swap.delta:.3g}"
        )
    if not problem.shared_budget:
        return
    between = improving_swap_between_rows(problem, kept, tolerance)
    if between is not None:
        raise state.wrong(
            f" states that its rows are {Status.SWAP_OPTIMAL} together; keeping input "
            f"{between.pruned} of row {between.other} instead of {between.kept} of row {between.row} "
            f"changes the error by {between.delta:.3g}"
        )


# --- the walk


class _Walk:
    """Walk of a prune, repeated with the masks and the updated weights of its result."""

    def __init__(
        self,
        manifest: Manifest,
        output: Path,
        model: Path,
        calibration: Any,
        machine: Mapping[str, Any],
    ) -> None:
        self.manifest, self.options = manifest, manifest.options
        self.stated = {layer["name"]: layer for layer in manifest.layers}
        fingerprint, trust = manifest.record["fingerprint"], machine["trust_remote_code"]
        data = fingerprint["calibration"]
        bos = data["beginning"]["bos"]
        options = dataclasses.replace(
            self.options, include=tuple(self.stated), exclude=(), update=NONE,
            training={}, distillation={},
            damping=LeastSquaresUpdate.damping, damping_exponent=LeastSquaresUpdate.power,
            gram_shrinkage=0.0, samples=data["samples"], seq_len=data["length"],
            bos=bos if bos in BOS else "auto", chat=bos == TEMPLATE.bos and not are_tokens(calibration),
            device=fingerprint["device"], dtype=fingerprint["dtype"], **machine,
        )  # fmt: skip
        text, _ = tokens_or_tokenizer(None, calibration)
        self.job = open_job(model, text, options, written=read_windows(output, CALIBRATION))
        windows, checkpoint = self.job.windows, self.job.source.checkpoint
        if windows.digest != data["sha256"]:
            raise VerificationError(
                f"{windows.source}: is not what the model was calibrated on: its {len(windows)} windows of "
                f"{windows.length} tokens have another digest than those of the manifest"
            )
        assert checkpoint is not None
        if (output / BASES).is_file():
            checkpoint.bases.update(read_bases(output / BASES))
        self.masks = masks_as_model(checkpoint, output / MASKS, trust_remote_code=trust)
        self.result = None
        if self.options.update != NONE:
            cpu = torch.device("cpu")
            pruned = open_checkpoint(output)
            self.result = FolderSource(pruned, cpu, None, trust_remote_code=trust)

    def states(self, chosen: set[str]) -> Iterator[LayerState]:
        """Go through the blocks as the prune did; yield the chosen layers, before they are pruned."""
        model, trained = self.job.source.model, self.options.update == BLOCKWISE
        bad_samples = self.manifest.record["bad_samples"]
        last = max(layer.block for layer in self.job.layers if layer.name in chosen)
        left_out: list[dict[str, Any]] = []
        for block in self.job.blocks():
            with self.masks.open(block.index):
                kept = {layer.name: matrix(self.masks.model, layer) != 0 for layer in block.layers}
            # The dense model does not run along here.
            for sample in bad_samples if trained else ():
                if sample["layer"] == block.name + IN_DENSE:
                    block.samples.leave_out(sample["sample"], sample["layer"])
            new, vectors = self._updated(block)
            for stage, grams in block.rounds():
                for layer in stage:
                    weight, mask = matrix(model, layer), kept[layer.name]
                    mask, weights = mask.to(weight.device), new.get(layer.name)
                    updated = self.stated[layer.name]["damping"] is not None
                    # Later rounds may have seen the weights as they were before training.
                    if layer.name in chosen or (
                        trained and self.options.true_sequential and updated
                    ):
                        state = self._state(layer, grams, mask, weights)
                        weights = state.result
                        if layer.name in chosen:
                            yield state
                    if weights is not None and (updated or not trained):
                        weight.copy_(weights)
                    else:
                        weight.masked_fill_(~mask, 0)
                del grams  # the next pass needs their memory
            for layer in block.layers if trained else ():
                matrix(model, layer).copy_(new[layer.name])
            for name, vector in vectors.items():
                model.get_parameter(name).copy_(vector)
            left_out += [dataclasses.asdict(sample) for sample in block.bad]
            if block.index == last:
                break
            block.advance()
        if left_out != bad_samples[: len(left_out)]:
            raise self.manifest.wrong(
                "left out other samples than those with NaN or infinite activations"
            )

    def _updated(self, block: Block) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Read a block's weights in the result by layer, and its norms and biases if these were trained."""
        if self.result is None:
            return {}, {}
        model = self.result.model
        with self.result.open(block.index):
            new = {layer.name: matrix(model, layer).clone() for layer in block.layers}
            if self.options.update != BLOCKWISE:
                return new, {}
            names = self.result.vectors(block.index)
            return new, {name: model.get_parameter(name).clone() for name in names}

    def _state(self, layer: Layer, grams: Grams, mask: Tensor, result: Tensor | None) -> LayerState:
        """Return the state of a layer whose Gram matrix is collected; `result`: its weights in the result."""
        options, stated = self.options, self.stated[layer.name]
        gram, dense = grams.of(layer.name), matrix(self.job.source.model, layer).float()
        tokens = 0 if gram is None else gram.tokens
        pattern = options.pattern_of(layer.name, layer.n)
        damping, alpha = stated["damping"], float(stated["gram_shrinkage"])
        update = None if damping is None else LeastSquaresUpdate(damping, options.damping_exponent)
        known = None if tokens < options.min_tokens else gram
        problem = layer_problem(layer.name, dense, known, pattern, alpha, update)
        if known is not None:
            problem = counting(problem, options.sensitivity, self.job.gradients)
        if (
            options.update == BLOCKWISE and result is not None
        ):  # the weights before training are needed
            solved = update is not None and stated["objective"] != "updated"
            result = problem.weights(mask).to(result.dtype) if solved else None
        held = held_problem(layer, dense, grams, pattern)
        return LayerState(self.manifest, stated, problem, mask, result, tokens, held)

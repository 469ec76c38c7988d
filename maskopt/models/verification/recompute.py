"""Errors and statuses of a pruned model computed again, from the calibration text of its prune.

The walk through the model is that of a prune (`_walk` holds all of it): each layer's Gram matrix is
collected again on the inputs that the prune's options give it, with the masks of the result in place of
a solver. What is then computed from the Gram matrix shares no code with any solver.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from maskopt.models.blockwise.collect import IN_DENSE, Grams
from maskopt.models.blockwise.forward import Threads
from maskopt.models.blockwise.job import Job, open_job
from maskopt.models.calibration.tokens import CALIBRATION, are_tokens, tokens_or_tokenizer
from maskopt.models.checkpoints.bos import BOS, TEMPLATE
from maskopt.models.checkpoints.checkpoint import open_checkpoint
from maskopt.models.checkpoints.result import read_bases, read_windows
from maskopt.models.checkpoints.schema import BASES
from maskopt.models.options.prune import AUTO, BLOCKWISE, NONE, PruneOptions
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
class Found:
    """A layer as its prune met it: original weights and Gram matrix, also on held-out windows; the given
    mask; and weights of the result in the stored dtype (None: the kept ones)."""

    problem: LayerProblem
    kept: Tensor
    result: Tensor | None
    tokens: int
    held: LayerProblem | None


def recheck_layers(
    manifest: Manifest,
    output: Path,
    model: Path,
    calibration: Any,
    layers: Sequence[str],
    **machine: Any,
) -> tuple[list[str], float]:
    """Compare tokens, errors and statuses of the layers that patterns choose with those computed again.

    Args:
        machine: other options of a walk.

    Returns:
        The names of the layers, and the relative difference up to which errors had to agree.
    """
    _check_recorded(manifest)
    options, fingerprint = manifest.options, manifest.record["fingerprint"]
    data, dtype = fingerprint["calibration"], fingerprint["dtype"]
    trust: bool = machine["trust_remote_code"]
    bos = data["beginning"]["bos"]
    # masks and updated weights are those of the result
    walked = dataclasses.replace(
        options, include=tuple(layer["name"] for layer in manifest.layers), exclude=(), update=NONE,
        training={}, distillation={},
        damping=LeastSquaresUpdate.damping, damping_exponent=LeastSquaresUpdate.power,
        gram_shrinkage=0.0, samples=data["samples"], seq_len=data["length"],
        bos=bos if bos in BOS else "auto", chat=bos == TEMPLATE.bos and not are_tokens(calibration),
        device=fingerprint["device"], dtype=dtype, **machine,
    )  # fmt: skip
    text, _ = tokens_or_tokenizer(None, calibration)
    job = open_job(model, text, walked, written=read_windows(output, CALIBRATION))
    if job.windows.digest != data["sha256"]:
        raise VerificationError(
            f"{job.windows.source}: is not what the model was calibrated on: its {len(job.windows)} "
            f"windows of {job.windows.length} tokens have another digest than those of the manifest"
        )
    if (output / BASES).is_file():
        assert job.source.checkpoint is not None
        job.source.checkpoint.bases.update(read_bases(output / BASES))
    chosen = [layer.name for layer in choose(job.layers, layers)]
    assert job.source.checkpoint is not None
    masks = masks_as_model(job.source.checkpoint, output / MASKS, trust_remote_code=trust)
    result = None
    if options.update != NONE:
        result = FolderSource(
            open_checkpoint(output), torch.device("cpu"), None, trust_remote_code=trust
        )
    tolerance = ERROR_TOLERANCES[dtype]
    said = {layer["name"]: layer for layer in manifest.layers}
    with job, torch.no_grad():
        for name, layer in _walk(job, masks, result, said, set(chosen), manifest):
            for fault in _faults(said[name], layer, options, tolerance, job.pool):
                raise manifest.wrong(f"layer {name!r}{fault}")
    return chosen, tolerance


def _check_recorded(manifest: Manifest) -> None:
    """Raise VerificationError where errors cannot be computed again from what a manifest records."""
    options, device = manifest.options, manifest.record["fingerprint"]["device"]
    if device != "cpu" and not (device == "cuda" and torch.cuda.is_available()):
        raise manifest.wrong("its run was on a GPU, which rounds otherwise; check it on one")
    if manifest.distilled and options.update != NONE:
        raise manifest.wrong(
            "its updated weights were distilled since, so that their errors cannot be checked on text"
        )
    own = any(layer["objective"] == "updated" for layer in manifest.layers)
    if options.update == BLOCKWISE and options.true_sequential and own:
        raise manifest.wrong(
            "later layers of a block saw its solver's own weights, which training has "
            "changed since: it cannot be checked on text"
        )


def _faults(
    said: Mapping[str, Any], found: Found, options: PruneOptions, tolerance: float, pool: Threads
) -> Iterator[str]:
    """What a layer states that is not so, in words; computed as far as it is asked for."""
    if said["tokens"] != found.tokens:
        yield f" is said to have seen {said['tokens']} tokens; it sees {found.tokens}"
    used = 0.0 if said["fallback"] else options.gram_shrinkage
    if used != AUTO and said["gram_shrinkage"] != used:
        yield " was shrunk by another α than the options say"
    problem, kept, damping = found.problem, found.kept, said["damping"]
    if damping is not None and options.damping not in (AUTO, damping):
        yield " was updated with another damping than the options say"
    energies = _sums("energy", found, LayerProblem.output_energy)
    yield from _other_sums(said, energies, tolerance, 0.0)
    floor = SAME_BITS * float(problem.diagonal_mass().sum())
    if damping is None:
        sums = _sums("error", found, lambda x: x.objective(kept))
    else:
        unchanged = float(problem.with_update(None).objective(kept).sum())
        sums = [("error_kept", unchanged, " before its weights were updated")]
    yield from _other_sums(said, sums, tolerance, floor)
    wanda = float(problem.with_update(None).objective(_wanda(problem)).sum())
    yield from _other_sums(said, [("error_wanda", wanda, " for Wanda's mask")], tolerance, floor)
    if damping is not None and found.result is not None:
        if said["objective"] != "updated":
            yield from _other_weights(found, tolerance)
        new = found.result.to(problem.device).double()
        sums = _sums("error", found, lambda x: x.error(new))
        yield from _other_sums(said, sums, tolerance, floor)
    same = not any(_other_sums(said, sums[:1], SAME_BITS, floor))  # as far as the error shows
    yield from _other_statuses(said, found, SWAP_TOLERANCE if same else tolerance, pool)


def _wanda(problem: LayerProblem) -> Tensor:
    """The mask, True = kept, that prunes the least |wᵢ|·√Gᵢᵢ of every row or group."""
    group, pruned = groups(problem.pattern, problem.n)
    scores = problem.weight.double().abs() * problem.gram.diagonal().double().clamp(min=0).sqrt()
    least = scores.view(problem.rows, -1, group).topk(pruned, largest=False).indices
    kept = torch.ones(problem.rows, problem.n // group, group, dtype=torch.bool)
    return kept.to(scores.device).scatter_(-1, least, False).view(problem.rows, problem.n)


#: what a layer states, what is computed in its place (None: there are no held-out windows), and more words
Sum = tuple[str, float | None, str]


def _sums(key: str, found: Found, of: Callable[[LayerProblem], Tensor]) -> list[Sum]:
    """Over all rows, and the same on the held-out windows."""
    held = None if found.held is None else float(of(found.held).sum())
    every = float(of(found.problem).sum())
    return [(key, every, ""), (f"{key}_held", held, " on held-out windows")]


def _other_sums(
    said: Mapping[str, Any], sums: Sequence[Sum], tolerance: float, floor: float
) -> Iterator[str]:
    for key, value, which in sums:
        stated, what = said[key], key.partition("_")[0]
        if stated is None or value is None:
            holds = stated is value
        else:
            holds = math.isclose(stated, value, rel_tol=tolerance, abs_tol=floor)
        if not holds:
            yield f" states an {what} of {_short(stated)}{which}; its mask has {_short(value)}"


def _short(value: float | None) -> str:
    return str(value) if value is None else f"{value:.9g}"


def _other_weights(found: Found, tolerance: float) -> Iterator[str]:
    """Some rows' weights that cost more than least squares and the rounding to the stored dtype."""
    problem, result = found.problem, found.result
    assert result is not None
    rows = list(range(0, problem.rows, max(1, problem.rows // LEAST_SQUARES_ROWS)))
    some, mask = problem.take(rows), found.kept[rows]
    new = result[rows].to(problem.device).double()
    cost, diagonal = some.cost(new), some.least_squares.damped.diagonal()
    rounding = 10 * torch.finfo(result.dtype).eps ** 2 * (new.square() @ diagonal)
    for index, row in enumerate(rows):
        best = float(costs_of(some).cost(mask, index))
        if not float(cost[index]) <= best * (1 + tolerance) + float(rounding[index]):
            yield (
                f", row {row}: its weights are not those of least squares: they cost "
                f"{float(cost[index]):.6g}, the best {best:.6g}"
            )


def _other_statuses(
    said: Mapping[str, Any], found: Found, tolerance: float, pool: Threads
) -> Iterator[str]:
    kept = found.kept
    problem = (
        found.problem if said["objective"] == "least-squares" else found.problem.with_update(None)
    )
    count = sum(said["statuses"].get(s, 0) for s in (Status.SWAP_OPTIMAL, Status.OPTIMAL))
    if not count:
        return

    def swap_of(row: int) -> Any:
        own = Unstructured(keep=int(kept[row].sum()))
        one = problem.take([row]).under(own) if problem.shared_budget else problem.row(row)
        return improving_swap(one, kept[row], tolerance)

    swaps = pool.run([lambda row=row: swap_of(row) for row in range(problem.rows)])  # type: ignore[misc]
    improvable = [(row, swap) for row, swap in enumerate(swaps) if swap is not None]
    if problem.rows - len(improvable) < count:
        row, swap = improvable[0]
        yield (
            f" states that {count} of {problem.rows} rows are {Status.SWAP_OPTIMAL}; "
            f"{problem.rows - len(improvable)} are: in row {row}, keeping input {swap.pruned} "
            f"instead of {swap.kept} changes the error by {swap.delta:.3g}"
        )
    between = (
        improving_swap_between_rows(problem, kept, tolerance) if problem.shared_budget else None
    )
    if between is not None:
        yield (
            f" states that its rows are {Status.SWAP_OPTIMAL} together; keeping input "
            f"{between.pruned} of row {between.other} instead of {between.kept} of row {between.row} "
            f"changes the error by {between.delta:.3g}"
        )


def _walk(
    job: Job,
    masks: FolderSource,
    result: FolderSource | None,
    said: Mapping[str, Mapping[str, Any]],
    chosen: set[str],
    manifest: Manifest,
) -> Iterator[tuple[str, Found]]:
    """Go through the blocks as the prune did; yield the chosen layers, before they are pruned."""
    options, model = manifest.options, job.source.model
    trained = options.update == BLOCKWISE
    last = max(layer.block for layer in job.layers if layer.name in chosen)
    left_out: list[dict[str, Any]] = []
    for block in job.blocks():
        with masks.open(block.index):
            kept = {layer.name: matrix(masks.model, layer) != 0 for layer in block.layers}
        new: dict[str, Tensor] = {}
        vectors: dict[str, Tensor] = {}
        # the dense model does not run along here
        for sample in manifest.record["bad_samples"] if trained else ():
            if sample["layer"] == block.name + IN_DENSE:
                block.samples.leave_out(sample["sample"], sample["layer"])
        if result is not None:
            with result.open(block.index):
                new = {x.name: matrix(result.model, x).clone() for x in block.layers}
                names = result.vectors(block.index) if trained else ()
                vectors = {name: result.model.get_parameter(name).clone() for name in names}
        for stage, grams in block.rounds():
            for layer in stage:
                weight, one = matrix(model, layer), said[layer.name]
                mask, weights = kept[layer.name].to(weight.device), new.get(layer.name)
                updated = one["damping"] is not None
                # what its weights were before they were trained, later rounds may have seen
                if layer.name in chosen or (trained and options.true_sequential and updated):
                    found = _found(job, options, layer, one, grams, mask, weights)
                    weights = found.result
                    if layer.name in chosen:
                        yield layer.name, found
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
    if left_out != manifest.record["bad_samples"][: len(left_out)]:
        raise manifest.wrong("left out other samples than those with NaN or infinite activations")


def _found(
    job: Job,
    options: PruneOptions,
    layer: Layer,
    said: Mapping[str, Any],
    grams: Grams,
    mask: Tensor,
    result: Tensor | None,
) -> Found:
    """A layer of a block whose Gram matrices are there; `result`: its weights in the result."""
    gram, dense = grams.of(layer.name), matrix(job.source.model, layer).float()
    tokens, pattern = 0 if gram is None else gram.tokens, options.pattern_of(layer)
    damping = said["damping"]
    update = None if damping is None else LeastSquaresUpdate(damping, options.damping_exponent)
    known = None if tokens < options.min_tokens else gram
    problem = layer_problem(
        layer.name, dense, known, pattern, float(said["gram_shrinkage"]), update
    )
    if known is not None:
        problem = counting(problem, options.sensitivity, job.gradients)
    if options.update == BLOCKWISE and result is not None:  # as it was before it was trained
        own = update is not None and said["objective"] != "updated"
        result = problem.weights(mask).to(result.dtype) if own else None
    return Found(problem, mask, result, tokens, held_problem(layer, dense, grams, pattern))

"""Errors and statuses of a pruned model computed again, from the calibration text of its prune.

The walk through the model is that of a prune (`_walk` holds all of it): each layer's Gram matrix is
collected again on the inputs that the prune's options give it, with the masks of the result in place of
a solver. What is then computed from the Gram matrix shares no code with any solver.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskopt.checks.pooled_checks import improving_trade
from maskopt.checks.refit_checks import refitted_cost
from maskopt.checks.swap_checks import improving_swap
from maskopt.core.least_squares import Refit
from maskopt.core.pattern import Pattern, pattern_from_dict
from maskopt.core.problem import LayerProblem
from maskopt.errors import MaskoptError, VerificationError
from maskopt.models.architecture.blocks import choose, matrix
from maskopt.models.architecture.source import FolderSource, masks_as_model
from maskopt.models.blockwise.collect import IN_DENSE
from maskopt.models.blockwise.gradients import counting
from maskopt.models.blockwise.job import Job, open_job
from maskopt.models.blockwise.threads import Threads
from maskopt.models.calibration.token_weights import TOKEN_WEIGHTS
from maskopt.models.calibration.tokens import are_tokens
from maskopt.models.checkpoints.bos import BOS, GIVEN, TEMPLATE
from maskopt.models.checkpoints.checkpoint import open_checkpoint
from maskopt.models.options.prune import (
    AUTO,
    BLOCKWISE,
    FISHER,
    NONE,
    SENSITIVITIES,
    TARGETS,
    UNIFORM,
    UPDATES,
    PruneOptions,
)
from maskopt.models.pruning.problems import held_problem, layer_problem
from maskopt.models.verification.folder import MASKS
from maskopt.models.verification.manifest import Manifest
from maskopt.protocol.solution import SWAP_TOLERANCE, Status

#: relative difference at which a stated error is wrong, by the precision of the passes. On one machine
#: they give the same bits; another processor rounds otherwise, and each block adds to that
ERROR_TOLERANCES = {"float64": 1e-9, "float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-2}
#: relative difference up to which the Gram matrices are taken for those of the prune, bit for bit
SAME_BITS = 1e-12
#: of a layer, about how many rows' least squares are solved again
LEAST_SQUARES_ROWS = 16


@dataclass(frozen=True)
class Run:
    """How a manifest says that its run collected Gram matrices."""

    pattern: Pattern
    allocation: str
    counts: Mapping[str, int]
    max_deviation: float | None
    sensitivity: str
    calibrate_on: str
    true_sequential: bool
    all_experts: bool
    min_tokens: int
    gram_shrinkage: float | str
    holdout: float
    target: str
    token_weights: str
    update: str
    damping: float | str
    damping_exponent: float
    skip_bad_samples: bool
    seed: int
    samples: int
    length: int
    bos: str
    windows: str
    dtype: str
    device: str

    @classmethod
    def of(cls, manifest: Manifest) -> Run:
        """Raises VerificationError where the manifest does not say."""
        fingerprint = manifest.record["fingerprint"]
        try:
            options, data = fingerprint["options"], fingerprint["calibration"]
            run = cls(
                pattern=pattern_from_dict(options["sparsity"]),
                allocation=options["allocation"],
                counts=options["counts"],
                # of rows alone the pattern has it, of layers alone the counts
                max_deviation=_any(options["max_deviation"])
                if options["allocation"] == "both"
                else None,
                sensitivity=options["sensitivity"],
                calibrate_on=options["calibrate_on"],
                true_sequential=options["true_sequential"],
                all_experts=options["all_experts"],
                min_tokens=options["min_tokens"],
                gram_shrinkage=options["gram_shrinkage"],
                holdout=options["holdout"],
                target=options["target"],
                token_weights=options["token_weights"],
                update=options["update"],
                damping=options["damping"],
                # of before there was a choice
                damping_exponent=options.get("damping_exponent", 0.0),
                skip_bad_samples=options["skip_bad_samples"],
                seed=options["seed"],
                samples=data["samples"],
                length=data["length"],
                bos=data["beginning"]["bos"],
                windows=data["sha256"],
                dtype=fingerprint["dtype"],
                device=fingerprint["device"],
            )
        except (KeyError, TypeError, MaskoptError):
            raise manifest.wrong("does not say how its run was calibrated") from None
        flags = (run.true_sequential, run.all_experts, run.skip_bad_samples)
        counts = (run.min_tokens, run.samples, run.length)
        sound = (
            all(type(flag) is bool for flag in flags)
            and all(type(count) is int and count > 0 for count in counts)
            and type(run.seed) is int
            and run.seed >= 0
            and (type(run.gram_shrinkage) in (int, float) or run.gram_shrinkage == AUTO)
            and type(run.holdout) in (int, float)
            and 0 <= run.holdout < 1
            and run.target in TARGETS
            and run.calibrate_on in ("dense", "pruned")
            and run.token_weights in TOKEN_WEIGHTS
            and run.update in UPDATES
            and run.sensitivity in SENSITIVITIES
            and (run.damping == AUTO or _is_amount(run.damping))
            and _is_amount(run.damping_exponent)
            and run.damping_exponent <= 1
            and run.bos in (*BOS, GIVEN.bos, TEMPLATE.bos)
            and run.dtype in ERROR_TOLERANCES
            and run.device in ("cpu", "cuda")
        )
        if not sound:
            raise manifest.wrong("does not say how its run was calibrated")
        return run


def _any(max_deviation: float | None) -> float:
    """As options say it that no limits are set."""
    return 1.0 if max_deviation is None else max_deviation


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


@dataclass(frozen=True)
class Found:
    """A layer as its prune met it: original weights, Gram matrix, the mask that it was given, and what its
    weights are in the result, in the dtype in which they are stored."""

    problem: LayerProblem
    kept: Tensor
    result: Tensor | None
    tokens: int
    held: LayerProblem | None
    """The same on the windows that were kept aside, where there were any."""


def recheck_layers(
    manifest: Manifest,
    output: Path,
    model: Path,
    calibration: Any,
    *,
    layers: Sequence[str] = (),
    text_field: str = "text",
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> tuple[list[str], float]:
    """Compare tokens, errors and statuses of the chosen layers with those computed again.

    Arguments are those of `verify_output`. Returns the names of the layers, and the relative difference
    up to which errors had to agree.

    Raises:
        VerificationError: other windows than those of the prune, a machine that cannot repeat its
            passes, or a layer whose error or statuses are other ones.
    """
    run = Run.of(manifest)
    if run.device == "cuda" and not torch.cuda.is_available():
        raise VerificationError(
            f"{manifest.path}: its run was on a GPU, which rounds otherwise; check it on one"
        )
    said = {layer["name"]: layer for layer in manifest.layers}
    own = any(layer["objective"] == "updated" for layer in manifest.layers)
    if run.update == BLOCKWISE and run.true_sequential and own:
        raise VerificationError(
            f"{manifest.path}: later layers of a block saw its solver's own weights, which training has "
            "changed since: it cannot be checked on text"
        )
    options = PruneOptions(
        sparsity=run.pattern,
        allocation=run.allocation,
        counts=run.counts,
        max_deviation=run.max_deviation,
        sensitivity=run.sensitivity if run.allocation != UNIFORM else FISHER,
        solver="magnitude",
        include=tuple(said),
        seed=run.seed,
        calibrate_on=run.calibrate_on,
        true_sequential=run.true_sequential,
        all_experts=run.all_experts,
        skip_bad_samples=run.skip_bad_samples,
        samples=run.samples,
        seq_len=run.length,
        holdout=run.holdout,
        target=run.target,
        token_weights=run.token_weights,
        bos=run.bos if run.bos in BOS else "auto",
        chat=run.bos == TEMPLATE.bos and not are_tokens(calibration),
        text_field=text_field,
        device=run.device,
        dtype=run.dtype,
        threads=threads,
        trust_remote_code=trust_remote_code,
    )
    job = open_job(model, calibration, options)
    assert job.windows is not None
    if job.windows.digest != run.windows:
        raise VerificationError(
            f"{job.windows.source}: is not what the model was calibrated on: its {len(job.windows)} "
            f"windows of {job.windows.length} tokens have another digest than those of the manifest"
        )
    chosen = [layer.name for layer in choose(job.layers, tuple(layers))]
    assert job.source.checkpoint is not None
    masks = masks_as_model(
        job.source.checkpoint, output / MASKS, trust_remote_code=trust_remote_code
    )
    result = None
    if run.update != NONE:
        cpu = torch.device("cpu")
        result = FolderSource(
            open_checkpoint(output), cpu, None, trust_remote_code=trust_remote_code
        )
    with job, torch.no_grad():
        for name, layer in _walk(job, options, masks, result, said, set(chosen), run, manifest):
            _check_layer(manifest, said[name], layer, run, job.pool)
    return chosen, ERROR_TOLERANCES[run.dtype]


def _check_layer(
    manifest: Manifest, said: Mapping[str, Any], found: Found, run: Run, pool: Threads
) -> None:
    name = said["name"]
    if said["tokens"] != found.tokens:
        raise manifest.wrong(
            f"layer {name!r} is said to have seen {said['tokens']} tokens; it sees {found.tokens}"
        )
    _check_energies(manifest, said, found, ERROR_TOLERANCES[run.dtype])
    used = 0.0 if said["fallback"] else run.gram_shrinkage
    if used != AUTO and said["gram_shrinkage"] != used:
        raise manifest.wrong(f"layer {name!r} was shrunk by another α than the options say")
    if said["damping"] is not None and run.damping not in (AUTO, said["damping"]):
        raise manifest.wrong(
            f"layer {name!r} was refitted with another damping than the options say"
        )
    same = _check_errors(manifest, said, found, ERROR_TOLERANCES[run.dtype])
    _check_statuses(
        manifest, said, found, SWAP_TOLERANCE if same else ERROR_TOLERANCES[run.dtype], pool
    )


def _check_energies(
    manifest: Manifest, said: Mapping[str, Any], found: Found, tolerance: float
) -> None:
    """What errors are told as parts of."""
    for key, problem in (("energy", found.problem), ("energy_held", found.held)):
        energy = None if problem is None else float(problem.output_energy().sum())
        if (energy is None) != (said[key] is None) or not math.isclose(
            said[key] or 0.0, energy or 0.0, rel_tol=tolerance
        ):
            raise manifest.wrong(
                f"layer {said['name']!r} states {key} of {said[key]}; it is {energy}"
            )


def _check_errors(
    manifest: Manifest, said: Mapping[str, Any], found: Found, tolerance: float
) -> bool:
    """Whether the Gram matrix seems to be the prune's, bit for bit."""
    name, problem, kept = said["name"], found.problem, found.kept
    floor = SAME_BITS * float(problem.diagonal_mass().sum())
    if said["damping"] is None:
        error = float(problem.objective(kept).sum())
        held = None if found.held is None else float(found.held.objective(kept).sum())
    else:
        unchanged = float(problem.refitting(None).objective(kept).sum())
        if not math.isclose(said["error_kept"], unchanged, rel_tol=tolerance, abs_tol=floor):
            raise manifest.wrong(
                f"layer {name!r} states an error of {said['error_kept']:.9g} before its weights were "
                f"refitted; its mask has {unchanged:.9g}"
            )
        if found.result is None:  # trained from a solver's own weights, which are not stored
            return math.isclose(said["error_kept"], unchanged, rel_tol=SAME_BITS, abs_tol=floor)
        new = found.result.to(problem.device).double()
        error = float(problem.error(new).sum())
        held = None if found.held is None else float(found.held.error(new).sum())
        if said["objective"] != "updated":
            _check_least_squares(manifest, name, found, tolerance)
    if not math.isclose(said["error"], error, rel_tol=tolerance, abs_tol=floor):
        raise manifest.wrong(
            f"layer {name!r} states an error of {said['error']:.9g}; its mask has {error:.9g}"
        )
    if (held is None) != (said["error_held"] is None) or not math.isclose(
        said["error_held"] or 0.0, held or 0.0, rel_tol=tolerance, abs_tol=floor
    ):
        raise manifest.wrong(
            f"layer {name!r} states a held-out error of {said['error_held']}; its mask has {held}"
        )
    return math.isclose(said["error"], error, rel_tol=SAME_BITS, abs_tol=floor)


def _check_statuses(
    manifest: Manifest, said: Mapping[str, Any], found: Found, tolerance: float, pool: Threads
) -> None:
    name, kept = said["name"], found.kept
    problem = found.problem if said["objective"] == "refitted" else found.problem.refitting(None)
    count = sum(said["statuses"].get(s, 0) for s in (Status.SWAP_OPTIMAL, Status.OPTIMAL))
    if not count:
        return
    swaps = pool.run(
        [
            lambda i=i: improving_swap(  # type: ignore[misc]
                problem.at_count_of(kept, i) if problem.pooled else problem.row(i),
                kept[i],
                tolerance,
            )
            for i in range(problem.rows)
        ]
    )
    improvable = [(i, swap) for i, swap in enumerate(swaps) if swap is not None]
    if problem.rows - len(improvable) < count:
        row, swap = improvable[0]
        raise manifest.wrong(
            f"layer {name!r} states that {count} of {problem.rows} rows are {Status.SWAP_OPTIMAL}; "
            f"{problem.rows - len(improvable)} are: in row {row}, keeping input {swap.pruned} "
            f"instead of {swap.kept} changes the error by {swap.delta:.3g}"
        )
    trade = improving_trade(problem, kept, tolerance) if problem.pooled else None
    if trade is not None:
        raise manifest.wrong(
            f"layer {name!r} states that its rows are {Status.SWAP_OPTIMAL} together; keeping input "
            f"{trade.pruned} of row {trade.other} instead of {trade.kept} of row {trade.row} changes the "
            f"error by {trade.delta:.3g}"
        )


def _check_least_squares(manifest: Manifest, name: str, found: Found, tolerance: float) -> None:
    """Of some rows: their weights cost no more than those that are solved for here, but for what rounding to
    the stored dtype adds."""
    problem, result = found.problem, found.result
    assert result is not None
    rows = list(range(0, problem.rows, max(1, problem.rows // LEAST_SQUARES_ROWS)))
    some, mask = problem.take(rows), found.kept[rows]
    new = result[rows].to(problem.device).double()
    cost, diagonal = some.damped_error(new), some.least_squares.damped.diagonal()
    rounding = 10 * torch.finfo(result.dtype).eps ** 2 * (new.square() @ diagonal)
    for index, row in enumerate(rows):
        best = float(refitted_cost(some, mask, index))
        if not float(cost[index]) <= best * (1 + tolerance) + float(rounding[index]):
            raise manifest.wrong(
                f"layer {name!r}, row {row}: its weights are not those of least squares: they cost "
                f"{float(cost[index]):.6g}, the best {best:.6g}"
            )


def _begun(problem: LayerProblem, mask: Tensor, stored: Tensor | None) -> Tensor | None:
    """What weights were trained from, as they would have been stored; None where they were kept."""
    if problem.refit is None or stored is None:
        return None
    return problem.weights(mask).to(stored.dtype)


def _walk(
    job: Job,
    options: PruneOptions,
    masks: FolderSource,
    result: FolderSource | None,
    said: Mapping[str, Mapping[str, Any]],
    chosen: set[str],
    run: Run,
    manifest: Manifest,
) -> Iterator[tuple[str, Found]]:
    """Go through the blocks as the prune did, up to the last chosen layer; yield the chosen ones.

    A yielded problem may share its block's weights, which are pruned when the next one is asked for.
    """
    last = max(layer.block for layer in job.layers if layer.name in chosen)
    left_out: list[dict[str, Any]] = []
    for block in job.blocks():
        with masks.open(block.index):
            kept = {layer.name: matrix(masks.model, layer) != 0 for layer in block.layers}
        new: dict[str, Tensor] = {}
        vectors: dict[str, Tensor] = {}
        trained = run.update == BLOCKWISE
        # the dense model does not walk along here
        for sample in manifest.record["bad_samples"] if trained else ():
            if sample["layer"] == block.opened.name + IN_DENSE:
                block.opened.samples.leave_out(sample["sample"], sample["layer"])
        if result is not None:
            with result.open(block.index):
                new = {x.name: matrix(result.model, x).clone() for x in block.layers}
                names = result.vectors(block.index) if trained else ()
                vectors = {name: result.model.get_parameter(name).clone() for name in names}
        for stage, grams in block.rounds():
            for layer in stage:
                weight, gram = matrix(job.source.model, layer), grams.of(layer.name)
                mask = kept[layer.name].to(weight.device)
                tokens = 0 if gram is None else gram.tokens
                damping, result_weight = said[layer.name]["damping"], new.get(layer.name)
                # what its weights were before they were trained, later rounds may have seen
                seen = trained and run.true_sequential and damping is not None
                if layer.name in chosen or seen:
                    known = None if tokens < run.min_tokens else gram
                    alpha = float(said[layer.name]["gram_shrinkage"])
                    dense, moved = weight.float(), grams.moved(layer.name)
                    pattern = options.pattern_of(layer)
                    held = held_problem(layer, dense, grams, pattern)
                    refit = None if damping is None else Refit(damping, run.damping_exponent)
                    problem = layer_problem(layer, dense, known, pattern, alpha, moved, refit)
                    if known is not None:
                        problem = counting(problem, options.sensitivity, job.gradients)
                    if trained:
                        own = said[layer.name]["objective"] == "updated"
                        result_weight = None if own else _begun(problem, mask, result_weight)
                    if layer.name in chosen:
                        yield layer.name, Found(problem, mask, result_weight, tokens, held)
                if result_weight is not None and not (trained and damping is None):
                    weight.copy_(result_weight)
                else:
                    weight.masked_fill_(~mask, 0)
            del grams  # the next pass needs their memory
        for layer in block.layers if trained else ():
            matrix(job.source.model, layer).copy_(new[layer.name])
        for name, vector in vectors.items():
            job.source.model.get_parameter(name).copy_(vector)
        left_out += [dataclasses.asdict(sample) for sample in block.bad]
        if block.index == last:
            break
        block.advance()
    if left_out != manifest.record["bad_samples"][: len(left_out)]:
        raise manifest.wrong("left out other samples than those with NaN or infinite activations")

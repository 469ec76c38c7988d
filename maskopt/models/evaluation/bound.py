"""Certified gaps of full-width rows: how far masks are from the best possible.

Every bound is re-checked from its certificate before it is reported, and once more where a later run reads it
from the folder `<output>.rows`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import torch
from joblib import delayed
from torch import Tensor

from maskopt.core.pattern import Pattern, Unstructured, parse_sparsity
from maskopt.core.problem import LayerProblem
from maskopt.core.threads import torch_threads
from maskopt.errors import DataError, ModelError
from maskopt.experiments.compare import check_row_count, draw_rows
from maskopt.experiments.jobs import BATCH, Store, as_they_finish, digest_of, workers
from maskopt.models.architecture.blocks import Layer, choose
from maskopt.models.blockwise.job import open_job
from maskopt.models.calibration.tokens import CALIBRATION, SELF, Windows, tokens_or_tokenizer
from maskopt.models.checkpoints.checkpoint import open_checkpoint, resolve_model
from maskopt.models.checkpoints.report import LayerReport, grouped, read_reports, result_digest
from maskopt.models.checkpoints.result import read_windows
from maskopt.models.checkpoints.schema import MANIFEST, read_manifest
from maskopt.models.options.prune import BOTH, NONE
from maskopt.models.options.walk import WalkOptions, name_patterns, options_by_name
from maskopt.models.pruning.prune import layer_problems
from maskopt.protocol.bounds import REGISTRY, lower_bound
from maskopt.protocol.solution import Solution, is_bounded
from maskopt.protocol.solver import limits_of, solve

#: called with (rows done, name of the layer), before a layer is bounded and after
OnRows = Callable[[int, str], None]


@dataclass(frozen=True)
class GapRecord:
    """Gap of one row: its mask's objective, a certified lower bound, and the gap between them.

    Attributes:
        value, value_bound, gap: as those of `maskopt.experiments.compare.Record`.
        kind: of the row's layer in a model (`self_attn.q_proj`), else its name.
        model: `result_digest` of the pruned model of the row; empty where there is none.
        seconds: the bound's share of the time of its batch of rows.
    """

    instance: str
    kind: str
    row: int
    n: int
    pattern: str
    method: str
    objective: float
    lower_bound: float
    value: float
    value_bound: float
    gap: float
    seconds: float
    seed: int
    key: str
    model: str = ""

    @property
    def bounded(self) -> bool:
        """Whether the bound is informative."""
        return is_bounded(self.objective, self.lower_bound)


def bound_layers(
    problems: Iterable[LayerProblem],
    *,
    kinds: Mapping[str, str] | None = None,
    rows: int | None = None,
    solver: str = "swap",
    method: str = "sdp",
    method_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    jobs: int | None = None,
    output: Path | None = None,
    on_rows: OnRows = lambda done, name: None,
) -> list[GapRecord]:
    """Bound rows of every layer by `method`, and compare them with the masks of `solver`.

    Args:
        kinds: names of kinds in the records, by layer.
        rows: sampled from each layer; None: all.
        jobs: as for `compare`. One at a time bounds the rows of a layer together; several, each row by
            itself, with its share of a layer's time limit.
        output: `.jsonl` grows as layers finish and makes the run resumable (other records in the file stay).
            Certificates lie in the folder `<output>.rows`, and only a row whose certificate holds is skipped.
            `.csv` is written at the end.
    """
    check_row_count(rows)
    bounding = _Bounding(method, dict(method_options or {}), seed)
    kinds = kinds or {}

    def solved() -> Iterator[_Rows]:
        for position, layer in enumerate(problems):
            part, chosen = _sampled(layer, rows, seed=[seed, position])
            mask = solve(part, solver).raise_if_interrupted().mask
            yield _rows(bounding, part, kinds.get(layer.name, layer.name), chosen, mask)

    return _certify(solved(), bounding, jobs, output, on_rows)


def certify_model(
    model: str | Path,
    pruned: str | Path,
    *,
    calibration: str | Path | Sequence[Any],
    rows_per_layer: int = 4,
    method: str = "sdp",
    method_options: Mapping[str, Any] | None = None,
    jobs: int | None = None,
    output: Path | None = None,
    on_rows: OnRows = lambda done, name: None,
    **shorthand: Any,
) -> list[GapRecord]:
    """Return the certified gaps of sampled full-width rows of a pruned model.

    No other mask can lower the error on the given text by more, with the weights of `model` and the layers'
    inputs in `pruned`.

    Args:
        rows_per_layer: sampled from each layer, by the `seed`.
        method: of the bound, as for `lower_bound`.
        method_options: of this method.
        jobs: as for `bound_layers`.
        shorthand: options of the walk by name, as for `collect_problems`: `bos`, `seed`, …; `include` is
            among the pruned layers; `samples`, `seq_len` and `holdout` are by default those of the prune.

    Raises:
        ModelError: the folders do not belong together, weights were updated, or rows share a budget.
        DataError: an `output` with gaps of another model.
        MaskoptError: of what is called.
    """
    check_row_count(rows_per_layer)
    manifest = read_manifest(Path(pruned) / MANIFEST)
    asked = manifest["fingerprint"]["options"]
    pattern = _bounded_pattern(pruned, asked)
    trusted = bool(shorthand.get("trust_remote_code"))
    home = resolve_model(model, trust_remote_code=trusted)
    dense_model = open_checkpoint(home, trust_remote_code=trusted)
    if dense_model.digest != manifest["fingerprint"]["model"]:
        raise ModelError(f"{pruned}: was pruned from another model than {model}; name the original")
    reports = read_reports(LayerReport, manifest["layers"])
    done = choose(reports, name_patterns(shorthand.get("include")))
    text = manifest["fingerprint"]["calibration"]
    count = {"samples": text["samples"], "seq_len": text["length"], "holdout": asked["holdout"]}
    windows: Any = calibration
    if calibration == SELF or isinstance(calibration, Mapping):
        windows = _windows(model, calibration, count, pruned, shorthand)
    common: dict[str, Any] = {"sparsity": pattern, "calibration": windows}
    common = {**count, **shorthand, **common, "include": tuple(layer.name for layer in done)}
    seed = int(shorthand.get("seed", 0))
    # the walks end in the order in which they began, each with the threads that it found
    with ExitStack() as walks:
        walks.enter_context(torch_threads(None))
        dense = walks.enter_context(closing(layer_problems(model, unseen=True, **common)))
        sparse = walks.enter_context(closing(layer_problems(pruned, **common)))
        bounding = _Bounding(method, dict(method_options or {}), seed, result_digest(manifest))
        parts = _model_rows(bounding, dense, sparse, asked.get("counts", {}), rows_per_layer)
        return _certify(parts, bounding, jobs, output, on_rows)


def _windows(
    model: str | Path, calibration: Any, count: Mapping[str, Any], pruned: str | Path, asked: Any
) -> Windows:
    """Return the windows for both walks: the dense model wrote them, as a rule when it was pruned."""
    options = options_by_name(WalkOptions, None, {**count, **asked})
    written = None
    if options.samples == count["samples"]:
        written = read_windows(Path(pruned), CALIBRATION)
    text, _ = tokens_or_tokenizer(None, calibration)
    return open_job(model, text, options, written=written).windows


def _bounded_pattern(pruned: str | Path, asked: Mapping[str, Any]) -> Pattern:
    """Return the sparsity of a prune; ModelError where its rows have no bounds."""
    for name in ("update", "transform"):
        if asked.get(name, NONE) != NONE:
            raise ModelError(
                f"{pruned}: its weights were changed, and bounds are for unchanged ones; prune with `{name}` "
                "none"
            )
    pattern = parse_sparsity(asked["sparsity"])
    if pattern.shared_budget or asked.get("allocation") == BOTH:
        raise ModelError(
            f"{pruned}: its rows share a budget, and bounds need an equal count in every row; prune with "
            "`allocation` uniform or layers"
        )
    return pattern


class KindGaps(NamedTuple):
    """Gaps of the rows of one kind of layer; seconds are a median."""

    rows: int
    median: float
    worst: float
    seconds: float


def by_kind(records: Sequence[GapRecord]) -> dict[str, KindGaps]:
    """Summarise the gaps of each kind of layer."""
    result = {}
    for kind, rows in grouped(records, "kind").items():
        gaps = [row.gap for row in rows]
        seconds = statistics.median(row.seconds for row in rows)
        result[kind] = KindGaps(len(rows), statistics.median(gaps), max(gaps), seconds)
    return result


@dataclass(frozen=True)
class _Bounding:
    """Method of the bounds; `model` is that of the records."""

    method: str
    options: Mapping[str, Any]
    seed: int
    model: str = ""


@dataclass(frozen=True)
class _Rows:
    """Rows of one layer, with masks, indices in the layer, and keys of their records."""

    bounding: _Bounding
    problem: LayerProblem
    kind: str
    chosen: Sequence[int]
    mask: Tensor
    keys: Sequence[str]

    def parts(self) -> list[_Rows]:
        """Split the rows by their bounds: each row, or all rows of a shared budget."""
        shared = self.problem.shared_budget
        return [self.take([row]) for row in range(1 if shared else self.problem.rows)]

    def take(self, rows: list[int]) -> _Rows:
        """Return the rows of these indices; of a shared budget all."""
        if self.problem.shared_budget:
            return self
        chosen, keys = [self.chosen[row] for row in rows], [self.keys[row] for row in rows]
        problem = self.problem.take(rows)
        return replace(self, problem=problem, chosen=chosen, mask=self.mask[rows], keys=keys)

    def resumed(self, store: Store, held: Container[str]) -> Solution | None:
        """Return the solution of an earlier run, if it holds and the rows are among `held`."""
        if not all(key in held for key in self.keys):
            return None
        solution = store.solution(self.keys[0], self.problem)
        same = solution is not None and torch.equal(solution.mask, self.mask.cpu())
        return solution if same else None

    def records(self, solution: Solution) -> list[GapRecord]:
        """Return a record for every row."""
        records, problem, bounding = [], self.problem, self.bounding
        for i, key in enumerate(self.keys):
            objective, bound = float(solution.objective[i]), float(solution.lower_bound[i])
            values = problem.row(i).to_original_units(objective, bound)
            records.append(
                GapRecord(
                    instance=problem.name,
                    kind=self.kind,
                    row=int(self.chosen[i]),
                    n=problem.n,
                    pattern=str(problem.pattern),
                    method=bounding.method,
                    objective=objective,
                    lower_bound=bound,
                    value=values.value,
                    value_bound=values.bound,
                    gap=values.gap,
                    seconds=solution.seconds,
                    seed=bounding.seed,
                    key=key,
                    model=bounding.model,
                )
            )
        return records


def _rows(
    bounding: _Bounding, problem: LayerProblem, kind: str, chosen: Sequence[int], mask: Tensor
) -> _Rows:
    """Return rows with their keys; of a shared budget each key is by all rows."""
    of_all = bounding.method, sorted(bounding.options.items())
    keys = [digest_of(problem, i, mask[i], int(at), *of_all) for i, at in enumerate(chosen)]
    if problem.shared_budget:
        counts = problem.shares.tolist()
        keys = [joblib.hash([at, keys, counts]) for at in range(len(keys))]
    return _Rows(bounding, problem, kind, chosen, mask, keys)


def _certify(
    parts: Iterable[_Rows],
    bounding: _Bounding,
    jobs: int | None,
    output: Path | None,
    on_rows: OnRows,
) -> list[GapRecord]:
    REGISTRY.make(bounding.method, limits_of(None, dict(bounding.options))[1])
    store = Store(output, GapRecord)
    held: dict[str, GapRecord] = store.records()
    if any(record.model != bounding.model for record in held.values()):
        raise DataError(f"{output}: holds gaps of another model; name another file")
    finished: dict[str, GapRecord] = {}
    order: list[str] = []
    apart = workers(jobs) > 1
    for together in _batches(parts, BATCH if apart else 1):
        calls = []
        for rows in together:
            missing, parts_of = [], rows.parts()
            for row, part in enumerate(parts_of):
                if (solution := part.resumed(store, held)) is None:
                    missing.append(row)
                else:
                    finished |= {record.key: record for record in part.records(solution)}
            if missing and apart:
                calls += [delayed(_bounded)(parts_of[row], len(parts_of)) for row in missing]
            elif missing:
                calls.append(delayed(_bounded)(rows.take(missing)))
        if calls:
            on_rows(len(order), together[0].problem.name)
        for bounded in as_they_finish(calls, jobs):
            for records, solution in bounded:
                finished |= {record.key: record for record in records}
                store.add(records[0].key, solution, *records)
        order += [key for rows in together for key in rows.keys]
        on_rows(len(order), together[-1].problem.name)
    records = [finished[key] for key in order]
    store.finish(records)
    return records


def _batches(parts: Iterable[_Rows], rows: int) -> Iterator[list[_Rows]]:
    """Yield batches of parts that have at least so many rows together."""
    batch: list[_Rows] = []
    for part in parts:
        batch.append(part)
        if sum(p.problem.rows for p in batch) >= rows:
            yield batch
            batch = []
    if batch:
        yield batch


def _bounded(rows: _Rows, among: int = 1) -> list[tuple[list[GapRecord], Solution]]:
    """Return records and solution of each bound; rows of a shared budget have the layer's gap.

    A time limit is shared `among` so many calls.
    """
    problem, options = rows.problem, dict(rows.bounding.options)
    if options.get("time_limit") is not None:
        options["time_limit"] /= among
    bound = lower_bound(problem, rows.bounding.method, **options)
    value, certificate = bound.value, bound.certificate
    solution = Solution.of(problem, rows.mask, lower_bound=value, certificate=certificate)
    solution = replace(solution, seconds=bound.seconds / problem.rows)
    records = rows.records(solution)
    if problem.shared_budget:
        return [(records, solution)]
    return [([record], solution.take([row])) for row, record in enumerate(records)]


def _sampled(
    layer: LayerProblem, rows: int | None, *, seed: Sequence[int]
) -> tuple[LayerProblem, list[int]]:
    """Return the layer with sampled rows, and their indices."""
    chosen = [row for row, _ in draw_rows(layer, rows, None, seed=seed)]
    return layer.take(chosen), chosen


def _model_rows(
    bounding: _Bounding,
    dense: Iterator[tuple[Layer, LayerProblem]],
    sparse: Iterator[tuple[Layer, LayerProblem]],
    counts: Mapping[str, int],
    rows_per_layer: int,
) -> Iterator[_Rows]:
    """Yield rows from two walks: weights from `dense`, masks and Gram matrices from `sparse`."""
    places = enumerate(dense)
    for other, pruned in sparse:
        name = other.name
        place = next((place for place in places if place[1][0] == other), None)
        if place is None:
            raise ModelError(f"{name}: is a layer of the pruned model alone; not the same model")
        position, (layer, original) = place
        part, chosen = _sampled(original, rows_per_layer, seed=[bounding.seed, position])
        kept_weight = pruned.weight[chosen]
        changed = (kept_weight != 0) & (kept_weight != part.weight)
        if bool(changed.any()):
            raise ModelError(f"{name}: kept weights differ from the original model's")
        # Where layers share a budget, each has its own count.
        pattern = Unstructured(keep=layer.n - counts[name]) if counts else part.pattern
        problem = LayerProblem(part.weight, pruned.gram, pattern, name=name, assume_psd=True)
        yield _rows(bounding, problem, layer.kind, chosen, _mask_of(problem, kept_weight != 0))


def _mask_of(problem: LayerProblem, nonzero: Tensor) -> Tensor:
    """Make the mask from the nonzero weights: one that was zero before may count as kept or pruned."""
    score = torch.where(nonzero, 2, torch.where(problem.weight == 0, 1, 0))
    grouped = score.view(problem.rows, -1, problem.group_size)
    order = grouped.argsort(dim=-1, stable=True)[..., : problem.pruned_per_group]
    mask = torch.ones_like(grouped, dtype=torch.bool).scatter_(-1, order, False)
    mask = mask.view(problem.rows, problem.n)
    if bool((nonzero & ~mask).any()) or bool((mask & ~nonzero & (problem.weight != 0)).any()):
        raise ModelError(
            f"{problem.name}: its rows do not have the sparsity that the manifest states"
        )
    return mask

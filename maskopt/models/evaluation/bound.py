"""How far are masks from the best possible? Certified gaps of full-width rows.

`bound_layers` bounds rows of layer problems beside a solver's masks; `certify_model` does the same for the
masks of a model that is already pruned. Every bound is re-checked from its certificate by
`maskopt.protocol.bounds` before it is reported, and once more where a later run reads it from the folder
`<output>.rows`.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from joblib import delayed
from torch import Tensor

from maskopt.core.limits import torch_threads
from maskopt.core.pattern import Unstructured, pattern_from_dict
from maskopt.core.problem import LayerProblem
from maskopt.errors import DataError, ModelError
from maskopt.experiments.compare import check_rows, draw_rows
from maskopt.experiments.jobs import BATCH, as_they_finish, digest_of, workers
from maskopt.experiments.store import Store
from maskopt.models.architecture.blocks import Layer, choose
from maskopt.models.checkpoints.checkpoint import open_checkpoint, resolve_model
from maskopt.models.checkpoints.report import read_layers, read_manifest, result_digest
from maskopt.models.checkpoints.workspace import MANIFEST
from maskopt.models.options.prune import BOTH, NONE
from maskopt.models.options.walk import name_patterns
from maskopt.models.pruning.problems import layer_problems
from maskopt.protocol.bounds import lower_bound, make_bound
from maskopt.protocol.solution import Solution, is_bounded
from maskopt.protocol.solver import limits_of, solve

#: called with (rows done, name of the layer), before a layer is bounded and after
OnRows = Callable[[int, str], None]


@dataclass(frozen=True)
class GapRecord:
    """One row: its mask's objective, a certified lower bound, and what lies between.

    `value`, `value_bound` and `gap` are those of `maskopt.experiments.compare.Record`.
    `kind` is the layer's kind where the row is one of a model's (`self_attn.q_proj`), else its name.
    `model` is `result_digest` of the pruned model that the row belongs to; empty where it belongs to none.
    `seconds` is the bound's share of the time that its batch of rows took.
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
        """Does the bound say anything?"""
        return is_bounded(self.objective, self.lower_bound)


def bound_layers(
    problems: Iterable[LayerProblem],
    *,
    kinds: Mapping[str, str] | None = None,
    rows: int | None = None,
    columns: int | None = None,
    solver: str = "swap",
    method: str = "sdp",
    method_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    jobs: int | None = None,
    output: Path | None = None,
    on_rows: OnRows = lambda done, name: None,
) -> list[GapRecord]:
    """Rows of every layer, the mask of `solver`, and the bound of `method`.

    Args:
        kinds: of layers, by name, as the records are to call them.
        rows: sampled from each layer; None: all.
        columns: inputs that each row is restricted to, drawn per row; None: full width.
        jobs: as for `compare`. One at a time bounds the rows of a layer together; several,
            each row by itself, with its share of a layer's time limit.
        output: `.jsonl` grows as layers finish and makes the run resumable (what else the file holds
            stays in it). Certificates lie in the folder `<output>.rows`, and only a row whose certificate
            holds is skipped. `.csv` and `.parquet` are written at the end.
    """
    check_rows(rows)
    options = dict(method_options or {})
    kinds = kinds or {}
    parts = (
        _Rows(
            part,
            kinds.get(layer.name, layer.name),
            chosen,
            solve(part, solver).uninterrupted().mask,
        )
        for position, layer in enumerate(problems)
        for part, chosen in _sampled(layer, rows, columns, seed=[seed, position])
    )
    return _certify(parts, method, options, seed, jobs, output, on_rows)


def certify_model(
    model: str | Path,
    pruned: str | Path,
    *,
    calibration: str | Path | Sequence[Any],
    rows_per_layer: int = 4,
    layers: str | Sequence[str] = (),
    method: str = "sdp",
    method_options: Mapping[str, Any] | None = None,
    jobs: int | None = None,
    output: Path | None = None,
    on_rows: OnRows = lambda done, name: None,
    **shorthand: Any,
) -> list[GapRecord]:
    """The certified gap of sampled full-width rows of a pruned model.

    The weights are those of `model`, the masks those of `pruned` (what `maskopt prune` wrote), the
    Gram matrices those of the inputs that each layer sees in the pruned model, on the given text: the
    gap says how much better any other mask could serve there.

    Args:
        rows_per_layer: sampled from each layer, by the `seed`.
        layers: another word for `include`, among those that were pruned; all of them by default.
        method: as for `lower_bound`.
        method_options: its options.
        jobs: as for `bound_layers`.
        shorthand: options of the walk by name, as for `collect_problems`: `samples`, `seed`, …

    Raises:
        ModelError: the folders do not belong together, or weights were set anew, or rows trade.
        DataError: an `output` with gaps of another model.
        MaskoptError: of what is called.
    """
    check_rows(rows_per_layer)
    manifest = read_manifest(Path(pruned) / MANIFEST)
    if manifest["fingerprint"]["options"].get("update", NONE) != NONE:
        raise ModelError(
            f"{pruned}: its weights were updated, and bounds are for unchanged ones; prune with `update` none"
        )
    original = manifest["fingerprint"].get("model")
    trusted = bool(shorthand.get("trust_remote_code"))
    home = resolve_model(model, trust_remote_code=trusted)
    dense_model = open_checkpoint(home, trust_remote_code=trusted)
    if original is not None and dense_model.digest != original:
        raise ModelError(f"{pruned}: was pruned from another model than {model}; name the original")
    pattern = pattern_from_dict(manifest["fingerprint"]["options"]["sparsity"])
    if pattern.pooled or manifest["fingerprint"]["options"].get("allocation") == BOTH:
        raise ModelError(
            f"{pruned}: its rows share a budget, and bounds need an equal count in every row; prune with "
            "`allocation` uniform or layers"
        )
    wanted = (*name_patterns(layers), *name_patterns(shorthand.get("include")))
    done = choose(read_layers(manifest["layers"], Path(pruned) / MANIFEST), wanted)
    common: dict[str, Any] = {
        **shorthand,
        "include": tuple(layer.name for layer in done),
        "sparsity": pattern,
        "calibration": calibration,
    }
    seed = int(shorthand.get("seed", 0))
    # the walks end in the order in which they began, each with the threads that it found
    with ExitStack() as walks:
        walks.enter_context(torch_threads(None))
        dense = walks.enter_context(closing(layer_problems(model, unseen=True, **common)))
        sparse = walks.enter_context(closing(layer_problems(pruned, **common)))
        counts = manifest["fingerprint"]["options"].get("counts", {})
        parts = _model_rows(dense, sparse, counts, rows_per_layer, seed)
        options = dict(method_options or {})
        model_digest = result_digest(manifest)
        return _certify(parts, method, options, seed, jobs, output, on_rows, model_digest)


def by_kind(records: Sequence[GapRecord]) -> dict[str, tuple[int, float, float, float]]:
    """Per layer kind: rows, median gap, worst gap, median seconds."""
    kinds: dict[str, list[GapRecord]] = {}
    for record in records:
        kinds.setdefault(record.kind, []).append(record)
    return {
        kind: (
            len(found),
            statistics.median(r.gap for r in found),
            max(r.gap for r in found),
            statistics.median(r.seconds for r in found),
        )
        for kind, found in kinds.items()
    }


@dataclass(frozen=True)
class _Rows:
    """Rows of one layer that are bounded together: which they are, and their masks."""

    problem: LayerProblem
    kind: str
    chosen: Sequence[int]
    mask: Tensor

    def keys(self, method: str, options: Mapping[str, Any]) -> list[str]:
        """Of every row, what its record is known by; of rows that trade, by all of them."""
        own = [
            _key(self.problem, i, self.mask[i], self.chosen[i], method, options)
            for i in range(self.problem.rows)
        ]
        if not self.problem.pooled:
            return own
        counts = self.problem.shares.tolist()
        return [_short(json.dumps([at, own, counts])) for at in range(len(own))]

    def parts(self) -> list[list[int]]:
        """The rows by the bounds that they have: one each, or one of all rows of a pooled layer."""
        every = list(range(self.problem.rows))
        return [every] if self.problem.pooled else [[row] for row in every]

    def resumed(
        self, store: Store, keys: Sequence[str], held: Container[str]
    ) -> Iterator[tuple[_Rows, list[str], Solution]]:
        """What an earlier run bounded: rows with their keys, out of `held`, and a solution that holds."""
        for part in self.parts():
            own = [keys[row] for row in part]
            if not all(key in held for key in own):
                continue
            rows = self if self.problem.pooled else self.take(part)
            solution = store.solution(own[0], rows.problem)
            if solution is not None and torch.equal(solution.mask, rows.mask.cpu()):
                yield rows, own, solution

    def take(self, rows: list[int]) -> _Rows:
        """Some of them."""
        chosen = [self.chosen[row] for row in rows]
        return _Rows(self.problem.take(rows), self.kind, chosen, self.mask[rows])

    def calls(
        self,
        keys: Sequence[str],
        finished: Container[str],
        method: str,
        options: Mapping[str, Any],
        seed: int,
        *,
        apart: bool,
    ) -> list[Any]:
        """Jobs that bound the rows that are not finished: all in one, or each `apart`, with its share of
        the time for all. Rows that trade have one bound, of all of them."""
        missing = [row for row, key in enumerate(keys) if key not in finished]
        if missing and self.problem.pooled:
            return [delayed(_bounded)(self, list(keys), method, options, seed)]
        if missing and not apart:
            return [
                delayed(_bounded)(
                    self.take(missing), [keys[r] for r in missing], method, options, seed
                )
            ]
        own = dict(options)
        if own.get("time_limit") is not None:
            own["time_limit"] /= len(keys)
        return [delayed(_bounded)(self.take([r]), [keys[r]], method, own, seed) for r in missing]


def _certify(
    parts: Iterable[_Rows],
    method: str,
    options: dict[str, Any],
    seed: int,
    jobs: int | None,
    output: Path | None,
    on_rows: OnRows,
    model: str = "",
) -> list[GapRecord]:
    make_bound(method, **limits_of(None, options)[1])
    store = Store(output, GapRecord)
    held: dict[str, GapRecord] = store.records()
    if any(record.model != model for record in held.values()):
        raise DataError(f"{output}: holds gaps of another model; name another file")
    finished: dict[str, GapRecord] = {}
    order: list[str] = []
    apart = workers(jobs) > 1
    for together in _batches(parts, BATCH if apart else 1):
        keyed = [(rows, rows.keys(method, options)) for rows in together]
        for rows, keys in keyed:
            for some, own, solution in rows.resumed(store, keys, held):
                for record in _records(some, own, solution, method, seed):
                    finished[record.key] = replace(record, model=model)
        calls = [
            call
            for rows, keys in keyed
            for call in rows.calls(keys, finished, method, options, seed, apart=apart)
        ]
        if calls:
            on_rows(len(order), together[0].problem.name)
        for bounded in as_they_finish(calls, jobs):
            for records, solution in bounded:
                of_model = [replace(record, model=model) for record in records]
                finished |= {record.key: record for record in of_model}
                store.add(records[0].key, solution, *of_model)
        order += [key for _, keys in keyed for key in keys]
        on_rows(len(order), together[-1].problem.name)
    records = [finished[key] for key in order]
    store.finish(records)
    return records


def _batches(parts: Iterable[_Rows], rows: int) -> Iterator[list[_Rows]]:
    """Parts, as many as have so many rows together."""
    batch: list[_Rows] = []
    for part in parts:
        batch.append(part)
        if sum(p.problem.rows for p in batch) >= rows:
            yield batch
            batch = []
    if batch:
        yield batch


def _bounded(
    rows: _Rows, keys: Sequence[str], method: str, options: Mapping[str, Any], seed: int
) -> list[tuple[list[GapRecord], Solution]]:
    """Rows of a layer together, each with its bound and its solution. The one bound of a pooled layer is
    shared out, so that each row has the layer's gap."""
    problem = rows.problem
    bound = lower_bound(problem, method, **options)
    value = bound.value
    if problem.pooled:
        objective, counts = problem.objective(rows.mask), problem.shares
        total = float((counts * objective).sum())
        value = objective * (float((counts * value).sum()) / total if total else 0.0)
    solution = Solution.of(problem, rows.mask, lower_bound=value, certificate=bound.certificate)
    solution = replace(solution, seconds=bound.seconds / problem.rows)
    records = _records(rows, keys, solution, method, seed)
    return [
        ([records[row] for row in part], solution if problem.pooled else solution.take(part))
        for part in rows.parts()
    ]


def _records(
    rows: _Rows, keys: Sequence[str], solution: Solution, method: str, seed: int
) -> list[GapRecord]:
    problem = rows.problem
    posed = [
        problem.row(i).posed(float(solution.objective[i]), float(solution.lower_bound[i]))
        for i in range(problem.rows)
    ]
    return [
        GapRecord(
            instance=problem.name,
            kind=rows.kind,
            row=int(rows.chosen[i]),
            n=problem.n,
            pattern=str(problem.pattern),
            method=method,
            objective=float(solution.objective[i]),
            lower_bound=float(solution.lower_bound[i]),
            value=posed[i].value,
            value_bound=posed[i].bound,
            gap=posed[i].gap,
            seconds=solution.seconds,
            seed=seed,
            key=key,
        )
        for i, key in enumerate(keys)
    ]


def _sampled(
    layer: LayerProblem, rows: int | None, columns: int | None, *, seed: Sequence[int]
) -> Iterator[tuple[LayerProblem, list[int]]]:
    """The layer with some rows; where columns are drawn, each row is a problem of its own."""
    drawn = draw_rows(layer, rows, columns, seed=seed)
    whole = [row for row, inputs in drawn if inputs is None]
    if whole:
        yield layer.take(whole), whole
    for row, inputs in drawn:
        if inputs is not None:
            problem = layer.row(row).restrict(inputs).as_layer()
            problem.name = layer.name
            yield problem, [row]


def _model_rows(
    dense: Iterator[tuple[Layer, LayerProblem]],
    sparse: Iterator[tuple[Layer, LayerProblem]],
    counts: Mapping[str, int],
    rows_per_layer: int,
    seed: int,
) -> Iterator[_Rows]:
    """Pairs what two walks in the same order yield. `dense` has all layers: of it only the weights are used,
    and an expert may see tokens in one of the two alone."""
    places = enumerate(dense)
    for other, pruned in sparse:
        name = other.name
        found = next((place for place in places if place[1][0] == other), None)
        if found is None:
            raise ModelError(f"{name}: is a layer of the pruned model alone; not the same model")
        position, (layer, original) = found
        for part, chosen in _sampled(original, rows_per_layer, None, seed=[seed, position]):
            kept_weight = pruned.weight[chosen]
            changed = (kept_weight != 0) & (kept_weight != part.weight)
            if bool(changed.any()):
                raise ModelError(f"{name}: kept weights differ from the original model's")
            # where layers trade, each has a count of its own
            pattern = Unstructured(keep=layer.n - counts[name]) if counts else part.pattern
            problem = LayerProblem(part.weight, pruned.gram, pattern, name=name, assume_psd=True)
            yield _Rows(problem, layer.kind, chosen, _mask_of(problem, kept_weight != 0))


def _mask_of(problem: LayerProblem, nonzero: Tensor) -> Tensor:
    """The mask behind what is not zero: a weight that was zero before may count as kept or pruned."""
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


def _key(
    problem: LayerProblem,
    row: int,
    mask: Tensor,
    chosen: int,
    method: str,
    options: Mapping[str, Any],
) -> str:
    digest = digest_of(problem, row)
    digest.update(mask.cpu().numpy().tobytes())
    text = [str(problem.pattern), problem.name, int(chosen), method, sorted(options.items())]
    return _short(digest.hexdigest() + json.dumps(text, default=str))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]

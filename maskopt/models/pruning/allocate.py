"""How much of each layer is pruned where the layers of a model share a budget.

The error of every layer is measured at a few sparsities around that of the model, on the dense model's inputs
and with Wanda's masks, and weighted by `sensitivity`. With `kl`, the layers of a block move together, and the
cost is that of the model's output where that block alone is pruned; such variants of all blocks go through
the model together, 3·N²/2 passes through single blocks for N blocks. The cheapest choice with the model's
count is a multiple-choice knapsack (`choose_levels`): an item is a layer, a level how much of it is pruned. A
price on the total gives the Lagrangian bound, and what every level costs above the best at that price. A
dynamic program over the total goes through the choices within some slack of the bound, which grows until one
is found: the cheapest.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from maskopt.core.gram import Gram
from maskopt.core.least_squares import LeastSquaresUpdate
from maskopt.core.pattern import Unstructured
from maskopt.core.problem import LayerProblem
from maskopt.errors import OptionError, SolverError
from maskopt.models.architecture.blocks import Layer, matrix
from maskopt.models.blockwise.divergence import Variants, divergences, place, through
from maskopt.models.blockwise.gradients import row_sensitivity
from maskopt.models.blockwise.job import Block, Job
from maskopt.models.calibration.tokens import GRADIENT, UNIFORM
from maskopt.models.checkpoints.report import grouped
from maskopt.models.options.prune import KL, NONE, VARIANT_WINDOWS, VARIANTS, PruneOptions
from maskopt.models.pruning.problems import layer_problem
from maskopt.protocol.solver import solve

#: sparsities at which a layer's error is measured
_MEASURED = 5
#: steps that a row's inputs are divided into, about
_STEPS = 128


def allocate(job: Job, options: PruneOptions) -> dict[str, int]:
    """How many inputs each row of a layer prunes, on average over its rows, by the layer's name. Layers that
    see fewer tokens than `min_tokens` have the model's sparsity. The model is not changed: another job walks
    through it, with the layers and windows of `job`."""
    dense = replace(
        options,
        calibrate_on="pruned" if options.sensitivity == KL else "dense",
        true_sequential=False,
        update=NONE,
        training={},
        damping=LeastSquaresUpdate.damping,
        damping_exponent=LeastSquaresUpdate.power,
        gram_shrinkage=0.0,
    )
    if options.sensitivity == KL:
        return share_out(job.layers, measured_curves(job, dense), options)
    walk = job.again(dense)
    with walk, torch.no_grad():
        curves = [curve for block in walk.blocks() for curve in _curves(walk, block, dense)]
    return share_out(job.layers, curves, options)


def _curves(job: Job, block: Block, options: PruneOptions) -> list[Curve]:
    found = []
    samples = block.samples
    samples.drop(set(samples.active) - set(job.few()))
    problems = _problems(job, block, options)
    tick = block.ticker("allocation", len(block.layers))
    for layer, problem in problems:
        counts = row_sensitivity(problem, options.sensitivity, job.gradients, of_layer=True)
        found.append(_curve(layer, problem, counts, options))
        tick(1)
    block.advance()
    return found


def _curve(layer: Layer, problem: LayerProblem, counts: Tensor, options: PruneOptions) -> Curve:
    middle = options.pattern.pruned_per_group(layer.n)
    least, most = ends(layer.n, middle, options.layer_deviation)
    pruned = sorted({*np.linspace(least, most, _MEASURED).round().astype(int).tolist(), middle})
    costs = []
    for count in pruned:
        part = problem.under(Unstructured(keep=layer.n - count))
        costs.append(float(counts @ solve(part, "wanda").objective))
    return Curve((layer,), tuple(pruned), tuple(costs))


def measured_curves(job: Job, options: PruneOptions) -> list[Curve]:
    """The curves of all blocks, by variants of the model that go through another job."""
    # the gradients that count tokens are those of all windows, of another walk
    token_weights = UNIFORM if options.token_weights == GRADIENT else options.token_weights
    options = replace(options, token_weights=token_weights)
    some = job.windows.take(job.few()[:VARIANT_WINDOWS])
    walk = Job(job.source, job.layers, some, options, whole=True, on_progress=job.tell)
    windows = range(walk.count)
    check_moves(job, options)
    most = VARIANTS * len(job.source.blocks)
    folder = place(walk, most, Path(tempfile.gettempdir()))
    moves: dict[int, Moves] = {}
    held = Variants[tuple[int, int]](walk, most, folder)
    with walk, torch.no_grad(), held:
        for block in walk.blocks():
            entered = block.samples.states
            problems = list(_problems(walk, block, options))
            tick = block.ticker("allocation", len(held) + VARIANTS)
            for states in held.values():
                through(block, states, windows)
                tick(1)
            if problems:
                chosen = [layer for layer, _ in problems]
                move = moves[block.index] = Moves.of(chosen, options)
                # the first of the moves, that of 0, and the last
                for level in sorted({0, move.moves.index(0), len(move.moves) - 1}):
                    counts = [move.counts(index)[level] for index in range(len(chosen))]
                    key = block.index, move.counts(0)[level]
                    with _pruned(walk, problems, counts):
                        through(block, held.begin(key, entered, entered), windows)
                    tick(1)
            block.advance()
        costs = divergences(walk, held)
    found = []
    for index, move in moves.items():
        pruned = tuple(count for block_index, count in held if block_index == index)
        kl = tuple(max(0.0, costs[index, count]) for count in pruned)
        found.append(Curve(move.layers, pruned, kl))
    return found


def check_moves(job: Job, options: PruneOptions) -> None:
    """Raise OptionError where no block's layers can prune more or less together."""
    moves = [Moves.of(layers, options) for layers in grouped(job.layers, "block").values()]
    if all(len(move.moves) == 1 for move in moves):
        widths = sorted({layer.n for layer in job.layers})
        raise OptionError(
            f"`sensitivity` kl: layers of {', '.join(map(str, widths))} inputs have no step in common "
            "that is within `max_deviation`; take a larger one, or `sensitivity` fisher"
        )


def _problems(
    job: Job, block: Block, options: PruneOptions
) -> Iterator[tuple[Layer, LayerProblem]]:
    """Of the chosen layers that see enough tokens."""
    grams = block.grams()

    def problem(layer: Layer, gram: Gram) -> LayerProblem:
        weight = matrix(job.source.model, layer).detach().float().clone()
        return layer_problem(layer, weight, gram, options.pattern)

    seen = ((layer, grams.of(layer.name)) for layer in block.layers)
    return ((x, problem(x, g)) for x, g in seen if g and g.tokens >= options.min_tokens)


@contextmanager
def _pruned(
    job: Job, problems: Sequence[tuple[Layer, LayerProblem]], counts: Sequence[int]
) -> Iterator[None]:
    """The block with so many inputs of each row of its layers pruned by Wanda, and afterwards as it was."""
    before: list[tuple[Tensor, Tensor]] = []
    for (layer, problem), count in zip(problems, counts, strict=True):
        weight = matrix(job.source.model, layer)
        before.append((weight, weight.clone()))
        mask = solve(problem.under(Unstructured(keep=layer.n - count)), "wanda").mask
        weight.masked_fill_(~mask.to(weight.device), 0)
    try:
        yield
    finally:
        for weight, old in before:
            weight.copy_(old)


@dataclass(frozen=True)
class Moves:
    """Layers that prune more or less together, in even steps from a uniform sparsity, so that their counts
    have large common units. `middle` and `step` are inputs of a row of each layer; `moves`: how many steps,
    ascending."""

    layers: tuple[Layer, ...]
    middle: tuple[int, ...]
    step: tuple[int, ...]
    moves: range

    @classmethod
    def of(cls, layers: Sequence[Layer], options: PruneOptions) -> Moves:
        """All moves that keep every layer within the deviation, and some inputs."""
        middle = tuple(options.pattern.pruned_per_group(layer.n) for layer in layers)
        step = _steps([layer.n for layer in layers])
        below, above = [], []
        for layer, m, s in zip(layers, middle, step, strict=True):
            low, high = ends(layer.n, m, options.layer_deviation)
            below.append((m - low) // s)
            above.append((high - m) // s)
        return cls(tuple(layers), middle, step, range(-min(below), min(above) + 1))

    def counts(self, index: int) -> list[int]:
        """What each row of one of the layers prunes, by move."""
        return [self.middle[index] + move * self.step[index] for move in self.moves]

    def sizes(self) -> Int[np.ndarray, " moves"]:
        """What all of them prune, by move."""
        return np.sum([x.rows * np.array(self.counts(i)) for i, x in enumerate(self.layers)], 0)


@dataclass(frozen=True)
class Curve:
    """The `costs` of pruning so many inputs per row of layers that move together."""

    layers: tuple[Layer, ...]
    pruned: tuple[int, ...]
    costs: tuple[float, ...]

    def at(self, pruned: Sequence[int]) -> Float[np.ndarray, " levels"]:
        """The costs, log-linear between measured ones; from a cost of 0 on by the cube of the count."""
        costs = np.maximum(self.costs, 1e-12 * max(self.costs) or 1e-300)
        found = np.exp(np.interp(pruned, self.pruned, np.log(costs)))
        if self.costs[0] == 0 and len(self.costs) > 1:
            none, first = self.pruned[:2]
            part = (np.asarray(pruned) - none) / (first - none)
            found = np.where(part < 1, self.costs[1] * part.clip(0, 1) ** 3, found)
        return found


def _steps(inputs: Sequence[int]) -> tuple[int, ...]:
    """The step of each layer; layers that move together keep equal sparsities."""
    if len(inputs) == 1:
        return (max(1, round(inputs[0] / _STEPS)),)
    common = math.gcd(*inputs)
    parts = max(parts for parts in range(1, _STEPS + 1) if common % parts == 0)
    return tuple(n // parts for n in inputs)


def ends(n: int, middle: int, max_deviation: float) -> tuple[int, int]:
    """The least and the largest count of a row; at least one input stays."""
    reach = math.floor(max_deviation * n)
    return max(0, middle - reach), min(n - 1, middle + reach)


def share_out(
    layers: Sequence[Layer], curves: Sequence[Curve], options: PruneOptions
) -> dict[str, int]:
    """The cheapest counts of the layers; layers without a curve have the model's sparsity."""
    uniform = {layer.name: options.pattern.pruned_per_group(layer.n) for layer in layers}
    if not curves:
        return uniform
    moves = [Moves.of(curve.layers, options) for curve in curves]
    choice = choose_levels(
        [move.sizes() for move in moves],
        [curve.at(move.counts(0)) for curve, move in zip(curves, moves, strict=True)],
        sum(layer.rows * uniform[layer.name] for curve in curves for layer in curve.layers),
    )
    found = dict(uniform)
    for move, level in zip(moves, choice.levels, strict=True):
        found |= {layer.name: move.counts(i)[level] for i, layer in enumerate(move.layers)}
    return found


#: halvings of the interval that the price is in
_HALVINGS = 100
#: by how much the slack grows at a time
_GROWTH = 4.0


@dataclass(frozen=True)
class Choice:
    """The level of every item, their cost, and the Lagrangian bound of all choices of that total."""

    levels: tuple[int, ...]
    cost: float
    bound: float


def choose_levels(
    sizes: Sequence[Int[np.ndarray, " levels"]],
    costs: Sequence[Float[np.ndarray, " levels"]],
    total: int,
) -> Choice:
    """The cheapest choice of one level for each item whose sizes add up to exactly the total; SolverError
    where there is none. `sizes` are whole numbers, `costs` finite."""
    impossible = SolverError(f"no choice of levels adds up to {total}")
    # from each item's first level on, in the largest unit that all differences have in common
    steps = [np.asarray(size, dtype=np.int64) - size[0] for size in sizes]
    unit = max(1, int(np.gcd.reduce(np.concatenate(steps))))
    rest = total - sum(int(size[0]) for size in sizes)
    least, most = (sum(int(end(x)) for x in steps) for end in (np.min, np.max))
    if rest % unit or not least <= rest <= most:
        raise impossible
    steps, rest = [step // unit for step in steps], rest // unit
    price = _price(steps, costs, rest)
    priced = [cost + price * step for cost, step in zip(costs, steps, strict=True)]
    bound = float(sum(x.min() for x in priced)) - price * rest
    above = [x - x.min() for x in priced]
    positive = np.concatenate(above)
    positive = positive[positive > 0]
    slack = float(positive.min()) if len(positive) else 1.0
    everything = 2 * float(sum(x.max() for x in above)) + slack
    while (levels := _within(steps, above, rest, slack)) is None:
        if slack > everything:
            raise impossible
        slack *= _GROWTH
    value = float(sum(cost[level] for cost, level in zip(costs, levels, strict=True)))
    return Choice(levels, value, min(bound, value))


def _price(
    steps: Sequence[Int[np.ndarray, " levels"]],
    costs: Sequence[Float[np.ndarray, " levels"]],
    rest: int,
) -> float:
    """Of a unit, at which the cheapest levels come closest to the total: the dearer, the less of it."""

    def reached(price: float) -> int:
        pairs = zip(steps, costs, strict=True)
        return sum(int(step[(cost + price * step).argmin()]) for step, cost in pairs)

    spread = max(float(np.ptp(cost)) for cost in costs) or 1.0
    # beyond these every item takes its largest, its smallest level
    low, high = -2 * spread, 2 * spread
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if reached(middle) > rest:
            low = middle
        else:
            high = middle
    return high


def _within(
    steps: Sequence[Int[np.ndarray, " levels"]],
    above: Sequence[Float[np.ndarray, " levels"]],
    rest: int,
    slack: float,
) -> tuple[int, ...] | None:
    """The cheapest levels with that total within the slack above the bound; None: there are none."""
    best, start = np.zeros(1), 0  # what totals from `start` on cost at least
    walked: list[tuple[np.ndarray, int]] = []
    for step, cost in zip(steps, above, strict=True):
        useful = np.flatnonzero(cost <= slack)
        first, last = int(step[useful].min()), int(step[useful].max())
        new = np.full(len(best) + last - first, np.inf)
        by = np.zeros(len(new), dtype=np.int16)
        for level in useful:
            at = slice(int(step[level]) - first, int(step[level]) - first + len(best))
            found = best + cost[level]
            better = found < new[at]
            new[at][better], by[at][better] = found[better], level
        inside = np.flatnonzero(new <= slack)
        cut = slice(int(inside[0]), int(inside[-1]) + 1)
        best, start = np.where(new <= slack, new, np.inf)[cut], start + first + cut.start
        walked.append((by[cut], start))
    if not 0 <= rest - start < len(best) or not np.isfinite(best[rest - start]):
        return None
    levels: list[int] = []
    for step, (by, start) in zip(reversed(steps), reversed(walked), strict=True):
        levels.append(int(by[rest - start]))
        rest -= int(step[levels[-1]])
    return tuple(reversed(levels))

"""Make a model smaller by whole decoder blocks: the set whose absence changes its output least.

Every block and every pair is left out of the dense model, and KL(dense ‖ without) of the next token is
measured, nats a token. All variants go through the blocks together, N³/6 passes through single blocks. The
cost of a set P is modelled as pᵀUp: U's diagonal holds the single costs, each other entry half of what a pair
costs beyond its two. Larger sets are searched by exchanges, and measured as a whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from maskopt.core.problem import RowProblem
from maskopt.errors import ModelError, OptionError
from maskopt.models.architecture.source import FolderSource
from maskopt.models.architecture.structures import block_settings, renumbered, without_blocks
from maskopt.models.blockwise.activations import Activations
from maskopt.models.blockwise.collect import pass_on
from maskopt.models.blockwise.forward import OnBlockProgress, ticker
from maskopt.models.blockwise.job import Block, Job
from maskopt.models.blockwise.memory import check_memory, hidden_size
from maskopt.models.checkpoints.report import PruneReport
from maskopt.models.checkpoints.result import disk_needed
from maskopt.models.checkpoints.schema import BLOCKS
from maskopt.models.options.prune import NONE
from maskopt.models.options.walk import WalkOptions
from maskopt.models.pruning.run import Run, fingerprint_of, peaks
from maskopt.models.structured.change import check_shapes, finish_smaller, open_original
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import solve

#: windows that score blocks, by default
WINDOWS = 4
#: every so many tokens of a window is judged: a large vocabulary costs more than the blocks
EVERY = 8
#: sets of a round of the search that are measured on all tokens
JUDGED = 16
#: options of the walk that apply to outputs of whole models
OPTIONS = (
    *("seq_len", "bos", "text_field", "chat"),
    *("device", "dtype", "threads", "activation_memory", "max_memory", "trust_remote_code"),
)
#: exchanges measured in a round of the search, those of least cost by pairs
EXCHANGES = 128

#: what it means if the written model computes something else
_WHY = "blocks of this family depend on their numbers, and cannot be removed"
Left = frozenset[int]
#: the KL of sets, nats a token; some of them may be left out
Measure = Callable[[Sequence[Left]], Mapping[Left, float]]


@dataclass(frozen=True)
class BlocksReport:
    """Which blocks were removed, and what others would have cost.

    Attributes:
        solution: of least cost by the effects; for more than two blocks, where the search began.
        measured: nats a token of every set that was left out as a whole; the least was removed.
    """

    removed: list[int]
    effects: Effects
    solution: Solution
    measured: dict[Left, float]
    output: Path
    seconds: float


def remove_blocks(
    model: str | Path,
    tokenizer_or_tokens: Any = None,
    *,
    count: int,
    output: str | Path,
    calibration: Any = None,
    windows: int = WINDOWS,
    options: WalkOptions | None = None,
    overwrite: bool = False,
    on_progress: OnBlockProgress | None = None,
) -> BlocksReport:
    """Write a copy of a model folder without `count` of its blocks, which `from_pretrained` loads.

    Args:
        model: as for `prune_model`, and so are `tokenizer_or_tokens` and `calibration`.
        windows: number of windows, the first ones of the text, of `options.seq_len` tokens each.

    Raises:
        MaskoptError: a count or a family that leaves no model, or what `prune_model` refuses.
    """
    began = time.perf_counter()
    options = options or WalkOptions()
    options.refuse_all_but(OPTIONS, "`blocks` are chosen by the model's output on all tokens")
    run = Run(output, overwrite=overwrite, model=model, calibration=calibration)
    how: Any = {"whole": True, "limit": windows, "on_progress": on_progress}
    given = (model, tokenizer_or_tokens, calibration, options, "removing blocks")
    job, source = open_original(*given, **how)
    _check_count(source, count)
    run.reads(model=source.checkpoint)
    with run.opened(disk_needed(source.checkpoint)) as work:
        removed, effects, solution, measured = choose_blocks(job, source, count, work.hidden)
        settings = _check_family(source, removed)
        change = without_blocks(source.conversion, source.blocks, settings, removed)
        record = {"removed": removed, "update": NONE, "seed": options.seed}
        fingerprint, memory = fingerprint_of(job, record), peaks(source.device)
        report = PruneReport([], fingerprint, output=run.output, memory=memory, kind=BLOCKS)

        def skip_removed(block: Block) -> None:
            if block.index in removed:
                leave_out(block)

        more = {**effects.record(removed, measured), "status": str(solution.status[0])}
        finish_smaller(job, run, change, report, _WHY, prepare=skip_removed, effects=more)
    seconds = time.perf_counter() - began
    return BlocksReport(removed, effects, solution, measured, run.output, seconds)


def leave_out(block: Block) -> None:
    """Let the samples pass a block without going through it."""
    block.advanced = True


class BlockChoice(NamedTuple):
    """The blocks to remove, and what led to them; as in `BlocksReport`."""

    removed: list[int]
    effects: Effects
    solution: Solution
    measured: dict[Left, float]


def choose_blocks(job: Job, source: FolderSource, count: int, folder: Path) -> BlockChoice:
    """Return the `count` blocks whose removal changes the output least.

    Args:
        job: a whole walk through the dense model, not entered.
        folder: for hidden states that memory has no room for.
    """
    _check_count(source, count)

    def measure(sets: Sequence[Left]) -> dict[Left, float]:
        with job.again(job.options) as walk:
            return measure_sets(walk, sets, folder)

    with job, torch.no_grad():
        effects = measure_effects(job, folder)
        best, solution = effects.best(count)
        measured = choose(effects, best, measure, _sayable(source))
    least = min(measured, key=lambda left: measured[left])
    return BlockChoice(sorted(least), effects, solution, measured)


def _check_count(source: FolderSource, count: int) -> None:
    """Raise MaskoptError for a number of blocks that leaves no model."""
    blocks = len(source.blocks)
    if not 0 < count < blocks:
        raise OptionError(f"`blocks` must be 1 to {blocks - 1}, not {count}")
    _check_family(source, list(range(blocks - count, blocks)))


def choose(
    effects: Effects, best: Sequence[int], measure: Measure, sayable: Callable[[Left], bool]
) -> dict[Left, float]:
    """KL of the measured sets of blocks, of which the least is removed.

    Args:
        best: the set of least cost by pairs.
        measure: of sets of more than two.
        sayable: whether a configuration can describe what is left; without the last blocks it can.
    """
    count = len(best)
    of_others = effects.most_alike(count), effects.last(count)
    first = list(filter(sayable, dict.fromkeys(map(Left, (best, *of_others)))))
    if count <= 2:
        if Left(best) not in first:
            ranked = sorted((s for s in effects.kl if len(s) == count), key=effects.kl.__getitem__)
            first.append(next(filter(sayable, ranked)))
        return {left: effects.kl[left] for left in first}

    def known(sets: Sequence[Left]) -> Mapping[Left, float]:
        some = list(filter(sayable, sets))
        return measure(some) if some else {}

    return search_sets(known, effects, first)


def _sayable(source: FolderSource) -> Callable[[Left], bool]:
    """Whether the family's configuration can describe what is left without some blocks."""

    @cache
    def can_go(left: Left) -> bool:
        try:
            _check_family(source, sorted(left))
        except ModelError:
            return False
        return True

    singles = [can_go(Left({index})) for index in range(len(source.blocks))]
    return (lambda _: True) if all(singles) else can_go


def _check_family(source: FolderSource, removed: list[int]) -> dict[str, Any]:
    """The settings without these blocks; ModelError where a configuration cannot describe what is left."""
    settings = block_settings(source.blocks, source.checkpoint.config, removed)
    name = source.blocks.name
    check_shapes(source, settings, rename=lambda x: renumbered(x, name, removed))
    return settings


@dataclass(frozen=True)
class Effects:
    """The measured effects of leaving out blocks.

    Attributes:
        kl: nats a token, by set, of all sets of one or two blocks.
        similarity: of each block, the mean cosine of input and output (ShortGPT, arXiv 2403.03853).
    """

    kl: dict[Left, float]
    similarity: list[float]

    def quadratic(self) -> Float[Tensor, "blocks blocks"]:
        """U, float64."""
        blocks = len(self.similarity)
        u = torch.zeros(blocks, blocks, dtype=torch.float64)
        for left, kl in self.kl.items():
            if len(left) == 1:
                (i,) = left
                u[i, i] = kl
            else:
                i, j = sorted(left)
                u[i, j] = u[j, i] = (kl - self.kl[Left({i})] - self.kl[Left({j})]) / 2
        return u

    def cost(self, left: Sequence[int]) -> float:
        """pᵀUp of a set."""
        some = torch.tensor(sorted(left))
        return float(self.quadratic()[some][:, some].sum())

    def problem(self, count: int) -> RowProblem:
        """Which `count` blocks to leave out, as a problem for any solver."""
        return RowProblem.from_quadratic(self.quadratic().numpy(), cardinality=count, name="blocks")

    def best(self, count: int) -> tuple[list[int], Solution]:
        """The set of least cost, and its solution."""
        solution = solve(self.problem(count), "branch", time_limit=600.0).raise_if_interrupted()
        return (~solution.mask[0]).nonzero()[:, 0].tolist(), solution

    def record(self, removed: list[int], measured: Mapping[Left, float]) -> dict[str, Any]:
        """For the manifest: the effects, and the costs of the removed blocks and of others."""

        def by_name(sets: Mapping[Left, float]) -> dict[str, float]:
            return {",".join(map(str, sorted(left))): kl for left, kl in sets.items()}

        count = len(removed)
        return {
            "kl": by_name(self.kl),
            "similarity": self.similarity,
            "cost": self.cost(removed),
            "measured": by_name(measured),
            "last": self.cost(self.last(count)),
            "most_alike": self.cost(self.most_alike(count)),
        }

    def last(self, count: int) -> list[int]:
        """The last blocks."""
        blocks = len(self.similarity)
        return list(range(blocks - count, blocks))

    def most_alike(self, count: int) -> list[int]:
        """The blocks that change their input least, by the cosine."""
        order = sorted(range(len(self.similarity)), key=lambda i: -self.similarity[i])
        return sorted(order[:count])


def measure_effects(job: Job, folder: Path) -> Effects:
    """The effects of one or two left-out blocks of a dense model; `job` is of a whole walk, entered; hidden
    states that memory has no room for go to a file in `folder`."""
    windows, blocks = range(job.count), len(job.source.blocks)
    similarity: list[float] = []
    with Variants(job, blocks * (blocks + 1) // 2, folder) as held:
        for block in job.blocks(folder=folder):
            entered = block.samples.states
            through_it = list(held)
            held.begin(Left({block.index}), entered)
            for left in through_it:
                if len(left) < 2:
                    held.begin(left | {block.index}, entered, left)
            before = [entered[w] for w in windows]
            _advance(block, held, through_it)
            cosines = [
                cosine_similarity(old.double(), entered[w].double(), dim=-1).mean()
                for w, old in zip(windows, before, strict=True)
            ]
            similarity.append(float(torch.stack(cosines).mean()))
        return Effects(divergences(job, held, held), similarity)


def measure_sets(job: Job, sets: Sequence[Left], folder: Path) -> dict[Left, float]:
    """KL(dense ‖ without), nats a token, on all tokens, of the `JUDGED` best sets by some tokens."""
    with Variants(job, len(sets), folder) as held:
        for block in job.blocks(folder=folder):
            entered = block.samples.states
            for left in sets:
                if min(left) == block.index:
                    held.begin(left, entered)
            _advance(block, held, [left for left in held if block.index not in left])
        best = list(held)
        if len(held) > JUDGED:
            some = divergences(job, held, held)
            best = sorted(held, key=lambda s: some[s])[:JUDGED]
        return divergences(job, held, best, every=1)


def _advance(block: Block, held: Variants, some: Sequence[Left]) -> None:
    """Send the dense model's samples and those of some variants through a block."""
    tick = block.ticker("without others", len(some) + 1)
    for left in some:
        pass_on(block, held.states, first=held[left])
        tick(1)
    block.advance()
    tick(1)


def place(job: Job, variants: int, folder: Path) -> Path | None:
    """The folder, if hidden states of so many variants go to a file there; None: in memory."""
    most = job.activation_memory
    if job.options.max_memory is not None:
        load = replace(job.load, variants=variants * job.count)
        most = check_memory(load, int(job.options.max_memory))
    size = job.count * job.length * hidden_size(job.source.model) * 4 * variants
    return folder if size > most else None


class Variants(dict[Left, int], AbstractContextManager["Variants"]):
    """At most `most` variants of the model, each without some blocks, with hidden states alone of its own: by
    what was left out, the place of its first window in the `states` of all of them, which are in memory, or
    where that is too small in one file in `folder`. All go through the blocks together, so that each block is
    in memory once."""

    states: Activations

    def __init__(self, job: Job, most: int, folder: Path) -> None:
        super().__init__()
        self.windows = range(job.count)
        self._most, self._folder = most, place(job, most, folder)

    def begin(self, left: Left, entered: Activations, like: Left | None = None) -> None:
        """Another one, which begins with what enters a block, or with the states of the one `like` it."""
        first = len(self) * len(self.windows)
        if not self:
            places = range(self._most * len(self.windows))
            self.states = Activations(places, entered.shape, entered.dtype, self._folder)
        for window in self.windows:
            state = entered[window] if like is None else self.states[self[like] + window]
            self.states[first + window] = state
        self[left] = first

    def __exit__(self, *raised: object) -> None:
        if self:
            self.states.close()


def divergences(
    job: Job, held: Variants, sets: Iterable[Left], every: int = EVERY
) -> dict[Left, float]:
    """KL(model ‖ variant), nats per token, over each `every`th token, after the job's whole walk."""
    tokens, device = job.windows.tokens, job.source.device
    total = dict.fromkeys(sets, 0.0)
    some = torch.arange(every - 1, job.windows.length, every)
    if not len(some):
        some = torch.tensor([job.windows.length - 1])
    tick = ticker(job.tell, job.last, job.last + 1, "output", len(total) * len(tokens))
    with job.after_blocks() as end:

        def logs(state: Tensor, window: int) -> Tensor:
            ids = tokens[window : window + 1, some]
            return end(ids.to(device), state[:, some].to(device))[0].float().log_softmax(1)

        for window in range(len(tokens)):
            wanted = logs(job.last_state(window)[None], window)
            likely = wanted.exp()
            for left in total:
                changed = logs(held.states[held[left] + window], window)
                of_tokens = (likely * (wanted - changed)).sum(1)
                total[left] += float(of_tokens.double().sum())  # what is removed depends on it
                tick(1)
    return {left: of_all / (len(tokens) * len(some)) for left, of_all in total.items()}


def search_sets(measure: Measure, effects: Effects, first: Sequence[Left]) -> dict[Left, float]:
    """What was measured on the way to the set of least KL; `measure` gives all of `first`."""
    known = dict(measure(first))
    tried = set(first)
    while True:
        least = min(known, key=lambda left: known[left])
        near = [left for left in exchanges(effects, least) if left not in tried][:EXCHANGES]
        if not near:
            return known
        tried |= set(near)
        found = measure(near)
        known |= found
        if found and min(found.values()) >= known[least]:
            return known


def exchanges(effects: Effects, left: Left) -> list[Left]:
    """The sets that differ by one block, those of least cost by pairs first."""
    blocks = range(len(effects.similarity))
    near = [left - {out} | {other} for out in left for other in blocks if other not in left]
    return sorted(near, key=lambda one: (effects.cost(sorted(one)), sorted(one)))

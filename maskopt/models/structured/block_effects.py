"""What it costs to leave blocks out of a model, measured by the model's own output.

Every single block and every pair of them is left out of the dense model, and what that changes in the
distribution of the next token is measured: KL(dense ‖ without), nats a token. All of these models go through
the blocks side by side, so that each block's weights are in memory once: after block k there are
1 + k + k(k−1)/2 of them, and a block is left out by taking over the states that came to it. For N blocks that
is N³/6 passes through single blocks.

The cost of leaving out a set P is then taken to be pᵀUp with U's diagonal the single costs and, beside it,
half of what a pair costs beyond its two: exact for one block and for two, a model of interactions beyond.
There sets are left out as they are, too (`maskopt.models.structured.block_search`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.core.problem import RowProblem
from maskopt.models.blockwise.job import Job
from maskopt.models.blockwise.variants import Variant, Variants, divergences, through
from maskopt.protocol.solution import Solution
from maskopt.protocol.solver import solve

Left = frozenset[int]


@dataclass(frozen=True)
class Effects:
    """What is known of leaving out the blocks of a model.

    Attributes:
        kl: nats a token by the set of left-out blocks, of all sets of one or two.
        similarity: of each block, the mean cosine of what enters it and what leaves it (ShortGPT, arXiv
            2403.03853).
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
        """The set of least cost, and the solution that says whether it is proven."""
        solution = solve(self.problem(count), "branch", time_limit=600.0).uninterrupted()
        return (~solution.mask[0]).nonzero()[:, 0].tolist(), solution

    def yardsticks(self, count: int) -> tuple[list[int], list[int]]:
        """What others remove."""
        return self.most_alike(count), self.last(count)

    def last(self, count: int) -> list[int]:
        """The yardstick that knows nothing: the last ones."""
        blocks = len(self.similarity)
        return list(range(blocks - count, blocks))

    def most_alike(self, count: int) -> list[int]:
        """The blocks that change their input least, by the cosine."""
        order = sorted(range(len(self.similarity)), key=lambda i: -self.similarity[i])
        return sorted(order[:count])


def measure_effects(job: Job, folder: Path | None = None) -> Effects:
    """Walk through a dense model with all that leave out one or two of its blocks.

    Args:
        job: of a whole walk, entered.
        folder: for a file of hidden states, where they are not to be kept in memory.

    Raises:
        ModelError: NaN or infinite activations.
    """
    windows, blocks = range(job.count), len(job.source.blocks)
    similarity: list[float] = []
    with Variants[Left](job, blocks * (blocks + 1) // 2, folder) as held:
        for block in job.blocks(folder=folder):
            entered = block.opened.samples.states
            through_it = list(held.items())
            held.begin(Left({block.index}), entered, entered)
            for left, states in through_it:
                if len(left) < 2:
                    held.begin(left | {block.index}, states, entered)
            before = [entered[w] for w in windows]
            tick = block.ticker("without others", len(through_it) + 1)
            for _, states in through_it:
                through(block, states, windows)
                tick(1)
            block.advance()
            tick(1)
            similarity.append(_alike(before, [entered[w] for w in windows]))
        return Effects(divergences(job, held), similarity)


def measure_sets(
    job: Job, sets: Sequence[Left], folder: Path | None = None, *, judged: int
) -> dict[Left, float]:
    """KL(dense ‖ without) of whole sets, nats a token; arguments and errors as of `measure_effects`.

    Args:
        judged: so many, the best by some tokens of every window, are measured on all tokens and returned.
    """
    windows = range(job.count)
    with Variants[Left](job, len(sets), folder) as held:
        for block in job.blocks(folder=folder):
            entered = block.opened.samples.states
            for left in sets:
                if min(left) == block.index:
                    held.begin(left, entered, entered)
            through_it = [states for left, states in held.items() if block.index not in left]
            tick = block.ticker("without others", len(through_it) + 1)
            for states in through_it:
                through(block, states, windows)
                tick(1)
            block.advance()
            tick(1)
        best: Mapping[Left, Variant] = held
        if judged < len(held):
            some = divergences(job, held)
            best = {left: held[left] for left in sorted(held, key=lambda s: some[s])[:judged]}
        return divergences(job, best, every=1)


def _alike(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Mean cosine over the tokens."""
    cosines = [
        torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).mean()
        for a, b in zip(before, after, strict=True)
    ]
    return float(torch.stack(cosines).mean())

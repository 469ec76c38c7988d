"""Which blocks to leave out, more than two of them: pairs foretell what a set costs, and here it is measured.

A set of blocks is left out as it is, and KL(dense ‖ without) taken. Search by exchanges, as for weights: from
the best of a few sets, one block for another, until none of the exchanges that were measured is better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from maskopt.models.structured.block_effects import Effects, Left

#: exchanges of a round that are measured, those of least cost by pairs
EXCHANGES = 128

#: the KL of sets, nats a token; may leave out those that look worse, or cannot be
Measure = Callable[[Sequence[Left]], Mapping[Left, float]]


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

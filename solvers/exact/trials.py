"""When a tree tries relaxations with triangles (`relaxation`), and how they are solved then.

Twice at most: early, for rows whose root they nearly close; and once more where a tree without them has
turned out to be too large.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from maskopt.solvers.exact.relaxation import Plan

#: nodes after which triangles are tried at the root; at once where f is known to be whole
_TRY = 300
#: nodes after which they are tried again, for a tree of which more than so many are to be expected
_TRY_AGAIN, _TOO_MANY = 1200, 50_000


class Plans(NamedTuple):
    """How a tree with triangles is grown.

    Attributes:
        root, node: how the relaxations are solved.
        candidates: at least so many inputs have both of their children bounded before one is branched on.
        anyway: also where triangles do not nearly close the root.
    """

    root: Plan
    node: Plan
    candidates: int = 1
    anyway: bool = False


#: of trees that triangles nearly close: chosen on the k-cluster instances of seed 1;
#: docs/results/proofs.md measures those of seed 2
CLOSE = Plans(
    Plan((20.0, 10.0, 5.0, 2.5, 1.2, 0.6, 0.3, 0.15), (15, 15, 20, 30)),
    Plan((1.2, 0.6, 0.3, 0.15, 0.08)),
)
#: of others: chosen on a row of block 10 gate_proj, restricted to 320 inputs;
#: docs/results/proofs.md measures another one (n = 320)
FAR = Plans(
    Plan(
        (20, 10, 5, 2.5, 2, 1.6, 1.3, 1.1, 0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.22, 0.15),
        (15, 15, 20, 30),
        new=16,
        pentagons=8,
    ),
    Plan((0.2,), new=16, pentagons=8),
    candidates=6,
    anyway=True,
)


class Trials:
    """Those of one tree.

    Attributes:
        made: how many trials there were.
        halfway: the least open bound at half of the nodes after which they are tried again.
    """

    def __init__(self, bound: float, whole: bool) -> None:
        """From the bound of the root; `whole`: f is known to take whole values."""
        self.halfway, self.whole = bound, whole
        self.made = 0

    def due(self, nodes: int, least_open: float, cutoff: float) -> Plans | None:
        """What is to be tried now, if anything is; to be asked before every turn."""
        if self.made == 0 and (nodes >= _TRY or self.whole):
            self.made = 1
            return CLOSE
        if nodes <= _TRY_AGAIN // 2:
            self.halfway = least_open
        if self.made == 1 and nodes >= _TRY_AGAIN:
            self.made = 2
            # every doubling of the tree brings about as much as the last one
            doublings = max(0.0, math.log2(_TOO_MANY / nodes))
            if least_open + (least_open - self.halfway) * doublings < cutoff:
                return FAR
        return None

"""What other methods prune of each block, on blocks that are made for it."""

import numpy as np
import pytest
import torch

from maskopt import LayerProblem, Unstructured


@pytest.mark.parametrize("method", ["OWL", "DLP"])
def test_blocks_that_count_more_keep_more_and_the_model_prunes_as_many(benchmarks, method):
    from judges import Judge
    from yardsticks import METHODS, blocks_keep, shared_out

    pattern = Unstructured(sparsity=0.7)
    generator = torch.Generator().manual_seed(0)
    judges = {}
    for block, outliers in enumerate((0, 3, 1)):
        weight = 1 + torch.rand(5, 128, generator=generator)
        # the more outliers, the smaller all else, and its median
        weight = weight / (1 + outliers)
        weight[:, :outliers] = 50
        problem = LayerProblem(weight, torch.eye(128), pattern)
        energy = problem.output_energy()
        judges[f"layers.{block}.fc"] = Judge(block, problem, energy, energy)
    keep = blocks_keep(method, judges)
    assert keep[1] > keep[2] > keep[0]
    reach = METHODS[method][1]
    assert max(keep.values()) - min(keep.values()) == pytest.approx(2 * reach)
    assert np.mean(list(keep.values())) == pytest.approx(0, abs=1e-12)
    counts = shared_out(method, judges, pattern)
    assert sum(counts.values()) == 3 * pattern.pruned_per_group(128)
    for name, judge in judges.items():
        assert counts[name] / 128 == pytest.approx(0.7 - keep[judge.block], abs=1.5 / 128)

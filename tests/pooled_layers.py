"""Layers whose rows share one count, for tests."""

import torch
from hypothesis import strategies as st
from strategies import KINDS, floor, random_gram, random_linear, random_weight

from maskopt import LayerProblem, LeastSquaresUpdate, Unstructured


def pool(sparsity=0.5, max_deviation=None):
    return Unstructured(sparsity=sparsity, per="layer", max_deviation=max_deviation)


def layer(rows=6, n=24, kind="full", sparsity=0.5, seed=1, max_deviation=None, **more):
    """Rows of very different size, so that their counts differ; no weight is 0, so that nothing ties."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, n, generator=generator, dtype=torch.float64)
    weight *= torch.rand(rows, 1, generator=generator, dtype=torch.float64) + 0.2
    gram = random_gram(n, kind, seed + 1)
    omega, pattern = more.pop("omega", None), pool(sparsity, max_deviation)
    return LayerProblem(weight, gram, pattern, **more).with_omega(omega)


@st.composite
def shared_budget(draw, max_n=12, max_rows=5):
    """Any kind of layer, of weights kept or refitted, counted equally or not."""
    n, rows = draw(st.integers(1, max_n)), draw(st.integers(1, max_rows))
    seed = draw(st.integers(0, 2**31 - 1))
    gram = random_gram(n, draw(st.sampled_from(KINDS)), seed)
    weight = random_weight(rows, n, seed + 1)
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.1
    pruned = draw(st.sampled_from((0.0, 0.1, 0.37, 0.5, 0.8, 0.99)))
    pattern = pool(pruned, draw(st.sampled_from((None, None, 0.0, 0.05, 0.1, 0.3))))
    linear = random_linear(weight, gram, seed + 2) if draw(st.booleans()) else None
    how = draw(st.sampled_from((None, (0.01,), (0.3,), (0.1, 0.5))))
    update = None if how is None else LeastSquaresUpdate(*how)
    omega = shares if draw(st.booleans()) else None
    return LayerProblem(weight, gram, pattern, linear=linear, update=update).with_omega(omega)


def total(problem, solution):
    return float(problem.shares @ solution.objective)


def slack(problem):
    return float(problem.shares @ floor(problem))

"""How much each token of a calibration window counts in the Gram matrices.

Models leave in the first token a hidden state hundreds of times as large as the others (Sun et al., *Massive
activations in large language models*, arXiv 2402.17762). An error is added to the hidden state, which the
next block normalises; to first order the loss changes by its gradient by that state.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

#: all tokens count once; the first of a window does not; each by one over the mean square of its hidden
#: state; each by the norm of the loss's gradient by its hidden state
UNIFORM, SKIP_FIRST, RELATIVE, GRADIENT = "uniform", "skip-first", "relative", "gradient"
TOKEN_WEIGHTS = UNIFORM, SKIP_FIRST, RELATIVE, GRADIENT


def weights_of_tokens(
    state: Float[Tensor, "1 length width"],
    token_weights: str,
    gradients: Float[Tensor, " length"] | None = None,
) -> Float[Tensor, " length"]:
    """Weights of a window's tokens, with a mean of 1.

    Args:
        state: the window's hidden state as it enters the block.
        token_weights: `skip-first`, `relative` or `gradient`.
        gradients: for `gradient`, norms of the loss's gradient by each token's hidden state after the block
            in the dense model; see `maskopt.models.blockwise.gradients`.
    """
    if token_weights == SKIP_FIRST:
        weights = torch.ones(state.shape[1])
        weights[0] = 0.0
    elif token_weights == RELATIVE:
        size = state[0].float().square().mean(1)
        weights = 1.0 / size.clamp(min=1e-12 * float(size.max()) or 1.0)
    else:
        assert gradients is not None
        weights = gradients if bool(gradients.any()) else torch.ones_like(gradients)
    return (weights * (len(weights) / float(weights.sum()))).to(state.device)

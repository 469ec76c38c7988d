"""KL(dense ‖ pruned) of the next token: of logits, and as a loss of windows, a few logits at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from maskopt.models.blockwise.job import Job
from maskopt.models.blockwise.memory import POSITIONS

#: positions at a time whose logits stay in a processor's cache, with a vocabulary of 262,144
CACHED = 4


def kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Float[Tensor, ""]:
    """KL(p ‖ q) of distributions [positions, vocabulary], summed over the positions, nats."""
    return (log_p - log_q).mul_(p).sum()


@torch.no_grad()
def divergence(
    wanted: Float[Tensor, "positions vocabulary"],
    found: Float[Tensor, "positions vocabulary"],
    slope: Float[Tensor, "positions vocabulary"] | None = None,
) -> Float[Tensor, ""]:
    """`kl` of p and q, the softmax of these logits.

    Args:
        slope: receives the derivative by the logits of q, which is q − p.
    """
    step = CACHED if found.device.type == "cpu" else len(found)
    total = found.new_zeros(())
    for start in range(0, len(found), step):
        part = slice(start, start + step)
        log_p, log_q = wanted[part].log_softmax(1), found[part].log_softmax(1)
        p = log_p.exp()
        total += kl(p, log_p, log_q)
        if slope is not None:
            torch.sub(log_q.exp_(), p, out=slope[part])
    return total


@contextmanager
def divergence_loss(
    student: Job, dense: Job, states: Callable[[int], Tensor]
) -> Iterator[Callable[[int], Float[Tensor, ""]]]:
    """A function of a window's index: KL(dense ‖ student), mean over its targets. Both models end in the same
    head, which is in memory meanwhile.

    Args:
        dense: after its whole walk.
        states: of a window, the output of the student's last block, [1, length, width].
    """
    windows, device = student.windows, student.source.device
    first, last = windows.beginning.first_target - 1, windows.length - 1

    def of(window: int) -> Tensor:
        own, tokens = states(window), windows.tokens[window : window + 1].to(device)
        taught = dense.last_state(window)[None].to(device)
        leaf = own.detach().requires_grad_(torch.is_grad_enabled())
        gradient = torch.zeros_like(leaf)
        total = torch.zeros((), device=device)
        for start in range(first, last, POSITIONS):
            part = slice(start, min(start + POSITIONS, last))
            with torch.no_grad():
                wanted = end(tokens[:, part], taught[:, part])
            found = end(tokens[:, part], leaf[:, part])
            slope = torch.empty_like(found[0], dtype=torch.float32) if found.requires_grad else None
            total += divergence(wanted[0].float(), found[0].detach().float(), slope)
            if slope is not None:
                gradient += torch.autograd.grad(found, leaf, slope[None].to(found.dtype))[0]
        return _Known.apply(own, total, gradient) / (last - first)

    with dense.after_blocks(student) as end:
        yield of


class _Known(torch.autograd.Function):
    """A value whose gradient by a tensor is known already, so that logits need not be kept for it."""

    @staticmethod
    def forward(ctx: Any, at: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *onto: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return onto[0] * gradient, None, None

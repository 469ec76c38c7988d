"""Calibration text that the dense model writes itself: token after token from its beginning token.

Such text needs no file and is about everything that the model can say (Williams et al., *Self-calibration for
language model quantization and pruning*, NAACL 2025, arXiv 2410.17170).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from maskopt.errors import DataError, ModelError
from maskopt.models.architecture.source import Source
from maskopt.models.calibration.tokens import SELF, Windows
from maskopt.models.checkpoints.bos import TEMPLATE, beginning_of

#: windows that are written at once: more of them are not faster on a CPU, and their cache takes memory
BATCH = 64
#: tokens of the vocabulary whose probabilities are summed together: sampling first draws one such part
PART = 512
#: stands in a conversation where the user's words begin
_PROBE = "MASKOPT-PROBE"


def write_windows(
    source: Source,
    tokenizer: Any,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    bos: str = "auto",
    chat: bool = False,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> Windows:
    """Let the model write windows, with the temperature 1 and without special tokens.

    The whole model is in memory meanwhile. Random numbers are drawn for every token beforehand, so that they
    depend on the seed alone.

    Args:
        source: the dense model.
        tokenizer: that of the model.
        samples, seq_len: number of windows, and tokens in each.
        bos: as for texts: whether a window begins with the token that the model begins with.
        chat: begin with a user's turn of the chat template; the model writes its words, and the answer.
        on_tokens: called with the number of windows that have got one more token.

    Raises:
        DataError: no tokenizer, no beginning token, or no room after it.
        ModelError: a model without `generate`.
    """
    if tokenizer is None:
        raise DataError(
            "`calibration` self needs the model's tokenizer; give one, or name a source of text or tokens"
        )
    if not hasattr(source.model, "generate"):
        raise ModelError("`calibration` self needs a model with `generate`; name a source of text")
    kept = beginning_of(tokenizer, bos)
    prompt = list(kept.ids) or _first_token(tokenizer)
    banned = sorted({int(token) for token in tokenizer.all_special_ids})
    if chat:
        kept, prompt, banned = TEMPLATE, _user_turn(tokenizer), []
    given = len(prompt) if kept.ids or chat else 0
    length = seq_len - given
    if length <= 0:
        raise DataError(f"`seq_len` {seq_len} leaves no room after the beginning; take more")
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(samples, seq_len, generator=generator, dtype=torch.float64)[:, :length]
    source.load_whole()
    try:
        written = [_written(source, prompt, part, banned, on_tokens) for part in draws.split(BATCH)]
    finally:
        source.drop()
    tokens = torch.cat(written)[:, len(prompt) - given :].contiguous()
    return Windows(tokens, SELF, kept, tokens)


def _written(
    source: Source,
    prompt: list[int],
    draws: Float[Tensor, "samples length"],
    banned: list[int],
    on_tokens: Callable[[int], object],
) -> Int[Tensor, "samples longer"]:
    """Prompt and what follows it."""
    from transformers import GenerationConfig, LogitsProcessorList

    model: Any = source.model
    ids = torch.tensor([prompt] * len(draws), device=source.device)

    def choose(seen: Tensor, scores: Tensor) -> Tensor:
        """Scores that are 1 for the sampled token, and else 0."""
        scores[:, banned] = -torch.inf
        token = sampled(scores, draws[:, seen.shape[1] - len(prompt)].to(scores.device))
        on_tokens(len(draws))
        return torch.zeros_like(scores).scatter_(1, token[:, None], 1.0)

    length = draws.shape[1]
    how = GenerationConfig(max_new_tokens=length, do_sample=False, pad_token_id=0)
    before, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with torch.no_grad():
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=how,
                logits_processor=LogitsProcessorList([choose]),
            )
    finally:
        model.generation_config = before
    return torch.as_tensor(found).to("cpu", torch.int64)


def sampled(
    scores: Float[Tensor, "samples vocabulary"], draws: Float[Tensor, " samples"]
) -> Int[Tensor, " samples"]:
    """Tokens at the quantiles `draws` in [0, 1) of their distribution, the softmax of `scores`.

    Probabilities are summed in parts of the vocabulary, and one by one only in the part that a draw falls
    into: with 262,144 tokens this takes a tenth of the time of `torch.multinomial`.
    """
    size = scores.shape[1]
    likely = (scores.float() - scores.amax(1, keepdim=True)).exp()
    parts = torch.nn.functional.pad(likely, (0, -size % PART)).view(len(scores), -1, PART)
    until = parts.sum(2).double().cumsum(1)
    target = draws[:, None] * until[:, -1:]
    part = torch.searchsorted(until, target, right=True).clamp(max=until.shape[1] - 1)
    before = torch.where(part > 0, until.gather(1, (part - 1).clamp(min=0)), 0.0)
    rows = torch.arange(len(scores), device=scores.device)
    inside = parts[rows, part[:, 0]].double().cumsum(1)
    place = torch.searchsorted(inside, target - before, right=True).clamp(max=PART - 1)
    return (part * PART + place)[:, 0].clamp(max=size - 1)


def _first_token(tokenizer: Any) -> list[int]:
    """The token that the model goes on from, where its tokenizer puts none before a text."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [int(token)]
    raise DataError("the tokenizer has no token to begin with; name a source of text")


def _user_turn(tokenizer: Any) -> list[int]:
    """The tokens before a user's first words."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("the tokenizer has no chat template; leave `chat` out")
    messages = [{"role": "user", "content": _PROBE}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    before = text.partition(_PROBE)[0]
    return [int(token) for token in tokenizer(before, add_special_tokens=False)["input_ids"]]

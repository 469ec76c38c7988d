"""Layer problems out of a real model, without pruning it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskopt.model.blocks import choose, matrix, vocabulary_size, within
from maskopt.model.collect import Samples, collect
from maskopt.model.forward import Workers, capture
from maskopt.model.opening import capped_length, open_source
from maskopt.model.options import OnProgress, check_pattern, one_pattern, ticker, windows_of
from maskopt.model.source import FolderSource
from maskopt.model.tokens import Windows, check_vocabulary
from maskopt.pattern import Pattern
from maskopt.problem import LayerProblem


def collect_problems(
    model: nn.Module | str | Path,
    tokenizer_or_tokens: Any = None,
    *,
    layers: Sequence[str] = (),
    sparsity: float | None = None,
    pattern: Pattern | None = None,
    calibration: str | Path | Sequence[str] | None = None,
    samples: int = 32,
    seq_len: int = 512,
    text_field: str = "text",
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    shrink: float = 0.0,
    threads: int | None = None,
    trust_remote_code: bool = False,
    on_progress: OnProgress | None = None,
) -> Iterator[tuple[str, LayerProblem]]:
    """The layer problems of a dense model, one block after the other: (name, problem).

    Arguments are those of `prune_model`; `layers` are its `include` patterns. The last block that
    holds a chosen layer is the last that is run. Layers that saw no token are left out.
    """
    chosen_pattern = one_pattern(sparsity, pattern)
    source, tokenizer = open_source(
        model, tokenizer_or_tokens, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    chosen = choose(source.blocks.all_layers(), tuple(layers))
    check_pattern(chosen_pattern, chosen)
    in_memory = isinstance(model, nn.Module)
    windows = windows_of(
        tokenizer_or_tokens
        if in_memory or isinstance(tokenizer_or_tokens, Tensor | Windows)
        else None,
        tokenizer,
        calibration,
        samples=samples,
        seq_len=capped_length(source.model, seq_len),
        seed=seed,
        field=text_field,
    )
    check_vocabulary(windows, vocabulary_size(source.model))
    report = on_progress or (lambda _: None)
    wanted = {layer.name for layer in chosen}
    with Workers(source.device, threads or torch.get_num_threads()) as workers:
        if isinstance(source, FolderSource):
            source.load_outside()
        with torch.no_grad():
            captured = capture(source.model, source.blocks, windows.tokens, workers, source.device)
        flow = Samples(captured.states, len(windows))
        last = max(i for i in range(len(source.blocks)) if within(source.blocks, i, wanted))
        for index in range(last + 1):
            mine = within(source.blocks, index, wanted)
            with source.open(index) as block:
                with torch.no_grad():
                    grams = collect(
                        source.model, block, source.blocks.prefix(index), mine,
                        captured.calls[index], flow, workers, source.device, advance=True,
                        tick=ticker(report, index, last + 1, "calibrate", len(flow.active)),
                    )  # fmt: skip
                for layer in mine:
                    gram = grams.of(layer.name)
                    if gram is not None:
                        weight = matrix(source.model, layer).detach().float().clone()
                        yield (
                            layer.name,
                            LayerProblem(
                                weight,
                                gram.value(shrink=shrink),
                                chosen_pattern,
                                name=layer.name,
                                assume_psd=True,
                                mean=gram.mean(),
                            ),
                        )

"""`maskopt plan`: what a prune will take, before anything heavy happens."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from maskopt.cli import options as opt
from maskopt.cli.console import output
from maskopt.errors import ModelError


def plan(
    model: Annotated[str, typer.Argument(help="A model folder, or a name on the hub.")],
    sparsity: opt.Sparsity = None,
    pattern: opt.PatternText = None,
    solver: Annotated[str, typer.Option(help="See `maskopt solvers`.")] = "swap",
    option: opt.SolverOption = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: opt.SeqLen = 2048,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    one_pass: Annotated[bool, typer.Option("--one-pass/--sequential")] = False,
    threads: opt.Threads = None,
    activation_memory: opt.ActivationMemory = "4GiB",
    max_memory: Annotated[str | None, typer.Option(help="Say whether it suffices.")] = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    trust_remote_code: opt.Trust = False,
) -> None:
    """Layers, shapes, pruned counts, memory and an estimate of time."""
    chosen = opt.read_pattern(sparsity, pattern)
    import torch

    from maskopt.model.blocks import choose
    from maskopt.model.opening import capped_length, open_source
    from maskopt.model.options import check_pattern
    from maskopt.model.plan import GIB, make_plan, parse_bytes
    from maskopt.solver import check_options

    options = opt.read_solver_options(option)
    check_options(solver, options)
    source, _ = open_source(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    layers = choose(source.blocks.all_layers(), include or (), exclude or ())
    check_pattern(chosen, layers)
    result = make_plan(
        source,
        layers,
        chosen,
        samples=samples,
        length=capped_length(source.model, seq_len),
        threads=threads or torch.get_num_threads(),
        activation_memory=parse_bytes(activation_memory),
        solver=solver,
        solver_options=options,
        one_pass=one_pass,
    )
    table = Table()
    for heading in ("layer", "count", "rows", "inputs", "pruned", "of"):
        table.add_column(
            heading, justify="left" if heading == "layer" else "right", overflow="fold"
        )
    kinds: dict[tuple[str, int, int], list[str]] = {}
    for layer in layers:
        kinds.setdefault((layer.stage, layer.rows, layer.n), []).append(layer.name)
    for (stage, rows, n), names in kinds.items():
        count = sum(result.pruned[name] for name in names)
        table.add_row(
            stage, str(len(names)), str(rows), str(n), f"{count:,}", f"{len(names) * rows * n:,}"
        )
    output.print(table)
    memory = result.memory
    parts = ("base", "outside", "block", "grams", "inputs", "solving", "activations")
    output.print(
        f"memory at the peak, estimated: {memory.peak / GIB:.2f} GiB ("
        + ", ".join(f"{part} {getattr(memory, part) / GIB:.2f}" for part in parts)
        + ")",
        soft_wrap=True,
    )
    output.print(f"disk: {result.disk / GIB:.2f} GiB")
    solving = "unknown" if result.solve_seconds is None else f"about {result.solve_seconds:.0f} s"
    output.print(
        f"time, estimated: forward passes and Gram matrices about {result.forward_seconds:.0f} s, "
        f"solving {solving}",
        soft_wrap=True,
    )
    if max_memory is not None and memory.peak > parse_bytes(max_memory):
        raise ModelError(
            f"the estimate of {memory.peak / GIB:.2f} GiB is above --max-memory "
            f"{parse_bytes(max_memory) / GIB:.2f} GiB"
        )

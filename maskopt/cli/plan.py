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
    warm_start: opt.WarmStart = None,
    option: opt.SolverOption = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: opt.SeqLen = 2048,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    one_pass: opt.OnePass = False,
    true_sequential: opt.TrueSequential = False,
    threads: opt.Threads = None,
    activation_memory: opt.ActivationMemory = "4GiB",
    max_memory: Annotated[
        str | None, typer.Option(help="Refuse, as prune would, where the peak is higher.")
    ] = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    trust_remote_code: opt.Trust = False,
) -> None:
    """What `maskopt prune` with the same options will take: layers, shapes, pruned counts, memory, time.

    No weights are read but for a measurement of a few seconds.
    """
    chosen = opt.read_pattern(sparsity, pattern)
    import torch

    from maskopt.model.blocks import choose
    from maskopt.model.opening import capped_length, open_source
    from maskopt.model.options import PruneOptions, check_pattern
    from maskopt.model.plan import GIB, check_memory, make_plan, parse_bytes

    options = PruneOptions(
        chosen,
        solver,
        warm_start,
        opt.read_solver_options(option),
        one_pass=one_pass,
        true_sequential=true_sequential,
    )
    source, _ = open_source(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    layers = choose(source.blocks.all_layers(), include or (), exclude or ())
    check_pattern(chosen, layers)
    length = capped_length(source.model, seq_len)
    threads = threads or torch.get_num_threads()
    in_memory, refusal = parse_bytes(activation_memory), None
    if max_memory is not None:
        limit = parse_bytes(max_memory)
        try:
            in_memory = check_memory(source, layers, samples, length, threads, limit, in_memory)
        except ModelError as error:
            refusal = error  # told once the plan is printed
    result = make_plan(
        source,
        layers,
        options,
        samples=samples,
        length=length,
        threads=threads,
        activation_memory=in_memory,
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
    parts_of_time = (result.solve_seconds, result.seconds)
    solving, total = ("unknown" if x is None else f"about {x:.0f} s" for x in parts_of_time)
    output.print(
        f"time, estimated: {total} (forward passes and Gram matrices about "
        f"{result.forward_seconds:.0f} s, solving {solving}, files about "
        f"{result.file_seconds:.0f} s)",
        soft_wrap=True,
    )
    if refusal is not None:
        raise refusal

"""`maskopt prune --dry-run`: what a prune would take, before anything heavy happens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from maskopt.cli.console import make_table, screen

if TYPE_CHECKING:
    from maskopt.models.pruning.plan import Plan


def tokens_file(calibration: str | None) -> str | None:
    """The source of text if it is read at no cost: tokens."""
    return calibration if calibration is not None and calibration.endswith(".npy") else None


def dry_run(
    model: str, calibration: str | None, grams: Any, out: Any, options: dict[str, Any]
) -> None:
    """Print layers, shapes, pruned counts, memory, disk and time.

    No weights are read except for a measurement of a few seconds.

    Raises:
        MaskoptError: what the prune would refuse.
    """
    from maskopt.models.pruning.plan import START, plan_prune

    tokens = tokens_file(calibration) if grams is None else calibration
    result = plan_prune(model, tokens, grams=grams, output=out, **options)
    screen.print(layer_table(result))
    memory = result.memory
    screen.print(f"memory at the peak, estimated: {memory.gib:.2f} GiB ({memory})", soft_wrap=True)
    screen.print(f"disk: {result.disk / 2**30:.2f} GiB")
    parts_of_time = (result.solve_seconds, result.seconds)
    solving, total = ("unknown" if x is None else f"about {x:.0f} s" for x in parts_of_time)
    screen.print(
        f"time, estimated: {total} (forward passes and Gram matrices about "
        f"{result.forward_seconds:.0f} s, solving {solving}, files about "
        f"{result.file_seconds:.0f} s, libraries about {START:.0f} s)",
        soft_wrap=True,
    )
    if result.refusal is not None:
        raise result.refusal


def layer_table(plan: Plan) -> Table:
    """Counts by kind and shape."""
    table = make_table("layer", "count", "rows", "inputs", "pruned", "of")
    kinds: dict[tuple[str, int, int], list[str]] = {}
    for layer in plan.layers:
        kinds.setdefault((layer.kind, layer.rows, layer.n), []).append(layer.name)
    for (kind, rows, n), names in kinds.items():
        count = sum(plan.pruned[name] for name in names)
        table.add_row(
            kind, str(len(names)), str(rows), str(n), f"{count:,}", f"{len(names) * rows * n:,}"
        )
    return table

"""Error against time, one point a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from book import Record


def plot(path: Path, split: Mapping[tuple[str, ...], Record]) -> None:
    """Measurements by pattern, layer and method, as a figure of those at 60%."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    layers = list(dict.fromkeys(k[1] for k in split if k[0] == "60%"))
    methods = list(dict.fromkeys(k[2] for k in split))
    points = {}
    most = max(cell["rows"] for cell in split.values())
    for method in methods:
        cells = [c for layer in layers if (c := split.get(("60%", layer, method)))]
        if len(cells) == len(layers):
            count = cells[0]["rows"]
            # a mean over other rows than those of the rest, and said so
            label = method if count == most else f"{method}, {count} rows"
            points[label] = (
                1000 * mean(c["seconds_per_row"] for c in cells),
                mean(mean(c["error"]) for c in cells),
            )
    figure, (whole, best) = plt.subplots(1, 2, figsize=(13, 6))
    draw(whole, points)
    whole.set_yscale("log")
    whole.set_title("all methods; those below the dashed line are in the other panel", fontsize=9)
    whole.axhline(LOW_ERROR, color="tab:gray", lw=0.8, ls="--")
    low = {m: p for m, p in points.items() if p[1] <= LOW_ERROR}
    draw(best, low)
    best.set_title("the best", fontsize=9)
    for axis in (whole, best):
        axis.set_xscale("log")
        axis.set_xlabel("milliseconds a row")
        axis.set_ylabel("error / Wanda, 60%, mean over layers")
        axis.grid(alpha=0.3, which="both")
        left, right = axis.get_xlim()
        axis.set_xlim(left, right * 4)  # room for the names
    figure.tight_layout()
    name_points(whole, points, [m for m in points if points[m][1] > LOW_ERROR])
    name_points(best, low, list(low))
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


#: errors below this are drawn apart
LOW_ERROR = 0.5


def draw(axis: Any, points: dict[str, tuple[float, float]]) -> None:
    """The points, and the 1-swaps joined."""
    series = [p for method, p in points.items() if method.startswith("1-swap")]
    axis.plot(*zip(*series, strict=True), "-", color="tab:gray", lw=1, zorder=1)
    for point in points.values():
        axis.scatter(*point, s=25, zorder=2)


#: where a name may stand beside its point, in points, and its alignment
_PLACES = ((6, 3, "left"), (6, -9, "left"), (-6, 3, "right"), (-6, -9, "right"), (0, 9, "center"))


def name_points(axis: Any, points: dict[str, tuple[float, float]], named: Sequence[str]) -> None:
    """Names beside their points, each at the first place that no other name or point takes."""
    renderer = axis.figure.canvas.get_renderer()
    taken: list[Any] = []
    dots = [axis.transData.transform(point) for point in points.values()]
    for method in named:
        for x, y, side in (*_PLACES, (6, -20, "left"), (6, 16, "left")):
            text = axis.annotate(
                method,
                points[method],
                fontsize=8,
                xytext=(x, y),
                textcoords="offset points",
                ha=side,
            )
            box = text.get_window_extent(renderer)
            inside = axis.bbox.x0 <= box.x0 and box.x1 <= axis.bbox.x1
            free = not any(box.overlaps(other) for other in taken)
            if inside and free and not any(box.contains(*dot) for dot in dots):
                break
            if (x, y) != (6, 16):
                text.remove()
        taken.append(box)

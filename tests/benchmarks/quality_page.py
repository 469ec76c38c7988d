"""The page and the plot out of the measurements of `quality.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

COMMAND = "python tests/benchmarks/quality.py"


def write(book: Any, page: Path) -> None:
    """docs/quality.md and docs/figures/quality.png; studies without measurements are left out."""
    about = book.get("about") or {}
    parts = [
        f"""# How good the masks are

![Error against time, 60%](figures/quality.png)

{lead(book)}
## How it was measured

Everything here is written by one command, `{COMMAND}` (extra `demo`), on real
layers of Gemma 3 270M: calibration on the demo's text, {about.get("samples")} windows of 512 tokens, rows
drawn with seed {about.get("seed")}.

*Error* is a row's objective relative to Wanda's mask of the same row, averaged over rows and then over
layers; less is better. Seconds are wall clock, start included, on
{about.get("machine")}, {about.get("date")}, with {threads(about)} unless said otherwise.
{about.get("note") or "Nothing is known of what else the machine did."}
Layers are named by block and kind.
"""
    ]
    sections = (masks, relax, tabu, model, starts, steps, interaction, gaps, growth, blame)
    parts += [text for section in sections if (text := section(book, page))]
    wanted = {
        "certified gaps of 17.down": "gaps/17.down",
        "bound or search on small rows": "blame/",
        "tabu by moves": "moves/",
        "the rounded SDP at n = 2048": "masks/60%/2.down/sdp",
        "whole layers": "whole/",
        "the whole model": "model/",
        "Frank–Wolfe": "masks/60%/0.q/Frank",
        "the rounded SDP": "masks/60%/0.q/sdp",
    }
    missing = [what for what, prefix in wanted.items() if not family(book, prefix)]
    if missing:
        parts.append(f"## Not measured yet\n\n{'; '.join(missing)}: the command above adds them.\n")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(parts).rstrip() + "\n")


def lead(book: Any) -> str:
    """What to take from the page, every figure out of its tables."""
    masks = {tuple(k.split("/")): v for k, v in family(book, "masks/60%/").items()}
    gaps = {k: v for k, v in family(book, "gaps/").items() if k in GAPS and " on " not in k}
    small = list(family(book, "blame/").values())
    layers = list(family(book, "model/").values())
    if not (masks and gaps and small and layers):
        return ""

    def error(method: str) -> str:
        return f"{mean(mean(v['error']) for k, v in masks.items() if k[1] == method):.2f}"

    def cost(method: str) -> str:
        found = [v["seconds_per_row"] for k, v in masks.items() if k[1] == method]
        return f"{1000 * mean(found):.3g} ms"

    def span(kind: str, method: str) -> str:
        found = sorted(mean(v[kind][method]) for v in gaps.values())
        return f"{100 * found[0]:.0f}–{100 * found[-1]:.0f}%"

    def solved(method: str) -> float:
        return sum(v["methods"][method]["seconds"] for v in layers)

    agree = [v["above_best"] for v in gaps.values()]
    apart = max(max(a for name, a in ends.items() if name.startswith("relax")) for ends in agree)
    excess = {m: percent(mean(v[m] for v in small) - 1) for m in ("swap", "relax", "tabu")}
    return LEAD.format(
        all=error("1-swap, T = ∞"),
        all_cost=cost("1-swap, T = ∞"),
        t25=error("1-swap, T = 25"),
        t100=error("1-swap, T = 100"),
        hard=error("hardened start, 1-swap"),
        hard_cost=cost("hardened start, 1-swap"),
        tabu=error("tabu 1000, from relax"),
        slower=solved("tabu 1000, from relax") / solved("hardened start, 1-swap"),
        tabu_swap=error("tabu 1000, from 1-swap"),
        wolfe=error("Frank–Wolfe (2000)"),
        wolfe_cost=cost("Frank–Wolfe (2000)"),
        ria=error("RIA"),
        gpt=error("SparseGPT mask"),
        gap=span("plain", "1-swap"),
        cut=span("cut", "best"),
        apart=percent(apart),
        excess=excess,
    )


LEAD = """What to take from it, at 60% unless said otherwise:

1. **1-swap search more than halves Wanda's error**: {all} of it, in {all_cost} a row, and every row
   ends with a proof that no exchange of two weights improves it.
2. **Go on until nothing improves.** 25 swaps a row leave {t25}, 100 leave {t100}; the last ones cost
   next to nothing.
3. **The start matters more than any search after it.** From the hardened relaxation instead of Wanda:
   {hard}, in {hard_cost} a row. This is what `prune` does by default.
4. **Tabu search adds little to a good start**: {tabu} after 1000 moves, at {slower:.1f} times the
   solving time of the whole model. To 1-swap's own optimum it adds more ({tabu_swap}).
5. **Frank–Wolfe with 2000 steps** (SparseFW) ends at {wolfe} in {wolfe_cost} a row.
6. **RIA, and SparseGPT's mask without its weight update, are worse than Wanda** on this objective:
   {ria} and {gpt}. SparseGPT chooses for weights that it goes on to change.
7. **The interaction term is the point.** Without −2 w_u w_p G_up the search stops at worse masks; see
   below.
8. **Certified gaps of full rows**: 1-swap from Wanda is within {gap} of the best possible, the best
   mask found within {cut} where the bound has its cuts.
9. **Most of what is left is the bound, not the mask**: long searches with three seeds agree, from
   `relax` within {apart}, while the gaps stay wide.
10. **On small rows, where the optimum is proven**, 1-swap is {excess[swap]} above it on average,
    `relax` {excess[relax]}, tabu {excess[tabu]}.
"""


def threads(record: dict[str, Any]) -> str:
    count = record.get("threads")
    return "one thread" if count == 1 else f"{count} threads"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    width = [max(3, *(len(line[k]) for line in lines)) for k in range(len(head))]
    text = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, width, strict=True)) + " |"
        for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in width) + "|")
    return "\n".join(text) + "\n"


def family(book: Any, prefix: str) -> dict[str, dict[str, Any]]:
    return {k[len(prefix) :]: v for k, v in book.lines.items() if k.startswith(prefix)}


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def below(value: float) -> str:
    return f"−{percent(value)}" if value >= 0 else f"+{percent(-value)}"


def masks(book: Any, page: Path) -> str:
    found = family(book, "masks/")
    if not found:
        return ""
    split = {tuple(key.split("/")): value for key, value in found.items()}
    # a mean over layers is only fair where every method has run
    split = {k: v for k, v in split.items() if (k[0], k[1], "portfolio") in split}
    if not split:
        return ""
    patterns = list(dict.fromkeys(k[0] for k in split))
    layers = list(dict.fromkeys(k[1] for k in split if k[0] == "60%"))
    methods = list(dict.fromkeys(k[2] for k in split))

    def error(pattern: str, method: str) -> str:
        there = [mean(v["error"]) for k, v in split.items() if k[0] == pattern and k[2] == method]
        return f"{mean(there):.3f}" if there else "–"

    def seconds(method: str) -> float:
        cells = [c for k, c in split.items() if k[2] == method and k[0] == "60%"]
        return mean(c["seconds_per_row"] for c in cells) if cells else float("nan")

    few = {m: next(c["rows"] for k, c in split.items() if k[2] == m) for m in methods}
    rows = [
        [m, *(error(p, m) for p in patterns), f"{1000 * seconds(m):.3g}", str(few[m])]
        for m in methods
    ]
    lists = [", ".join(k[1] for k in split if k[0] == p and k[2] == "Wanda") for p in patterns]
    shown = "; ".join(f"{p}: {names}" for p, names in zip(patterns, lists, strict=True))
    if len(set(lists)) == 1:
        shown = f"every pattern: {lists[0]}"
    text = f"""## All methods

Mean over the layers of {shown}.

"""
    text += table(["method", *patterns, "ms a row, 60%", "rows a layer"], rows)
    per_layer = [
        [
            m,
            *(
                f"{mean(c['error']):.3f}" if (c := split.get(("60%", x, m))) else "–"
                for x in layers
            ),
        ]
        for m in methods
    ]
    text += "\nThe same at 60%, layer by layer:\n\n" + table(["method", *layers], per_layer)
    plot(page.parent / "figures" / "quality.png", split, layers, methods)
    same = [
        (mean(c["error"]), mean(split[("60%", k[1], "relax")]["error"][: c["rows"]]))
        for k, c in split.items()
        if k[2] == "sdp, rounded" and k[0] == "60%" and ("60%", k[1], "relax") in split
    ]
    if same:
        text += f"""
`sdp, rounded` ran on fewer rows: at 60%, on the rows where both ran, it reaches \
{mean(s[0] for s in same):.3f}, `relax` {mean(s[1] for s in same):.3f}.
"""
    return text


def plot(path: Path, split: Any, layers: Sequence[str], methods: Sequence[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    points = {}
    most = max(cell["rows"] for cell in split.values())
    for method in methods:
        cells = [split.get(("60%", layer, method)) for layer in layers]
        if all(cells):
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
    taken = []
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


def relax(book: Any, page: Path) -> str:
    found = family(book, "sixteen/")
    if not found:
        return ""
    wins = sum(v["relax"] < v["swap"] for v in found.values())
    rows = [
        [
            layer,
            f"{v['swap']:.3f}",
            f"{v['relax']:.3f}",
            below(1 - v["relax"] / v["swap"]),
            f"{v['swap swaps']:.0f}",
            f"{v['relax swaps']:.0f}",
            f"{v['tabu']:.3f}",
            f"{v['tabu relax']:.3f}",
        ]
        for layer, v in found.items()
    ]
    text = f"""## Relax, harden, round, swap

64 rows of each layer, 60%. `relax` ends below Wanda-started `swap` on {wins} of {len(found)} layers.

"""
    text += table(
        [
            "layer",
            "Wanda → swap",
            "relax → swap",
            "change",
            "swaps a row",
            "after relax",
            "swap → tabu",
            "relax → tabu",
        ],
        rows,
    )
    whole = family(book, "whole/")
    if whole:
        text += f"""
All rows of a layer, {threads(next(iter(whole.values())))}: `relax` with its bound, and hardened at once,
which is how it starts other solvers and what `prune` starts from:

"""
        text += table(
            [
                "layer",
                "rows × n",
                "",
                "steps before hardening",
                "gap of the relaxation",
                "seconds",
                "swaps, seconds",
            ],
            [
                [
                    k.split("/")[0],
                    f"{v['rows']} × {v['n']}",
                    k.split("/")[1],
                    str(v["iterations"]),
                    percent(v["relaxed_gap"]) if v["iterations"] else "–",
                    f"{v['relax_seconds']:.2f}",
                    f"{v['swap_seconds']:.2f}",
                ]
                for k, v in whole.items()
            ],
        )
    return text


def tabu(book: Any, page: Path) -> str:
    sixteen = [v for v in family(book, "sixteen/").values() if v["n"] == 640]
    if not sixteen:
        return ""

    def gain(method: str) -> str:
        values = [1 - v[method] / v["swap"] for v in sixteen]
        return f"{percent(mean(values))} (least {percent(min(values))})"

    text = f"""## Tabu

1000 moves a row, {len(sixteen)} layers of n = 640, 64 rows each, 60%: error below that of 1-swap from Wanda
by {gain("tabu")} from 1-swap's own optimum, and by {gain("tabu relax")} from
`relax`, its default start.
"""
    found = list(family(book, "moves/").values())
    if not found:
        return text
    counts = [int(k.split()[1]) for k in found[0] if k.startswith("swap") and "seconds" not in k]
    rows = []
    for start, name in {"swap": "1-swap's own optimum", "relax": "`relax`"}.items():
        values = [[v[f"{start} {count}"] for v in found] for count in counts]
        seconds = [mean(v[f"{start} {count} seconds"] for v in found) for count in counts]
        rows += [
            [name, "mean", *(below(1 - mean(v)) for v in values)],
            ["", "the layer of least gain", *(below(1 - max(v)) for v in values)],
            ["", "ms a row, start included", *(f"{1000 * value:.2f}" for value in seconds)],
        ]
    text += """
The same rows by moves (0: the start alone, and `swap`):

"""
    return text + table(["from", "", *map(str, counts)], rows)


def model(book: Any, page: Path) -> str:
    layers = list(family(book, "model/").values())
    if not layers:
        return ""
    kinds = list(dict.fromkeys(v["kind"] for v in layers))

    def error(method: str, of: Sequence[dict[str, Any]]) -> float:
        rows = sum(v["rows"] for v in of)
        return sum(v["rows"] * v["methods"][method]["error"] for v in of) / rows

    names = list(layers[0]["methods"])
    seconds = {name: sum(v["methods"][name]["seconds"] for v in layers) for name in names}
    base = error(names[0], layers)
    lines = [
        [
            name,
            f"{seconds[name]:.1f}",
            f"{seconds[name] / seconds[names[0]]:.2f}",
            f"{error(name, layers):.4f}",
            below(1 - error(name, layers) / base) if name != names[0] else "",
            *(f"{error(name, [v for v in layers if v['kind'] == kind]):.3f}" for kind in kinds),
        ]
        for name in names
    ]
    return f"""## The whole model

All {sum(v["rows"] for v in layers)} rows of {len(layers)} layers, 50%, Gram matrices of the dense model, \
{threads(layers[0])}. Seconds of solving,
starts included; error against Wanda, mean over rows, and by kind.

""" + table(["method", "seconds", "× 1-swap", "error", "against 1-swap", *kinds], lines)


def starts(book: Any, page: Path) -> str:
    found = family(book, "starts/")
    if not found:
        return ""
    split = {tuple(k.split("/")): v for k, v in found.items()}
    names = list(dict.fromkeys(k[1] for k in split))
    rows = []
    for name in names:
        cells = [v for k, v in split.items() if k[1] == name]
        wanda = [
            mean(split[(k[0], "wanda")]["error"][: v["rows"]])
            for k, v in split.items()
            if k[1] == name and (k[0], "wanda") in split
        ]
        rows.append(
            [
                name,
                f"{mean(mean(c['start']) for c in cells):.3g}",
                f"{mean(mean(c['error']) for c in cells):.3f}",
                f"{mean(wanda):.3f}" if wanda else "–",
                f"{mean(c['swaps'] for c in cells):.0f}",
                str(len(cells)),
            ]
        )
    return "## Where the search starts\n\n1-swap search to the optimum, 60%.\n\n" + table(
        [
            "start",
            "its error",
            "after 1-swap",
            "Wanda → 1-swap, same rows",
            "swaps a row",
            "layers",
        ],
        rows,
    )


def steps(book: Any, page: Path) -> str:
    found = {
        tuple(k.split("/")): v for k, v in family(book, "masks/60%/").items() if "1-swap, T" in k
    }
    if not found:
        return ""
    layers = list(dict.fromkeys(k[0] for k in found))
    limits = list(dict.fromkeys(k[1] for k in found))
    rows = [
        [
            layer,
            *(
                f"{mean(found[(layer, t)]['error']):.3f}" if (layer, t) in found else "–"
                for t in limits
            ),
        ]
        for layer in layers
    ]
    return "## Error against T\n\nThe paper stops at T = 100; 60%, Wanda start.\n\n" + table(
        ["layer", *(t.removeprefix("1-swap, ") for t in limits)], rows
    )


def interaction(book: Any, page: Path) -> str:
    found = family(book, "interaction/")
    if not found:
        return ""
    rows = [
        [
            layer,
            f"{mean(v['full']):.3f}",
            f"{mean(v['error']):.3f}",
            f"{mean(v['best']):.3f}",
            f"{v['swaps']:.0f}",
        ]
        for layer, v in found.items()
    ]
    return """## Without the u–p interaction

Swaps chosen by a_u + b_p alone, as if −2 w_u w_p G_up were zero, until none seems to improve (200 at most):
the objective at the end, and the least one on the way, which only an extra evaluation would find. 60%.

""" + table(
        ["layer", "with the term", "without: at the end", "without: best on the way", "swaps"], rows
    )


#: the rows of the certified gaps: full ones of every kind, and two that are restricted
GAPS = (
    "10.down on 256, 60%", "5.q on 256, 60%", "10.gate, 60%", "17.gate, 60%", "5.q, 60%", "0.q, 60%",
    "5.o, 60%", "10.down, 60%", "17.down, 50%",
)  # fmt: skip


def gaps(book: Any, page: Path) -> str:
    found = {k: v for k, v in family(book, "gaps/").items() if k in GAPS}
    if not found:
        return ""

    def cells(values: list[float]) -> str:
        return " / ".join(f"{100 * value:.1f}" for value in values)

    rows = [
        [
            k,
            str(v["n"]),
            cells(v["plain"]["wanda"]),
            cells(v["plain"]["1-swap"]),
            cells(v["plain"]["best"]),
            cells(v["cut"]["best"]),
            f"{v['plain_seconds']:.0f}",
            f"{v['cut_seconds']:.0f}",
        ]
        for k, v in found.items()
    ]
    text = """## Certified gaps of full rows

Two rows of each layer: 1 − bound/objective in %, one figure a row. The bound is `sdp`, every certificate
re-checked in float64 by code it shares nothing with; with cuts, rounds of triangle inequalities are added.
The best mask is that of nine tabu runs of 100,000 moves, three seeds from each of 1-swap, `relax` and the
rounded SDP.

""" + table(
        [
            "rows",
            "n",
            "Wanda",
            "1-swap",
            "best mask",
            "best mask, cuts",
            "bound, s a row",
            "with cuts",
        ],
        rows,
    )
    return text


def growth(book: Any, page: Path) -> str:
    found = family(book, "gaps/")
    if not found:
        return ""
    rows = []
    for k, v in sorted(found.items(), key=lambda item: (item[0][:4], item[1]["n"])):
        above = v["above_best"]
        rows.append(
            [
                k,
                str(v["n"]),
                f"{100 * mean(v['plain']['best']):.1f}",
                f"{100 * mean(v['cut']['best']):.1f}",
                *(
                    " / ".join(
                        f"{100 * value:.2f}" for name, value in above.items() if name[:-2] == start
                    )
                    for start in ("1-swap", "relax", "sdp")
                ),
            ]
        )
    text = """## Do independent searches agree?

The same long runs, and those on rows restricted to random inputs: how far, in %, each of three seeds ends
above the best mask of all nine runs (mean of two rows), by start. Where runs from different starts end at
the same objective and the gap stays wide, it is the bound that is weak.

""" + table(
        ["rows", "n", "gap, %", "with cuts", "from 1-swap", "from relax", "from the rounded SDP"],
        rows,
    )
    for layer in HARD:
        if layer in found:
            text += "\n" + verdict(layer, found[layer])
    return text


#: the kinds with the widest gaps
HARD = ("5.o, 60%", "0.q, 60%")


def verdict(layer: str, record: dict[str, Any]) -> str:
    """How much of the gap a better search could close, as far as the long runs tell."""
    ends: dict[str, list[float]] = {}
    for name, above in record["above_best"].items():
        ends.setdefault(name[:-2], []).append(above)
    apart = max(min(values) for values in ends.values())
    among_relax = max(ends["relax"]) - min(ends["relax"])
    gap = mean(record["cut"]["best"])
    left = 1 - (1 - gap) / (1 - apart)
    weak = "the bound" if left > gap / 2 else "the search"
    return (
        f"{layer}: the best runs of the three starts end within {percent(apart)} of each other, those from\n"
        f"`relax` within {percent(among_relax)}; the gap is {percent(gap)}. Were there masks as much better "
        f"again, {percent(left)}\nwould be left: most of it is the fault of {weak}.\n"
    )


def blame(book: Any, page: Path) -> str:
    found = {tuple(k.split("/")): v for k, v in family(book, "blame/").items()}
    found = {k: v for k, v in found.items() if v["status"] == "OPTIMAL" or "optimal" in v["status"]}
    if not found:
        return ""
    rows = []
    for layer in dict.fromkeys(k[0] for k in found):
        cells = [v for k, v in found.items() if k[0] == layer]
        rows.append(
            [
                layer,
                str(len(cells)),
                *(f"+{percent(mean(c[m] for c in cells) - 1)}" for m in ("swap", "relax", "tabu")),
                f"−{percent(1 - mean(c['sdp'] for c in cells))}",
                f"−{percent(1 - mean(c['box'] for c in cells))}",
            ]
        )
    return """## Bound or search?

Rows restricted to 80 random inputs, where `branch` proves the optimum (60%): the masks above it, the
bounds below.

""" + table(["layer", "rows", "1-swap", "relax", "tabu 1000", "sdp bound", "box bound"], rows)

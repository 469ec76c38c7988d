"""The page out of the measurements of `quality.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from book import Book, Record, beginning, family, percent, table
from quality_gaps_page import GAPS, blame, both, crossed_gaps, gaps, growth
from quality_plot import plot

COMMAND = "python tests/benchmarks/quality.py"
Lines = Mapping[str, Record]


def write(of_layers: Book, of_gaps: Book, timed: Book, page: Path) -> None:
    """docs/results/quality.md and its plot; studies without measurements are left out.

    Where `of_layers` was measured on a busy machine, the page has the seconds of `timed`.
    """
    if not of_layers.about.get("busy"):
        timed = of_layers
    lines = {**with_seconds_of(timed.lines, of_layers.lines), **of_gaps.lines}
    parts = [
        f"""# How good the masks are

![Error against time, 60%](figures/quality.png)

The same for methods that update the kept weights, on held-out windows at 50% ([all figures](refit.md)):

![Held-out error of updated layers at 50% against milliseconds a row](figures/refit.png)

{lead(lines)}
## How it was measured

Everything here is written by one command (extra `demo`),
`{COMMAND} --bos {of_layers.about.get("bos", "auto")}`,
on real layers of Gemma 3 270M: calibration on the demo's text, {of_layers.about["samples"]} windows
of 512 tokens, rows drawn with seed {of_layers.about["seed"]}.

*Error* is a row's objective relative to Wanda's mask of the same row, averaged over rows and then over
layers; less is better. Layers are named by block and kind.

{sources(of_layers, of_gaps, timed)}"""
    ]
    page.parent.mkdir(parents=True, exist_ok=True)
    if split := compared(lines):
        plot(page.parent / "figures" / "quality.png", split)
    sections = (masks, relax, tabu, model, starts, steps, interaction, gaps, growth, blame)
    parts += [text for section in sections if (text := section(lines))]
    wanted = {
        "certified gaps of 17.down": "gaps/17.down",
        "the bound with cuts": "tightened/",
        "memetic search and long tabu runs": "crossed/",
        "bound or search on small rows": "blame/",
        "tabu by moves": "moves/",
        "the rounded SDP at n = 2048": "masks/60%/2.down/sdp",
        "whole layers": "whole/",
        "the whole model": "model/",
        "Frank–Wolfe": "masks/60%/0.q/Frank",
        "the rounded SDP": "masks/60%/0.q/sdp",
    }
    missing = [what for what, prefix in wanted.items() if not family(lines, prefix)]
    if missing:
        parts.append(
            f"The command measures more that is not in these data: {'; '.join(missing)}.\n"
        )
    page.write_text("\n".join(parts).rstrip() + "\n")


def with_seconds_of(timed: Lines, lines: Lines) -> dict[str, Record]:
    """The measurements, their seconds those of `timed`, NaN where it has none.

    The study of whole layers measures time alone, and is that of `timed`.
    """
    errors = {k: v for k, v in lines.items() if not k.startswith("whole/")}
    seconds = {k: v for k, v in timed.items() if k.startswith("whole/")}
    return {k: _timed(v, timed.get(k, {})) for k, v in errors.items()} | seconds


def _timed(record: Record, other: Record) -> dict[str, Any]:
    return {
        key: _timed(value, other.get(key, {}))
        if isinstance(value, dict)
        else other.get(key, math.nan)
        if "seconds" in key
        else value
        for key, value in record.items()
    }


def sources(of_layers: Book, of_gaps: Book, timed: Book) -> str:
    """What was measured where, when, and on which windows."""
    rows = [
        ("errors of layers", of_layers),
        ("their seconds", timed),
        ("certified gaps, small rows", of_gaps),
    ]
    rows = [(what, book) for what, book in rows if book.about]
    notes = [
        f"{what.capitalize()}: {b.about['note']}\n" for what, b in rows[1:] if b.about.get("note")
    ]
    return (
        table(
            ["what", "windows", "when", "machine"],
            [[what, beginning(b.about), b.dates, b.about["machine"]] for what, b in rows],
        )
        + f"""
Seconds are wall clock, start included, with {threads(timed.about)} unless said otherwise.
"""
        + "".join(notes)
    )


def lead(lines: Lines) -> str:
    """What to take from the page, every figure out of its tables."""
    masks = {tuple(k.split("/")): v for k, v in family(lines, "masks/60%/").items()}
    gaps = {k: v for k, v in family(lines, "gaps/").items() if k in GAPS and " on " not in k}
    small = list(family(lines, "blame/").values())
    layers = list(family(lines, "model/").values())
    whole = all(both(lines, k) for k in gaps) and ("0.q", "memetic, from relax") in masks
    if not (masks and gaps and small and layers and whole):
        return ""

    def error(method: str, digits: int = 2) -> str:
        there = mean(mean(v["error"]) for k, v in masks.items() if k[1] == method)
        return f"{there:.{digits}f}"

    def cost(method: str) -> str:
        found = [v["seconds_per_row"] for k, v in masks.items() if k[1] == method]
        return f"{1000 * mean(found):.3g} ms" if mean(found) < 1 else f"{mean(found):.1f} s"

    def span(found: list[float]) -> str:
        return f"{100 * min(found):.0f}–{100 * max(found):.0f}%"

    def solved(method: str) -> float:
        return sum(v["methods"][method]["seconds"] for v in layers)

    agree = [v["above_best"] for v in gaps.values()]

    def apart(relax: bool) -> str:
        """The most that a long search ends above the best one, by where it starts."""
        ends = [(name, above) for runs in agree for name, above in runs.items()]
        return percent(max(a for name, a in ends if name.startswith("relax") == relax))

    excess = {m: percent(mean(v[m] for v in small) - 1) for m in ("swap", "relax", "tabu")}
    return LEAD.format(
        all=error("1-swap, T = ∞"),
        all_cost=cost("1-swap, T = ∞"),
        t25=error("1-swap, T = 25", 3),
        t100=error("1-swap, T = 100", 3),
        to_the_end=error("1-swap, T = ∞", 3),
        t100_cost=cost("1-swap, T = 100"),
        hard=error("hardened start, 1-swap"),
        hard_cost=cost("hardened start, 1-swap"),
        tabu=error("tabu 1000, from relax"),
        slower=solved("tabu 1000, from relax") / solved("hardened start, 1-swap"),
        tabu_swap=error("tabu 1000, from 1-swap"),
        wolfe=error("Frank–Wolfe (2000)"),
        wolfe_cost=cost("Frank–Wolfe (2000)"),
        ria=error("RIA"),
        gpt=error("SparseGPT mask"),
        gap=span([mean(v["gap"]["1-swap"]) for v in gaps.values()]),
        cut=span([mean(crossed_gaps(lines, k)) for k in gaps]),
        apart=apart(relax=True),
        others=apart(relax=False),
        crossed=percent(1 - min(mean(lines[f"crossed/{k}"]["ratio"]) for k in gaps)),
        memetic=error("memetic, from relax", 3),
        memetic_cost=cost("memetic, from relax"),
        long_tabu=error("tabu 10000, from relax", 3),
        excess=excess,
    )


LEAD = """What to take from it, at 60% unless said otherwise:

1. **1-swap search more than halves Wanda's error**: {all} of it, in {all_cost} a row, and every row
   ends with a proof that no exchange of two weights improves it.
2. **Go on until nothing improves.** 25 swaps a row leave {t25}, 100 leave {t100} ({t100_cost}), all that
   improve {to_the_end} ({all_cost}). Rows of many inputs gain most from the last ones; see below.
3. **The start matters more than any search after it.** From the hardened relaxation instead of Wanda:
   {hard}, in {hard_cost} a row. This is what `prune` does by default.
4. **Tabu search adds little to a good start**: {tabu} after 1000 moves, at {slower:.1f} times the
   solving time of the whole model. To 1-swap's own optimum it adds more ({tabu_swap}).
5. **Frank–Wolfe with 2000 steps** (SparseFW) ends at {wolfe} in {wolfe_cost} a row.
6. **RIA, and SparseGPT's mask without its weight update, are worse than Wanda** on this objective:
   {ria} and {gpt}. SparseGPT chooses for weights that it goes on to change.
7. **The interaction term is the point.** Without −2 w_u w_p G_up the search stops at worse masks; see
   below.
8. **Certified gaps of full rows**: no mask's error is more than {gap} below that of 1-swap from
   Wanda, nor more than {cut} below that of the best mask found, where the bound has its cuts (means of
   two rows a layer).
9. **Long tabu searches agree, and better masks exist**: of nine runs of 100,000 moves those from
   `relax` end within {apart} of the best, those from other starts within {others}, and `memetic`, which
   crosses masks, up to {crossed} below all of them. On the rows of all methods it leaves {memetic} in
   {memetic_cost} a row, where 10,000 moves of tabu leave {long_tabu}.
10. **On small rows, where the optimum is proven**, 1-swap is {excess[swap]} above it on average,
    `relax` {excess[relax]}, tabu {excess[tabu]}.
"""


def threads(record: Record) -> str:
    count = record.get("threads")
    return "one thread" if count == 1 else f"{count} threads"


def below(value: float) -> str:
    return f"−{percent(value)}" if value >= 0 else f"+{percent(-value)}"


def compared(lines: Lines) -> dict[tuple[str, ...], Record]:
    """The comparison of masks by pattern, layer and method; layers on which every method has run."""
    split = {tuple(k.split("/")): v for k, v in family(lines, "masks/").items()}
    # a mean over layers is only fair where every method has run
    return {k: v for k, v in split.items() if (k[0], k[1], "portfolio") in split}


def masks(lines: Lines) -> str:
    split = compared(lines)
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


def relax(lines: Lines) -> str:
    found = family(lines, "sixteen/")
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
    whole = family(lines, "whole/")
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


def tabu(lines: Lines) -> str:
    sixteen = [v for v in family(lines, "sixteen/").values() if v["n"] == 640]
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
    found = list(family(lines, "moves/").values())
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


def model(lines: Lines) -> str:
    layers = list(family(lines, "model/").values())
    if not layers:
        return ""
    kinds = list(dict.fromkeys(v["kind"] for v in layers))

    def error(method: str, of: Sequence[Record]) -> float:
        total = sum(v["rows"] * v["methods"][method]["error"] for v in of)
        return total / sum(v["rows"] for v in of)

    names = list(layers[0]["methods"])
    seconds = {name: sum(v["methods"][name]["seconds"] for v in layers) for name in names}
    base = error(names[0], layers)
    rows = [
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

""" + table(["method", "seconds", "× 1-swap", "error", "against 1-swap", *kinds], rows)


def starts(lines: Lines) -> str:
    found = family(lines, "starts/")
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


def steps(lines: Lines) -> str:
    found = {
        tuple(k.split("/")): v for k, v in family(lines, "masks/60%/").items() if "1-swap, T" in k
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


def interaction(lines: Lines) -> str:
    found = family(lines, "interaction/")
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

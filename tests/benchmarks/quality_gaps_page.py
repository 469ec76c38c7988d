"""What the page says of the distance to the optimum."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean

from book import Record, family, percent, table

Lines = Mapping[str, Record]

#: the rows of the certified gaps: full ones of every kind, and two that are restricted
GAPS = (
    "10.down on 256, 60%", "5.q on 256, 60%", "10.gate, 60%", "17.gate, 60%", "5.q, 60%", "0.q, 60%",
    "5.o, 60%", "10.down, 60%", "17.down, 50%",
)  # fmt: skip


def cut_gaps(lines: Lines, label: str) -> list[float]:
    """Of the best masks of long searches, where the bound has its cuts."""
    plain, cut = lines[f"gaps/{label}"]["gap"], lines[f"tightened/{label}"]["wanda"]
    rows = zip(plain["best"], plain["wanda"], cut, strict=True)
    return [1 - (1 - wanda_cut) * (1 - best) / (1 - wanda) for best, wanda, wanda_cut in rows]


def crossed_gaps(lines: Lines, label: str) -> list[float]:
    """Of the masks of memetic search, where the bound has its cuts."""
    pairs = zip(cut_gaps(lines, label), lines[f"crossed/{label}"]["ratio"], strict=True)
    return [1 - (1 - gap) / ratio for gap, ratio in pairs]


def both(lines: Lines, label: str) -> bool:
    """Are the bound with cuts and memetic search measured, too?"""
    return f"tightened/{label}" in lines and f"crossed/{label}" in lines


def gaps(lines: Lines) -> str:
    found = {k: v for k, v in family(lines, "gaps/").items() if k in GAPS}
    if not found:
        return ""

    def cells(values: list[float]) -> str:
        return " / ".join(f"{100 * value:.1f}" for value in values)

    rows = [
        [
            k,
            str(v["n"]),
            *(cells(v["gap"][mask]) for mask in ("wanda", "1-swap", "best")),
            cells(cut_gaps(lines, k)) if f"tightened/{k}" in lines else "–",
            cells(crossed_gaps(lines, k)) if both(lines, k) else "–",
            f"{v['seconds']:.0f}",
            f"{lines[f'tightened/{k}']['seconds']:.0f}" if f"tightened/{k}" in lines else "–",
        ]
        for k, v in found.items()
    ]
    text = """## Certified gaps of full rows

Two rows of each layer: 1 − bound/objective in %, one figure a row. The bound is `sdp`, every certificate
re-checked in float64 by code it shares nothing with; with cuts, rounds of triangle inequalities are added,
for at most a minute a row. The best mask is that of nine tabu runs of 100,000 moves, three seeds from each of
1-swap, `relax` and the rounded SDP; memetic: the mask of `memetic` after 300 generations.

""" + table(
        [
            "rows",
            "n",
            "Wanda",
            "1-swap",
            "best mask",
            "best mask, cuts",
            "memetic, cuts",
            "bound, s a row",
            "with cuts",
        ],
        rows,
    )
    return text


def beyond(crossed: Record | None) -> str:
    """What memetic search ends above the long ones, %."""
    if crossed is None:
        return "–"
    return f"{100 * (mean(crossed['ratio']) - 1):.2f}".replace("-", "−")


def growth(lines: Lines) -> str:
    found = family(lines, "gaps/")
    if not found:
        return ""
    rows = []
    for k, v in sorted(found.items(), key=lambda item: (item[0][:4], item[1]["n"])):
        above = v["above_best"]
        rows.append(
            [
                k,
                str(v["n"]),
                f"{100 * mean(v['gap']['best']):.1f}",
                f"{100 * mean(cut_gaps(lines, k)):.1f}" if f"tightened/{k}" in lines else "–",
                beyond(lines.get(f"crossed/{k}")),
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
above the best mask of all nine runs (mean of two rows), by start; and how far `memetic` does, of 300
generations, where less than 0 is below. Runs that agree are no sign that nothing better exists.

""" + table(
        [
            *("rows", "n", "gap, %", "with cuts", "memetic"),
            *("from 1-swap", "from relax", "from the rounded SDP"),
        ],
        rows,
    )
    for layer in HARD:
        if layer in found and both(lines, layer):
            text += "\n" + verdict(layer, lines)
    return text


#: the kinds with the widest gaps
HARD = ("5.o, 60%", "0.q, 60%")


def verdict(layer: str, lines: Lines) -> str:
    """How much of the gap a better search closed, and what is left."""
    ends: dict[str, list[float]] = {}
    for name, above in lines[f"gaps/{layer}"]["above_best"].items():
        ends.setdefault(name[:-2], []).append(above)
    apart = max(min(values) for values in ends.values())
    gap, left = mean(cut_gaps(lines, layer)), mean(crossed_gaps(lines, layer))
    ahead = percent(1 - mean(lines[f"crossed/{layer}"]["ratio"]))
    return (
        f"{layer}: the best runs of the three starts end within {percent(apart)} of each other, with a\n"
        f"gap of {percent(gap)}; `memetic` ends {ahead} below the best of them,\n"
        f"and {percent(left)} are left.\n"
    )


def blame(lines: Lines) -> str:
    found = {tuple(k.split("/")): v for k, v in family(lines, "blame/").items()}
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

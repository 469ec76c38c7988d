"""The page out of the measurements of `refit.py`."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean, median

from book import PATTERNS, POOLED, Book, Record, family, plain, table


def write(book: Book, page: Path) -> None:
    """docs/results/refit.md: a table for each pattern, errors × 10⁴."""
    about = book.about
    measured = {k: r for k, r in book.lines.items() if "rows" in r}
    taken = sorted({f"{r['machine']}, {r['date']}" for r in measured.values()})
    flat, root = (_dampings(measured, power) for power in (0.0, 0.5))
    calibration, heldout = about["calibration"], about["heldout"]
    text = f"""# Least-squares updates, layer by layer

Written by `python tests/benchmarks/refit.py --calibration {calibration} --heldout {heldout}` (extra
`demo`): whole layers of Gemma 3 270M, inputs of the dense model, {calibration} of which everything is fitted
to and {heldout} on which it is judged. Errors are ‖(W−Ŵ)X‖²/‖WX‖² × 10⁴, fitted / held out, with the mask's
weights updated by least squares; λ relative to the mean of diag(G): {flat}, chosen on blocks 5 and 11.
*power ½*: inputs damped by the root of their size, `--damping-exponent 0.5`; λ: {root},
chosen on the odd blocks.
*unchanged*: the same mask with unchanged weights, held out. *for updates*: chosen for updated weights. *of B
formed*: the part of B, which has an entry for each kept and each pruned input, that a scan needs. *per
layer*: the rows of a layer share one budget, ω = 1; proven is also that no exchange between rows
improves. *memetic*: crosses 1-swap optima for 10 generations of 4 children a row, at 50% and of rows that are
not long.
{"; ".join(taken)}.
"""
    for pattern in (*PATTERNS, *POOLED):
        rows = []
        for key, record in of_pattern(book, pattern).items():
            layer, method = key.split("/", 1)
            swaps = record["swaps"]
            rows.append(
                [
                    layer,
                    plain(method),
                    f"{1e4 * record['fitted']:.1f} / {1e4 * record['held']:.1f}",
                    f"{1e4 * record['kept_held']:.1f}",
                    "" if swaps is None else f"{swaps:.1f}",
                    ""
                    if record["formed"] is None or "F" not in method
                    else f"{100 * record['formed']:.0f}%",
                    f"{100 * record['proven']:.0f}%" if "F" in method else "",
                ]
            )
        if rows:
            head = [
                "layer",
                "mask",
                "updated",
                "unchanged",
                "swaps a row",
                "of B formed",
                "proven",
            ]
            text += f"\n## {pattern}\n\n" + table(head, rows)
    figure = page.parent / "figures" / f"{page.stem}.png"
    page.write_text(text + plotted(book, figure) + toys(book) + beyond(book) + pace(book))


def _dampings(measured: dict[str, Record], power: float) -> str:
    found = {
        (key.split("/")[1].split(".")[1], record["damping"])
        for key, record in measured.items()
        if record.get("power", 0.0) == power
    }
    return ", ".join(f"{value} for {kind}" for kind, value in sorted(found))


def of_pattern(book: Book, pattern: str) -> dict[str, Record]:
    """By layer and method: layers of a kind by their blocks, of a layer the largest error first."""
    found = family(book.lines, f"{pattern}/")

    def place(key: str) -> tuple[bool, int, float]:
        block, kind = key.split("/")[0].split(".")
        return kind != "q", int(block), -found[key]["held"]

    return {key: found[key] for key in sorted(found, key=place)}


def plotted(book: Book, figure: Path) -> str:
    """Held-out error against time at 50%, a panel for each kind of layer, means over its layers."""
    import matplotlib.pyplot as plt

    # the time of memetic search is what one gives it
    found = {k: r for k, r in of_pattern(book, "50%").items() if "memetic" not in k}
    kinds = sorted({k.split("/")[0].split(".")[1] for k in found}, reverse=True)
    if not kinds:
        return ""
    pace = family(book.lines, "pace/")
    squares = {  # what chooses for kept weights has not solved them yet
        k: pace[k.split("/")[0]]["ours"]
        for k in found
        if k.split("/", 1)[1] not in ("ADMM", "OBS") and "F" not in k and k.split("/")[0] in pace
    }
    methods = list(
        dict.fromkeys(k.split("/", 1)[1] for k in found)
    )  # a colour each, in both panels
    fig, panels = plt.subplots(1, len(kinds), figsize=(5 * len(kinds), 4), layout="constrained")
    for panel, kind in zip([panels] if len(kinds) == 1 else panels, kinds, strict=True):
        some = {k: r for k, r in found.items() if k.split("/")[0].endswith(kind)}
        for number, method in enumerate(methods):
            these = {k: r for k, r in some.items() if k.split("/", 1)[1] == method}
            if not these:
                continue
            taken = [r["seconds"] / r["rows"] + squares.get(k, 0.0) for k, r in these.items()]
            panel.scatter(
                1000 * mean(taken),
                1e4 * mean(r["held"] for r in these.values()),
                s=28,
                color=f"C{number}",
                label=plain(method),
            )
        panel.set(xscale="log", xlabel="milliseconds a row", title=f"{kind}_proj")
        panel.grid(visible=True, which="both", alpha=0.3)
    first = panels if len(kinds) == 1 else panels[0]
    first.set_ylabel("held-out error × 10⁴, updated")
    first.legend(fontsize=7)
    figure.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(figure, dpi=100, metadata={"Software": None})
    plt.close(fig)
    return f"""
## Error against time

![Held-out error of updated layers at 50% against milliseconds a row](figures/{figure.name})

The table at 50%, means over the layers of a kind; the time of the start, the mask and its least squares.
"""


def toys(book: Book) -> str:
    """Rows with few inputs, whose optimum is proven."""
    found = family(book.lines, "toy/")
    rows = []
    for n in sorted({int(key.split("/")[0]) for key in found}):
        some = [record for key, record in found.items() if key.startswith(f"{n}/")]
        every = {
            name: [x for r in some for x in r[name]]
            for name in ("swap", "admm", "kept", "root", "gap", "nodes")
        }
        parts = [
            f"{median(v):.2%} / {max(v):.2%}"
            for v in (every[k] for k in ("swap", "admm", "kept", "root"))
        ]
        proven = sum(gap <= 1e-6 for gap in every["gap"])
        nodes = f"{median(every['nodes']):.0f} / {max(every['nodes'])}"
        rows.append([str(n), f"{proven} of {len(every['gap'])}", *parts, nodes])
    if not rows:
        return ""
    head = [
        "n",
        "proven",
        "1-swap for updates above it",
        "ADMM",
        "1-swap, updated",
        "bound below it",
        "nodes",
    ]
    return """
## Rows whose optimum is proven

Of every layer four rows, restricted to n inputs, 50%, the λ of their kind: the least F, which `branch`
proves, how far above it other masks end, and how far below it the certified bound `perspective` is;
median / worst.

""" + table(head, rows)


def beyond(book: Book) -> str:
    """Masks of smaller F than 1-swap optima, on held-out windows."""
    found = family(book.lines, "beyond/")
    if not found:
        return ""
    rows = [
        [
            layer,
            str(r["count"]),
            f"{r['least'] - 1:+.2%}",
            f"{r['held'] - 1:+.2%} ± {r['about']:.2%}",
        ]
        for layer, r in found.items()
    ]
    least, held = (mean(r[name] - 1 for r in found.values()) for name in ("least", "held"))
    machines = sorted({f"{r['machine']}, {r['date']}" for r in found.values()})
    head = ["layer", "rows", "F", "held-out error"]
    return f"""
## Long rows beyond 1-swap optima

How much lower `memetic` gets the F of 1-swap optima at 50% (from ADMM; some rows of each layer), and what
becomes of the error on held-out windows, ± one standard error over rows. The mean over the layers is
{least:+.2%} of F and {held:+.2%} of the held-out error.
{"; ".join(machines)}.

""" + table(head, rows)


def pace(book: Book) -> str:
    """What least squares cost, compared with a plain loop."""
    found = family(book.lines, "pace/")
    if not found:
        return ""
    rows = [
        [k, str(r["n"]), f"{r['loop'] / r['ours']:.1f}", f"{r['trading'] / r['ours']:.1f}"]
        for k, r in found.items()
    ]
    # they differ by their load alone where one run measured all
    machines = sorted({re.sub(r", load [\d.]+", "", r["machine"]) for r in found.values()})
    return f"""
## What least squares cost

Of Wanda's mask at 50%, all rows together, compared with a loop over rows that solves every system in float64,
and for Wanda's mask under a shared budget, whose rows keep different counts.
{"; ".join(machines)}.

""" + table(["layer", "n", "the loop's time is × ours", "under a shared budget"], rows)

"""The page out of the measurements of `refit.py`."""

from __future__ import annotations

from pathlib import Path

from book import PATTERNS, Book, family, table


def write(book: Book, page: Path) -> None:
    """docs/refit.md: a table for each pattern, errors × 10⁴."""
    about = book.about
    taken = sorted({f"{r['machine']}, {r['date']}" for r in book.lines.values() if "machine" in r})
    found = {
        (k.split("/")[1].split(".")[1], r["damping"]) for k, r in book.lines.items() if "rows" in r
    }
    dampings = ", ".join(f"{value} for {kind}" for kind, value in sorted(found))
    calibration, heldout = about["calibration"], about["heldout"]
    text = f"""# Refitted weights

Written by `python tests/benchmarks/refit.py --calibration {calibration} --heldout {heldout}` (extra
`demo`): whole layers of Gemma 3 270M, inputs of the dense model, {calibration} of which everything is fitted
to and {heldout} on which it is judged. Errors are ‖(W−Ŵ)X‖²/‖WX‖² × 10⁴, fitted / held out, with the mask's
weights refitted by least squares; λ in parts of G's mean diagonal: {dampings}, chosen on blocks 5 and 11.
*kept*: the same mask with its weights as they were, held out. *on F*: chosen for refitted weights.
{"; ".join(taken)}.
"""
    for pattern in PATTERNS:
        rows = []
        for key, record in family(book.lines, f"{pattern}/").items():
            layer, method = key.split("/", 1)
            swaps = record["swaps"]
            rows.append(
                [
                    layer,
                    method,
                    f"{1e4 * record['fitted']:.1f} / {1e4 * record['held']:.1f}",
                    f"{1e4 * record['kept_held']:.1f}",
                    "" if swaps is None else f"{swaps:.1f}",
                    f"{100 * record['proven']:.0f}%" if "F" in method else "",
                ]
            )
        if rows:
            head = ["layer", "mask", "refitted", "kept", "swaps a row", "proven for F"]
            text += f"\n## {pattern}\n\n" + table(head, rows)
    page.write_text(text)

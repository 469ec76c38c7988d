"""Cells of tables that several commands print: a bound, and how far a mask is from it."""

from __future__ import annotations

from typing import Any

#: of a bound that says nothing, and of its gap
NO_BOUND = ("–", "–")


def bound_cells(record: Any) -> tuple[str, str]:
    """Bound and gap of a record of `compare` or `bound`, in the units of whoever posed the row."""
    if not record.bounded or record.gap != record.gap:
        return NO_BOUND
    return f"{record.value_bound:.6g}", f"{record.gap:.2%}"

"""Whole channels, heads, experts and blocks removed."""

"""Rows of a layer under a shared budget: one count for the layer, any count for each row."""

"""Rows of a layer that trade: one count for the layer, and whichever rows give and take."""

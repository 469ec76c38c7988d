"""Masks for weights that are updated by least squares: the search on F, and what starts it."""

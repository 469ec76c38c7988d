"""Masks for weights that are refitted by least squares: the search on F, and what starts it."""

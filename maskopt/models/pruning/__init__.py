"""Pruning of a whole model: allocation, layers, output, report."""

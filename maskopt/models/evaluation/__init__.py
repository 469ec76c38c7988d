"""Perplexity, comparison of models, sweeps, certified gaps of a pruned model."""

"""The decoder blocks and weight matrices of a causal language model, in memory or read block by block."""

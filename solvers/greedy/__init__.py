"""One pass over the weights: scores ranked once, elimination, SparseGPT's mask, DSnoT."""

"""The mask-selection problem of a linear layer: objective, sparsity patterns, weight update, arrays."""

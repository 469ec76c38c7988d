"""A causal language model as a sequence of layer problems: read, prune, write, check."""

"""Branch and bound of our own: one best-first tree, and what it needs to know of each objective."""

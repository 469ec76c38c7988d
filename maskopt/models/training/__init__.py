"""Training of kept weights with their masks fixed."""

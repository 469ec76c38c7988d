"""Lower bounds and proofs of optimality as data, and their independent check."""

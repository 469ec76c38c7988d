"""A pruned folder checked against its manifest, its masks and the original."""

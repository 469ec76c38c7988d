"""A pruned model trained as a whole to predict what the dense model predicts."""

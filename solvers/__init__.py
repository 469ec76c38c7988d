"""The backends of maskopt, imported as `maskopt.solvers` and found through entry points."""

"""The protocol of solvers and bounds: `solve`, the registries, solutions and traces."""

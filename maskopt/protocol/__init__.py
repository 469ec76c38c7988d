"""What a solver takes and returns: limits, solutions, traces, and the registries of solvers and bounds."""

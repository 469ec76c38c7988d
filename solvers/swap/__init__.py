"""1-swap local search: the engine, its kernels, and the solver that the registry finds."""

from maskopt.solvers.swap.solver import Swap

__all__ = ["Swap"]

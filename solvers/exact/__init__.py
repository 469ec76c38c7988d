"""Solvers that prove optima: enumeration, branch and bound, integer programming; rows in worker processes."""

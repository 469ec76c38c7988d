"""Convex optimisation that several families share: relaxations of a row, their duals and bounds."""

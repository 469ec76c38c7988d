"""What several families need of convex optimisation: relaxations of a row, their duals and bounds."""

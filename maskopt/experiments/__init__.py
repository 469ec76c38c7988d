"""Many rows through several solvers, with results that an interrupted run continues."""

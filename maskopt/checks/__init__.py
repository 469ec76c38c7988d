"""Independent checks of what a solution claims."""

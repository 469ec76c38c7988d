"""Methods that make certificates of lower bounds, found through the group `maskopt.bounds`."""

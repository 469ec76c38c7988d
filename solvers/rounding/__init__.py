"""A relaxation solved, then rounded to a mask: relax, frank_wolfe, the rounded SDP."""

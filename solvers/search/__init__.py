"""Local search beyond one swap: tabu, kswap, portfolio."""

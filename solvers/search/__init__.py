"""Local search beyond one swap: tabu and memetic."""

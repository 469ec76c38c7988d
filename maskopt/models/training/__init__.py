"""Kept weights trained with their masks fixed."""

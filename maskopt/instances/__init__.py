"""Instances of other libraries, and row problems of whole input structures."""

"""Instances of other libraries, read and written."""

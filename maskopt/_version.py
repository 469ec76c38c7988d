"""The version, for all modules to read."""

__version__ = "0.2.0"

"""What people read: tables for the terminal, and one self-contained HTML page."""

from maskopt.report.page import write_page
from maskopt.report.table import Table, number

__all__ = ["Table", "number", "write_page"]

"""What people read: tables for the terminal, and one self-contained HTML page."""

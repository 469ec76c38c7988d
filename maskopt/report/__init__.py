"""Reports of prunes: one self-contained HTML page, with charts."""

"""Self-contained HTML reports from plain data: one file, no script, nothing fetched."""

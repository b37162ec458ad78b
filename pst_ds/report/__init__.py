"""One HTML page about runs: read their folders, lay out curves, heat maps and tables, fill the template. No torch."""

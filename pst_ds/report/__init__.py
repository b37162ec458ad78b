"""One HTML page about runs: read their folders, lay out curves and tables, fill the template. No torch."""

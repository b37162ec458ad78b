"""Additions: trained modules next to the layers of a model. One addition per file."""

"""A finished run becomes a folder or file for other programs, and the check that it holds the right weights."""

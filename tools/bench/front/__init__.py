"""Speed, size and quality of pst-ds and of the alternatives, measured in one run."""

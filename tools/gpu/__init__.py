"""Check PST on a GPU against the CPU, and measure it next to the predictions of ``pst-ds plan``: ``make gpu``."""

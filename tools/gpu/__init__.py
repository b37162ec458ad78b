"""Measure PST on a GPU within ten minutes, next to the predictions of ``pst-ds plan``: ``make gpu``."""

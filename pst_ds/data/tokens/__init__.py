"""Tokens on disk: stores that ``pst-ds prepare`` writes, those of other programs, and the order in which a run reads
them. Nothing of a corpus is held in memory."""

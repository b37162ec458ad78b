"""Stacks of experts: a router sends each of N tokens to k of E experts (arXiv 1701.06538)."""

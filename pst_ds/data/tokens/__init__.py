"""Token stores of ``pst-ds prepare``, token files of other programs, and the order in which a run reads them.

A corpus is never held in memory.
"""

"""pst-ds: Parameter-efficient Sparse Training (arXiv 2205.11005) on DeepSpeed ZeRO-3."""

__version__ = "0.1.0"

"""Packed folders in transformers: importing this package registers the packed formats with every Auto class.

Scripts import :mod:`pst_ds.hf`, which has the public names.
"""

from pst_ds.inference.hf.quantizer import register

register()

"""Packed formats of a sparse (O, I) matrix: kept values and their positions.

    "bitmask"   kept values row by row, one bit per position, index of the first value of every row
    "2:4"       the two kept values of every four inputs, and the bits
    "csr"       kept values, the column of each, index of the first value of every row

In bitmask, 2:4 and dense matrices the values may be quantised (:mod:`pst_ds.core.quantization`), with their scales in
another part. Files may have the bits compressed; see :mod:`pst_ds.formats.stored_bits`. The class of a storage format
chooses the layout: :func:`pst_ds.storage_format.packed_format`.

A packed tensor is a dict of parts, named ``<module>.<part>`` in files. The caller transposes a Conv1D weight, stored
(I, O), before packing and after unpacking. Call :meth:`PackedFormat.check` first for parts that were read from a file:
nothing else here validates them.
"""

from pst_ds.formats.parts import VALUE_DTYPES, FormatError, PackedFormat, Part
from pst_ds.formats.quantized import QuantizedBitmask, QuantizedDense, QuantizedFormat, QuantizedTwoFour
from pst_ds.formats.rows import mask_row_bits, row_bits
from pst_ds.formats.sparse import BitmaskFormat, CsrFormat, TwoFourFormat
from pst_ds.formats.stored_bits import stored_bits, with_row_bits

_FORMATS: tuple[PackedFormat, ...] = (BitmaskFormat(), TwoFourFormat(), CsrFormat())
FORMATS = {layout.name: layout for layout in _FORMATS}
"""Layouts of pst-ds with values in the model's dtype. Formats of other packages have theirs; see storage_format.py."""


__all__ = [
    "FORMATS",
    "VALUE_DTYPES",
    "BitmaskFormat",
    "FormatError",
    "PackedFormat",
    "Part",
    "QuantizedBitmask",
    "QuantizedDense",
    "QuantizedFormat",
    "QuantizedTwoFour",
    "mask_row_bits",
    "row_bits",
    "stored_bits",
    "with_row_bits",
]

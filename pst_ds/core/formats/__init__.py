"""Packed forms of a sparse (O, I) matrix: what is kept, and where it was.

    "bitmask"   the kept values row by row, a bit for every position, the first value of every row
    "2:4"       the two kept values of every four inputs of an output, and the bits
    "csr"       the kept values, the column of each, the first value of every row

A packed tensor is a dict of parts, which are named in a file ``<module>.<part>``. A GPT-2 Conv1D weight, stored (I, O),
is transposed by the caller, before packing and after unpacking. :meth:`PackedFormat.check` comes first for parts that
were read from anywhere: nothing else here looks at them before it uses them.
"""

from __future__ import annotations

from pst_ds.core.formats.bitmask import BitmaskFormat
from pst_ds.core.formats.csr import CsrFormat
from pst_ds.core.formats.parts import VALUE_DTYPES, FormatError, PackedFormat, Part
from pst_ds.core.formats.rows import mask_row_bits, row_bits
from pst_ds.core.formats.two_four import TwoFourFormat
from pst_ds.core.packings import PACKINGS

_FORMATS: tuple[PackedFormat, ...] = (BitmaskFormat(), TwoFourFormat(), CsrFormat())
FORMATS = dict(zip(PACKINGS, _FORMATS, strict=True))

__all__ = ["FORMATS", "VALUE_DTYPES", "FormatError", "PackedFormat", "Part", "mask_row_bits", "row_bits"]

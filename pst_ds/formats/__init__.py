"""Packed forms of a sparse (O, I) matrix: what is kept, and where it was.

    "bitmask"   the kept values row by row, a bit for every position, the first value of every row
    "2:4"       the two kept values of every four inputs of an output, and the bits
    "csr"       the kept values, the column of each, the first value of every row

Of bitmask, 2:4 and dense matrices the values may also be codes on a grid (:mod:`pst_ds.core.quantization`), with their
scales in a part of their own; :func:`packed_format` gives the format of either.

A packed tensor is a dict of parts, which are named in a file ``<module>.<part>``. A GPT-2 Conv1D weight, stored (I, O),
is transposed by the caller, before packing and after unpacking. :meth:`PackedFormat.check` comes first for parts that
were read from anywhere: nothing else here looks at them before it uses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch

from pst_ds.core.packings import COMPRESSED_TENSORS, DENSE, FOR_COMPRESSED_TENSORS, GROUPS, PACKINGS
from pst_ds.core.quantization import Grid
from pst_ds.formats.bitmask import BitmaskFormat
from pst_ds.formats.compressed_tensors import IntQuantizedFormat, PackQuantizedFormat
from pst_ds.formats.csr import CsrFormat
from pst_ds.formats.foreign import ForeignFormat
from pst_ds.formats.parts import VALUE_DTYPES, FormatError, PackedFormat, Part
from pst_ds.formats.quantized import QuantizedFormat
from pst_ds.formats.rows import mask_row_bits, row_bits
from pst_ds.formats.two_four import TwoFourFormat

_FORMATS: tuple[PackedFormat, ...] = (BitmaskFormat(), TwoFourFormat(), CsrFormat())
FORMATS = dict(zip(PACKINGS, _FORMATS, strict=True))


@cache
def packed_format(packing: str, grid: Grid | None = None) -> PackedFormat:
    """Return the format of a packing whose values are on ``grid``, or have the model's dtype.

    Raises ValueError for what there is not: a dense matrix without a grid is not packed, and csr has no grid.
    """
    if grid is not None and packing in FOR_COMPRESSED_TENSORS:
        return PackQuantizedFormat(grid) if packing == COMPRESSED_TENSORS else IntQuantizedFormat(grid)
    if grid is not None:
        return QuantizedFormat(packing, grid)
    if packing not in FORMATS:
        raise ValueError(f"packed formats are {', '.join(FORMATS)}, not {packing}")
    return FORMATS[packing]


def form_of(packing: str, parts: Mapping[str, Part], columns: int) -> PackedFormat:
    """Return the format of a weight of ``columns`` inputs whose parts have these dtypes and shapes.

    ``packing``: the format of the folder; a weight with codes and no bitmask is dense. Only what tells formats apart is
    looked at: :meth:`PackedFormat.check` comes after it. FormatError where the scales fit no grid; ValueError for a
    ``packing`` that there is not.
    """
    if "codes" not in parts:
        return packed_format(packing)
    bits = 4 if parts["codes"][0] == torch.uint8 else 8
    dims = parts["scales"][1] if "scales" in parts else ()
    groups = dims[1] if len(dims) == 2 else 1
    group = None if groups == 1 or not columns else columns // max(groups, 1)
    if group is not None and (group not in GROUPS or group * groups != columns):
        known = ", ".join(map(str, GROUPS))
        raise FormatError(f"{groups} scales a row of {columns} inputs; a scale is for {known} of them or for all")
    return packed_format(packing if "bitmask" in parts else DENSE, Grid(bits, group))


__all__ = [
    "FORMATS",
    "VALUE_DTYPES",
    "ForeignFormat",
    "FormatError",
    "PackedFormat",
    "Part",
    "QuantizedFormat",
    "form_of",
    "mask_row_bits",
    "packed_format",
    "row_bits",
]

"""Packed formats of a sparse (O, I) matrix: kept values and their positions.

    "bitmask"   kept values row by row, one bit per position, index of the first value of every row
    "2:4"       the two kept values of every four inputs, and the bits
    "csr"       kept values, the column of each, index of the first value of every row

In bitmask, 2:4 and dense matrices the values may be quantised (:mod:`pst_ds.core.quantization`), with their scales in
another part; see :func:`packed_format`. Files may have the bits compressed; see :mod:`pst_ds.formats.stored_bits`.

A packed tensor is a dict of parts, named ``<module>.<part>`` in files. The caller transposes a Conv1D weight, stored
(I, O), before packing and after unpacking. Call :meth:`PackedFormat.check` first for parts that were read from a file:
nothing else here validates them.
"""

from collections.abc import Mapping
from functools import cache

import torch

from pst_ds.core.packings import COMPRESSED_TENSORS, DENSE, FOR_COMPRESSED_TENSORS, GROUPS, PACKINGS
from pst_ds.core.quantization import Grid
from pst_ds.formats.compressed_tensors import IntQuantizedFormat, PackQuantizedFormat
from pst_ds.formats.parts import VALUE_DTYPES, FormatError, PackedFormat, Part
from pst_ds.formats.quantized import QuantizedFormat
from pst_ds.formats.rows import mask_row_bits, row_bits
from pst_ds.formats.sparse import BitmaskFormat, CsrFormat, TwoFourFormat
from pst_ds.formats.stored_bits import stored_bits, with_row_bits

_FORMATS: tuple[PackedFormat, ...] = (BitmaskFormat(), TwoFourFormat(), CsrFormat())
FORMATS = dict(zip(PACKINGS, _FORMATS, strict=True))


@cache
def packed_format(packing: str, grid: Grid | None = None) -> PackedFormat:
    """Return the format of a packing with values quantised to ``grid``, or in the model's dtype.

    Raises ValueError for an unsupported combination: dense without quantisation, or csr with it.
    """
    if grid is not None and packing in FOR_COMPRESSED_TENSORS:
        return PackQuantizedFormat(grid) if packing == COMPRESSED_TENSORS else IntQuantizedFormat(grid)
    if grid is not None:
        return QuantizedFormat(packing, grid)
    if packing not in FORMATS:
        raise ValueError(f"packed formats are {', '.join(FORMATS)}, not {packing}")
    return FORMATS[packing]


def form_of(packing: str, parts: Mapping[str, Part], columns: int) -> PackedFormat:
    """Return the format of a weight, given the dtypes and shapes of its parts.

    Reads only what distinguishes formats; :meth:`PackedFormat.check` validates the rest.

    Args:
        packing: format of the folder; a weight with codes and without a bitmask is dense.
        parts: dtype and shape of each part.
        columns: inputs of the weight.

    Raises FormatError if the scales fit no quantisation, and ValueError for an unknown ``packing``.
    """
    if "codes" not in parts:
        return packed_format(packing)
    bits = 4 if parts["codes"][0] == torch.uint8 else 8
    dims = parts["scales"][1] if "scales" in parts else ()
    groups = dims[1] if len(dims) == 2 else 1
    group = None if groups == 1 or not columns else columns // max(groups, 1)
    if group is not None and (group not in GROUPS or group * groups != columns):
        known = ", ".join(map(str, GROUPS))
        raise FormatError(f"{groups} scales per row of {columns} inputs: a scale must be for {known} inputs or for all")
    return packed_format(packing if "bitmask" in parts else DENSE, Grid(bits, group))


__all__ = [
    "FORMATS",
    "VALUE_DTYPES",
    "FormatError",
    "PackedFormat",
    "Part",
    "QuantizedFormat",
    "form_of",
    "mask_row_bits",
    "packed_format",
    "row_bits",
    "stored_bits",
    "with_row_bits",
]

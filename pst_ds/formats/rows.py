"""Row bits, and copies between dense rows and their kept values: C++ loops, with numpy fallbacks of the same results.

Row bits are (O, ceil(I / 8)) uint8, little-endian within a byte; every row starts with a new byte, and padding bits are
zero. Weights are copied as integers of the same width, so that NaNs stay bit-identical.
"""

from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from pst_ds.core.bits import INT_OF_SIZE, unpack_range
from pst_ds.core.kernels import INT, POINTER, NativeSource, load
from pst_ds.core.layout import WeightLayout

SOURCE = NativeSource(
    "pack.cpp",
    {
        "pst_row_bits": ([POINTER, INT, INT, INT, POINTER], None),
        "pst_row_counts": ([POINTER, INT, INT, POINTER], None),
        "pst_gather": ([POINTER, POINTER, INT, INT, INT, POINTER, INT], None),
        "pst_scatter": ([POINTER, POINTER, INT, INT, INT, POINTER, INT], None),
        "pst_scatter_nibbles": ([POINTER, POINTER, INT, INT, POINTER, POINTER], None),
        "pst_columns": ([POINTER, INT, INT, INT, POINTER, INT], None),
    },
    "packed formats",
    flags=("-std=c++17", "-O3"),
)
_BAND = 1 << 18
"""Weights of a matrix that are scattered in one step."""
POPCOUNT = np.array([value.bit_count() for value in range(256)], dtype=np.uint8)
library = cache(partial(load, SOURCE))
"""The functions of pack.cpp, or None if they cannot be compiled."""


def bytes_of_row(columns: int) -> int:
    """Return the bytes of a row of bits."""
    return -(-columns // 8)


def row_bits(weight: Tensor) -> Tensor:
    """Return the row bits of the non-zeros of ``weight``, (O, I) float on the CPU; -0.0 counts as zero."""
    as_int = _as_int(weight.detach().contiguous())
    rows, columns = as_int.shape
    native = library()
    if native is None:
        # the largest integer masks the sign, so that -0.0 is zero, as a comparison of floats would have it
        nonzero = (as_int.numpy() & np.iinfo(as_int.numpy().dtype).max) != 0
        return torch.from_numpy(np.packbits(nonzero, axis=1, bitorder="little"))
    bits = torch.empty(rows, bytes_of_row(columns), dtype=torch.uint8)
    native.pst_row_bits(as_int.data_ptr(), as_int.element_size(), rows, columns, bits.data_ptr())
    return bits


def mask_row_bits(mask: Tensor, layout: WeightLayout) -> Tensor:
    """Return the row bits, in (O, I) orientation, of a whole mask in one shard in storage order.

    ``mask``: bits as in :mod:`pst_ds.core.bits`. The result is a view of it if rows start at whole bytes.
    """
    if not layout.transposed and layout.in_features % 8 == 0:
        return mask.view(layout.out_features, layout.in_features // 8)
    keep = unpack_range(mask, layout.numel, 1, 0, layout.numel).view(layout.num_experts, *layout.expert.shape)
    if layout.transposed:
        keep = keep.transpose(1, 2)  # (experts, outputs, inputs)
    matrix = keep.flatten(0, 1).contiguous()  # (O, I)
    return torch.from_numpy(np.packbits(matrix.numpy(), axis=1, bitorder="little"))


def as_bools(bits: Tensor, columns: int) -> Tensor:
    """Return row bits as (O, I) bool."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=columns, bitorder="little").view(bool))


def row_counts(bits: Tensor) -> Tensor:
    """Count the set bits per row, (O,) int64."""
    native = library()
    if native is None:
        return torch.from_numpy(POPCOUNT[bits.numpy()].sum(axis=1, dtype=np.int64))
    counts = torch.empty(bits.shape[0], dtype=torch.int64)
    native.pst_row_counts(bits.data_ptr(), bits.shape[0], bits.shape[1], counts.data_ptr())
    return counts


def gather(weight: Tensor, bits: Tensor, count: int) -> Tensor:
    """Return the kept values of ``weight``, (O, I) contiguous, row by row: (count,), with -0.0 turned into +0.0.

    ``weight`` may be int8 codes above -128. ``bits`` must have ``count`` bits set, none of them padding.
    """
    as_int = _as_int(weight)
    rows, columns = as_int.shape
    values = torch.empty(count, dtype=as_int.dtype)
    native = library()
    if native is None:
        values.copy_(torch.from_numpy(as_int.numpy()[as_bools(bits, columns).numpy()]))
        values[values == torch.iinfo(values.dtype).min] = 0  # only the sign bit is set: -0.0
    else:
        size = as_int.element_size()
        native.pst_gather(as_int.data_ptr(), bits.data_ptr(), size, rows, columns, values.data_ptr(), count)
    return values.view(weight.dtype)


def scatter(values: Tensor, bits: Tensor, columns: int) -> Tensor:
    """Return the (O, I) matrix with ``values``, of any shape, at the set ``bits``, and +0.0 elsewhere.

    ``bits`` must have as many bits set as there are values, none of them padding.
    """
    as_int = _as_int(values)
    rows = bits.shape[0]
    count = values.numel()
    native = library()
    if not rows * columns:  # without inputs, a file of few bytes may claim any number of rows
        dense = torch.empty(rows, columns, dtype=as_int.dtype)
    elif native is None:
        dense = torch.zeros(rows, columns, dtype=as_int.dtype)
        dense.numpy()[as_bools(bits, columns).numpy()] = as_int.flatten().numpy()
    else:
        dense = torch.empty(rows, columns, dtype=as_int.dtype)
        size = as_int.element_size()
        native.pst_scatter(as_int.data_ptr(), bits.data_ptr(), size, rows, columns, dense.data_ptr(), count)
    return dense.view(values.dtype)


def scatter_nibbles(packed: Tensor, bits: Tensor | None, rows: int, columns: int) -> Tensor | None:
    """Return the (O, I) int8 codes of ``packed`` 4-bit codes, 0 where no bit is set; None without native code.

    Every row of ``packed`` starts with a new byte. ``bits``: of the kept positions; None if all are kept.
    """
    native = library()
    if native is None or not rows * columns:
        return None
    codes = torch.empty(rows, columns, dtype=torch.int8)
    row_codes = torch.empty(columns + 1, dtype=torch.int8)
    bits_pointer = 0 if bits is None else bits.data_ptr()
    native.pst_scatter_nibbles(packed.data_ptr(), bits_pointer, rows, columns, row_codes.data_ptr(), codes.data_ptr())
    return codes


def columns_of(bits: Tensor, columns: int, count: int, dtype: torch.dtype) -> Tensor:
    """Return the column of every set bit, row by row: (count,), uint16 or int32."""
    native = library()
    if native is None:
        column_of = np.nonzero(as_bools(bits, columns).numpy())[1]
        width = np.uint16 if dtype == torch.uint16 else np.int32
        return torch.from_numpy(column_of.astype(width))
    indices = torch.empty(count, dtype=dtype)
    native.pst_columns(bits.data_ptr(), bits.shape[0], columns, dtype.itemsize, indices.data_ptr(), count)
    return indices


def scatter_columns(values: Tensor, starts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """Return the (O, I) matrix with ``values`` (nnz,) at the columns ``indices`` (nnz,).

    ``starts`` (O + 1,) int64: index of the first value of each row.
    """
    as_int = _as_int(values)
    rows = starts.numel() - 1
    dense = torch.zeros(rows, columns, dtype=as_int.dtype)
    step = max(1, _BAND // max(1, columns))
    for first in range(0, rows, step):  # numpy's indices take several times the memory of the values
        band_starts = starts.numpy()[first : first + step + 1]
        kept = slice(band_starts[0], band_starts[-1])
        row_of = np.repeat(np.arange(len(band_starts) - 1), np.diff(band_starts))
        band = dense.numpy()[first : first + step]
        band[row_of, indices.numpy()[kept]] = as_int.numpy()[kept]
    return dense.view(values.dtype)


def _as_int(weight: Tensor) -> Tensor:
    return weight.view(INT_OF_SIZE[weight.element_size()])

"""Products of a packed weight with many vectors: tiles are expanded on the chip and multiplied as dense ones."""

from __future__ import annotations

import triton
import triton.language as tl

from pst_ds.core.kernels.triton.launch import is_interpreted
from pst_ds.core.kernels.triton.vector_kernels import count_bits, mask_word

TILE_ROWS = 64
_INTERPRETED = tl.constexpr(is_interpreted())


@triton.jit
def _expanded(values, first, bits, scale, BITS: tl.constexpr):
    """Return (rows, 32) fp32 for one word of the mask per row: kept values times the row's scale, zeros elsewhere.

    ``first``: (rows,) index in ``values`` of the first value of the word: a code of BITS bits, or a float if BITS is 0.
    """
    places = tl.arange(0, 32)[None, :]
    is_kept = ((bits[:, None] >> places) & 1) != 0
    at = first[:, None] + count_bits(bits[:, None] & ((1 << places) - 1))
    if BITS == 4:
        byte = tl.load(values + (at >> 1), mask=is_kept, other=0).to(tl.int32)
        weight = ((byte << (28 - (at & 1) * 4)) >> 28).to(tl.float32)
    else:
        weight = tl.load(values + at, mask=is_kept, other=0).to(tl.float32)
    return weight * scale[:, None] if BITS else weight


@triton.jit
def packed_tiles(
    x_ptr, vectors, tiles_ptr, values_ptr, bits_ptr, rows, columns, offsets_ptr, scales_ptr, bias_ptr, y_ptr,
    ROWS: tl.constexpr, VECTORS: tl.constexpr, BITS: tl.constexpr, GROUP_WORDS: tl.constexpr, GROUPS: tl.constexpr,
):
    """Compute y (vectors, rows) = x (vectors, columns) W' + bias, with W rounded to the dtype of x and sums in fp32.

    ``tiles_ptr``: (expert, first vector, number of vectors) int32 per tile of experts; None for a single weight.
    """
    output = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_vector, end, first_row = tl.program_id(1) * VECTORS, vectors, 0
    if tiles_ptr is not None:
        tile = tiles_ptr + tl.program_id(1) * 3
        first_row = tl.load(tile) * rows
        first_vector = tl.load(tile + 1)
        end = first_vector + tl.load(tile + 2)
    vector = first_vector + tl.arange(0, VECTORS)
    is_row, is_vector = output < rows, vector < end
    row = first_row + output
    offsets = tl.load(offsets_ptr + row, mask=is_row, other=0)
    base = tl.load(offsets_ptr + first_row + tl.program_id(0) * ROWS)
    first = (offsets - base).to(tl.int32) * (2 if BITS == 4 else 1)
    values = values_ptr + base
    x = x_ptr + vector.to(tl.int64)[None, :] * columns
    places = tl.arange(0, 32)
    scale = tl.full((ROWS,), 1.0, tl.float32)
    sums = tl.zeros((ROWS, VECTORS), tl.float32)
    word = 0
    while word * 32 < columns:
        bits = mask_word(bits_ptr, row, tl.full((ROWS,), word, tl.int32), columns, is_row)
        if BITS:
            group = row * GROUPS + (word // GROUP_WORDS if GROUP_WORDS else 0)
            scale = tl.load(scales_ptr + group, mask=is_row, other=0.0).to(tl.float32)
        weight = _expanded(values, first, bits, scale, BITS).to(x_ptr.dtype.element_ty)
        first += count_bits(bits)
        column = word * 32 + places
        part = tl.load(x + column[:, None], mask=is_vector[None, :] & (column < columns)[:, None], other=0.0)
        if _INTERPRETED:  # the interpreter would multiply the bits of bf16
            weight, part = weight.to(tl.float32), part.to(tl.float32)
        sums = tl.dot(weight, part, sums, input_precision="ieee")
        word += 1
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + output, mask=is_row, other=0.0).to(tl.float32)[:, None]
    y = y_ptr + vector.to(tl.int64)[None, :] * rows + output[:, None]
    tl.store(y, sums.to(y_ptr.dtype.element_ty), mask=is_row[:, None] & is_vector[None, :])

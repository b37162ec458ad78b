"""Kernels that score weights: bits of those above and inside a bracket, and keys of individual weights.

One launch serves many matrices: a program finds the number of its matrix in ``matrix_ptr``, and in the table what
:class:`pst_ds.core.kernels.triton.table.Table` wrote about it. ``starts_ptr`` has its first program.

Layout of the data:

* ``table_ptr``: (matrices, COLUMNS) int64. The constants below name the columns.
* weights: fp32, fp16 or bf16, or int32 keys. Rows are ROW_LENGTH elements apart. The address of a matrix is that of its
  first weight, which may be outside of this rank's shard; only positions in [FIRST, END) are read.
* ``above_ptr``, ``inside_ptr``: a bit per weight, little-endian. Bytes start at multiples of 8 of a matrix's
  positions, so a rank's first byte may have leading bits of another rank.
* ``brackets_ptr``: (matrices, 2) int32, the lowest and the highest key inside.
* ``counts_ptr``: (matrices, 3) int64, keys above, rows of tiles with a key that is not finite, and keys inside.

A score is computed as in masks.cpp, one component of a product after another, with separate rounding of products and
sums (``enable_fp_fusion=False``), so it is bit-identical to the CPU's. A layer lacks a product if its rank is 0, and a
vector if its bit in TERMS is 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pst_ds.core.kernels.triton.launch import is_interpreted

# A thread has 8 columns of two rows: their mask bits are two bytes, and a load of V or B serves both rows.
TILE_ROWS = 32
TILE_COLS = 64
FLAT = 256
"""Weights, or keys inside a bracket, of a program that has no rows."""
INTERPRETED = tl.constexpr(is_interpreted())
LOWEST_FINITE = tl.constexpr(-0x7F800000)
HIGHEST_FINITE = tl.constexpr(0x7F7FFFFF)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
COLUMNS = tl.constexpr(30)
# Columns of the table. Columns 25 to 29 are only read by the kernels of units, which name them.
WEIGHT = tl.constexpr(0)  # address of the matrix's first weight
UPDATE = tl.constexpr(1)  # U: address, strides of rows and ranks; V: address, stride of ranks
SCORE = tl.constexpr(6)  # A and B in the same way
VECTORS = tl.constexpr(11)  # addresses of score_rows, score_cols, row_norms, col_norms; 0 for a missing one
FACTOR = tl.constexpr(15)  # 1 / weight_scale, as the bits of an fp32
FIRST = tl.constexpr(16)  # first position of this rank's weights in the matrix; of units: the first number
END = tl.constexpr(17)  # the last + 1
OWN_FIRST = tl.constexpr(18)  # first position that this rank counts
OWN_END = tl.constexpr(19)  # the last + 1
HEIGHT = tl.constexpr(20)
WIDTH = tl.constexpr(21)
ROW_LENGTH = tl.constexpr(22)  # of the stored weight, which may hold several matrices side by side
ROW0 = tl.constexpr(23)  # first row of the matrix that has weights of this rank
TILES_DOWN = tl.constexpr(24)  # tiles in a column of tiles


@triton.jit
def order_key(score):
    """Return the int32 that orders like an fp32 score, with -0 equal to +0."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & _MAGNITUDE)


@triton.jit
def product(a, b):
    """Return a * b, rounded separately: for sm_100, the ptxas of triton 3.6 fuses pairs of products and sums despite
    the flag.
    """
    if INTERPRETED:
        return a * b
    else:
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, is_pure=True, pack=1)


@triton.jit
def address(table, ALIGNED: tl.constexpr, TYPE: tl.constexpr = tl.float32):
    """Return the pointer whose address is at ``table``, of values of a TYPE; ALIGNED: at a multiple of 16 bytes."""
    pointer = tl.load(table).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _add_low_rank(sums, row, col, table, scale, RANK: tl.constexpr, ALIGNED: tl.constexpr):
    """Return sums + (left * scale) @ right at (row, col), with eight components unrolled."""
    left = address(table, False) + row * tl.load(table + 1).to(tl.int32)
    right = address(table + 3, ALIGNED)
    right_rank = tl.load(table + 4).to(tl.int32)
    if ALIGNED:
        left_rank = 1
        right_rank = tl.multiple_of(right_rank, 4)
    else:
        left_rank = tl.load(table + 2).to(tl.int32)
    for first in range(0, RANK - RANK % 8, 8):
        for more in tl.static_range(8):
            value = product(tl.load(left + (first + more) * left_rank), scale)
            sums = sums + product(value, tl.load(right + (first + more) * right_rank + col))
    for rank in tl.static_range(RANK - RANK % 8, RANK):
        value = product(tl.load(left + rank * left_rank), scale)
        sums = sums + product(value, tl.load(right + rank * right_rank + col))
    return sums


@triton.jit
def score(
    weight, row, col, table, beta, alpha1, alpha2, UPDATE_RANK: tl.constexpr, SCORE_RANK: tl.constexpr,
    TERMS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Return S of weights (fp32) at (row, col), which broadcast to their shape, as pst_ds.core.scores.importance.

    ``ALIGNED``: factors at multiples of 16 bytes, if ``col`` has runs of four.
    """
    sums = weight
    if UPDATE_RANK > 0:
        sums = _add_low_rank(sums, row, col, table + UPDATE, beta, UPDATE_RANK, ALIGNED)
    sums = product(tl.abs(sums), tl.load(table + FACTOR).to(tl.int32).to(tl.float32, bitcast=True))
    if TERMS & 4:
        sums = product(sums, tl.load(address(table + VECTORS + 2, False) + row))
    if TERMS & 8:
        sums = product(sums, tl.load(address(table + VECTORS + 3, ALIGNED) + col))
    if SCORE_RANK > 0:
        sums = _add_low_rank(sums, row, col, table + SCORE, alpha1, SCORE_RANK, ALIGNED)
    if TERMS & 1:
        sums = sums + product(tl.load(address(table + VECTORS, False) + row), alpha2)
    if TERMS & 2:
        sums = sums + product(tl.load(address(table + VECTORS + 1, ALIGNED) + col + row * 0), alpha2)
    return sums


@triton.jit
def popcount(bits):
    """Return the number of set bits of each int32."""
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    return (((bits + (bits >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def _popcount_of_byte(bits):
    bits = bits - ((bits >> 1) & 0x55)
    bits = (bits & 0x33) + ((bits >> 2) & 0x33)
    return (bits + (bits >> 4)) & 0xF


@triton.jit
def bits_between(at, first, end):
    """Return the byte of bits whose positions from ``at`` on are in [first, end)."""
    below = tl.minimum(tl.maximum(first - at, 0), 8)
    up_to = tl.minimum(tl.maximum(end - at, 0), 8)
    return (1 << up_to) - 1 & ~((1 << below) - 1)


@triton.jit
def _store_bits(
    keys, at, number, table, brackets_ptr, words_ptr, above_ptr, inside_ptr, counts_ptr,
    WORD_BYTES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """Store the bytes of what is above and inside the bracket, and add to their counts.

    ``keys``: (ROWS, COLS). ``at``: (ROWS, COLS // 8), the position of a byte's first key, a multiple of 8, or -8.
    """
    first = tl.load(table + FIRST).to(tl.int32)
    valid = bits_between(at, first, tl.load(table + END).to(tl.int32))
    low = tl.load(brackets_ptr + 2 * number)
    high = tl.load(brackets_ptr + 2 * number + 1)
    places = tl.arange(0, 8)[None, None, :]
    above = tl.sum(tl.reshape((keys > high).to(tl.int32), (ROWS, COLS // 8, 8)) << places, 2) & valid
    up_from = tl.sum(tl.reshape((keys >= low).to(tl.int32), (ROWS, COLS // 8, 8)) << places, 2) & valid
    inside = up_from ^ above
    # 64 bits: the bits of all matrices lie in one run, which has more than 2**31 bytes above 17e9 weights
    start = tl.load(words_ptr + number).to(tl.int64) * WORD_BYTES - (first >> 3)
    tl.store(above_ptr + start + (at >> 3), above.to(tl.uint8), mask=valid > 0)
    tl.store(inside_ptr + start + (at >> 3), inside.to(tl.uint8), mask=valid > 0)
    if NEIGHBOURS:  # which other ranks count
        valid = bits_between(at, tl.load(table + OWN_FIRST).to(tl.int32), tl.load(table + OWN_END).to(tl.int32))
        above = above & valid
        inside = inside & valid
    magnitudes = tl.reshape(keys ^ (keys >> 31), (ROWS, COLS // 8, 8))
    bad_rows = tl.max(((tl.max(magnitudes, 2) > HIGHEST_FINITE) & (valid > 0)).to(tl.int32), 1)
    both = tl.sum(_popcount_of_byte(above) + (_popcount_of_byte(inside) << 12), 1)
    total = tl.sum(both + (bad_rows << 24), 0)  # at most 2,048 keys and 32 rows, or one: no field overflows
    counts_ptr += 3 * number
    tl.atomic_add(counts_ptr, (total & 0xFFF).to(tl.int64), sem="relaxed")
    tl.atomic_add(counts_ptr + 1, (total >> 24).to(tl.int64), mask=(total >> 24) > 0, sem="relaxed")
    tl.atomic_add(counts_ptr + 2, ((total >> 12) & 0xFFF).to(tl.int64), sem="relaxed")


@triton.jit
def bracket_rows(
    table_ptr, starts_ptr, matrix_ptr, beta, alpha1, alpha2, brackets_ptr, words_ptr, above_ptr, inside_ptr, counts_ptr,
    TYPE: tl.constexpr, UPDATE_RANK: tl.constexpr, SCORE_RANK: tl.constexpr, TERMS: tl.constexpr,
    ALIGNED: tl.constexpr, ALIGNED_WEIGHT: tl.constexpr, WORD_BYTES: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """Classify this rank's weights of matrices by their brackets, in tiles of rows, whose width is a multiple of 8.

    The bits of a matrix start with the byte of its rows that has this rank's first weight, and the bytes with those
    of ``words_ptr``, in words of WORD_BYTES.
    """
    number = tl.load(matrix_ptr + tl.program_id(0)).to(tl.int64)
    tile = tl.program_id(0) - tl.load(starts_ptr + number).to(tl.int32)
    table = table_ptr + number * COLUMNS
    first = tl.load(table + FIRST).to(tl.int32)
    end = tl.load(table + END).to(tl.int32)
    width = tl.multiple_of(tl.load(table + WIDTH).to(tl.int32), 8)
    row_length = tl.load(table + ROW_LENGTH)
    if ALIGNED_WEIGHT:
        first = tl.multiple_of(first, 8)
        end = tl.multiple_of(end, 8)
        row_length = tl.multiple_of(row_length, 8)
    down = tl.load(table + TILES_DOWN).to(tl.int32)
    across = tile // down
    row = tl.load(table + ROW0).to(tl.int32) + (tile - across * down) * ROWS + tl.arange(0, ROWS)[:, None]
    col0 = across * COLS
    col = col0 + tl.arange(0, COLS)[None, :]
    at = row * width + col
    is_own = (col < width) & (at >= first) & (at < end)
    weight_ptr = address(table + WEIGHT, ALIGNED_WEIGHT, TYPE) + row * row_length + col
    weight = tl.load(weight_ptr, mask=is_own, other=0.0).to(tl.float32)
    # loads of factors need no mask: loads beyond an edge read the last row, or column 0
    row_in = tl.minimum(row, tl.load(table + HEIGHT).to(tl.int32) - 1)
    col_in = tl.max_contiguous(tl.multiple_of(tl.where(col < width, col, 0), [1, 8]), [1, 8])
    scores = score(
        weight, row_in, col_in, table, beta, alpha1, alpha2, UPDATE_RANK, SCORE_RANK, TERMS, ALIGNED
    )
    byte_col = col0 + 8 * tl.arange(0, COLS // 8)[None, :]
    byte_at = tl.where(byte_col < width, row * width + byte_col, -8)
    _store_bits(
        order_key(scores), byte_at, number, table, brackets_ptr, words_ptr, above_ptr, inside_ptr, counts_ptr,
        WORD_BYTES, ROWS, COLS, False,
    )  # fmt: skip


@triton.jit
def _keys(
    at, is_own, table, beta, alpha1, alpha2, TYPE: tl.constexpr, UPDATE_RANK: tl.constexpr, SCORE_RANK: tl.constexpr,
    TERMS: tl.constexpr,
):  # fmt: skip
    """Return the keys of the weights at positions ``at``, (1, SIZE) or (SIZE,), where ``is_own``."""
    width = tl.load(table + WIDTH).to(tl.int32)
    at = tl.where(is_own, at, tl.load(table + FIRST).to(tl.int32))
    row = at // width
    col = at % width
    weight_ptr = address(table + WEIGHT, False, TYPE) + row * tl.load(table + ROW_LENGTH) + col
    weight = tl.load(weight_ptr, mask=is_own, other=0)
    if tl.int32 == TYPE:
        return weight
    else:
        scores = score(
            weight.to(tl.float32), row, col, table, beta, alpha1, alpha2, UPDATE_RANK, SCORE_RANK, TERMS, False
        )
        return order_key(scores)


@triton.jit
def bracket_flat(
    table_ptr, starts_ptr, matrix_ptr, beta, alpha1, alpha2, brackets_ptr, words_ptr, above_ptr, inside_ptr, counts_ptr,
    TYPE: tl.constexpr, UPDATE_RANK: tl.constexpr, SCORE_RANK: tl.constexpr, TERMS: tl.constexpr,
    WORD_BYTES: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Do the same as :func:`bracket_rows` for matrices of any width. Values of type int32 are the keys themselves."""
    number = tl.load(matrix_ptr + tl.program_id(0)).to(tl.int64)
    table = table_ptr + number * COLUMNS
    first = tl.load(table + FIRST).to(tl.int32)
    end = tl.load(table + END).to(tl.int32)
    start = (first >> 3 << 3) + (tl.program_id(0) - tl.load(starts_ptr + number).to(tl.int32)) * SIZE
    at = start + tl.arange(0, SIZE)[None, :]
    is_own = (at >= first) & (at < end)
    keys = _keys(at, is_own, table, beta, alpha1, alpha2, TYPE, UPDATE_RANK, SCORE_RANK, TERMS)
    byte_at = start + 8 * tl.arange(0, SIZE // 8)[None, :]
    _store_bits(
        keys, byte_at, number, table, brackets_ptr, words_ptr, above_ptr, inside_ptr, counts_ptr, WORD_BYTES, 1, SIZE,
        tl.int32 == TYPE,
    )  # fmt: skip


@triton.jit
def keys_at(
    table_ptr, starts_ptr, matrix_ptr, beta, alpha1, alpha2, slots_ptr, limits_ptr, index_ptr, keys_ptr,
    TYPE: tl.constexpr, UPDATE_RANK: tl.constexpr, SCORE_RANK: tl.constexpr, TERMS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Write the keys of individual weights, up to each matrix's limit; 0 for a weight of another rank.

    The keys of a matrix start at its number in ``slots_ptr``. ``index_ptr`` has the places of their bits. Without it
    the weights are sampled as by :func:`pst_ds.core.bracket.sample_positions`.
    """
    number = tl.load(matrix_ptr + tl.program_id(0)).to(tl.int64)
    tile = tl.program_id(0) - tl.load(starts_ptr + number).to(tl.int32)
    table = table_ptr + number * COLUMNS
    lanes = tl.arange(0, SIZE)
    limit = tl.load(limits_ptr + number).to(tl.int32)
    asked = tile * SIZE + lanes < limit
    slot = tl.load(slots_ptr + number) + tile * SIZE + lanes
    first = tl.load(table + FIRST).to(tl.int32)
    end = tl.load(table + END).to(tl.int32)
    if index_ptr is None:
        numel = tl.load(table + HEIGHT) * tl.load(table + WIDTH)
        stratum = (tile * SIZE + lanes).to(tl.int64)
        edge = stratum * numel // limit
        next_edge = (stratum + 1) * numel // limit
        at = (edge + ((stratum * 0x9E3779B1 & 0xFFFFFFFF) * (next_edge - edge) >> 32)).to(tl.int32)
        first = tl.load(table + OWN_FIRST).to(tl.int32)
        end = tl.load(table + OWN_END).to(tl.int32)
    else:
        at = tl.load(index_ptr + slot, mask=asked, other=0) + (first >> 3 << 3)
    is_own = asked & (at >= first) & (at < end)
    keys = _keys(at, is_own, table, beta, alpha1, alpha2, TYPE, UPDATE_RANK, SCORE_RANK, TERMS)
    tl.store(keys_ptr + slot, tl.where(is_own, keys, 0), mask=asked)

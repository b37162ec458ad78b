"""Kernels that score weights: bits of those above and inside a bracket, and keys of individual weights.

A score is computed as in masks.cpp, one component of a product after another, with separate rounding of products and
sums (``enable_fp_fusion=False``), so it is bit-identical to the CPU's. A pointer that is None omits its term.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pst_ds.core.kernels.triton.launch import is_interpreted

TILE_ROWS, TILE_COLS = 32, 64
"""A thread has 8 columns of two rows: their mask bits are two bytes, and a load of V or B serves both rows."""
FLAT = 256
INTERPRETED = tl.constexpr(is_interpreted())
_INFINITE = tl.constexpr(0x7F800000)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def order_key(score):
    """Return the int32 that orders like an fp32 score, with -0 equal to +0."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & _MAGNITUDE)


@triton.jit
def _product(a, b):
    """Return a * b, rounded separately: for sm_100, the ptxas of triton 3.6 fuses pairs of products and sums despite
    the flag.
    """
    if INTERPRETED:
        return a * b
    else:
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, is_pure=True, pack=1)


@triton.jit
def _add_rank(sums, row, col, left, left_row, left_rank, right, right_rank, scale, rank):
    value = _product(tl.load(left + row * left_row + rank * left_rank), scale)
    return sums + _product(value, tl.load(right + rank * right_rank + col))


@triton.jit
def _add_low_rank(sums, row, col, left, left_row, left_rank, right, right_rank, scale, RANK: tl.constexpr):
    """Return sums + (left * scale) @ right at (row, col), with eight components unrolled."""
    for first in range(0, RANK - RANK % 8, 8):
        for more in tl.static_range(8):
            sums = _add_rank(sums, row, col, left, left_row, left_rank, right, right_rank, scale, first + more)
    for rank in tl.static_range(RANK - RANK % 8, RANK):
        sums = _add_rank(sums, row, col, left, left_row, left_rank, right, right_rank, scale, rank)
    return sums


@triton.jit
def score(
    weight, row, col, update_left, update_left_row, update_left_rank, update_right, update_right_rank,
    score_left, score_left_row, score_left_rank, score_right, score_right_rank, score_rows, score_cols,
    row_norms, col_norms, beta, factor, alpha1, alpha2, UPDATE_RANK: tl.constexpr, SCORE_RANK: tl.constexpr,
):
    """Return S of weights (fp32) at (row, col), which broadcast to their shape, as pst_ds.core.scores.importance."""
    sums = weight
    if UPDATE_RANK > 0:
        sums = _add_low_rank(
            sums, row, col, update_left, update_left_row, update_left_rank, update_right, update_right_rank, beta,
            UPDATE_RANK,
        )
    sums = _product(tl.abs(sums), factor)
    if row_norms is not None:
        sums = _product(sums, tl.load(row_norms + row))
    if col_norms is not None:
        sums = _product(sums, tl.load(col_norms + col))
    if SCORE_RANK > 0:
        sums = _add_low_rank(
            sums, row, col, score_left, score_left_row, score_left_rank, score_right, score_right_rank, alpha1,
            SCORE_RANK,
        )
    if score_rows is not None:
        sums = sums + _product(tl.load(score_rows + row), alpha2)
    if score_cols is not None:
        sums = sums + _product(tl.load(score_cols + col), alpha2)
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
def _store_bits(
    scores, at, count, bracket, above_ptr, inside_ptr, counts_ptr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Store the bytes of what is above and inside the bracket, and add to their counts.

    ``scores``: (ROWS, COLS). ``at``: (ROWS, COLS // 8), the index of a byte's first key among the ``count`` keys, or
    -1.
    """
    keys = order_key(scores)
    low, high = tl.load(bracket), tl.load(bracket + 1)
    valid = tl.where(at >= 0, tl.minimum(tl.maximum(count - at, 0), 8), 0)
    mask = (1 << valid) - 1
    places = tl.arange(0, 8)[None, None, :]
    above = tl.sum(tl.reshape((keys > high).to(tl.int32), (ROWS, COLS // 8, 8)) << places, 2) & mask
    up_from = tl.sum(tl.reshape((keys >= low).to(tl.int32), (ROWS, COLS // 8, 8)) << places, 2) & mask
    inside = up_from ^ above
    tl.store(above_ptr + (at >> 3), above.to(tl.uint8), mask=valid > 0)
    tl.store(inside_ptr + (at >> 3), inside.to(tl.uint8), mask=valid > 0)
    magnitudes = tl.reshape(scores.to(tl.int32, bitcast=True) & _MAGNITUDE, (ROWS, COLS // 8, 8))
    bad_rows = tl.max(((tl.max(magnitudes, 2) >= _INFINITE) & (valid > 0)).to(tl.int32), 1)
    both = tl.sum(_popcount_of_byte(above) + (_popcount_of_byte(inside) << 12), 1)
    total = tl.sum(both + (bad_rows << 24), 0)  # at most 2,048 keys and 32 rows, or one: no field overflows
    tl.atomic_add(counts_ptr, (total & 0xFFF).to(tl.int64), sem="relaxed")
    tl.atomic_add(counts_ptr + 1, (total >> 24).to(tl.int64), mask=(total >> 24) > 0, sem="relaxed")
    tl.atomic_add(counts_ptr + 2, ((total >> 12) & 0xFFF).to(tl.int64), sem="relaxed")


@triton.jit
def bracket_rows(
    weight_ptr, row0, lead, count, rows, cols,
    update_left, update_left_row, update_left_rank, update_right, update_right_rank,
    score_left, score_left_row, score_left_rank, score_right, score_right_rank, score_rows, score_cols,
    row_norms, col_norms, beta, factor, alpha1, alpha2, bracket, above_ptr, inside_ptr, counts_ptr,
    UPDATE_RANK: tl.constexpr, SCORE_RANK: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """Classify ``count`` weights, from column ``lead`` of row ``row0`` on, of a matrix (rows, cols) by a bracket.

    For matrices with the row length of the storage. ``cols`` and ``lead`` are multiples of 8.
    """
    below = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    across = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    at = below * cols + across - lead
    is_own = (across < cols) & (at >= 0) & (at < count)
    weight = tl.load(weight_ptr + at, mask=is_own, other=0.0).to(tl.float32)
    # loads of factors need no mask: loads beyond an edge read the last row, or column 0
    row = tl.minimum(row0 + below, rows - 1)
    col = tl.max_contiguous(tl.multiple_of(tl.where(across < cols, across, 0), [1, 8]), [1, 8])
    scores = score(
        weight, row, col, update_left, update_left_row, update_left_rank, update_right, update_right_rank,
        score_left, score_left_row, score_left_rank, score_right, score_right_rank, score_rows, score_cols,
        row_norms, col_norms, beta, factor, alpha1, alpha2, UPDATE_RANK, SCORE_RANK,
    )
    first = tl.program_id(1) * COLS + 8 * tl.arange(0, COLS // 8)[None, :]
    byte_at = tl.where(first < cols, below * cols + first - lead, -1)
    _store_bits(scores, byte_at, count, bracket, above_ptr, inside_ptr, counts_ptr, ROWS, COLS)


@triton.jit
def bracket_flat(
    weight_ptr, first, count, width, row_length, offset,
    update_left, update_left_row, update_left_rank, update_right, update_right_rank,
    score_left, score_left_row, score_left_rank, score_right, score_right_rank, score_rows, score_cols,
    row_norms, col_norms, beta, factor, alpha1, alpha2, bracket, above_ptr, inside_ptr, counts_ptr,
    UPDATE_RANK: tl.constexpr, SCORE_RANK: tl.constexpr, SIZE: tl.constexpr,
):
    """Do the same as :func:`bracket_rows` for any shape: the keys from position ``first`` of a matrix of width
    ``width`` on.

    Position (row, col) is element ``row * row_length + col + offset`` of the shard.
    """
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)[None, :]
    position = first + tl.minimum(at, count - 1)
    row, col = position // width, position % width
    weight = tl.load(weight_ptr + (row.to(tl.int64) * row_length + col + offset)).to(tl.float32)
    scores = score(
        weight, row, col, update_left, update_left_row, update_left_rank, update_right, update_right_rank,
        score_left, score_left_row, score_left_rank, score_right, score_right_rank, score_rows, score_cols,
        row_norms, col_norms, beta, factor, alpha1, alpha2, UPDATE_RANK, SCORE_RANK,
    )
    byte_at = tl.program_id(0) * SIZE + 8 * tl.arange(0, SIZE // 8)[None, :]
    _store_bits(scores, byte_at, count, bracket, above_ptr, inside_ptr, counts_ptr, 1, SIZE)


@triton.jit
def keys_at(
    positions_ptr, num_positions, limit_ptr, base, weight_ptr, first, count, width, row_length, offset,
    update_left, update_left_row, update_left_rank, update_right, update_right_rank,
    score_left, score_left_row, score_left_rank, score_right, score_right_rank, score_rows, score_cols,
    row_norms, col_norms, beta, factor, alpha1, alpha2, keys_ptr,
    UPDATE_RANK: tl.constexpr, SCORE_RANK: tl.constexpr, SIZE: tl.constexpr,
):
    """Write the keys of the weights at ``base`` + positions of a matrix, as in :func:`bracket_flat`; 0 for those of
    other ranks.

    With a limit, a number on the device, positions from it on are left unchanged.
    """
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    asked = at < num_positions
    if limit_ptr is not None:
        asked = asked & (at < tl.load(limit_ptr))
    position = tl.load(positions_ptr + at, mask=asked, other=0).to(tl.int64) + base
    is_own = asked & (position >= first) & (position < first + count)
    position = tl.where(is_own, position, first)
    row, col = position // width, position % width
    weight = tl.load(weight_ptr + (row * row_length + col + offset), mask=is_own, other=0.0).to(tl.float32)
    scores = score(
        weight, row, col, update_left, update_left_row, update_left_rank, update_right, update_right_rank,
        score_left, score_left_row, score_left_rank, score_right, score_right_rank, score_rows, score_cols,
        row_norms, col_norms, beta, factor, alpha1, alpha2, UPDATE_RANK, SCORE_RANK,
    )
    tl.store(keys_ptr + at, tl.where(is_own, order_key(scores), 0), mask=asked)

"""Kernels for patterns whose units are several weights: keys of blocks and N:M groups, masks of N:M groups and rows.

They read the table of :mod:`pst_ds.core.kernels.triton.score_kernels`, with numbers of units in place of positions. A
rank also has the weights of other ranks in its first and last units, from right before and after its shard.

Layout: a unit is (rows, cols) weights of a matrix, and its number counts units from left to right, then down. Keys of
units are int32, one per unit. BEFORE and AFTER are addresses as if the weights of the neighbours continued the whole
matrix, so one flat index reads this rank's weights, those before and those after.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pst_ds.core.kernels.triton.score_kernels import (
    COLUMNS,
    END,
    FIRST,
    HEIGHT,
    HIGHEST_FINITE,
    ROW0,
    ROW_LENGTH,
    TILES_DOWN,
    WEIGHT,
    WIDTH,
    address,
    bits_between,
    order_key,
    score,
)

# Columns of a tile of small units, and weights of a row that are processed in one step.
TILE_COLS = 64
ROW_SIZE = 512
# Further columns of the table of score kernels.
BEFORE = tl.constexpr(25)  # address for flat indices below OWN_START
AFTER = tl.constexpr(26)  # address for flat indices from OWN_STOP on
OWN_START = tl.constexpr(27)  # flat index of this rank's first weight, counted from the matrix's first weight
OWN_STOP = tl.constexpr(28)  # the last + 1
PRUNE = tl.constexpr(29)  # weights that a row loses
_LOWEST = tl.constexpr(-(1 << 31))


@triton.jit
def _scores(
    row, col, is_there, table, beta, alpha1, alpha2, TYPE: tl.constexpr, UPDATE_RANK: tl.constexpr,
    SCORE_RANK: tl.constexpr, TERMS: tl.constexpr, ALIGNED: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    """Return the scores of the weights that are there, of whichever rank, fp32; elsewhere anything."""
    flat = row.to(tl.int64) * tl.load(table + ROW_LENGTH) + col
    start = tl.load(table + OWN_START)
    stop = tl.load(table + OWN_STOP)
    is_own = is_there & (flat >= start) & (flat < stop)
    weight = tl.load(address(table + WEIGHT, False, TYPE) + flat, mask=is_own, other=0.0)
    if HALO:
        before = is_there & (flat < start)
        after = is_there & (flat >= stop)
        weight = tl.where(before, tl.load(address(table + BEFORE, False, TYPE) + flat, mask=before, other=0.0), weight)
        weight = tl.where(after, tl.load(address(table + AFTER, False, TYPE) + flat, mask=after, other=0.0), weight)
    row = tl.minimum(row, tl.load(table + HEIGHT).to(tl.int32) - 1)
    return score(
        weight.to(tl.float32), row, col, table, beta, alpha1, alpha2, UPDATE_RANK, SCORE_RANK, TERMS, ALIGNED
    )


@triton.jit
def _fold(values, NUMBER: tl.constexpr, SIZE: tl.constexpr, INNER: tl.constexpr):
    """Return the sums over the middle of (NUMBER, SIZE, INNER), flat or not, halves added to halves: (NUMBER, INNER).

    ``SIZE`` is a power of two.
    """
    values = tl.reshape(values, (NUMBER, SIZE, INNER))
    for step in tl.static_range(10):
        if SIZE >> step > 1:
            values = tl.sum(tl.reshape(values, (NUMBER, 2, SIZE >> step + 1, INNER)), 1)
    return tl.reshape(values, (NUMBER, INNER))


@triton.jit
def _kept(keys, PRUNE: tl.constexpr, UNIT_ROWS: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return where keys are not among the PRUNE smallest of their M, the first of equal ones: int32, (ROWS, COLS)."""
    if UNIT_ROWS > 1:
        keys = tl.trans(keys)
    groups = tl.reshape(keys, (ROWS * COLS // M, M))
    own = groups[:, :, None]
    other = groups[:, None, :]
    place = tl.arange(0, M)
    is_before = (other < own) | ((other == own) & (place[None, None, :] < place[None, :, None]))
    kept = (tl.sum(is_before.to(tl.int32), 2) >= PRUNE).to(tl.int32)
    if UNIT_ROWS > 1:
        return tl.trans(tl.reshape(kept, (COLS, ROWS)))
    else:
        return tl.reshape(kept, (ROWS, COLS))


@triton.jit
def _tile(tile, table, UNIT_ROWS: tl.constexpr, UNIT_COLS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return rows, columns (0 beyond the last) and units of a tile of whole units, and which are this rank's."""
    width = tl.multiple_of(tl.load(table + WIDTH).to(tl.int32), 8)
    down = tl.load(table + TILES_DOWN).to(tl.int32)
    across = tile // down
    row = tl.load(table + ROW0).to(tl.int32) + (tile - across * down) * ROWS + tl.arange(0, ROWS)[:, None]
    col = across * COLS + tl.arange(0, COLS)[None, :]
    unit = row // UNIT_ROWS * (width // UNIT_COLS) + col // UNIT_COLS
    is_there = (col < width) & (unit >= tl.load(table + FIRST)) & (unit < tl.load(table + END))
    col = tl.max_contiguous(tl.multiple_of(tl.where(col < width, col, 0), [1, 8]), [1, 8])
    return row, col, unit, is_there


@triton.jit
def unit_keys(
    table_ptr, starts_ptr, matrix_ptr, beta, alpha1, alpha2, slots_ptr, keys_ptr,
    TYPE: tl.constexpr, UPDATE_RANK: tl.constexpr, SCORE_RANK: tl.constexpr, TERMS: tl.constexpr,
    ALIGNED: tl.constexpr, HALO: tl.constexpr, LOST: tl.constexpr, UNIT_ROWS: tl.constexpr, UNIT_COLS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write the keys of blocks, of the sums of their scores, or of N:M groups, of the sums of the LOST smallest.

    The keys of a matrix start at its number in ``slots_ptr``.
    """
    number = tl.load(matrix_ptr + tl.program_id(0)).to(tl.int64)
    table = table_ptr + number * COLUMNS
    tile = tl.program_id(0) - tl.load(starts_ptr + number).to(tl.int32)
    row, col, unit, is_there = _tile(tile, table, UNIT_ROWS, UNIT_COLS, ROWS, COLS)
    scores = _scores(
        row, col, is_there, table, beta, alpha1, alpha2, TYPE, UPDATE_RANK, SCORE_RANK, TERMS, ALIGNED, HALO
    )
    if LOST > 0:
        kept = _kept(order_key(scores), LOST, UNIT_ROWS, UNIT_ROWS * UNIT_COLS, ROWS, COLS)
        scores = tl.where(kept > 0, 0.0, scores)
    ACROSS: tl.constexpr = COLS // UNIT_COLS
    DOWN: tl.constexpr = ROWS // UNIT_ROWS
    keys = order_key(_fold(_fold(scores, ROWS * ACROSS, UNIT_COLS, 1), DOWN, UNIT_ROWS, ACROSS))
    # all weights of a unit have its number, or -1 outside the matrix
    unit = tl.max(tl.max(tl.reshape(tl.where(is_there, unit, -1), (DOWN, UNIT_ROWS, ACROSS, UNIT_COLS)), 3), 1)
    slot = tl.load(slots_ptr + number) + unit - tl.load(table + FIRST)
    tl.store(keys_ptr + slot, keys, mask=unit >= 0)


@triton.jit
def keep_n_of_m(
    table_ptr, starts_ptr, matrix_ptr, beta, alpha1, alpha2, slots_ptr, units_ptr, bits_ptr, bad_ptr,
    TYPE: tl.constexpr, UPDATE_RANK: tl.constexpr, SCORE_RANK: tl.constexpr, TERMS: tl.constexpr,
    ALIGNED: tl.constexpr, HALO: tl.constexpr, LOST: tl.constexpr, UNIT_ROWS: tl.constexpr, UNIT_COLS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write the bits of the weights that are not the LOST smallest of their N:M group, bytes as in the whole matrix.

    ``slots_ptr``: first byte of each matrix. ``units_ptr``: addresses of bits of groups that lose nothing; may be None.
    Adds to ``bad_ptr``, per matrix, how many tiles have scores that are not finite.
    """
    number = tl.load(matrix_ptr + tl.program_id(0)).to(tl.int64)
    table = table_ptr + number * COLUMNS
    tile = tl.program_id(0) - tl.load(starts_ptr + number).to(tl.int32)
    row, col, unit, is_there = _tile(tile, table, UNIT_ROWS, UNIT_COLS, ROWS, COLS)
    keys = order_key(
        _scores(row, col, is_there, table, beta, alpha1, alpha2, TYPE, UPDATE_RANK, SCORE_RANK, TERMS, ALIGNED, HALO)
    )
    kept = _kept(keys, LOST, UNIT_ROWS, UNIT_ROWS * UNIT_COLS, ROWS, COLS)
    first = tl.load(table + FIRST).to(tl.int32)
    end = tl.load(table + END).to(tl.int32)
    if units_ptr is not None:
        at = unit - first
        byte = tl.load(address(units_ptr + number, False, tl.uint8) + (at >> 3), mask=is_there, other=0).to(tl.int32)
        kept = kept | (byte >> (at & 7) & 1)
    else:
        bad = is_there & ((keys ^ (keys >> 31)) > HIGHEST_FINITE)
        num_bad = tl.max(tl.max(bad.to(tl.int32), 1), 0)
        tl.atomic_add(bad_ptr + number, num_bad.to(tl.int64), mask=num_bad > 0, sem="relaxed")
    first = first * UNIT_ROWS * UNIT_COLS
    end = end * UNIT_ROWS * UNIT_COLS
    width = tl.load(table + WIDTH).to(tl.int32)
    byte_col = tile // tl.load(table + TILES_DOWN).to(tl.int32) * COLS + 8 * tl.arange(0, COLS // 8)[None, :]
    at = tl.where(byte_col < width, row * width + byte_col, -8)
    valid = bits_between(at, first, end)
    bits = tl.sum(tl.reshape(kept, (ROWS, COLS // 8, 8)) << tl.arange(0, 8)[None, None, :], 2) & valid
    slot = tl.load(slots_ptr + number) + (at >> 3) - (first >> 3)
    tl.store(bits_ptr + slot, bits.to(tl.uint8), mask=valid > 0)


@triton.jit
def keep_in_rows(
    table_ptr, starts_ptr, matrix_ptr, beta, alpha1, alpha2, num_rows, scratch_ptr, longest, slots_ptr, bits_ptr,
    bad_ptr,
    TYPE: tl.constexpr, UPDATE_RANK: tl.constexpr, SCORE_RANK: tl.constexpr, TERMS: tl.constexpr,
    ALIGNED: tl.constexpr, HALO: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Write the bits of the weights that are not among the smallest of their row, as many as the table says.

    A program decides one row after another, with the keys of one in its ``longest`` numbers of ``scratch_ptr``. The
    widths of rows are multiples of 8. Adds to ``bad_ptr`` how many rows have scores that are not finite.
    """
    scratch = scratch_ptr + tl.program_id(0).to(tl.int64) * longest
    for at in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        number = tl.load(matrix_ptr + at).to(tl.int64)
        table = table_ptr + number * COLUMNS
        width = tl.load(table + WIDTH).to(tl.int32)
        prune = tl.load(table + PRUNE).to(tl.int32)
        row_here = at - tl.load(starts_ptr + number).to(tl.int32)
        row = tl.load(table + FIRST).to(tl.int32) + row_here
        lanes = tl.arange(0, SIZE)
        worst = tl.zeros((SIZE,), tl.int32)
        for col0 in range(0, width, SIZE):
            is_there = col0 + lanes < width
            col = tl.max_contiguous(tl.multiple_of(tl.where(is_there, col0 + lanes, 0), 8), 8)
            keys = order_key(
                _scores(
                    row, col, is_there, table, beta, alpha1, alpha2, TYPE, UPDATE_RANK, SCORE_RANK, TERMS, ALIGNED,
                    HALO,
                )
            )  # fmt: skip
            worst = tl.maximum(worst, tl.where(is_there, keys ^ (keys >> 31), 0))
            tl.store(scratch + col0 + lanes, keys, mask=is_there)
        is_bad = tl.max(worst, 0) > HIGHEST_FINITE
        tl.atomic_add(bad_ptr + number, is_bad.to(tl.int64), mask=is_bad, sem="relaxed")
        tl.debug_barrier()
        step = _LOWEST + 0 * prune
        # the largest key with fewer than ``prune`` keys below it, bit by bit
        cut = step
        below = 0 * prune
        for _ in range(32):
            higher = cut + step  # at first 0
            step = tl.where(step < 0, 1 << 30, step >> 1)
            smaller = tl.zeros((SIZE,), tl.int32)
            for col0 in range(0, width, SIZE):
                is_there = col0 + lanes < width
                keys = tl.load(scratch + col0 + lanes, mask=is_there, other=0)
                smaller += (is_there & (keys < higher)).to(tl.int32)
            number_below = tl.sum(smaller, 0)
            is_cut = number_below < prune
            cut = tl.where(is_cut, higher, cut)
            below = tl.where(is_cut, number_below, below)
        ties = prune - below
        for col0 in range(0, width, SIZE):
            is_there = col0 + lanes < width
            keys = tl.load(scratch + col0 + lanes, mask=is_there, other=0)
            is_equal = (is_there & (keys == cut)).to(tl.int32)
            kept = (keys > cut) | ((is_equal > 0) & (tl.cumsum(is_equal, 0) > ties))
            ties -= tl.sum(is_equal, 0)
            bits = tl.sum(tl.reshape(kept.to(tl.int32), (SIZE // 8, 8)) << tl.arange(0, 8)[None, :], 1)
            byte = col0 // 8 + tl.arange(0, SIZE // 8)
            out = bits_ptr + tl.load(slots_ptr + number) + row_here.to(tl.int64) * (width // 8) + byte
            tl.store(out, bits.to(tl.uint8), mask=byte < width // 8)
        tl.debug_barrier()

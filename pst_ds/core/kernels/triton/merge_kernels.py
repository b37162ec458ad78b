"""Kernels of a layer's turn: the merged weight, and what its backward pass makes of a gradient, each in one pass.

A weight's product U V is a separate matrix product, summed in fp32; W0 is added in fp32 and the sum rounded once.

Layout of the data; a program computes a tile of ROWS x COLS weights, and the third axis of the grid counts matrices:

* ``weight_ptr``, ``grad_ptr``, ``merged_ptr``, ``out_ptr``: (rows, cols) fp16, bf16 or fp32 as the layer stores it,
  columns contiguous, rows ``*_row`` elements apart. Matrix n starts at the offset of :func:`_start`.
* ``scores_ptr``, ``updates_ptr``: as these, but one matrix below the other.
* ``bits``: the whole mask in shards (:mod:`pst_ds.core.bits`), little-endian, addressed by flat position in the stored
  weight: ``first`` for the first matrix, and rows of the stored weight have ``width`` bits.
* ``left``, ``right``: U and V, or V' and U' if the layer is transposed, with strides of rows (columns) and ranks; the
  factors of the next matrix follow ``left_step`` and ``right_step`` elements later. RANK is the rank, padded to a
  power of two; components beyond ``rank`` are zeros.

Elements of a tile beyond the edges of its matrix are masked in every load and store. Nothing is shared between
programs, so a tile may be merged in place.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pst_ds.core.kernels.triton.launch import is_interpreted

TILE_ROWS = 32
TILE_COLS = 128
GRADIENT_ROWS = 32
GRADIENT_COLS = 64
LEAST_RANK = 16
"""Inner size of a product on tensor cores; lower ranks are padded with zeros."""
_INTERPRETED = tl.constexpr(is_interpreted())


@triton.jit
def _product(left, right):
    """left @ right in fp32. The interpreter multiplies the raw bits of bf16, so there they are widened first."""
    if _INTERPRETED:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _updated(
    weight, row, col, rows, cols, left, left_row, left_rank, right, right_rank, right_col, beta, rank,
    left_step, right_step, RANK: tl.constexpr,
):
    """W0 + beta U V in fp32 from W0 of a tile, with the factors of the program's matrix."""
    wide = weight.to(tl.float32)
    if RANK > 0:
        k = tl.arange(0, RANK)
        if left_step is not None:
            left += tl.program_id(2).to(tl.int64) * left_step
            right += tl.program_id(2).to(tl.int64) * right_step
        at = row * left_row + k[None, :] * left_rank
        u = tl.load(left + at, mask=(row < rows) & (k[None, :] < rank), other=0.0).to(weight.dtype)
        at = k[:, None] * right_rank + col * right_col
        v = tl.load(right + at, mask=(k[:, None] < rank) & (col < cols), other=0.0).to(weight.dtype)
        wide = wide + _product(u, v) * beta
    return wide


@triton.jit
def _kept(
    bits, first, width, per_shard, pad, num_bytes, first_row, row, first_col, rows, cols,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """The mask of a tile, (ROWS, COLS) bool, read for eight columns at a time.

    ``first``: position in the stored weight of row 0, column 0. ``pad``: bits between two shards of ``per_shard``
    weights. ``ALIGNED``: no eight columns start within a byte, and ``pad`` is 0.
    """
    col = 8 * tl.arange(0, COLS // 8)[None, :]
    near = (row - first_row) * width + col
    base = first + first_row.to(tl.int64) * width + first_col
    places = tl.arange(0, 8)[None, None, :]
    if ALIGNED:
        is_in = (row < rows) & (first_col + col < cols)
        held = tl.load(bits + (base >> 3) + (near >> 3), mask=is_in, other=0).to(tl.int32)
    else:
        # a 64-bit division takes 30 registers: estimate the shard, at most two too low, and divide the rest in 32 bits
        shards = tl.maximum((base.to(tl.float32) * (1.0 / per_shard)).to(tl.int64) - 1, 0)
        inside = (base - shards * per_shard).to(tl.uint32) + near.to(tl.uint32)
        shard = inside // per_shard.to(tl.uint32)
        base += shards * pad
        at = (base & 7).to(tl.int32) + near + shard.to(tl.int32) * pad
        num_left = tl.minimum(num_bytes - (base >> 3), 1 << 30).to(tl.int32)
        held = tl.zeros_like(near)
        for more in tl.static_range(3):  # eight bits and a pad, from any bit on
            byte = (at >> 3) + more
            held |= tl.load(bits + (base >> 3) + byte, mask=byte < num_left, other=0).to(tl.int32) << 8 * more
        held >>= at & 7
        here = (1 << tl.minimum((shard + 1) * per_shard - inside, 8).to(tl.int32)) - 1  # bits of this shard
        held = (held & here) | ((held >> pad) & ~here)
    return tl.reshape((held[:, :, None] >> places) & 1, (ROWS, COLS)) != 0


@triton.jit
def _start(parts, expert_step, part_step):
    """Where the program's matrix starts: ``parts`` of them in each expert. All None for a launch of one matrix."""
    if parts is None:
        return 0
    else:
        expert = (tl.program_id(2) // parts).to(tl.int64)
        return expert * expert_step + (tl.program_id(2) % parts).to(tl.int64) * part_step


@triton.jit
def merge(
    weight_ptr, weight_row, rows, cols, bits, first, width, per_shard, pad, num_bytes, left, left_row, left_rank,
    right, right_rank, right_col, beta, rank, parts, expert_step, part_step, left_step, right_step, out_ptr, out_row,
    ALIGNED: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """out = M . (W0 + beta U V) of each matrix of a layer; +0.0 where the mask prunes."""
    start = _start(parts, expert_step, part_step)
    first_row = tl.program_id(0) * ROWS
    first_col = tl.program_id(1) * COLS
    row = first_row + tl.arange(0, ROWS)[:, None]
    col = first_col + tl.arange(0, COLS)[None, :]
    is_in = (row < rows) & (col < cols)
    weight = tl.load(weight_ptr + start + row.to(tl.int64) * weight_row + col, mask=is_in, other=0.0)
    merged = _updated(
        weight, row, col, rows, cols, left, left_row, left_rank, right, right_rank, right_col, beta, rank,
        left_step, right_step, RANK,
    )
    keep = _kept(
        bits, first + start, width, per_shard, pad, num_bytes, first_row, row, first_col, rows, cols,
        ALIGNED, ROWS, COLS,
    )
    kept = tl.where(keep, merged, 0.0).to(weight.dtype)
    tl.store(out_ptr + start + row.to(tl.int64) * out_row + col, kept, mask=is_in)


@triton.jit
def gradients(
    weight_ptr, weight_row, rows, cols, bits, first, width, per_shard, pad, num_bytes, left, left_row, left_rank,
    right, right_rank, right_col, beta, rank, parts, expert_step, part_step, left_step, right_step,
    grad_ptr, grad_row, row_norms, col_norms, norm_step, factor, factors_ptr, ends_ptr, first_expert,
    merged_ptr, merged_row, scores_ptr, scores_row, updates_ptr, updates_row,
    ALIGNED: tl.constexpr, RANK: tl.constexpr, HAS_MAGNITUDE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """Per tile of G = dL/d(M . W): M . W, dS = G . W, and dW = G . M + G . |W| . factor.

    ``scores_ptr`` (dS) and ``updates_ptr`` (dW) may be None; they hold one matrix after another, while the others are
    laid out like the weight. ``merged_ptr`` may be ``weight_ptr`` or ``grad_ptr``. ``factors_ptr``: a factor for each
    matrix, or None. ``ends_ptr``: ends of the rows of all experts, or None; G counts as 0 for experts without rows.
    """
    start = _start(parts, expert_step, part_step)
    first_row = tl.program_id(0) * ROWS
    first_col = tl.program_id(1) * COLS
    row = first_row + tl.arange(0, ROWS)[:, None]
    col = first_col + tl.arange(0, COLS)[None, :]
    is_in = (row < rows) & (col < cols)
    held = tl.load(weight_ptr + start + row.to(tl.int64) * weight_row + col, mask=is_in, other=0.0)
    merged = _updated(
        held, row, col, rows, cols, left, left_row, left_rank, right, right_rank, right_col, beta, rank,
        left_step, right_step, RANK,
    ).to(held.dtype)
    keep = _kept(
        bits, first + start, width, per_shard, pad, num_bytes, first_row, row, first_col, rows, cols,
        ALIGNED, ROWS, COLS,
    )
    has_grad = is_in
    if ends_ptr is not None:
        expert = first_expert + tl.program_id(2) // parts
        first_token = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
        # not `is_in & (end > first)`: the interpreter broadcasts a comparison of scalars as int32, not as a mask
        rows_with_grad = tl.where(tl.load(ends_ptr + expert) > first_token, rows, 0)
        has_grad = is_in & (row < rows_with_grad)
    grad = tl.load(grad_ptr + start + row.to(tl.int64) * grad_row + col, mask=has_grad, other=0.0)
    zero = tl.zeros((ROWS, COLS), held.dtype)
    tl.store(merged_ptr + start + row.to(tl.int64) * merged_row + col, tl.where(keep, merged, zero), mask=is_in)
    wide = merged.to(tl.float32)
    slope = grad.to(tl.float32)
    of_matrix = row.to(tl.int64)
    if parts is not None:
        of_matrix += tl.program_id(2).to(tl.int64) * rows
    if scores_ptr is not None:
        tl.store(scores_ptr + of_matrix * scores_row + col, (slope * wide).to(grad.dtype), mask=is_in)
    if updates_ptr is not None:
        update = tl.where(keep, slope, 0.0)
        if HAS_MAGNITUDE:
            if factors_ptr is not None:
                factor = tl.load(factors_ptr + tl.program_id(2))
            magnitude = tl.abs(wide) * factor
            norms_at = 0 if parts is None else (tl.program_id(2) // parts).to(tl.int64) * norm_step
            if row_norms is not None:
                magnitude = magnitude * tl.load(row_norms + norms_at + row, mask=row < rows, other=0.0)
            if col_norms is not None:
                magnitude = magnitude * tl.load(col_norms + norms_at + col, mask=col < cols, other=0.0)
            update = update + slope * magnitude
        tl.store(updates_ptr + of_matrix * updates_row + col, update.to(grad.dtype), mask=is_in)

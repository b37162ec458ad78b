"""Kernels of a layer's turn: the merged weight, and what its backward pass makes of a gradient, each in one pass.

A weight's product U V is a separate matrix product, summed in fp32; W0 is added in fp32 and the sum rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pst_ds.core.kernels.triton.launch import is_interpreted

TILE_ROWS, TILE_COLS = 32, 128
GRADIENT_ROWS, GRADIENT_COLS = 32, 64
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
    RANK: tl.constexpr,
):
    """W0 + beta U V in fp32 from W0 of a tile."""
    wide = weight.to(tl.float32)
    if RANK > 0:
        k = tl.arange(0, RANK)
        at = row * left_row + k[None, :] * left_rank
        u = tl.load(left + at, mask=(row < rows) & (k[None, :] < rank), other=0.0).to(weight.dtype)
        at = k[:, None] * right_rank + col * right_col
        v = tl.load(right + at, mask=(k[:, None] < rank) & (col < cols), other=0.0).to(weight.dtype)
        wide = wide + _product(u, v) * beta
    return wide


@triton.jit
def _kept(bits, row, first_col, rows, cols, bit_row, bit_first, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The mask of a tile, (ROWS, COLS) bool, from a byte for each eight columns."""
    byte = first_col + 8 * tl.arange(0, COLS // 8)[None, :]
    at = row.to(tl.int64) * bit_row + bit_first + byte // 8
    held = tl.load(bits + at, mask=(row < rows) & (byte < cols), other=0).to(tl.int32)
    places = tl.arange(0, 8)[None, None, :]
    return tl.reshape((held[:, :, None] >> places) & 1, (ROWS, COLS)) != 0


@triton.jit
def merge(
    weight_ptr, weight_row, rows, cols, bits, bit_row, bit_first, left, left_row, left_rank,
    right, right_rank, right_col, beta, rank, out_ptr, out_row,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """out = M . (W0 + beta U V); +0.0 where the mask prunes."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    first_col = tl.program_id(1) * COLS
    col = first_col + tl.arange(0, COLS)[None, :]
    is_in = (row < rows) & (col < cols)
    weight = tl.load(weight_ptr + row.to(tl.int64) * weight_row + col, mask=is_in, other=0.0)
    merged = _updated(
        weight, row, col, rows, cols, left, left_row, left_rank, right, right_rank, right_col, beta, rank, RANK,
    )
    keep = _kept(bits, row, first_col, rows, cols, bit_row, bit_first, ROWS, COLS)
    kept = tl.where(keep, merged, 0.0).to(weight.dtype)
    tl.store(out_ptr + row.to(tl.int64) * out_row + col, kept, mask=is_in)


@triton.jit
def gradients(
    weight_ptr, weight_row, rows, cols, bits, bit_row, bit_first, left, left_row, left_rank,
    right, right_rank, right_col, beta, rank, grad_ptr, grad_row, row_norms, col_norms, factor,
    merged_ptr, merged_row, scores_ptr, scores_row, updates_ptr, updates_row,
    RANK: tl.constexpr, HAS_MAGNITUDE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """Per tile of G = dL/d(M . W): M . W, dS = G . W, and dW = G . M + G . |W| . factor.

    ``scores_ptr`` (dS) and ``updates_ptr`` (dW) may be None. ``merged_ptr`` may be ``weight_ptr``.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    first_col = tl.program_id(1) * COLS
    col = first_col + tl.arange(0, COLS)[None, :]
    is_in = (row < rows) & (col < cols)
    held = tl.load(weight_ptr + row.to(tl.int64) * weight_row + col, mask=is_in, other=0.0)
    merged = _updated(
        held, row, col, rows, cols, left, left_row, left_rank, right, right_rank, right_col, beta, rank, RANK,
    ).to(held.dtype)
    keep = _kept(bits, row, first_col, rows, cols, bit_row, bit_first, ROWS, COLS)
    zero = tl.zeros((ROWS, COLS), held.dtype)
    tl.store(merged_ptr + row.to(tl.int64) * merged_row + col, tl.where(keep, merged, zero), mask=is_in)
    grad = tl.load(grad_ptr + row.to(tl.int64) * grad_row + col, mask=is_in, other=0.0)
    wide, slope = merged.to(tl.float32), grad.to(tl.float32)
    if scores_ptr is not None:
        tl.store(scores_ptr + row.to(tl.int64) * scores_row + col, (slope * wide).to(grad.dtype), mask=is_in)
    if updates_ptr is not None:
        update = tl.where(keep, slope, 0.0)
        if HAS_MAGNITUDE:
            magnitude = tl.abs(wide) * factor
            if row_norms is not None:
                magnitude = magnitude * tl.load(row_norms + row, mask=row < rows, other=0.0)
            if col_norms is not None:
                magnitude = magnitude * tl.load(col_norms + col, mask=col < cols, other=0.0)
            update = update + slope * magnitude
        tl.store(updates_ptr + row.to(tl.int64) * updates_row + col, update.to(grad.dtype), mask=is_in)

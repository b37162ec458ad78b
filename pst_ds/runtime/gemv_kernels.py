"""A product of a bitmask weight with a vector: a lane walks the set bits of a 32-bit word, past its kept values."""

from __future__ import annotations

import triton
import triton.language as tl

from pst_ds.core.kernels.launch import is_interpreted
from pst_ds.core.kernels.score_kernels import popcount

UNROLL = 8
"""Bits of a word between two looks whether any lane has one left."""
WARP = 32
X_WORD = 33
"""Numbers of x that belong to a word: its columns' and a zero."""
X_STRIDE = tl.constexpr(X_WORD)
_INTERPRETED = tl.constexpr(is_interpreted())


@triton.jit
def _popcount(bits):
    if _INTERPRETED:
        return popcount(bits)
    else:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [bits], tl.int32, is_pure=True, pack=1)


@triton.jit
def bitmask_vector(
    x_ptr, x_vector, values_ptr, words_ptr, num_words, offsets_ptr, bias_ptr, y_ptr, y_vector, UNROLL: tl.constexpr
):  # fmt: skip
    """y[vector, row] = sum of the kept values of a row times their x (fp32), plus the bias. For one warp.

    ``num_words``: of a row's mask, 32 columns each. x has X_WORD numbers for each, and zeros up to a whole WARP.
    """
    row, vector = tl.program_id(0), tl.program_id(1)
    lanes = tl.arange(0, 32)
    values = values_ptr + tl.load(offsets_ptr + row)
    words = words_ptr + row.to(tl.int64) * num_words
    x_ptr += vector * x_vector
    sums = tl.zeros((32,), tl.float32)
    start = 0
    while start < num_words:
        word = tl.load(words + start + lanes, mask=start + lanes < num_words, other=0)
        count = _popcount(word)
        total = tl.cumsum(count, 0)
        own = values + (total - count)
        x = x_ptr + (start + lanes) * X_STRIDE
        most = tl.max(count, 0)
        step = 0
        while step < most:
            for more in tl.static_range(UNROLL):
                below = word - 1
                is_set = word != 0
                column = _popcount(below & ~word)
                value = tl.load(own + more, mask=is_set, other=0.0).to(tl.float32)
                sums += value * tl.load(x + column)  # of a word without bits column 32, a zero
                word = word & below
            own += UNROLL
            step += UNROLL
        values += tl.sum(count, 0)
        start += 32
    result = tl.sum(sums, 0)
    if bias_ptr is not None:
        result += tl.load(bias_ptr + row).to(tl.float32)
    tl.store(y_ptr + vector * y_vector + row, result.to(y_ptr.dtype.element_ty))

"""Products of a packed weight with a vector: a lane processes the set bits of a 32-bit word from the highest down.

Lanes of a warp take as many steps as the lane with the most bits. A word without remaining bits uses place -1, where x
has a zero.

Layout of the data; a program is one warp, which computes one row of the weight times one vector:

* ``bits_ptr``: (rows, columns / 32) int32, or (rows, ceil(columns / 8)) uint8 if rows do not end at a word; bit i of a
  row keeps column i. A lane takes one word of 32 columns, a step of the warp 32 words.
* ``values_ptr``: the kept values of all rows, row by row: floats, int8 codes, or two int4 codes per byte. Row r starts
  at ``offsets_ptr[r]``, in values for floats and in bytes for codes. A lane finds the end of its values by a running
  sum of the bits of the lanes before it.
* ``scales_ptr``: (rows, GROUPS), a scale per GROUP_WORDS words of columns, or per row if that is 0.
* ``x_ptr``: fp32, (words / WARP, X_ROWS, WARP) per vector. Row 0 has zeros; row 1 + p has, for each word, the x of its
  column p. Neighbouring lanes thus read neighbouring addresses, if their places are equal.
* ``y_ptr``: (vectors, rows), ``y_vector`` elements apart.

Codes are loaded as whole aligned words, from the last code of a lane to its first. No load passes the word with the
first code of the row, which for the first row starts ``lead`` bytes before ``values_ptr``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pst_ds.core.kernels.triton.launch import is_interpreted
from pst_ds.core.kernels.triton.score_kernels import popcount

UNROLL = 8
"""Bits of a word between two checks whether any lane has one left; a multiple of eight for int4 codes."""
WARP = 32
X_ROWS = 33
"""Rows of x per WARP words of the mask: zeros, and one per place in a word. A column belongs to a word."""
_X_ROWS = tl.constexpr(X_ROWS)
_INTERPRETED = tl.constexpr(is_interpreted())
_TWO_TO_23 = tl.constexpr(0x4B000000)  # 2**23 as fp32
_SIGNS_OF_8 = tl.constexpr(-0x7F7F7F80)  # 0x80808080
_SIGNS_OF_4 = tl.constexpr(-0x77777778)  # 0x88888888


@triton.jit
def count_bits(bits):
    """Return the number of set bits of each int32."""
    if _INTERPRETED:
        return popcount(bits)
    else:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [bits], tl.int32, is_pure=True, pack=1)


@triton.jit
def mask_word(bits_ptr, row, at, columns, is_row):
    """Return word ``at`` of a row's mask, 32 bits, zeros beyond its end and where not ``is_row``.

    ``bits_ptr``: int32 if rows have whole words of bits, or uint8; None if every bit is set.
    """
    if bits_ptr is None:
        left = tl.minimum(tl.maximum(columns - at * 32, 0), 32)
        word = tl.where(left == 32, -1, (1 << (left & 31)) - 1)
        return tl.where(is_row, word, 0)
    elif bits_ptr.dtype.element_ty == tl.int32:
        num_words = columns // 32
        return tl.load(bits_ptr + row.to(tl.int64) * num_words + at, mask=is_row & (at < num_words), other=0)
    else:
        num_bytes = (columns + 7) // 8
        bytes = bits_ptr + row.to(tl.int64) * num_bytes + at * 4
        word = tl.load(bytes, mask=is_row & (at * 4 < num_bytes), other=0).to(tl.int32)
        for more in tl.static_range(1, 4):
            byte = tl.load(bytes + more, mask=is_row & (at * 4 + more < num_bytes), other=0).to(tl.int32)
            word |= byte << (8 * more)
        return word


@triton.jit
def _take_highest(word):
    """Return the place of the highest set bit, or -1, and the remaining bits."""
    if _INTERPRETED:
        filled = word.to(tl.uint32, bitcast=True)
        for shift in tl.static_range(5):
            filled |= filled >> (1 << shift)
        return count_bits(filled.to(tl.int32, bitcast=True)) - 1, word & (filled >> 1).to(tl.int32, bitcast=True)
    else:
        place = tl.inline_asm_elementwise("bfind.u32 $0, $1;", "=r,r", [word], tl.int32, is_pure=True, pack=1)
        below = tl.inline_asm_elementwise(
            "szext.clamp.u32 $0, $1, $2;", "=r,r,r", [word, place], tl.int32, is_pure=True, pack=1
        )  # bits below the place; for -1 all bits, which are 0
        return place, below


@triton.jit
def _from_bit(low, high, shift):
    """Return 32 bits of two words, from bit ``shift`` of the lower on."""
    low = low.to(tl.uint32, bitcast=True).to(tl.uint64)
    high = high.to(tl.uint32, bitcast=True).to(tl.uint64)
    return (((high << 32) | low) >> shift).to(tl.int32)


@triton.jit
def _code(word, two_to_23, number: tl.constexpr, BITS: tl.constexpr):
    """Return code ``number`` of a word as fp32, exactly, through its sum with 2**23, whose last bit is 1.

    Codes are stored with an inverted sign bit, so they are 8 or 128 too large.
    """
    if BITS == 4:
        word = (word if number % 2 == 0 else word >> 4) & 0x0F0F0F0F
    byte: tl.constexpr = number * BITS // 8
    if _INTERPRETED:
        large = ((word >> (byte * 8)) & 255) | two_to_23
    else:
        large = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [word, two_to_23, 0x7650 + byte], tl.int32, is_pure=True, pack=1
        )
    return large.to(tl.float32, bitcast=True) - (8388608.0 + (1 << (BITS - 1)))


@triton.jit
def _sum_of_floats(values, x, bits, most, UNROLL: tl.constexpr):
    """Return the sum per lane of the kept values of its word times their x. ``values``: points to the last value."""
    sums = tl.zeros((32,), tl.float32)
    step = 0
    while step < most:
        for more in tl.static_range(UNROLL):
            value = tl.load(values - more, mask=bits != 0, other=0.0).to(tl.float32)
            place, bits = _take_highest(bits)
            sums = tl.fma(value, tl.load(x + place.to(tl.int64) * 32), sums)
        values -= UNROLL
        step += UNROLL
    return sums


@triton.jit
def _sum_of_codes(words, end, count, x, bits, most, UNROLL: tl.constexpr, BITS: tl.constexpr):
    """Return the same for the codes before code number ``end`` of ``words``, without their scale."""
    IN_WORD: tl.constexpr = 32 // BITS
    word = end * BITS >> 5
    shift = (end * BITS & 31).to(tl.uint64)
    high = tl.load(words + word, mask=shift != 0, other=0)
    # a count is at most 32, so this adds 0 and keeps the number in a register
    two_to_23 = _TWO_TO_23 + (count >> 6)
    sums = tl.zeros((32,), tl.float32)
    step = 0
    while step < most:
        for more in tl.static_range(UNROLL):
            if more % IN_WORD == 0:
                word -= 1
                low = tl.load(words + word, mask=word >= 0, other=0)
                codes = _from_bit(low, high, shift) ^ (_SIGNS_OF_4 if BITS == 4 else _SIGNS_OF_8)
                high = low
            value = _code(codes, two_to_23, IN_WORD - 1 - more % IN_WORD, BITS)
            place, bits = _take_highest(bits)
            sums = tl.fma(value, tl.load(x + place.to(tl.int64) * 32), sums)
        step += UNROLL
    return sums


@triton.jit
def packed_vector(
    x_ptr, x_vector, experts_ptr, values_ptr, lead, bits_ptr, columns, offsets_ptr, scales_ptr, bias_ptr, y_ptr,
    y_vector, UNROLL: tl.constexpr, BITS: tl.constexpr, GROUP_WORDS: tl.constexpr, GROUPS: tl.constexpr,
):
    """Compute y[vector, row] = sum of the kept values of a row times their x (fp32), plus the bias, in one warp.

    ``BITS``: 8 or 4 for codes, 0 for floats. ``lead``: bytes between a multiple of four and ``values_ptr``, for codes.
    x: (words / WARP, X_ROWS, WARP) per vector. ``experts_ptr``: the expert of each vector, whose rows start at y_vector
    times its number; None for a single weight.
    """
    # 64 bits: vectors times their length can pass 2**31
    output = tl.program_id(0).to(tl.int64)
    vector = tl.program_id(1).to(tl.int64)
    row = output
    if experts_ptr is not None:
        row += tl.load(experts_ptr + vector).to(tl.int64) * y_vector
    lanes = tl.arange(0, 32)
    offset = tl.load(offsets_ptr + row)
    if BITS:
        words = (values_ptr - lead).to(tl.pointer_type(tl.int32)) + ((offset + lead) >> 2)
        before = ((offset + lead) & 3).to(tl.int32) * (8 // BITS)
    else:
        values = values_ptr + offset - 1
        before = 0
    x_ptr += vector * x_vector + 32
    sums = tl.zeros((32,), tl.float32)
    start = 0
    while start * 32 < columns:
        bits = mask_word(bits_ptr, row, start + lanes, columns, True)
        count = count_bits(bits)
        end = before + tl.cumsum(count, 0)
        most = tl.max(count, 0)
        if BITS:
            at = start + lanes
            group = row * GROUPS + (at // GROUP_WORDS if GROUP_WORDS else at * 0)
            scale = tl.load(scales_ptr + group, mask=at * 32 < columns, other=0.0)
            sums += _sum_of_codes(words, end, count, x_ptr + lanes, bits, most, UNROLL, BITS) * scale.to(tl.float32)
        else:
            sums += _sum_of_floats(values + end, x_ptr + lanes, bits, most, UNROLL)
        before += tl.sum(count, 0)
        start += 32
        x_ptr += 32 * _X_ROWS
    result = tl.sum(sums, 0)
    if bias_ptr is not None:
        result += tl.load(bias_ptr + output).to(tl.float32)
    tl.store(y_ptr + vector * y_vector + output, result.to(y_ptr.dtype.element_ty))

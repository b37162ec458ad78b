"""Kernels on the bits of many masks at once: their places in shards, counts and checksums.

A program finds the number of its mask in ``mask_ptr``, its first program in ``starts_ptr``, and in the table what
:mod:`pst_ds.core.kernels.triton.bit_sums` wrote about it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pst_ds.core.kernels.triton.score_kernels import address, popcount

# Bytes that a program sums, and words that it places.
SIZE = 1024
WORDS = 32
# Columns of the tables of place and of the sums; the kernels' docstrings list them.
RUN_COLUMNS = tl.constexpr(10)
SUM_COLUMNS = tl.constexpr(6)
# Multipliers of splitmix64, as in masks.cpp, so that checksums are equal on every device.
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def place(
    table_ptr, starts_ptr, mask_ptr, IN_ORDER: tl.constexpr, UNIT_ROWS: tl.constexpr, UNIT_COLS: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """Set the bits of a matrix's weights in a shard of zeros, from the bits of the matrix's units.

    ``IN_ORDER``: units are weights, and neighbours in the matrix also are in the shard. Rows of the table: address and
    bytes of the units; address of the shard; bit of unit 0 (IN_ORDER: of the first weight); first and last + 1 bit
    to set; weights from the matrix's first row to the shard; first column of the matrix; row length; width.
    """
    number = tl.load(mask_ptr + tl.program_id(0)).to(tl.int64)
    table = table_ptr + number * RUN_COLUMNS
    source = address(table, False, tl.uint8)
    source_bytes = tl.load(table + 1)
    skip = tl.load(table + 3)
    first = tl.load(table + 4)
    end = tl.load(table + 5)
    word = (first >> 5) + (tl.program_id(0) - tl.load(starts_ptr + number)) * WORDS + tl.arange(0, WORDS)
    if IN_ORDER:
        bit = word * 32 - first + skip  # of the source
        value = tl.zeros((WORDS,), tl.int64)
        for more in tl.static_range(5):
            at = (bit >> 3) + more
            # 32 bits that start inside a byte lie in five bytes
            byte = tl.load(source + at, mask=(at >= 0) & (at < source_bytes), other=0)
            value |= byte.to(tl.int64) << (8 * more)
        bits = (value >> (bit & 7)).to(tl.int32)
        below = tl.maximum(first - word * 32, 0)
        up_to = tl.minimum(tl.maximum(end - word * 32, 0), 32)
        bits &= ((1 << up_to) - (1 << below)).to(tl.int32)
    else:
        lanes = tl.arange(0, 32)[None, :]
        bit = word[:, None] * 32 + lanes
        row_length = tl.load(table + 8).to(tl.int32)
        width = tl.load(table + 9).to(tl.int32)
        flat = bit + tl.load(table + 6)
        row = (flat // row_length).to(tl.int32)
        col = (flat - row.to(tl.int64) * row_length).to(tl.int32) - tl.load(table + 7).to(tl.int32)
        is_there = (bit >= first) & (bit < end) & (col >= 0) & (col < width)
        unit = (row // UNIT_ROWS).to(tl.int64) * (width // UNIT_COLS) + col // UNIT_COLS + skip
        byte = tl.load(source + (unit >> 3), mask=is_there, other=0).to(tl.int32)
        bits = tl.sum((byte >> (unit & 7).to(tl.int32) & 1) << lanes, 1)
    target = tl.load(table + 2).to(tl.pointer_type(tl.int32))
    tl.atomic_or(target + word, bits, mask=bits != 0, sem="relaxed")  # two matrices may share a word


@triton.jit
def _splitmix64(x):
    x = x * _GOLDEN
    x = (x ^ (x >> 30)) * _FIRST
    x = (x ^ (x >> 27)) * _SECOND
    return x ^ (x >> 31)


@triton.jit
def replace_bits(table_ptr, starts_ptr, mask_ptr, sums_ptr, SIZE: tl.constexpr):
    """Copy the bits after an update over those before it. Add to ``sums_ptr``, (masks, 3) int64, how many of them
    differ, how many are set after, and their checksum.

    Rows of the table: addresses before and after, bytes, bits, position of the first in the whole mask, seed.
    """
    number = tl.load(mask_ptr + tl.program_id(0)).to(tl.int64)
    table = table_ptr + number * SUM_COLUMNS
    before_ptr = address(table, False, tl.uint8)
    after_ptr = address(table + 1, False, tl.uint8)
    num_bytes = tl.load(table + 2)
    count = tl.load(table + 3)
    first_byte = tl.load(table + 4) >> 3
    lead = (tl.load(table + 4) & 7).to(tl.int32)
    at = (tl.program_id(0) - tl.load(starts_ptr + number)) * SIZE + tl.arange(0, SIZE)
    before = tl.load(before_ptr + at, mask=at < num_bytes, other=0).to(tl.int32)
    after = tl.load(after_ptr + at, mask=at < num_bytes, other=0).to(tl.int32)
    previous = tl.load(after_ptr + at - 1, mask=(at > 0) & (at <= num_bytes), other=0).to(tl.int32)
    tl.store(before_ptr + at, after.to(tl.uint8), mask=(at < num_bytes) & (before != after))
    # a byte of the whole mask combines bits of two of our bytes
    value = ((after << lead) | (previous >> (8 - lead))) & 0xFF
    is_byte = at < (lead + count + 7) // 8
    hashed = _splitmix64((at + first_byte + tl.load(table + 5) + 1).to(tl.uint64))
    checksum = tl.where(is_byte, value.to(tl.uint64) * hashed, 0).to(tl.int64)
    sums_ptr += 3 * number
    tl.atomic_add(sums_ptr, tl.sum(popcount(before ^ after), 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(sums_ptr + 1, tl.sum(popcount(after), 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(sums_ptr + 2, tl.sum(checksum, 0), sem="relaxed")

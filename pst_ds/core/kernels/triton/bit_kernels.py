"""Kernel that counts and checksums the bits of a mask, for pst_ds.core.bits."""

from __future__ import annotations

import triton
import triton.language as tl

from pst_ds.core.kernels.triton.score_kernels import popcount

SIZE = 1024
_GOLDEN, _FIRST, _SECOND = (
    tl.constexpr(0x9E3779B97F4A7C15),
    tl.constexpr(0xBF58476D1CE4E5B9),
    tl.constexpr(0x94D049BB133111EB),
)


@triton.jit
def _splitmix64(x):
    x = x * _GOLDEN
    x = (x ^ (x >> 30)) * _FIRST
    x = (x ^ (x >> 27)) * _SECOND
    return x ^ (x >> 31)


@triton.jit
def sum_bits(before_ptr, after_ptr, count, lead, first_byte, seed, out_ptr, SIZE: tl.constexpr):
    """Add to ``out_ptr``, int64, how many of ``count`` bits differ, how many are set after, and their checksum.

    The first bit is bit ``lead`` of byte ``first_byte`` of the whole mask.
    """
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    num_bytes = (count + 7) // 8
    before = tl.load(before_ptr + at, mask=at < num_bytes, other=0).to(tl.int32)
    after = tl.load(after_ptr + at, mask=at < num_bytes, other=0).to(tl.int32)
    previous = tl.load(after_ptr + at - 1, mask=(at > 0) & (at <= num_bytes), other=0).to(tl.int32)
    # a byte of the whole mask combines bits of two of our bytes
    value = ((after << lead) | (previous >> (8 - lead))) & 0xFF
    is_byte = at < (lead + count + 7) // 8
    hashed = _splitmix64((at.to(tl.int64) + first_byte + seed + 1).to(tl.uint64))
    checksum = tl.where(is_byte, value.to(tl.uint64) * hashed, 0).to(tl.int64)
    tl.atomic_add(out_ptr, tl.sum(popcount(before ^ after), 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(out_ptr + 1, tl.sum(popcount(after), 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(out_ptr + 2, tl.sum(checksum, 0), sem="relaxed")

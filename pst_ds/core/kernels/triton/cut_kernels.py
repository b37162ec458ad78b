"""Kernels that cut many matrices at once, from the bits of their keys inside a bracket.

The bits of all matrices are in one run of int32 words, each matrix in whole blocks of WORDS. The keys inside are
in another run, in whole blocks of KEYS, in any order. A table maps each block to its matrix. The ``matrices`` table is
(matrices, COLUMNS) int32; the constants below name its columns. No size on the host depends on the keys, so the host
never waits for a count.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pst_ds.core.kernels.triton.score_kernels import popcount

# Elements of a block, and of a program.
WORDS = 256
KEYS = 1024
# Columns of the matrices table. The kernels count in the last three.
FIRST_WORDS = 0  # the matrix's first block of words
FIRST_KEYS = 1  # the matrix's first block of keys
ROOM = 2  # keys inside that can be stored
NUM_INSIDE = 5  # keys inside, also those without room
COLUMNS = 7
# Constants that a jitted function reads must be constexpr.
_WORDS = tl.constexpr(WORDS)
_KEYS = tl.constexpr(KEYS)
_FIRST_WORDS = tl.constexpr(FIRST_WORDS)
_FIRST_KEYS = tl.constexpr(FIRST_KEYS)
_ROOM = tl.constexpr(ROOM)
_OWN_FIRST = tl.constexpr(3)  # first bit that this rank counts
_OWN_END = tl.constexpr(4)  # the last + 1
_NUM_INSIDE = tl.constexpr(NUM_INSIDE)
_EQUAL_BEFORE = tl.constexpr(6)  # keys equal to the cut before _OWN_FIRST
_COLUMNS = tl.constexpr(COLUMNS)


@triton.jit
def collect(matrices_ptr, matrix_of_block_ptr, inside_ptr, index_ptr):
    """Write the index in its matrix of every key inside, in any order, as long as there is room, and count them."""
    block = tl.program_id(0)
    matrix = matrices_ptr + tl.load(matrix_of_block_ptr + block).to(tl.int64) * _COLUMNS
    lanes = tl.arange(0, _WORDS)
    word = tl.load(inside_ptr + block.to(tl.int64) * _WORDS + lanes)
    number = popcount(word)
    # A program reserves places for all of its keys with one atomic addition; the order of programs does not matter.
    place = tl.atomic_add(matrix + _NUM_INSIDE, tl.sum(number, 0)) + tl.cumsum(number, 0) - number
    room = tl.load(matrix + _ROOM)
    index_ptr += tl.load(matrix + _FIRST_KEYS).to(tl.int64) * _KEYS
    first = ((block - tl.load(matrix + _FIRST_WORDS)) * _WORDS + lanes) * 32
    while tl.max((word != 0).to(tl.int32), 0) > 0:  # one step per bit of the fullest word
        lowest = word & -word
        tl.store(index_ptr + place, first + popcount(lowest - 1), mask=(word != 0) & (place < room))
        place += 1
        word = word ^ lowest


@triton.jit
def histogram(
    matrices_ptr, matrix_of_block_ptr, keys_ptr, index_ptr, lows_ptr, shift, counts_ptr, BINS: tl.constexpr
):
    """Count (key - low) >> shift of the keys inside that this rank counts into (matrices, BINS), if it is a bin."""
    block = tl.program_id(0)
    number = tl.load(matrix_of_block_ptr + block).to(tl.int64)
    matrix = matrices_ptr + number * _COLUMNS
    at = (block - tl.load(matrix + _FIRST_KEYS)) * _KEYS + tl.arange(0, _KEYS)
    is_there = at < tl.minimum(tl.load(matrix + _NUM_INSIDE), tl.load(matrix + _ROOM))
    key = tl.load(keys_ptr + block.to(tl.int64) * _KEYS + tl.arange(0, _KEYS), mask=is_there, other=0)
    bit = tl.load(index_ptr + block.to(tl.int64) * _KEYS + tl.arange(0, _KEYS), mask=is_there, other=0)
    is_there = is_there & (bit >= tl.load(matrix + _OWN_FIRST)) & (bit < tl.load(matrix + _OWN_END))
    digit = (key.to(tl.int64) - tl.load(lows_ptr + number)) >> shift
    is_there = is_there & (digit >= 0) & (digit < BINS)
    tl.atomic_add(counts_ptr + number * BINS + digit, 1, mask=is_there, sem="relaxed")


@triton.jit
def mark(matrices_ptr, matrix_of_block_ptr, keys_ptr, index_ptr, cuts_ptr, above_ptr, inside_ptr, equal_ptr):
    """Set the bits of keys above the cut among those above. Keep the bits inside that equal it.

    ``equal_ptr`` counts these per block of words. ``cuts_ptr``: (matrices, 2), the cut and how many equal keys it
    prunes.
    """
    block = tl.program_id(0)
    number = tl.load(matrix_of_block_ptr + block).to(tl.int64)
    matrix = matrices_ptr + number * _COLUMNS
    lanes = tl.arange(0, _KEYS)
    at = (block - tl.load(matrix + _FIRST_KEYS)) * _KEYS + lanes
    is_there = at < tl.minimum(tl.load(matrix + _NUM_INSIDE), tl.load(matrix + _ROOM))
    key = tl.load(keys_ptr + block.to(tl.int64) * _KEYS + lanes, mask=is_there, other=0)
    index = tl.load(index_ptr + block.to(tl.int64) * _KEYS + lanes, mask=is_there, other=0)
    cut = tl.load(cuts_ptr + 2 * number)
    first = tl.load(matrix + _FIRST_WORDS)
    word = first.to(tl.int64) * _WORDS + (index >> 5)
    bit = 1 << (index & 31)
    # Several keys may share a word, so bits are set and cleared atomically; relaxed order suffices, since only the
    # next launch reads them.
    tl.atomic_or(above_ptr + word, bit, mask=is_there & (key > cut), sem="relaxed")
    tl.atomic_and(inside_ptr + word, ~bit, mask=is_there & (key != cut), sem="relaxed")
    is_equal = is_there & (key == cut)
    tl.atomic_add(equal_ptr + first + index // (32 * _WORDS), 1, mask=is_equal, sem="relaxed")
    before = is_equal & (index < tl.load(matrix + _OWN_FIRST))
    if tl.max(before.to(tl.int32), 0) > 0:
        tl.atomic_add(matrix + _EQUAL_BEFORE, tl.sum(before.to(tl.int32), 0), sem="relaxed")


@triton.jit
def finish(matrices_ptr, matrix_of_block_ptr, cuts_ptr, equal_ptr, inside_ptr, above_ptr, STEP: tl.constexpr):
    """Set, among the bits above, the equal keys after the first, which are pruned. Most blocks need no change."""
    block = tl.program_id(0)
    if tl.load(equal_ptr + block) > 0:
        number = tl.load(matrix_of_block_ptr + block).to(tl.int64)
        matrix = matrices_ptr + number * _COLUMNS
        start = tl.load(matrix + _FIRST_WORDS)
        ties = tl.load(cuts_ptr + 2 * number + 1) + tl.load(matrix + _EQUAL_BEFORE)
        before = 0
        while start < block:
            blocks = start + tl.arange(0, STEP)
            before += tl.sum(tl.load(equal_ptr + blocks, mask=blocks < block, other=0), 0)
            start += STEP
        at = block.to(tl.int64) * _WORDS + tl.arange(0, _WORDS)
        equal = tl.load(inside_ptr + at)
        count = popcount(equal)
        pruned = ties - before - tl.cumsum(count, 0) + count
        equal = tl.where(pruned >= count, 0, equal)
        while tl.max(((pruned > 0) & (equal != 0)).to(tl.int32), 0) > 0:  # in one word of a matrix
            equal = tl.where(pruned > 0, equal & (equal - 1), equal)
            pruned -= 1
        tl.store(above_ptr + at, tl.load(above_ptr + at) | equal)

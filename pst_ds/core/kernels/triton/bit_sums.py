"""Place, count and checksum the mask bits of many shards at once.

On a GPU a few launches serve all shards; in torch a few operations do.

Layout: bits are bytes, little-endian, in the order of :mod:`pst_ds.core.bits`. One array of int32 words has the
bits of all shards, each of which starts at a word. Tables for the kernels are (items, numbers) int64, one row
per matrix or shard, in the order of bit_kernels.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pst_ds.core.bits import checksum, count_bits, splitmix64, unpack_shard
from pst_ds.core.kernels.triton.launch import blocks, launch, programs_of, serves, upload
from pst_ds.core.layout import Rect, runs_of

_AT_A_TIME = 1 << 22
"""Bytes of bits that torch unpacks in one step, on devices other than CPUs."""


@dataclass(frozen=True, slots=True)
class MatrixBits:
    """The bits of the units of a matrix that overlap a shard."""

    bits: Tensor
    rect: Rect
    row_length: int
    unit: tuple[int, int] = (1, 1)
    first_unit: int = 0
    """Number in the matrix of the unit with the first bit, after ``lead`` other bits."""
    lead: int = 0


@dataclass(frozen=True, slots=True)
class BitsOfShard:
    """The matrices whose bits make up the mask of the flat weights [start, stop), in ``num_bytes``."""

    start: int
    stop: int
    num_bytes: int
    matrices: Sequence[MatrixBits]


@dataclass
class _Launch:
    """Matrices that one launch places."""

    rows: list[list[int]] = field(default_factory=list)
    """Their rows of the kernel's table."""
    programs: list[int] = field(default_factory=list)
    """Programs for each."""


def placed_bits(shards: Sequence[BitsOfShard], device: torch.device) -> list[Tensor]:
    """Return the bits of each shard, (num_bytes,) uint8, by kernels. Bits of no matrix are 0."""
    from pst_ds.core.kernels.triton import bit_kernels as kernels

    if not shards:
        return []
    sizes = [blocks(shard.num_bytes, 4) for shard in shards]  # in words
    words = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
    first_words = [0, *accumulate(sizes)]
    kinds: dict[tuple[bool, tuple[int, int]], _Launch] = {}
    # first_words has one number more, the end
    for shard, first_word in zip(shards, first_words, strict=False):
        start = shard.start
        for matrix in shard.matrices:
            rect = matrix.rect
            length = matrix.row_length
            matrix_start = rect.r0 * length
            # flat places in the shard, between which the matrix has weights
            first = max(0, matrix_start - start)
            end = min(shard.stop, rect.r1 * length) - start
            # bits of whole rows have the order of the shard, and are copied as words
            in_order = matrix.unit == (1, 1) and rect.c1 - rect.c0 == length
            skip = matrix.lead - matrix.first_unit
            if in_order:
                skip += max(0, start - matrix_start)
            numbers = [matrix.bits.data_ptr(), matrix.bits.numel(), words.data_ptr() + 4 * first_word, skip, first, end]
            numbers += [start - matrix_start, rect.c0, length, rect.c1 - rect.c0]
            num_words = blocks(end, 32) - first // 32 if first < end else 0
            kind = kinds.setdefault((in_order, matrix.unit), _Launch())
            kind.rows.append(numbers)
            kind.programs.append(blocks(num_words, kernels.WORDS))
    for (in_order, unit), kind in kinds.items():
        table = upload(torch.tensor(kind.rows), device)
        starts, matrix_of = programs_of(kind.programs, device)
        units: dict[str, Any] = {"UNIT_ROWS": unit[0], "UNIT_COLS": unit[1]}
        grid = (len(matrix_of),)
        launch(kernels.place, grid, table, starts, matrix_of, IN_ORDER=in_order, WORDS=kernels.WORDS, **units)
    placed = []
    for first_word, shard in zip(first_words, shards, strict=False):
        placed.append(words[first_word:].view(torch.uint8)[: shard.num_bytes])
    return placed


@dataclass(frozen=True, slots=True)
class ShardBits:
    """The bits of a shard before and after an update: byte tensors of equal size, for weights from ``start`` on."""

    before: Tensor
    after: Tensor
    count: int
    start: int
    seed: int


def replace_bits(shards: Sequence[ShardBits]) -> Tensor:
    """Copy the bits after an update over those before. Return (n, 3) int64 on the device of the shards: bits that
    differed, bits set after, and their checksum.

    The checksum is :func:`pst_ds.core.bits.checksum` modulo 2**64.
    """
    device = shards[0].after.device
    sums = torch.zeros(len(shards), 3, dtype=torch.int64, device=device)
    if serves(device):
        _launch(shards, sums)
        return sums
    together = []
    for i, shard in enumerate(shards):
        if device.type != "cpu" and shard.start % 8 == 0:
            together.append(i)
        else:
            sums[i, :2] = count_bits(shard.before, shard.after)
            sums[i, 2] = checksum(shard.after, shard.count, shard.start, shard.seed)
    for run in runs_of([shards[i].after.numel() for i in together], _AT_A_TIME):
        chosen = [together[i] for i in run]
        _sum_together([shards[i] for i in chosen], [sums[i] for i in chosen])
    for shard in shards:
        if shard.after is not shard.before:
            shard.before.copy_(shard.after)
    return sums


def _launch(shards: Sequence[ShardBits], sums: Tensor) -> None:
    from pst_ds.core.kernels.triton import bit_kernels as kernels

    rows = []
    programs = []
    for shard in shards:
        num_bytes = shard.before.numel()
        rows.append([shard.before.data_ptr(), shard.after.data_ptr(), num_bytes, shard.count, shard.start, shard.seed])
        # the checksum is over bytes of the whole mask, one more than the shard's where its first bit is inside a byte
        hashed_bytes = blocks(shard.start % 8 + shard.count, 8)
        programs.append(blocks(max(num_bytes, hashed_bytes), kernels.SIZE))
    starts, shard_of = programs_of(programs, sums.device)
    table = upload(torch.tensor(rows), sums.device)
    launch(kernels.replace_bits, (len(shard_of),), table, starts, shard_of, sums, SIZE=kernels.SIZE)


def _sum_together(shards: Sequence[ShardBits], sums: Sequence[Tensor]) -> None:
    """Write the sums of shards that start at a byte boundary, for which all bits are processed together."""
    sizes = [shard.after.numel() for shard in shards]
    after = torch.cat([shard.after for shard in shards])
    differ = torch.cat([shard.before for shard in shards]) ^ after
    numbers = torch.empty(after.numel(), dtype=torch.int64, device=after.device)
    for shard, out in zip(shards, numbers.split(sizes), strict=True):
        first = shard.start // 8 + shard.seed + 1
        torch.arange(first, first + out.numel(), out=out)
    # values to add, and how many there are per byte
    columns = [
        (unpack_shard(differ, 8 * differ.numel()), 8),
        (unpack_shard(after, 8 * after.numel()), 8),
        (splitmix64(numbers).mul_(after), 1),
    ]
    for column, (values, width) in enumerate(columns):
        lengths = [width * size for size in sizes]
        for part, out in zip(values.split(lengths), sums, strict=True):
            torch.sum(part, 0, dtype=torch.int64, out=out[column])

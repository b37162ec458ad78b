"""Place, count and checksum the mask bits of many shards at once.

A few launches for all by kernels, few operations for all in torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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


def placed_bits(shards: Sequence[BitsOfShard], device: torch.device) -> list[Tensor]:
    """Return the bits of each shard, (num_bytes,) uint8, by kernels. Bits of no matrix are 0."""
    from pst_ds.core.kernels.triton import bit_kernels as kernels

    if not shards:
        return []
    sizes = [blocks(shard.num_bytes, 4) for shard in shards]
    words = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
    first_words = [0, *accumulate(sizes)]
    kinds: dict[tuple[bool, tuple[int, int]], list[tuple[list[int], int]]] = {}
    for shard, first_word in zip(shards, first_words, strict=False):
        for one in shard.matrices:
            rect = one.rect
            length = one.row_length
            start = shard.start
            first = max(0, rect.r0 * length - start)
            end = min(shard.stop, rect.r1 * length) - start
            in_order = one.unit == (1, 1) and rect.c1 - rect.c0 == length
            skip = one.lead - one.first_unit + (max(0, start - rect.r0 * length) if in_order else 0)
            numbers = [one.bits.data_ptr(), one.bits.numel(), words.data_ptr() + 4 * first_word, skip, first, end]
            numbers += [start - rect.r0 * length, rect.c0, length, rect.c1 - rect.c0]
            num_words = blocks(end, 32) - first // 32 if first < end else 0
            kinds.setdefault((in_order, one.unit), []).append((numbers, blocks(num_words, kernels.WORDS)))
    for (in_order, unit), some in kinds.items():
        table = upload(torch.tensor([numbers for numbers, _ in some]), device)
        starts, mask = programs_of([count for _, count in some], device)
        units: dict[str, Any] = {"UNIT_ROWS": unit[0], "UNIT_COLS": unit[1]}
        launch(kernels.place, (len(mask),), table, starts, mask, IN_ORDER=in_order, WORDS=kernels.WORDS, **units)
    ends = zip(first_words, shards, strict=False)
    return [words[first:].view(torch.uint8)[: shard.num_bytes] for first, shard in ends]


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
    together = [i for i, s in enumerate(shards) if device.type != "cpu" and s.start % 8 == 0]
    for i in set(range(len(shards))).difference(together):
        s = shards[i]
        sums[i, :2] = count_bits(s.before, s.after)
        sums[i, 2] = checksum(s.after, s.count, s.start, s.seed)
    for run in runs_of([shards[i].after.numel() for i in together], _AT_A_TIME):
        some = [together[i] for i in run]
        _sum_together([shards[i] for i in some], [sums[i] for i in some])
    for s in shards:
        if s.after is not s.before:
            s.before.copy_(s.after)
    return sums


def _launch(shards: Sequence[ShardBits], sums: Tensor) -> None:
    from pst_ds.core.kernels.triton import bit_kernels as kernels

    rows = [[s.before.data_ptr(), s.after.data_ptr(), s.before.numel(), s.count, s.start, s.seed] for s in shards]
    programs = [blocks(max(s.before.numel(), blocks(s.start % 8 + s.count, 8)), kernels.SIZE) for s in shards]
    starts, mask = programs_of(programs, sums.device)
    table = upload(torch.tensor(rows), sums.device)
    launch(kernels.replace_bits, (len(mask),), table, starts, mask, sums, SIZE=kernels.SIZE)


def _sum_together(shards: Sequence[ShardBits], sums: Sequence[Tensor]) -> None:
    """Write the sums of shards that start at a byte boundary, for which all bits are processed together."""
    sizes = [shard.after.numel() for shard in shards]
    after = torch.cat([shard.after for shard in shards])
    differ = torch.cat([shard.before for shard in shards]) ^ after
    numbers = torch.empty(after.numel(), dtype=torch.int64, device=after.device)
    for shard, out in zip(shards, numbers.split(sizes), strict=True):
        first = shard.start // 8 + shard.seed + 1
        torch.arange(first, first + out.numel(), out=out)
    columns = [(unpack_shard(bits, 8 * bits.numel()), 8) for bits in (differ, after)]
    columns.append((splitmix64(numbers).mul_(after), 1))
    for column, (values, width) in enumerate(columns):
        for part, out in zip(values.split([width * size for size in sizes]), sums, strict=True):
            torch.sum(part, 0, dtype=torch.int64, out=out[column])

"""Counts and checksums of the bits of many shards: one launch per shard on a GPU, few operations for all in torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pst_ds.core.bits import checksum, count_bits, splitmix64, unpack_shard
from pst_ds.core.kernels.triton.launch import blocks, launch, serves
from pst_ds.core.layout import runs_of

_AT_A_TIME = 1 << 22
"""Bytes of bits that torch unpacks in one step, on devices other than CPUs."""


@dataclass(frozen=True, slots=True)
class ShardBits:
    """The bits of a shard before and after an update: byte tensors of equal size, for weights from ``start`` on."""

    before: Tensor
    after: Tensor
    count: int
    start: int
    seed: int


def bit_sums(shards: Sequence[ShardBits]) -> Tensor:
    """Return (n, 3) int64 on the device of the shards: bits that differ, bits set after, and their checksum.

    The checksum is :func:`pst_ds.core.bits.checksum` modulo 2**64.
    """
    device = shards[0].after.device
    sums = torch.zeros(len(shards), 3, dtype=torch.int64, device=device)
    if serves(device):
        for shard, out in zip(shards, sums, strict=True):
            _launch(shard, out)
        return sums
    together = [i for i, s in enumerate(shards) if device.type != "cpu" and s.start % 8 == 0]
    for i in set(range(len(shards))).difference(together):
        s = shards[i]
        sums[i, :2] = count_bits(s.before, s.after)
        sums[i, 2] = checksum(s.after, s.count, s.start, s.seed)
    for run in runs_of([shards[i].after.numel() for i in together], _AT_A_TIME):
        some = [together[i] for i in run]
        _sum_together([shards[i] for i in some], [sums[i] for i in some])
    return sums


def _launch(shard: ShardBits, out: Tensor) -> None:
    from pst_ds.core.kernels.triton import bit_kernels as kernels

    lead, size = shard.start % 8, kernels.SIZE
    grid = (blocks(lead + shard.count, 8 * size),)
    place = shard.count, lead, shard.start // 8, shard.seed
    launch(kernels.sum_bits, grid, shard.before, shard.after, *place, out, SIZE=size)


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

"""Masks as bits: one bit a weight, 1 keeps, little-endian within a byte.

A mask lies in ``num_shards`` equal runs of bytes, one for each ZeRO-3 shard of the weight. Shard i holds the bits of
flat weights [i * p, (i + 1) * p) with p = ceil(numel / num_shards), from bit 0 of its first byte on, padded with zero
bits to whole bytes. ZeRO's own split of the byte tensor then gives each rank the bits of its own weights. One shard is
the canonical form, used in files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pst_ds.core.kernels import library, merges
from pst_ds.core.kernels.triton.launch import blocks

INT_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer as wide as a float of so many bytes: masks are applied to weights as integers."""


def shard_numel(numel: int, num_shards: int) -> int:
    """Weights in every shard but the last, which may hold fewer: ceil(numel / num_shards)."""
    return -(-numel // num_shards)


def shard_range(numel: int, num_shards: int, shard: int) -> tuple[int, int]:
    """Return the flat range [first, last) of the weights of a shard; the last shards may have fewer, or none."""
    share = shard_numel(numel, num_shards)
    return min(shard * share, numel), min((shard + 1) * share, numel)


def shard_bytes(numel: int, num_shards: int) -> int:
    """Bytes of one shard's bits."""
    return -(-shard_numel(numel, num_shards) // 8)


def _unpack_bytes(data: Tensor) -> Tensor:
    """uint8 (n,) -> uint8 (8n,) of zeros and ones."""
    if data.device.type == "cpu":  # numpy unpacks ten times as fast as torch shifts
        return torch.from_numpy(np.unpackbits(data.numpy(), bitorder="little"))
    shifts = torch.arange(8, dtype=torch.uint8, device=data.device)
    return (data.unsqueeze(-1) >> shifts).bitwise_and_(1).flatten()


def pack_shard(keep: Tensor, num_bytes: int) -> Tensor:
    """Bits of one shard: ``keep`` (n,) bool or 0/1, to (num_bytes,) uint8 with zero padding bits."""
    if keep.device.type == "cpu":
        packed = torch.from_numpy(np.packbits(keep.contiguous().numpy(), bitorder="little"))
    else:
        flags, shifts = keep.view(torch.uint8), torch.arange(8, dtype=torch.uint8, device=keep.device)
        if flags.numel() % 8:
            flags = torch.cat([flags, flags.new_zeros(-flags.numel() % 8)])
        packed = (flags.reshape(-1, 8) << shifts).sum(-1, dtype=torch.uint8)
    if packed.numel() == num_bytes:
        return packed
    out = torch.zeros(num_bytes, dtype=torch.uint8, device=keep.device)
    out[: packed.numel()] = packed
    return out


def unpack_shard(data: Tensor, count: int) -> Tensor:
    """The first ``count`` bits of one shard as uint8 zeros and ones, (count,)."""
    return _unpack_bytes(data[: -(-count // 8)])[:count]


def join_bits(runs: Sequence[tuple[Tensor, int]], num_bytes: int) -> Tensor:
    """Bits of one shard from those of runs of it: (bits, how many of them) of each, in order; (num_bytes,) uint8."""
    there = [(bits, count) for bits, count in runs if count]
    if any(count % 8 for _, count in there[:-1]):
        return pack_shard(torch.cat([unpack_shard(bits, count) for bits, count in there]), num_bytes)
    parts = [bits[: -(-count // 8)] for bits, count in there]
    if len(parts) == 1 and parts[0].numel() == num_bytes:
        return parts[0]
    return torch.cat([*parts, runs[0][0].new_zeros(num_bytes - sum(map(len, parts)))])


def unpack_range(bits: Tensor, numel: int, num_shards: int, start: int, stop: int) -> Tensor:
    """Mask of flat weights [start, stop), uint8 zeros and ones, from the whole mask ``bits``."""
    per_shard, per_shard_bytes = shard_numel(numel, num_shards), shard_bytes(numel, num_shards)
    pieces = []
    for begin, end in _cut_at_shards(start, stop, per_shard):
        shard, inside = divmod(begin, per_shard)
        count = end - begin
        first = shard * per_shard_bytes + inside // 8
        last = shard * per_shard_bytes + -(-(inside + count) // 8)
        pieces.append(_unpack_bytes(bits[first:last])[inside % 8 : inside % 8 + count])
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0] if pieces else bits.new_empty(0)


def bits_of_range(bits: Tensor, numel: int, num_shards: int, start: int, stop: int) -> Tensor:
    """The bits of flat weights [start, stop), from bit 0 on; a view where they begin with a byte of a shard.

    The last byte of a view may go on with the bits of the weights that follow.
    """
    per_shard = shard_numel(numel, num_shards)
    shard, inside = divmod(start, per_shard)
    if inside % 8 == 0 and inside + stop - start <= per_shard:
        first = shard * shard_bytes(numel, num_shards) + inside // 8
        return bits[first : first + -(-(stop - start) // 8)]
    return pack_mask(unpack_range(bits, numel, num_shards, start, stop))


def expand_mask_(
    out: Tensor, bits: Tensor, shape: tuple[int, int], num_shards: int, rows: slice, cols: slice
) -> Tensor:
    """Write the mask of a rectangle as integers to AND with: all ones where it keeps, 0 where it prunes.

    ``out``: (rows, cols), int16, int32 or int64. ``shape``: the stored weight's. Beside ``out`` at most
    2 * max(out.numel(), shape[1]) bytes are alive at a time.
    """
    row_length, numel = shape[1], shape[0] * shape[1]
    if row_length % 8 == 0 and cols.start % 8 == 0 and shard_numel(numel, num_shards) % 8 == 0:
        # every row, and every shard, begins with a byte of its own
        part = bits[: numel // 8].view(-1, row_length // 8)[rows, cols.start // 8 : -(-cols.stop // 8)]
        keep = _unpack_bytes(part.reshape(-1)).view(part.shape[0], -1)[:, : cols.stop - cols.start]
        return out.copy_(keep.view(torch.int8).neg_())
    step = max(1, out.numel() // row_length)
    for r0 in range(rows.start, rows.stop, step):  # whole rows, of which the columns are taken
        r1 = min(r0 + step, rows.stop)
        keep = unpack_range(bits, numel, num_shards, r0 * row_length, r1 * row_length).view(-1, row_length)[:, cols]
        out[r0 - rows.start : r1 - rows.start].copy_(keep.view(torch.int8).neg_())
    return out


def set_bits_(bits: Tensor, index: Tensor, chosen: Tensor) -> None:
    """Set the bits number ``index`` (n,) of ``bits`` in place where ``chosen`` (n,) bool is true.

    None of them may be set before, or be chosen twice. The native loop takes an int32 index; int64 is for torch.
    """
    native = library() if bits.device.type == "cpu" and index.dtype == torch.int32 else None
    if native is not None:
        index = index[chosen].contiguous()
        native.pst_set_bits(bits.data_ptr(), index.data_ptr(), index.numel())
        return
    ones = chosen.view(torch.uint8) << (index & 7).to(torch.uint8)
    bits.scatter_add_(0, (index >> 3).long(), ones)  # a sum is an or here; no size depends on data


def count_bits(before: Tensor, after: Tensor) -> Tensor:
    """(2,) int64 of two byte tensors of equal size: how many bits differ, and how many are set in ``after``."""
    counts = torch.zeros(2, dtype=torch.int64, device=after.device)
    native = library() if before.device.type == after.device.type == "cpu" else None
    if native is not None:
        native.pst_count_bits(before.data_ptr(), after.data_ptr(), before.numel(), counts.data_ptr())
        return counts
    counts[0] = _unpack_bytes(before ^ after).sum(dtype=torch.int64)
    counts[1] = _unpack_bytes(after).sum(dtype=torch.int64)
    return counts


def add_bit_sums(out: Tensor, before: Tensor, after: Tensor, count: int, start: int, seed: int) -> None:
    """Add (differ, set, :func:`checksum` modulo 2**64) of the bits of a shard to ``out``, (3,) int64.

    ``before`` and ``after``: byte tensors of equal size; the rest as for :func:`checksum`, of ``after``.
    """
    out[:2].add_(count_bits(before, after))
    out[2].add_(checksum(after, count, start, seed))


def pack_mask(keep: Tensor, num_shards: int = 1) -> Tensor:
    """A whole mask, (numel,) bool or 0/1 in storage order, as bits in ``num_shards`` shards."""
    flat = keep.flatten()
    per_shard, num_bytes = shard_numel(flat.numel(), num_shards), shard_bytes(flat.numel(), num_shards)
    return torch.cat([pack_shard(flat[i * per_shard : (i + 1) * per_shard], num_bytes) for i in range(num_shards)])


def relayout(bits: Tensor, numel: int, num_shards: int, new_num_shards: int) -> Tensor:
    """The same mask, in another number of shards."""
    if num_shards == new_num_shards:
        return bits.clone()
    return pack_mask(unpack_range(bits, numel, num_shards, 0, numel), new_num_shards)


def all_ones(numel: int, num_shards: int) -> Tensor:
    """The mask that keeps everything (padding bits are zero)."""
    per_shard = shard_numel(numel, num_shards)
    bits = torch.full((num_shards, shard_bytes(numel, num_shards)), 255, dtype=torch.uint8)
    whole, rest = divmod(numel, per_shard) if per_shard else (num_shards, 0)
    if per_shard % 8:
        bits[:whole, -1] = (1 << per_shard % 8) - 1
    if whole < num_shards:
        bits[whole:] = 0
        bits[whole, : rest // 8] = 255
        if rest % 8:
            bits[whole, rest // 8] = (1 << rest % 8) - 1
    return bits.flatten()


def apply_mask_(weight: Tensor, mask: Tensor) -> Tensor:
    """Zero the pruned entries of ``weight`` in place, to +0.0 exactly; ``mask`` is uint8 0/1 of the same shape.

    A bitwise AND: one pass, right for NaN, infinity and -0.0, where a product would leave NaN or -0.0.
    """
    as_int = weight.view(INT_OF_SIZE[weight.element_size()])
    as_int.bitwise_and_(mask.view(torch.int8).neg().to(as_int.dtype))
    return weight


def apply_range_(weight: Tensor, bits: Tensor, numel: int, num_shards: int, start: int) -> Tensor:
    """:func:`apply_mask_` to contiguous flat weights from ``start`` on, by the whole mask ``bits``; any shape."""
    flat = weight.view(-1)
    native = merges() if weight.device.type == bits.device.type == "cpu" and weight.element_size() in (2, 4) else None
    per_shard, stop = shard_numel(numel, num_shards), start + flat.numel()
    for first, last in _cut_at_shards(start, stop, per_shard):
        run, inside = flat[first - start : last - start], first % per_shard
        if native is None or inside % 8:
            apply_mask_(run, unpack_range(bits, numel, num_shards, first, last))
        else:
            at = first // per_shard * shard_bytes(numel, num_shards) + inside // 8
            native.pst_apply_bits(run.data_ptr(), run.element_size(), bits[at:].data_ptr(), run.numel())
    return weight


def _cut_at_shards(start: int, stop: int, per_shard: int) -> Iterator[tuple[int, int]]:
    """Cut [start, stop) where shards end."""
    while start < stop:
        last = min(stop, (start // per_shard + 1) * per_shard)
        yield start, last
        start = last


def checksum(shard: Tensor, count: int, start: int, seed: int) -> Tensor:
    """Checksum of the mask of flat weights [start, start + count), the bits of one shard; it *adds* over shards.

    The sum over all shards of a weight, modulo 2**64, depends on the mask and ``seed`` alone, not on where it was cut:
    sum of bit_i * 2**(i % 8) * hash(i // 8, seed), with the finaliser of splitmix64 (Steele et al., 2014) as hash.
    Returned as one signed int64, () and where ``shard`` is.
    """
    native = library() if shard.device.type == "cpu" else None
    if native is not None:
        return torch.tensor(_signed(native.pst_checksum(shard.data_ptr(), count, start, seed)))
    lead = start % 8
    if lead:
        keep = unpack_shard(shard, count)
        shard = pack_shard(torch.cat([keep.new_zeros(lead), keep]), blocks(lead + count, 8))
    values = shard[: blocks(lead + count, 8)].to(torch.int64)
    first = start // 8 + seed + 1
    numbers = torch.arange(first, first + values.numel(), dtype=torch.int64, device=values.device)
    return (values * splitmix64(numbers)).sum()


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def splitmix64(numbers: Tensor) -> Tensor:
    """A 64-bit hash of each number; int64 products wrap, as the algorithm wants."""

    def shift(x: Tensor, by: int) -> Tensor:  # logical, not arithmetic
        return (x >> by) & ((1 << (64 - by)) - 1)

    x = numbers * _signed(0x9E3779B97F4A7C15)
    x = (x ^ shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ shift(x, 31)

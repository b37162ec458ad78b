"""Masks as bits: one bit per weight, 1 keeps the weight, little-endian within a byte.

A mask consists of ``num_shards`` runs of bytes of equal length, one per ZeRO-3 shard of the weight. Shard i holds the
bits of flat weights [i * p, (i + 1) * p) with p = ceil(numel / num_shards), starting at bit 0 of its first byte and
padded with zero bits to whole bytes. ZeRO's split of the byte tensor then gives each rank the bits of its weights.
Files store the mask as a single shard.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pst_ds.core.kernels import library, merges
from pst_ds.core.kernels.triton.launch import blocks

INT_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtype of the same width as a float of that many bytes: masks are applied to weights as integers."""
NATIVE_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Dtypes of weights that native loops support, by their number in C++."""


def shard_numel(numel: int, num_shards: int) -> int:
    """Return the weights per shard, ceil(numel / num_shards). The last shards may have fewer."""
    return -(-numel // num_shards)


def shard_range(numel: int, num_shards: int, shard: int) -> tuple[int, int]:
    """Return the flat range [first, last) of a shard's weights; shorter or empty in the last shards."""
    share = shard_numel(numel, num_shards)
    return min(shard * share, numel), min((shard + 1) * share, numel)


def part_range(numel: int, num_shards: int, shard: int, parts: int) -> tuple[int, int]:
    """Return :func:`shard_range` of weights that are first divided into equal ``parts``, of which neighbouring shards
    hold different ones: shard i is in part i % parts."""
    part = numel // parts
    first, last = shard_range(part, num_shards // parts, shard // parts)
    start_of_part = shard % parts * part
    return start_of_part + first, start_of_part + last


def shard_bytes(numel: int, num_shards: int) -> int:
    """Return the bytes of the bits of one shard."""
    return -(-shard_numel(numel, num_shards) // 8)


def _unpack_bytes(data: Tensor) -> Tensor:
    """Return the bits of (n,) bytes as (8 n,) uint8 0 and 1."""
    if data.device.type == "cpu":  # numpy unpacks ten times as fast as torch shifts
        # data.numpy() would fix the size of the storage, which FSDP2 sets to 0 between passes.
        values = np.from_dlpack(data).view(np.uint8)
        return torch.from_numpy(np.unpackbits(values, bitorder="little"))
    shifts = torch.arange(8, dtype=torch.uint8, device=data.device)
    return (data.unsqueeze(-1) >> shifts).bitwise_and_(1).flatten()


def pack_shard(keep: Tensor, num_bytes: int) -> Tensor:
    """Pack ``keep`` (n,), bool or 0/1, into the bits of one shard: (num_bytes,) uint8, padded with zero bits."""
    if keep.device.type == "cpu":
        packed = torch.from_numpy(np.packbits(keep.contiguous().numpy(), bitorder="little"))
    else:
        flags = keep.view(torch.uint8)
        shifts = torch.arange(8, dtype=torch.uint8, device=keep.device)
        if flags.numel() % 8:
            flags = torch.cat([flags, flags.new_zeros(-flags.numel() % 8)])
        packed = (flags.reshape(-1, 8) << shifts).sum(-1, dtype=torch.uint8)  # distinct bits: the sum is an OR
    if packed.numel() == num_bytes:
        return packed
    out = torch.zeros(num_bytes, dtype=torch.uint8, device=keep.device)
    out[: packed.numel()] = packed
    return out


def unpack_shard(data: Tensor, count: int) -> Tensor:
    """Return the first ``count`` bits of one shard as (count,) uint8 0 and 1."""
    return _unpack_bytes(data[: -(-count // 8)])[:count]


def join_bits(runs: Sequence[tuple[Tensor, int]], num_bytes: int) -> Tensor:
    """Concatenate the bits of consecutive runs of one shard, given as (bits, number of bits), to (num_bytes,) uint8."""
    not_empty = [(bits, count) for bits, count in runs if count]
    if any(count % 8 for _, count in not_empty[:-1]):  # a run that ends inside a byte moves the bits of the next
        return pack_shard(torch.cat([unpack_shard(bits, count) for bits, count in not_empty]), num_bytes)
    parts = [bits[: -(-count // 8)] for bits, count in not_empty]
    # Most shards have one run, which needs no copy.
    if len(parts) == 1 and parts[0].numel() == num_bytes:
        return parts[0]
    return torch.cat([*parts, runs[0][0].new_zeros(num_bytes - sum(map(len, parts)))])


def unpack_range(bits: Tensor, numel: int, num_shards: int, start: int, stop: int) -> Tensor:
    """Return the mask of flat weights [start, stop) as uint8 0 and 1. ``bits``: the whole mask, of any shape."""
    bits = bits.view(-1)
    per_shard = shard_numel(numel, num_shards)
    per_shard_bytes = shard_bytes(numel, num_shards)
    pieces: list[Tensor] = []
    for begin, end in _cut_at_shards(start, stop, per_shard):
        shard, inside = divmod(begin, per_shard)
        count = end - begin
        first = shard * per_shard_bytes + inside // 8
        last = shard * per_shard_bytes + -(-(inside + count) // 8)
        pieces.append(_unpack_bytes(bits[first:last])[inside % 8 : inside % 8 + count])
    if not pieces:
        return bits.new_empty(0)
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(pieces)


def bits_of_range(bits: Tensor, numel: int, num_shards: int, start: int, stop: int) -> Tensor:
    """Return the bits of flat weights [start, stop), from bit 0 on; a view where ``start`` is at a byte of a shard.

    The last byte of a view may contain bits of the weights that follow.
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
    """Write the mask of a rectangle as integers for a bitwise AND: all ones to keep a weight, 0 to prune it.

    ``out``: (rows, cols), int16, int32 or int64. ``shape``: of the stored weight. Needs at most 2 * max(out.numel(),
    shape[1]) bytes in addition to ``out``.
    """
    row_length = shape[1]
    numel = shape[0] * shape[1]
    if row_length % 8 == 0 and cols.start % 8 == 0 and shard_numel(numel, num_shards) % 8 == 0:
        # Every row and every shard starts at a byte boundary.
        part = bits[: numel // 8].view(-1, row_length // 8)[rows, cols.start // 8 : -(-cols.stop // 8)]
        keep = _unpack_bytes(part.reshape(-1)).view(part.shape[0], -1)[:, : cols.stop - cols.start]
        return out.copy_(keep.view(torch.int8).neg_())  # -1 has all bits set
    step = max(1, out.numel() // row_length)
    for r0 in range(rows.start, rows.stop, step):  # whole rows, from which the columns are selected
        r1 = min(r0 + step, rows.stop)
        keep = unpack_range(bits, numel, num_shards, r0 * row_length, r1 * row_length).view(-1, row_length)[:, cols]
        out[r0 - rows.start : r1 - rows.start].copy_(keep.view(torch.int8).neg_())
    return out


def set_bits_(bits: Tensor, index: Tensor, chosen: Tensor) -> None:
    """Set the bits at positions ``index`` (n,) of ``bits`` in place where ``chosen`` (n,) bool is true.

    The bits must be unset and the chosen positions distinct. Native code needs an int32 index.
    """
    native = None
    if bits.device.type == "cpu" and index.dtype == torch.int32:
        native = library()
    if native is not None:
        index = index[chosen].contiguous()
        native.pst_set_bits(bits, index, index.numel())
        return
    ones = chosen.view(torch.uint8) << (index & 7).to(torch.uint8)
    # Each bit is set at most once, so the sum is an OR; no size depends on the data.
    bits.scatter_add_(0, (index >> 3).long(), ones)


def count_bits(before: Tensor, after: Tensor) -> Tensor:
    """Return (2,) int64 for two byte tensors of equal size: bits that differ, and bits set in ``after``."""
    counts = torch.zeros(2, dtype=torch.int64, device=after.device)
    native = None
    if before.device.type == after.device.type == "cpu":
        native = library()
    if native is not None:
        native.pst_count_bits(before, after, before.numel(), counts)
        return counts
    counts[0] = _unpack_bytes(before ^ after).sum(dtype=torch.int64)
    counts[1] = _unpack_bytes(after).sum(dtype=torch.int64)
    return counts


def pack_mask(keep: Tensor, num_shards: int = 1) -> Tensor:
    """Pack a whole mask, (numel,) bool or 0/1 in storage order, into ``num_shards`` shards of bits."""
    flat = keep.flatten()
    per_shard = shard_numel(flat.numel(), num_shards)
    num_bytes = shard_bytes(flat.numel(), num_shards)
    shards: list[Tensor] = []
    for shard in range(num_shards):
        shards.append(pack_shard(flat[shard * per_shard : (shard + 1) * per_shard], num_bytes))
    return torch.cat(shards)


def relayout(bits: Tensor, numel: int, num_shards: int, new_num_shards: int) -> Tensor:
    """Return the same mask, of any shape, in a different number of shards: flat bytes."""
    if num_shards == new_num_shards:
        return bits.flatten().clone()
    return pack_mask(unpack_range(bits, numel, num_shards, 0, numel), new_num_shards)


def all_ones(numel: int, num_shards: int) -> Tensor:
    """Return a mask that keeps every weight. Padding bits are zero."""
    per_shard = shard_numel(numel, num_shards)
    bits = torch.full((num_shards, shard_bytes(numel, num_shards)), 255, dtype=torch.uint8)
    whole = num_shards  # shards with as many weights as possible
    remaining = 0  # weights of the shard after these; later ones are empty
    if per_shard:
        whole, remaining = divmod(numel, per_shard)
    if per_shard % 8:
        bits[:whole, -1] = (1 << per_shard % 8) - 1
    if whole < num_shards:
        bits[whole:] = 0
        bits[whole, : remaining // 8] = 255
        if remaining % 8:
            bits[whole, remaining // 8] = (1 << remaining % 8) - 1
    return bits.flatten()


def apply_mask_(weight: Tensor, mask: Tensor) -> Tensor:
    """Set the pruned entries of ``weight`` to +0.0 in place. ``mask``: uint8 0/1 of the same shape.

    A bitwise AND is correct for NaN, infinity and -0.0, where multiplying would leave NaN or -0.0.
    """
    as_int = weight.view(INT_OF_SIZE[weight.element_size()])
    as_int.bitwise_and_(mask.view(torch.int8).neg().to(as_int.dtype))
    return weight


def apply_range_(weight: Tensor, bits: Tensor, numel: int, num_shards: int, start: int) -> Tensor:
    """Apply the whole mask ``bits`` in place to contiguous flat weights that start at index ``start``; any shape."""
    flat = weight.view(-1)
    native = None
    if weight.device.type == bits.device.type == "cpu" and weight.element_size() in (2, 4):
        native = merges()
    per_shard = shard_numel(numel, num_shards)
    stop = start + flat.numel()
    for first, last in _cut_at_shards(start, stop, per_shard):
        run = flat[first - start : last - start]
        inside = first % per_shard
        if native is None or inside % 8:  # the native loop starts at bit 0 of a byte
            apply_mask_(run, unpack_range(bits, numel, num_shards, first, last))
        else:
            first_byte = first // per_shard * shard_bytes(numel, num_shards) + inside // 8
            native.pst_apply_bits(run, run.element_size(), bits[first_byte:], run.numel())
    return weight


def _cut_at_shards(start: int, stop: int, per_shard: int) -> Iterator[tuple[int, int]]:
    """Yield the flat range [start, stop) in pieces [first, last) that are each in one shard."""
    while start < stop:
        last = min(stop, (start // per_shard + 1) * per_shard)
        yield start, last
        start = last


def checksum(shard: Tensor, count: int, start: int, seed: int) -> Tensor:
    """Return a checksum of the mask of flat weights [start, start + count), given as the bits of one shard.

    Checksums add over shards: the sum modulo 2**64 over all shards of a weight depends on the mask and ``seed`` only.
    It is the sum of bit_i * 2**(i % 8) * hash(i // 8, seed), with the finaliser of splitmix64 (Steele et al., 2014) as
    the hash: a signed int64 scalar on the device of ``shard``.
    """
    native = None
    if shard.device.type == "cpu":
        native = library()
    if native is not None:
        return torch.tensor(_signed(native.pst_checksum(shard, count, start, seed)))
    # Bytes count from the weight's first, so the bits move to where they are in their byte there.
    lead = start % 8
    if lead:
        keep = unpack_shard(shard, count)
        shard = pack_shard(torch.cat([keep.new_zeros(lead), keep]), blocks(lead + count, 8))
    values = shard[: blocks(lead + count, 8)].to(torch.int64)
    first = start // 8 + seed + 1
    numbers = torch.arange(first, first + values.numel(), dtype=torch.int64, device=values.device)
    return (values * splitmix64(numbers)).sum()


def _signed(value: int) -> int:
    """Return the signed 64-bit integer with the bits of an unsigned one, as torch has no unsigned arithmetic."""
    if value >= 1 << 63:
        return value - (1 << 64)
    return value


def splitmix64(numbers: Tensor) -> Tensor:
    """Hash each number to 64 bits. int64 products wrap around, as the algorithm requires."""

    def shift(x: Tensor, by: int) -> Tensor:  # logical shift, not arithmetic
        return (x >> by) & ((1 << (64 - by)) - 1)

    x = numbers * _signed(0x9E3779B97F4A7C15)
    x = (x ^ shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ shift(x, 31)

"""Halo exchange: fetch the weights around a rank's shard from the ranks that hold them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pst_ds.core.coded_weight import CodedRun
from pst_ds.parallel import sharding

Range = tuple[int, int]
Widen = Callable[[int, int], Range]
"""Maps a rank's shard [start, stop) to the flat range that it needs and that contains it; monotonic; empty if it is."""
Piece = tuple[int, int, int, int]
"""(the other rank, index of the parameter, first and last flat index + 1)"""


@dataclass(frozen=True, slots=True)
class Halo:
    """Flat values right before and right after this rank's shard; both may be empty."""

    before: Tensor
    after: Tensor


def fetch_halos(
    params: Sequence[nn.Parameter],
    splits: Sequence[sharding.Split],
    widen: Sequence[Widen],
    shards: Sequence[Tensor | CodedRun],
) -> list[Halo]:
    """Fetch the values outside this rank's shard that it needs, with one all-to-all for all parameters. Collective.

    Every rank works out from the splits which rank sends what to which. Free if nothing is partitioned.

    Args:
        params: parameters that are partitioned like the values.
        splits: how the values are divided over ranks.
        widen: maps each shard to the range that its rank needs.
        shards: this rank's flat values.
    """
    if not params or sharding.num_shards(params[0]) == 1:
        return [Halo(values[:0], values[:0]) for values in shards]
    pieces = [_pieces(i, split, widen[i]) for i, split in enumerate(splits)]
    incoming, outgoing = (sorted(chain.from_iterable(which)) for which in zip(*pieces, strict=True))
    received = _exchange(params[0], splits, shards, incoming, outgoing)
    before, after = ([[values[:0]] for values in shards] for _ in range(2))
    for (sender, i, _, _), values in zip(incoming, received, strict=True):  # by rank, so by rising flat index
        (before if sender < splits[i].own else after)[i].append(values)
    return [Halo(_joined(b), _joined(a)) for b, a in zip(before, after, strict=True)]


def _joined(pieces: list[Tensor]) -> Tensor:
    """Return neighbouring pieces as one tensor: mostly there is one at most, which needs no copy."""
    return pieces[-1] if len(pieces) <= 2 else torch.cat(pieces)


def _pieces(i: int, split: sharding.Split, widen: Widen) -> tuple[list[Piece], list[Piece]]:
    """Return the incoming and the outgoing pieces of a parameter."""
    own = split.range_of(split.own)
    needed = widen(*own)
    assert needed[0] <= own[0] <= own[1] <= needed[1], f"[{needed[0]}, {needed[1]}) does not hold [{own[0]}, {own[1]})"
    incoming, outgoing = list[Piece](), list[Piece]()
    for others in (range(split.own - 1, -1, -1), range(split.own + 1, split.ranks)):
        for other in others:
            theirs = split.range_of(other)
            received, sent = _common(needed, theirs), _common(own, widen(*theirs))
            if received:
                incoming.append((other, i, received.start, received.stop))
            if sent:
                outgoing.append((other, i, sent.start, sent.stop))
            if not received and not sent:
                break  # ranks further away need and have nothing either
    return incoming, outgoing


def _common(one: Range, other: Range) -> range:
    return range(max(one[0], other[0]), min(one[1], other[1]))


def _exchange(
    param: nn.Parameter,
    splits: Sequence[sharding.Split],
    shards: Sequence[Tensor | CodedRun],
    incoming: list[Piece],
    outgoing: list[Piece],
) -> list[Tensor]:
    """Send the ``outgoing`` pieces of this rank's shards; return the ``incoming`` ones, of any dtype. Collective."""
    group, world = sharding.process_group(param), sharding.num_shards(param)
    home = shards[0].device
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else home

    def bytes_by_rank(pieces: list[Piece]) -> list[int]:
        total = [0] * world
        for other, i, start, stop in pieces:
            total[other] += (stop - start) * shards[i].element_size()
        return total

    send = [torch.empty(0, dtype=torch.uint8, device=device)]
    for _, i, start, stop in outgoing:
        first, _ = splits[i].range_of(splits[i].own)
        send.append(shards[i][start - first : stop - first].contiguous().view(torch.uint8).to(device))
    into, out_of = bytes_by_rank(incoming), bytes_by_rank(outgoing)
    received = torch.empty(sum(into), dtype=torch.uint8, device=device)
    dist.all_to_all_single(received, torch.cat(send), into, out_of, group=group)
    pieces = received.to(home).split([(stop - start) * shards[i].element_size() for _, i, start, stop in incoming])
    dtypes = [shards[i].dtype for _, i, _, _ in incoming]
    return [
        (piece.clone() if piece.storage_offset() % dtype.itemsize else piece).view(dtype)
        for piece, dtype in zip(pieces, dtypes, strict=True)
    ]

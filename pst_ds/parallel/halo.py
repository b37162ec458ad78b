"""Halo exchange: fetch the weights around a rank's shard from the ranks that hold them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pst_ds.core.coded_weight import CodedRun
from pst_ds.parallel import sharding

Range = tuple[int, int]
Widen = Callable[[int, int], Range]
"""Maps a rank's shard [start, stop) to the flat range that it needs and that contains it; monotonic; empty if it is."""


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """Flat values [start, stop) of a parameter that travel between this rank and another.

    The order of the fields is the order of the pieces in the exchange, on the sender and on the receiver.
    """

    other: int
    """The other rank."""
    param: int
    """Index of the parameter."""
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start


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
    incoming: list[Piece] = []
    outgoing: list[Piece] = []
    for index, split in enumerate(splits):
        param_incoming, param_outgoing = _pieces(index, split, widen[index])
        incoming += param_incoming
        outgoing += param_outgoing
    # all-to-all sends in the order of the ranks; within a rank, both sides list the parameters alike
    incoming.sort()
    outgoing.sort()
    received = _exchange(params[0], splits, shards, incoming, outgoing)
    # the empty start gives a halo without pieces its dtype and device
    before = [[values[:0]] for values in shards]
    after = [[values[:0]] for values in shards]
    for piece, values in zip(incoming, received, strict=True):  # by rank, so by rising flat index
        is_before = piece.other < splits[piece.param].own
        side = before if is_before else after
        side[piece.param].append(values)
    halos: list[Halo] = []
    for pieces_before, pieces_after in zip(before, after, strict=True):
        halos.append(Halo(_joined(pieces_before), _joined(pieces_after)))
    return halos


def _joined(pieces: list[Tensor]) -> Tensor:
    """Return neighbouring pieces as one tensor. The first one is empty."""
    if len(pieces) <= 2:
        return pieces[-1]  # mostly there is one more at most, which needs no copy
    return torch.cat(pieces)


def _pieces(param: int, split: sharding.Split, widen: Widen) -> tuple[list[Piece], list[Piece]]:
    """Return the incoming and the outgoing pieces of the parameter with index ``param``."""
    start, stop = split.range_of(split.own)
    first, last = widen(start, stop)
    assert first <= start <= stop <= last, f"[{first}, {last}) does not hold [{start}, {stop})"
    incoming: list[Piece] = []
    outgoing: list[Piece] = []
    # from this rank to the first one, and to the last one
    for others in (range(split.own - 1, -1, -1), range(split.own + 1, split.ranks)):
        for other in others:
            other_range = split.range_of(other)
            received = _common((first, last), other_range)
            sent = _common((start, stop), widen(*other_range))
            if received:
                incoming.append(Piece(other=other, param=param, start=received.start, stop=received.stop))
            if sent:
                outgoing.append(Piece(other=other, param=param, start=sent.start, stop=sent.stop))
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
    group = sharding.process_group(param)
    world = sharding.num_shards(param)
    home = shards[0].device
    device = home
    if dist.get_backend(group) == "nccl":  # nccl only takes device memory, and offloaded shards are in host memory
        device = torch.device("cuda", torch.cuda.current_device())

    def nbytes(piece: Piece) -> int:
        return piece.count * shards[piece.param].element_size()

    def bytes_by_rank(pieces: list[Piece]) -> list[int]:
        total = [0] * world
        for piece in pieces:
            total[piece.other] += nbytes(piece)
        return total

    # as bytes, so that values of several dtypes go in one collective; the empty start lets torch.cat take no pieces
    send = [torch.empty(0, dtype=torch.uint8, device=device)]
    for piece in outgoing:
        split = splits[piece.param]
        first, _ = split.range_of(split.own)
        values = shards[piece.param][piece.start - first : piece.stop - first]
        send.append(values.contiguous().view(torch.uint8).to(device))
    received_bytes = bytes_by_rank(incoming)
    sent_bytes = bytes_by_rank(outgoing)
    # every rank knows both lists, so sizes need no exchange and the host does not wait
    received = torch.empty(sum(received_bytes), dtype=torch.uint8, device=device)
    # ranks that exchange nothing must call it too
    dist.all_to_all_single(received, torch.cat(send), received_bytes, sent_bytes, group=group)
    parts = received.to(home).split([nbytes(piece) for piece in incoming])
    arrived: list[Tensor] = []
    for piece, part in zip(incoming, parts, strict=True):
        dtype = shards[piece.param].dtype
        # view() needs an aligned start, which a part behind values of a smaller dtype may not have
        if part.storage_offset() % dtype.itemsize:
            part = part.clone()
        arrived.append(part.view(dtype))
    return arrived

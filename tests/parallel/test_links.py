"""Bytes of collectives by link, against every message of a ring and of an all-to-all."""

from __future__ import annotations

import pytest

from pst_ds.parallel.links import Group, Received


def _mean(messages, ranks, node_size):
    """The mean of what the ranks receive: ``messages`` are (sender, receiver, bytes)."""
    within = sum(n for a, b, n in messages if a // node_size == b // node_size)
    return Received(within / ranks, sum(n for *_, n in messages) / ranks - within / ranks)


@pytest.mark.parametrize(("ranks", "node_size", "nodes"), [(1, 8, 1), (8, 8, 1), (16, 8, 2), (4, 1, 4), (24, 4, 6)])
def test_bytes_are_those_of_all_messages(ranks, node_size, nodes):
    shard = 1000
    # in every turn but the last, each rank passes on the shard that it got before
    ring = [(rank, (rank + 1) % ranks, shard) for rank in range(ranks) for _ in range(ranks - 1)]
    direct = [(a, b, shard) for a in range(ranks) for b in range(ranks) if a != b]
    group = Group(ranks, nodes)
    for found, messages in ((group.gathered, ring), (group.exchanged, direct)):
        expected, counted = _mean(messages, ranks, node_size), found(shard * ranks)
        assert (counted.within, counted.between) == pytest.approx((expected.within, expected.between))

"""Bytes of collectives are counted inside a context, and torch is as before afterwards."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from pst_ds.parallel import traffic
from pst_ds.parallel.links import NOTHING, Received


def _received_inside_and_after():
    before = dict(vars(dist.ProcessGroup))
    values = torch.zeros(100)
    traffic.take()
    with traffic.counting(node_size=1):
        dist.all_reduce(values)
    inside = traffic.take()
    unpatched = dict(vars(dist.ProcessGroup)) == before
    dist.all_reduce(values)
    return inside, unpatched, traffic.take() == NOTHING


@pytest.mark.zero3
def test_collectives_are_counted_inside_the_context_only(run_ranks):
    # a sum of 400 bytes scatters and gathers: half of them come from the other rank, twice
    for received, unpatched, nothing_after in run_ranks(_received_inside_and_after, 2):
        assert received == Received(0, 400)
        assert unpatched
        assert nothing_after

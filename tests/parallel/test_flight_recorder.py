"""Numbers of collectives, as torch's flight recorder has them."""

from __future__ import annotations

import torch
import torch.distributed as dist

from pst_ds.parallel.flight_recorder import FlightRecorder


def _numbers_of_two_groups():
    """Return what the recorder says before, between and after collectives of the world and of another group."""
    other = dist.new_group([0, 1])
    dist.all_reduce(torch.ones(1))
    dist.all_reduce(torch.ones(1), group=other)
    recorder = FlightRecorder()
    recorder.sample()
    is_quiet = not recorder.sample()
    before = recorder.groups()["0"].reached
    for _ in range(3):
        dist.all_reduce(torch.ones(1))
    dist.all_reduce(torch.ones(1), group=other)
    is_noticed = recorder.sample()
    groups = recorder.groups()
    name = other.group_name
    dist.destroy_process_group(other)
    return {
        "is_quiet": is_quiet,
        "is_noticed": is_noticed,
        "counted": groups["0"].reached - before,
        "counted_by_other": groups[name].reached,
        "members": groups[name].members,
        "waits_at": groups["0"].waits_at,
        "is_forgotten": name not in recorder.groups(),
    }


def test_each_group_is_counted_alone_on_every_rank(run_ranks):
    for numbers in run_ranks(_numbers_of_two_groups, 2):
        assert numbers == {
            "is_quiet": True,
            "is_noticed": True,
            "counted": 3,
            "counted_by_other": 2,
            "members": [0, 1],
            "waits_at": 0,
            "is_forgotten": True,
        }


def test_without_a_recorder_no_group_is_told(monkeypatch):
    monkeypatch.delattr(torch._C._distributed_c10d, "_dump_fr_trace")
    recorder = FlightRecorder()
    assert recorder.groups() == {}
    assert not recorder.sample()

"""Which rank a stalled run blames, also in simulated stalls with slow answers."""

from __future__ import annotations

import random

import pytest

from pst_ds.parallel.stall_verdict import (
    MARKS,
    VERDICT_FILE,
    SignsOfLife,
    StallReport,
    blamed_hosts,
    collect,
    verdict_of,
)


def _report(rank, *, beats=9, idle=12.0, waits=True, doing="batch 3"):
    return StallReport(rank, f"host{rank}", 100 + rank, doing, beats, idle, waits, "stack")


@pytest.mark.parametrize(
    ("reports", "world", "said"),
    [
        ([_report(0), _report(2)], 4,
         "rank 1 (host1), 3 (host3) gave no sign of life: its process is stopped, or its host is down"),
        ([_report(0), _report(1, beats=8, waits=False)], 2,
         "rank 1 (host1, pid 101) hangs in batch 3, and the others wait for it"),
        ([_report(0, waits=False), _report(1, beats=8, waits=False)], 2, "rank 1 (host1, pid 101) hangs in batch 3,"),
        ([_report(0, beats=8), _report(1)], 2, "every rank waits for another: the network between them is cut"),
        ([_report(0), _report(1, beats=8, waits=False)], 3, "rank 1 (host1, pid 101) hangs in batch 3, and the others"),
        ([_report(0), _report(1, beats=8, waits=False, idle=3.0)], 2, "work that goes on: rank 1 (host1) in batch 3"),
        ([_report(0, waits=False)], 1, "rank 0 (host0, pid 100) hangs in batch 3. Continue"),
    ],
)  # fmt: skip
def test_the_rank_to_look_at_is_named(reports, world, said):
    text = verdict_of(reports, [f"host{i}" for i in range(world)], 12.0).message(12.0)
    assert text.startswith("pst-ds train: no progress for 12 seconds (train.stall_timeout_seconds): ")
    assert said in text
    assert text.endswith("Continue from the newest checkpoint with --resume")


def test_the_hosts_to_leave_out_can_be_read_back(tmp_path):
    hosts = ["node0", "node0", "node1", "node1"]
    assert blamed_hosts(tmp_path) == []
    verdict_of([_report(0), _report(1)], hosts, 12.0).write(tmp_path)
    assert blamed_hosts(tmp_path) == ["node1"]
    verdict_of([_report(i) for i in range(4)], hosts, 12.0).write(tmp_path)
    assert blamed_hosts(tmp_path) == []
    verdict_of([_report(0), _report(2)], [""] * 4, 12.0).write(tmp_path)  # hosts that nobody knows
    assert blamed_hosts(tmp_path) == []
    (tmp_path / VERDICT_FILE).write_text('{"hosts": 3}')
    assert blamed_hosts(tmp_path) == []


_RANKS, _PER_HOST, _TIMEOUT = 16, 4, 1800.0
_HOSTS = [f"host{rank // _PER_HOST}" for rank in range(_RANKS)]
_FAULTS = ("hang", "stopped process", "host down", "long work", "network")


class _Store:
    """A store in this process."""

    def __init__(self):
        self.values = {}

    def add(self, key, amount):
        self.values[key] = self.values.get(key, 0) + amount
        return self.values[key]

    def set(self, key, value):
        self.values[key] = value.encode()

    def get(self, key):
        return self.values[key]

    def check(self, keys):
        return all(key in self.values for key in keys)


class _Stall:
    """A simulated stall that is noticed at second 0: its fault, and when the ranks give signs of life and answer."""

    def __init__(self, seed):
        self.draw = random.Random(seed)
        self.fault, self.rank = self.draw.choice(_FAULTS), self.draw.randrange(_RANKS)
        self.host = _HOSTS[self.rank]
        self.dead = [self.rank] if self.fault == "stopped process" else []
        if self.fault == "host down":
            self.dead = [rank for rank in range(_RANKS) if _HOSTS[rank] == self.host]
        self.slowdown = 10 ** self.draw.uniform(0, 2)  # storage and network are slow for all
        self.store = _Store()
        self.now = 0.0
        self.signs = [SignsOfLife(self.store, "stall", rank, lambda: self.now) for rank in range(_RANKS)]

    def delay(self):
        """Seconds by which a rank is late: heavy-tailed, without a variance."""
        return 0.02 * self.slowdown * (1 - self.draw.random()) ** (-1 / 1.5)

    def give_signs(self):
        """Give the signs of life until second 0; those of ranks that stop end when the stall begins."""
        times = []
        for rank in range(_RANKS):
            now, end = -2 * _TIMEOUT - self.draw.uniform(0, 30), 0.0
            if rank in self.dead:
                end = -_TIMEOUT + self.draw.uniform(-30, 30)
            while (now := now + 2 * _TIMEOUT / MARKS + self.delay()) < end:
                times.append((now, rank))
        for self.now, rank in sorted(times):
            self.signs[rank].give()

    def report(self, rank):
        is_behind = rank == self.rank and self.fault in ("hang", "long work")
        is_busy = is_behind and self.fault == "long work"
        idle = self.draw.uniform(0, 60) if is_busy else _TIMEOUT - self.draw.uniform(0, 30)
        return _report(rank, beats=8 if is_behind else 9, idle=idle, waits=not is_behind)

    def blamed(self):
        """Hosts that the first living rank blames after waiting for a quarter of the timeout."""
        self.give_signs()
        alive = [rank for rank in range(_RANKS) if rank not in self.dead]
        answers = {rank: (0.0 if rank == alive[0] else self.delay(), self.report(rank)) for rank in alive}
        self.now = 0.0
        silent = self.signs[alive[0]].silent(_RANKS, _TIMEOUT / 2)

        def arrived():
            return {rank: report for rank, (after, report) in answers.items() if after <= self.now}

        def pauses():
            for self.now in range(int(_TIMEOUT / 4)):
                yield

        found, late = collect(set(range(_RANKS)) - silent, arrived, pauses())
        return verdict_of(list(found.values()), _HOSTS, _TIMEOUT, late).hosts


def test_stalls_with_slow_answers_blame_the_faulty_host_and_no_other():
    found = faulty = 0
    for seed in range(1000):
        stall = _Stall(seed)
        is_fault, blamed = stall.fault not in ("long work", "network"), stall.blamed()
        assert blamed in ([], [stall.host] if is_fault else []), (seed, stall.fault)
        faulty += is_fault
        found += bool(blamed)
    assert found >= 0.99 * faulty > 500

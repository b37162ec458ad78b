"""Simulate stalls of NCCL and count how often the verdict names the faulty rank, and how often a healthy one.

Ranks run one program of collectives over three groups: all ranks, neighbours and strides. A host enters collectives
ahead of its device. One rank hangs on its host or, with start times recorded, on its device; is slow; sends no report;
or a collective hangs in the network. Reports are taken at different times.

    python -m tools.chaos.stalls --ranks 64 --stalls 1000
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass

from pst_ds.parallel.stall_verdict import GroupState, StallReport, Verdict, verdict_of

TIMEOUT = 1800.0
PER_HOST = 8
PROGRAM = 120
"""Collectives of the simulated part of the program."""
FAULTS = ("host hangs", "device hangs", "slow", "no report", "network")
NAMED_FAULTS = ("host hangs", "device hangs")


@dataclass(slots=True)
class Found:
    """Counts over all stalls."""

    faulty: int = 0
    """Stalls with a rank that hangs."""
    named: int = 0
    """Those in which it is named."""
    falsely_named: int = 0
    """Stalls in which another rank is named."""


def simulated(*, ranks: int, stalls: int, seed: int) -> Found:
    """Simulate ``stalls`` stalls of ``ranks`` ranks."""
    found = Found()
    for number in range(stalls):
        stall = Stall(ranks, random.Random(f"{seed}/{number}"))
        named = stall.verdict().ranks
        if stall.fault in NAMED_FAULTS:
            found.faulty += 1
            found.named += named == [stall.rank]
        # a slow rank may be named, since the others wait for it
        allowed = stall.fault in (*NAMED_FAULTS, "slow")
        found.falsely_named += bool(named) and (named != [stall.rank] or not allowed)
    return found


class Stall:
    """A stall of a random fault."""

    def __init__(self, ranks: int, draw: random.Random):
        self._draw = draw
        self._ranks = ranks
        self.fault = draw.choice(FAULTS)
        self.rank = draw.randrange(ranks)
        self._has_start_times = self.fault == "device hangs" or draw.random() < 0.5
        kinds = [self._group_of_all, self._neighbours, self._stride]
        self._program = [draw.choice(kinds) for _ in range(PROGRAM)] + [self._group_of_all]
        self._fault_at = draw.randrange(PROGRAM // 2)
        """Position in the program before which the rank hangs, or at which the network does."""

    def _group_of_all(self, rank: int) -> list[int]:
        return list(range(self._ranks))

    def _neighbours(self, rank: int) -> list[int]:
        first = rank // PER_HOST * PER_HOST
        return list(range(first, first + PER_HOST))

    def _stride(self, rank: int) -> list[int]:
        return list(range(rank % PER_HOST, self._ranks, PER_HOST))

    def verdict(self) -> Verdict:
        entered, started, completed = self._positions()
        reports = []
        for rank in range(self._ranks):
            if self.fault != "no report" or rank != self.rank:
                reports.append(self._report(rank, entered[rank], started[rank], completed[rank]))
        hosts = [f"host{rank // PER_HOST}" for rank in range(self._ranks)]
        return verdict_of(reports, hosts, TIMEOUT)

    def _positions(self) -> tuple[list[int], list[int], list[set[int]]]:
        """Return how many collectives each host has entered and each device has started, and which are complete.

        A device runs its collectives in order, here; a host is at most some collectives ahead of its device.
        """
        ahead = [self._draw.randrange(1, 12) for _ in range(self._ranks)]
        entered = [0] * self._ranks
        started = [0] * self._ranks
        completed: list[set[int]] = [set() for _ in range(self._ranks)]
        while True:
            moved = False
            for rank in range(self._ranks):
                limit = min(len(completed[rank]) + ahead[rank], len(self._program))
                reach = limit
                if rank == self.rank and self.fault in ("host hangs", "slow", "no report"):
                    limit = min(limit, self._fault_at)
                    reach = limit
                if rank == self.rank and self.fault == "device hangs":
                    reach = min(limit, self._fault_at)
                device = min(len(completed[rank]) + 1, reach)
                moved |= entered[rank] < limit or started[rank] < device
                entered[rank] = max(entered[rank], limit)
                started[rank] = max(started[rank], device)
            for rank in range(self._ranks):
                position = len(completed[rank])
                if position == len(self._program) or position >= started[rank]:
                    continue
                members = self._program[position](rank)
                hangs = self.fault == "network" and position == self._fault_at and self.rank in members
                if not hangs and all(started[member] > position for member in members):
                    completed[rank].add(position)
                    moved = True
            if not moved:
                return entered, started, completed

    def _report(self, rank: int, entered: int, started: int, completed: set[int]) -> StallReport:
        seconds = TIMEOUT - self._draw.uniform(0, TIMEOUT / 4)  # the report is taken earlier or later
        numbers: dict[str, int] = {}
        groups: dict[str, GroupState] = {}
        for position, group in enumerate(self._program[:entered]):
            members = group(rank)
            name = f"{group.__name__} {members[0]}"
            number = numbers[name] = numbers.get(name, 0) + 1
            before = groups.get(name, GroupState(members, 0, 0, seconds))
            reached = before.reached
            if position < started or not self._has_start_times:
                reached = number
            waits_at = before.waits_at or (0 if position in completed else number)
            groups[name] = GroupState(members, reached, waits_at, seconds)
        if not groups:
            groups = {"none": GroupState([rank], 0, 0, seconds)}
        is_slow = self.fault == "slow" and rank == self.rank
        idle = self._draw.uniform(0, TIMEOUT / 3) if is_slow else seconds
        return StallReport(rank, f"host{rank // PER_HOST}", rank, "a batch", idle, groups, "")


def main(arguments: list[str] | None = None) -> int:
    """Print the counts; return 0 if the targets are met, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=64, help="a multiple of 8")
    parser.add_argument("--stalls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    found = simulated(ranks=given.ranks, stalls=given.stalls, seed=given.seed)
    print(
        f"{given.stalls} stalls of {given.ranks} ranks: {found.named} of {found.faulty} hanging ranks named, ", end=""
    )
    print(f"{found.falsely_named} healthy ranks named")
    return int(bool(found.falsely_named) or found.named < 0.95 * found.faulty)


if __name__ == "__main__":
    sys.exit(main())

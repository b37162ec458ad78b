"""Decide which rank a stalled run waits for, from the reports of its ranks. Needs no torch."""

import contextlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

VERDICT_FILE = "verdict.json"
"""Name of the verdict in the folder of stalls."""
LONG_SHARE = 0.5
"""Share of the timeout after which a wait is evidence. The rest covers reports that are late, and ranks whose hosts
entered more collectives while their devices waited."""


@dataclass(frozen=True, slots=True)
class GroupState:
    """Collectives of a rank in one of its groups, numbered from 1."""

    members: list[int]
    """Ranks of the group."""
    reached: int
    """Last collective that the device has started, or that the host has entered if start times are not recorded."""
    waits_at: int
    """First collective that is entered and not complete; 0 if all are complete."""
    seconds: float
    """Time for which these numbers have not changed."""


@dataclass(frozen=True, slots=True)
class StallReport:
    """State of a rank when some rank has made no progress for too long."""

    rank: int
    host: str
    pid: int
    doing: str
    idle: float
    """Seconds since the last heartbeat and the last change in the numbers of collectives."""
    groups: Mapping[str, GroupState]
    """Collectives by the name of their group; empty if they are not known."""
    stack: str
    """For readers; no evidence, since a call of NCCL returns while its collective waits."""

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the report that :func:`json.dumps` has written as a table."""
        table = json.loads(text)
        groups = {name: GroupState(**group) for name, group in table.pop("groups").items()}
        return cls(groups=groups, **table)

    @property
    def waits(self) -> bool:
        """Whether a collective that the rank has entered is not complete."""
        return any(group.waits_at for group in self.groups.values())

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The ranks to look at, with their known hosts; empty if no rank is known to be at fault."""

    ranks: list[int]
    hosts: list[str]
    why: str
    unseen: list[int] = field(default_factory=list)
    """Ranks that sent no report. They are not known to be at fault: a report may be late."""

    def write(self, folder: Path, reports: Collection[StallReport] = ()) -> None:
        """Write the verdict with the reports behind it. A full disk must not keep the process alive."""
        table = asdict(self) | {"reports": [asdict(report) for report in reports]}
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / VERDICT_FILE).write_text(json.dumps(table) + "\n", encoding="utf-8")

    def message(self, timeout: float) -> str:
        """Return the last line of the run's output."""
        return (
            f"pst-ds train: no progress for {timeout:g} seconds (train.stall_timeout_seconds): "
            f"{self.why}. Continue from the newest checkpoint with --resume"
        )


def verdict_of(reports: Collection[StallReport], hosts: Sequence[str], timeout: float) -> Verdict:
    """Judge the ranks on ``hosts`` by the reports that arrived.

    A rank waits for the members of a group that have not reached the collective at which it waits. As all ranks enter
    their collectives in one order, a rank only waits for ranks that are behind it. The rank that is furthest behind is
    named if it waits for no other, has done nothing for long, and all others have waited for it for long, directly or
    through ranks that wait for it. Anything else names nobody.
    """
    by_rank = {report.rank: report for report in reports}
    unseen = sorted(set(range(len(hosts))) - by_rank.keys())
    if unseen:
        names = ", ".join(f"{rank} ({hosts[rank]})" if hosts[rank] else f"{rank}" for rank in unseen)
        return Verdict([], [], f"no report of rank {names}: stopped, cut off or late, or its host is down", unseen)
    least = LONG_SHARE * timeout
    behind = [report for report in reports if not _blockers(report, by_rank) and not _is_stuck_inside(report)]
    if len(hosts) > 1 and not all(report.groups for report in reports):
        return Verdict([], [], "the numbers of collectives are not known, so no rank can be named; see the stacks")
    if len(behind) == 1 and behind[0].idle >= least and _all_wait_for(behind[0].rank, by_rank, least):
        found = behind[0]
        why = f"{found} hangs in {found.doing}"
        if len(hosts) > 1:
            why += ", and the others wait for it"
        # the launcher's name of the host, if known, since it is the one that a restart can exclude
        return Verdict([found.rank], [hosts[found.rank] or found.host], why)
    return Verdict([], [], _why_nobody(reports, behind, least))


def _blockers(report: StallReport, by_rank: Mapping[int, StallReport], least: float = 0.0) -> set[int]:
    """Return the other ranks that have not reached a collective in which this one has waited for ``least`` seconds."""
    found: set[int] = set()
    for name, group in report.groups.items():
        # a collective that its own device has not started waits for earlier work of this rank
        if not 0 < group.waits_at <= group.reached or group.seconds < least:
            continue
        for member in group.members:
            theirs = by_rank[member].groups.get(name)  # None before their first collective
            if member != report.rank and (theirs is None or theirs.reached < group.waits_at):
                found.add(member)
    return found


def _is_stuck_inside(report: StallReport) -> bool:
    """Return whether the rank has started a collective that is not complete. Then the network may be at fault."""
    return any(0 < group.waits_at <= group.reached for group in report.groups.values())


def _all_wait_for(rank: int, by_rank: Mapping[int, StallReport], least: float) -> bool:
    """Return whether every other rank has waited for ``least`` seconds for ``rank``, or for ranks that wait for it."""
    blockers = {other: _blockers(report, by_rank, least) for other, report in by_rank.items() if other != rank}
    reached = {rank}
    while True:
        # ranks that only wait for each other are never added
        more = {other for other, ranks in blockers.items() if ranks & reached} - reached
        if not more:
            # hosts enter collectives ahead of their devices, so one that all have entered may wait for a device
            more = {other for other in by_rank.keys() - reached if _waits_with(by_rank[other], reached, by_rank, least)}
        if not more:
            return reached == by_rank.keys()
        reached |= more


def _waits_with(report: StallReport, ranks: set[int], by_rank: Mapping[int, StallReport], least: float) -> bool:
    """Return whether a rank without blockers has waited long in a collective in which one of ``ranks`` waits too."""
    if _blockers(report, by_rank):
        return False
    for name, group in report.groups.items():
        if not 0 < group.waits_at <= group.reached or group.seconds < least:
            continue
        for member in ranks & set(group.members):
            theirs = by_rank[member].groups.get(name)
            if theirs is not None and theirs.waits_at == group.waits_at:
                return True
    return False


def _why_nobody(reports: Collection[StallReport], behind: Sequence[StallReport], least: float) -> str:
    if not any(report.waits for report in reports):
        return "no rank waits in a collective, so none can be named; see what each one does"
    active = [f"{report} in {report.doing}" for report in behind if report.idle < least]
    if active:
        return f"the others wait for work that goes on: {'; '.join(active)}. Raise the timeout if that is normal"
    if any(_is_stuck_inside(report) for report in reports) and not behind:
        return "all ranks have entered the same collectives; the network or a device does not complete one"
    return "the collectives of the ranks do not show one that all others wait for; see what each one does"

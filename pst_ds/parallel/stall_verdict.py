"""Decide which ranks and hosts a stalled run has to look at, from the reports of its ranks. Needs no torch."""

import contextlib
import json
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

VERDICT_FILE = "verdict.json"
"""Name of the verdict in the folder of stalls."""
MARKS = 200
"""Signs of life that a rank gives in twice the timeout, and remembers."""


class Store(Protocol):
    """The part of ``torch.distributed.Store`` that ranks use."""

    def add(self, key: str, amount: int, /) -> int: ...
    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...


@dataclass(frozen=True, slots=True)
class StallReport:
    """State of a rank when some rank has made no progress for too long."""

    rank: int
    host: str
    pid: int
    doing: str
    beats: int
    """Heartbeats so far; all ranks count the same events."""
    idle: float
    """Seconds since the last heartbeat."""
    waits: bool
    """True if it waits for other ranks."""
    stack: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """The ranks to look at, with their known hosts; empty if no rank is known to be at fault."""

    ranks: list[int]
    hosts: list[str]
    why: str

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


class SignsOfLife:
    """Numbered marks that every rank leaves in a store while its threads run. Clocks of hosts are not compared."""

    def __init__(self, store: Store, key: str, rank: int, clock: Callable[[], float]):
        self._store = store
        self._key = key
        self._rank = rank
        self._clock = clock
        self._marks = deque[tuple[int, float]](maxlen=MARKS)
        self._longest_gap = 0.0

    def give(self) -> None:
        """Leave a mark, and the longest time between two marks of this rank."""
        number = self._store.add(f"{self._key}/marks", 1)  # of all ranks, so numbers order the marks of all ranks
        now = self._clock()
        if self._marks:
            self._longest_gap = max(self._longest_gap, now - self._marks[-1][1])
        self._marks.append((number, now))
        self._store.set(f"{self._key}/mark-{self._rank}", f"{number} {self._longest_gap}")

    def silent(self, world: int, least: float) -> set[int]:
        """Return the ranks without a mark for ``least`` seconds, and for twice the longest gap of any rank."""
        last_marks: list[int] = []
        for rank in range(world):
            number, longest_gap = self._last_mark(rank)
            last_marks.append(number)
            # on a loaded machine the marks of healthy ranks come late too
            least = max(least, 2 * longest_gap)
        before = [number for number, when in self._marks if when <= self._clock() - least]
        if not before:
            return set()  # this rank has not watched for long enough
        return {rank for rank, number in enumerate(last_marks) if number < before[-1]}

    def _last_mark(self, rank: int) -> tuple[int, float]:
        """Return the number of a rank's last mark, and its longest gap in seconds; zeros before its first mark."""
        key = f"{self._key}/mark-{rank}"
        if not self._store.check([key]):  # get() would wait for the key
            return 0, 0.0
        number, longest_gap = self._store.get(key).decode().split()
        return int(number), float(longest_gap)


def collect(
    alive: set[int], arrived: Callable[[], Mapping[int, StallReport]], pauses: Iterable[object]
) -> tuple[Mapping[int, StallReport], set[int]]:
    """Return the reports by rank, and the ranks of ``alive`` that are still late when ``pauses`` are over.

    ``arrived`` returns all reports so far.
    """
    reports = arrived()
    for _ in pauses:
        if alive <= reports.keys():
            break
        reports = arrived()
    return reports, alive - reports.keys()


def verdict_of(
    reports: Collection[StallReport], hosts: Sequence[str], timeout: float, late: Collection[int] = ()
) -> Verdict:
    """Judge the ranks on ``hosts`` by the reports that arrived. ``late`` ranks sent no report, and may be healthy.

    A rank with the fewest heartbeats that waits for no other hangs. Without one, a rank without report is at fault.
    """

    def named(ranks: Collection[int]) -> str:
        names: list[str] = []
        for number in sorted(ranks):
            names.append(f"{number} ({hosts[number]})" if hosts[number] else f"{number}")
        return ", ".join(names)

    # ranks count the same events, so one with fewer heartbeats has not reached the collective of the others
    fewest = min(report.beats for report in reports)
    behind = [report for report in reports if not report.waits and report.beats == fewest]
    hanging = [report for report in behind if report.idle >= timeout / 2]
    silent = sorted(set(range(len(hosts))) - {report.rank for report in reports} - set(late))
    if hanging:
        ranks: list[int] = []
        at_fault: set[str] = set()
        facts: list[str] = []
        for report in hanging:
            ranks.append(report.rank)
            # the launcher's name of the host, if known, since it is the one that a restart can exclude
            at_fault.add(hosts[report.rank] or report.host)
            facts.append(f"rank {report.rank} ({report.host}, pid {report.pid}) hangs in {report.doing}")
        why = "; ".join(facts)
        if len(hosts) > len(hanging):
            why += ", and the others wait for it"
        return Verdict(ranks, sorted(at_fault), why)
    if silent:
        why = f"rank {named(silent)} gave no sign of life: its process is stopped, or its host is down or cut off"
        return Verdict(silent, sorted({hosts[number] for number in silent} - {""}), why)
    if behind:
        # slower than the others, but it has moved within half of the timeout
        facts = [f"rank {r.rank} ({r.host}) in {r.doing}, for {r.idle:.0f} s" for r in behind]
        why = f"the others wait for work that goes on: {', '.join(facts)}. Raise the timeout if that is normal"
        return Verdict([], [], why)
    if late:
        return Verdict([], [], f"rank {named(late)} answers too late to tell whether it is alive")
    why = "every rank waits for another: the network between them is cut, or not all reached the same collective"
    return Verdict([], [], why)


def blamed_hosts(folder: Path) -> list[str]:
    """Return the hosts that the verdict in ``folder`` names; none without a readable verdict."""
    try:
        hosts = json.loads((folder / VERDICT_FILE).read_text(encoding="utf-8"))["hosts"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if not isinstance(hosts, list):
        return []
    return [host for host in hosts if isinstance(host, str)]

"""Which ranks a stalled run blames, from what each of them reported; needs no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

VERDICT_FILE = "verdict.json"
"""Is in the folder of the reports once the verdict was said."""


@dataclass(frozen=True, slots=True)
class StallReport:
    """Where a rank stood when it had made no progress for too long."""

    rank: int
    host: str
    pid: int
    doing: str
    beats: int
    """How often it had made progress; all ranks count the same things."""
    waits: bool
    """True if it was inside a collective, which waits for other ranks."""
    stack: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """The ranks to look at, with their hosts as far as they are known; none if every rank waits for another."""

    ranks: list[int]
    hosts: list[str]
    why: str

    def write(self, folder: Path) -> None:
        """Leave it for others in the folder of the reports."""
        text = json.dumps({"ranks": self.ranks, "hosts": self.hosts, "why": self.why})
        (folder / VERDICT_FILE).write_text(text + "\n", encoding="utf-8")

    def message(self, timeout: float) -> str:
        """Return the line that a run ends with."""
        return (
            f"pst-ds train: StalledError: no progress for {timeout:g} seconds (train.stall_timeout_seconds): "
            f"{self.why}. Continue from the newest checkpoint with --resume"
        )


def verdict_of(reports: Sequence[StallReport], hosts: Sequence[str]) -> Verdict:
    """Judge ranks that are on ``hosts`` by the reports of some of them: who gave none is stopped or cut off, and who
    got less far than the others, and does not wait in a collective, is the one that hangs."""
    silent = sorted(set(range(len(hosts))) - {report.rank for report in reports})
    fewest = min(report.beats for report in reports)
    hanging = [report for report in reports if not report.waits and report.beats == fewest]
    if silent:
        names = ", ".join(f"{number} ({hosts[number]})" if hosts[number] else f"{number}" for number in silent)
        why = f"rank {names} gave no sign of life: its process is stopped, or its host is down or cut off"
        return Verdict(silent, sorted({hosts[number] for number in silent} - {""}), why)
    if hanging:
        why = "; ".join(f"rank {r.rank} ({r.host}, pid {r.pid}) hangs in {r.doing}" for r in hanging)
        why += ", and the others wait for it" if len(hosts) > len(hanging) else ""
        return Verdict([r.rank for r in hanging], sorted({r.host for r in hanging}), why)
    why = "every rank waits for another: the network between them is cut, or not all reached the same collective"
    return Verdict([], [], why)


def blamed_hosts(folder: Path) -> list[str]:
    """Return the hosts that the verdict in ``folder`` names, if there is one."""
    try:
        found = json.loads((folder / VERDICT_FILE).read_text(encoding="utf-8"))["hosts"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [host for host in found if isinstance(host, str)] if isinstance(found, list) else []

"""End a stalled run and say which rank is at fault. Importing this needs no torch.

A rank that hangs makes all others wait in a collective. Each rank has a thread that notices this, writes the rank's
stack into the run folder and to stderr, reads the reports of the others, and ends the process; the first rank says
which rank to look at.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

VERDICT_FILE = "verdict.json"
"""Name of the verdict in the folder of the reports."""
_GRACE_SECONDS = 5.0
_BACKSTOP_SECONDS = 30.0
_ARM_SECONDS = 1.0
"""Shortest time between two deferrals of the backstop, each of which starts a thread."""
_EXIT_CODE = 1
_COLLECTIVE_FILES = (os.path.join("torch", "distributed", ""), os.path.join("deepspeed", "comm", ""))
_DEEPSPEED_FILES = os.path.join("deepspeed", "")


@dataclass(frozen=True, slots=True)
class StallReport:
    """State of a rank that has made no progress for too long."""

    rank: int
    host: str
    pid: int
    doing: str
    beats: int
    """Heartbeats so far; all ranks count the same events."""
    waits: bool
    """True if it is inside a collective, which waits for other ranks."""
    stack: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """The ranks to look at, with their known hosts; empty if every rank waits for another."""

    ranks: list[int]
    hosts: list[str]
    why: str

    def write(self, folder: Path) -> None:
        """Write the verdict into the folder of the reports."""
        (folder / VERDICT_FILE).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    def message(self, timeout: float) -> str:
        """Return the last line of the run's output."""
        return (
            f"pst-ds train: StalledError: no progress for {timeout:g} seconds (train.stall_timeout_seconds): "
            f"{self.why}. Continue from the newest checkpoint with --resume"
        )


def verdict_of(reports: Sequence[StallReport], hosts: Sequence[str]) -> Verdict:
    """Judge the ranks on ``hosts`` by the reports that arrived.

    A rank without report is stopped or cut off. A rank with the fewest heartbeats that is not in a collective hangs.
    """
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
    """Return the hosts that the verdict in ``folder`` names; none without a readable verdict."""
    try:
        found = json.loads((folder / VERDICT_FILE).read_text(encoding="utf-8"))["hosts"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [host for host in found if isinstance(host, str)] if isinstance(found, list) else []


class Watchdog:
    """Watch the calling thread until closed. ``hosts``: host of every rank, if known."""

    def __init__(self, folder: Path, timeout_seconds: float, hosts: Sequence[str] = ()):
        from pst_ds.parallel.ranks import rank, world_size

        self._folder, self._timeout, self._hosts = folder, timeout_seconds, hosts
        self._rank, self._world = rank(), world_size()
        self._main = threading.get_ident()
        self._closed = threading.Event()
        self._beats, self._armed = 0, -math.inf
        self.heartbeat("start")
        threading.Thread(target=self._watch, daemon=True).start()

    def heartbeat(self, doing: str, worker: threading.Thread | None = None) -> None:
        """Note progress, and that ``doing`` comes next, in this thread or in a ``worker`` that it waits for."""
        self._last, self._doing, self._beats = time.monotonic(), doing, self._beats + 1
        self._worker = worker
        # a main thread that never releases the interpreter blocks our thread; this timer is C code and needs no GIL
        if sys.__stderr__ is not None and self._last - self._armed >= _ARM_SECONDS:
            self._armed = self._last
            after = self._timeout + _GRACE_SECONDS + _BACKSTOP_SECONDS
            faulthandler.dump_traceback_later(after, exit=True, file=sys.__stderr__)

    def close(self) -> None:
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._timeout / 4)):
            if time.monotonic() - self._last > self._timeout:
                self._end()

    def _end(self) -> None:
        frames = sys._current_frames()
        worker = self._worker.ident if self._worker is not None else None
        stack = traceback.extract_stack(frames[worker if worker in frames else self._main])
        text = "".join(traceback.format_list(stack))
        own = StallReport(self._rank, socket.gethostname(), os.getpid(), self._doing, self._beats, _waits(stack), text)
        with contextlib.suppress(OSError):  # a full disk must not keep the process alive
            _write(self._folder, own)
        who = f"rank {own.rank} ({own.host}, pid {own.pid})"
        where = f"{own.doing}, {'' if own.waits else 'not '}waiting for other ranks:\n{own.stack}"
        print(f"{who} made no progress for {self._timeout:g} seconds in {where}", file=sys.stderr, flush=True)
        patience = min(_GRACE_SECONDS, self._timeout)
        paths = _files(self._folder, "rank-*.json", self._world, patience)
        others = [StallReport(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]
        if self._rank == min([own.rank, *(report.rank for report in others)]):
            verdict = verdict_of(others, self._hosts or [""] * self._world)
            print(verdict.message(self._timeout), file=sys.stderr, flush=True)
            with contextlib.suppress(OSError):
                verdict.write(self._folder)
        else:  # a rank that leaves first would cut off the one that is about to write the verdict
            _files(self._folder, VERDICT_FILE, 1, patience)
        os._exit(_EXIT_CODE)


_current: Watchdog | None = None


@contextlib.contextmanager
def watching(folder: Path, timeout_seconds: float, hosts: Sequence[str] = ()) -> Iterator[None]:
    """End the process with code 1 after ``timeout_seconds`` without :func:`heartbeat` in the context; 0 is never.

    The ranks, each on its one of ``hosts``, exchange their reports in ``folder``.
    """
    global _current
    if timeout_seconds <= 0:
        yield
        return
    _current = Watchdog(folder, timeout_seconds, hosts)
    try:
        yield
    finally:
        _current.close()
        _current = None


def heartbeat(doing: str, worker: threading.Thread | None = None) -> None:
    """Call :meth:`Watchdog.heartbeat` of the process's watchdog, if there is one."""
    if _current is not None:
        _current.heartbeat(doing, worker)


def _waits(stack: traceback.StackSummary) -> bool:
    """Return whether a stack is inside a collective, or in DeepSpeed's wait for one that was started earlier."""
    handles = (entry for entry in stack[-3:] if entry.name == "wait" and _DEEPSPEED_FILES in entry.filename)
    return any(handles) or any(part in entry.filename for entry in stack for part in _COLLECTIVE_FILES)


def _write(folder: Path, report: StallReport) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"rank-{report.rank}.{os.getpid()}.partial"
    partial.write_text(json.dumps(asdict(report)), encoding="utf-8")
    partial.replace(folder / f"rank-{report.rank}.json")


def _files(folder: Path, pattern: str, count: int, seconds: float) -> list[Path]:
    """Return ``count`` matching files, or those that appear within ``seconds``."""
    deadline = time.monotonic() + seconds
    while len(paths := sorted(folder.glob(pattern))) < count and time.monotonic() <= deadline:
        time.sleep(0.05)
    return paths

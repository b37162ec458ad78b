"""End a stalled run and say which rank is at fault. Importing this needs no torch.

A rank that hangs makes all others wait in a collective. Each rank has a thread that notices when its training makes no
progress, and one that hears the same from other ranks through the store. Every rank then reports its numbers of
collectives and what it does; the first to notice judges the reports, and all end.
"""

import contextlib
import faulthandler
import itertools
import json
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from pst_ds.parallel.stall_verdict import StallReport, verdict_of

if TYPE_CHECKING:
    import torch.distributed as dist

_LOOKS = 50
"""How often a rank looks at its collectives, and for stalls of other ranks, in a timeout."""
_GRACE_SECONDS = 5.0
_BACKSTOP_SECONDS = 30.0
_ARM_SECONDS = 1.0
"""Shortest time between two deferrals of the backstop, each of which starts a thread."""
_EXIT_CODE = 1
_numbers = itertools.count()


def longest_wait(timeout_seconds: float) -> float:
    """Return the seconds within which the reports of a stall arrive, if at all."""
    return max(10.0, timeout_seconds / 4)


class Watchdog:
    """Watch the calling thread until closed. ``hosts``: host of every rank, if known. All ranks create it together."""

    def __init__(self, folder: Path, timeout_seconds: float, hosts: Sequence[str] = ()):
        from pst_ds.parallel.flight_recorder import FlightRecorder
        from pst_ds.parallel.ranks import rank, world_size
        from pst_ds.parallel.store import store_connection

        self._folder = folder
        self._timeout = timeout_seconds
        self._rank = rank()
        self._world = world_size()
        self._hosts = hosts or [""] * self._world
        self._longest = longest_wait(timeout_seconds)
        self._pause = timeout_seconds / _LOOKS
        self._main = threading.get_ident()
        self._closed = threading.Event()
        self._heard = threading.Event()
        """Set when another rank has noticed a stall."""
        self._reported = threading.Event()
        """Set when the report of this rank is ready."""
        self._judged = threading.Event()
        """Set when the verdict is written."""
        self._armed = -math.inf
        self._recorder = FlightRecorder()
        self._moved = time.monotonic()
        """When a number of a collective last changed."""
        # keys of the store outlive a watchdog; all ranks create theirs together, so the numbers agree
        self._key = f"pst_ds/stall/{next(_numbers)}"
        self.heartbeat("start")
        self._store = store_connection()
        threading.Thread(target=self._watch, daemon=True).start()
        if self._store is not None:
            threading.Thread(target=self._listen, args=(self._store,), daemon=True).start()

    def heartbeat(self, doing: str, worker: threading.Thread | None = None) -> None:
        """Note progress, and that ``doing`` comes next, in this thread or in a ``worker`` that it waits for."""
        self._last = time.monotonic()
        self._doing = doing
        self._worker = worker
        # a main thread that never releases the interpreter blocks our threads; this timer is C code and needs no GIL
        if sys.__stderr__ is not None and self._last - self._armed >= _ARM_SECONDS:
            self._armed = self._last
            after = self._timeout + self._longest + 2 * _GRACE_SECONDS + _BACKSTOP_SECONDS
            faulthandler.dump_traceback_later(after, exit=True, file=sys.__stderr__)

    def close(self) -> None:
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._closed.is_set():
            if self._recorder.sample():
                self._moved = time.monotonic()
            if self._heard.wait(self._pause) or time.monotonic() - self._last > self._timeout:
                self._end()

    def _end(self) -> None:
        """Report what the main thread does, wait for the verdict, and end the process."""
        self._own = self._report()
        self._reported.set()
        if self._store is None:
            self._say([self._own])
        else:
            # without an answer, the store or its host is gone, and the report above has to do
            self._judged.wait(self._longest + 2 * _GRACE_SECONDS)
        # sys.exit would only end this thread, and the main thread may be in a collective that never returns
        os._exit(_EXIT_CODE)

    def _report(self) -> StallReport:
        """Print and return what the watched thread does."""
        frames = sys._current_frames()
        thread = self._main
        if self._worker is not None and self._worker.ident in frames:
            thread = self._worker.ident
        stack = traceback.extract_stack(frames[thread])
        report = StallReport(
            rank=self._rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            doing=self._doing,
            idle=time.monotonic() - max(self._last, self._moved),
            groups=self._recorder.groups(),
            stack="".join(traceback.format_list(stack)),
        )
        waits = "in a collective" if report.waits else "not in a collective"
        made = f"{report} made no progress for {time.monotonic() - self._last:.4g} seconds in {report.doing}, {waits}"
        print(f"{made}:\n{report.stack}", file=sys.stderr, flush=True)
        return report

    def _listen(self, store: "dist.Store") -> None:
        """Exchange reports once this rank or another notices a stall."""
        with contextlib.suppress(RuntimeError):  # the store is gone: its host is, or the run has ended
            while not self._closed.is_set():
                if self._reported.wait(self._pause) or store.check([f"{self._key}/judge"]):
                    self._heard.set()
                    self._reported.wait()
                    self._exchange(store)
                    self._judged.set()
                    return

    def _exchange(self, store: "dist.Store") -> None:
        """Send this rank's report. The first rank judges, and the others stay until it is done: their end would be its
        own."""
        # the counter is atomic: exactly one rank gets 1
        is_judge = store.add(f"{self._key}/judge", 1) == 1
        store.append(f"{self._key}/reports", json.dumps(asdict(self._own)) + "\n")  # type: ignore[attr-defined]
        if not is_judge:
            store.wait([f"{self._key}/said"], timedelta(seconds=self._longest + _GRACE_SECONDS))
            return
        until = time.monotonic() + self._longest
        reports = [self._own]
        while len(reports) < self._world and time.monotonic() < until:
            time.sleep(0.1)
            lines = store.get(f"{self._key}/reports").decode().splitlines()
            reports = [StallReport.from_json(line) for line in lines]
        self._say(reports)
        store.set(f"{self._key}/said", "")

    def _say(self, reports: Sequence[StallReport]) -> None:
        verdict = verdict_of(reports, self._hosts, self._timeout)
        print(verdict.message(self._timeout), file=sys.stderr, flush=True)
        verdict.write(self._folder, reports)


_current: Watchdog | None = None


@contextlib.contextmanager
def watching(folder: Path, timeout_seconds: float, hosts: Sequence[str] = ()) -> Iterator[None]:
    """End the process with code 1 after ``timeout_seconds`` without :func:`heartbeat` in the context; 0 is never.

    The ranks, each on its one of ``hosts``, end together. The verdict is written into ``folder``.
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

"""End a stalled run and say which rank is at fault. Importing this needs no torch.

A rank that hangs makes all others wait in a collective. Each rank has a thread that notices when its training makes no
progress, and one that hears the same from other ranks through the store. Every rank then reports what it does; the
first to notice judges the reports, and all end.
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

from pst_ds.parallel.stall_verdict import MARKS, SignsOfLife, StallReport, Verdict, collect, verdict_of

if TYPE_CHECKING:
    import torch.distributed as dist

_GRACE_SECONDS = 5.0
_BACKSTOP_SECONDS = 30.0
_ARM_SECONDS = 1.0
"""Shortest time between two deferrals of the backstop, each of which starts a thread."""
_EXIT_CODE = 1
_WAITING_FILES = (
    os.path.join("torch", "distributed", ""),
    os.path.join("deepspeed", "comm", ""),
    os.path.join("pst_ds", "parallel", "store.py"),
)
"""Parts of the paths of files in which a rank waits for others."""
_DEEPSPEED_FILES = os.path.join("deepspeed", "")
_numbers = itertools.count()


def longest_wait(timeout_seconds: float) -> float:
    """Return the seconds within which the reports of a stall arrive, if at all."""
    return max(10.0, timeout_seconds / 4)


class Watchdog:
    """Watch the calling thread until closed. ``hosts``: host of every rank, if known. All ranks create it together."""

    def __init__(self, folder: Path, timeout_seconds: float, hosts: Sequence[str] = ()):
        from pst_ds.parallel.ranks import rank, world_size
        from pst_ds.parallel.store import store_connection

        self._folder = folder
        self._timeout = timeout_seconds
        self._rank = rank()
        self._world = world_size()
        self._hosts = hosts or [""] * self._world
        self._longest = longest_wait(timeout_seconds)
        self._pause = 2 * timeout_seconds / MARKS
        self._main = threading.get_ident()
        self._closed = threading.Event()
        self._heard = threading.Event()
        """Set when another rank has noticed a stall."""
        self._reported = threading.Event()
        """Set when the report of this rank is ready."""
        self._judged = threading.Event()
        """Set when the verdict is written."""
        self._beats = 0
        self._armed = -math.inf
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
        self._beats += 1
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
            if self._heard.wait(self._pause) or time.monotonic() - self._last > self._timeout:
                self._end()

    def _end(self) -> None:
        """Report what the main thread does, wait for the verdict, and end the process."""
        self._own = self._report()
        self._reported.set()
        if self._store is None:
            self._say(verdict_of([self._own], [self._own.host], self._timeout), [self._own])
        elif not self._judged.wait(self._longest + 2 * _GRACE_SECONDS):
            self._judge_the_store()
        # sys.exit would only end this thread, and the main thread may be in a collective that never returns
        os._exit(_EXIT_CODE)

    def _report(self) -> StallReport:
        """Print and return what the watched thread does."""
        idle = time.monotonic() - self._last
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
            beats=self._beats,
            idle=idle,
            waits=_waits(stack),
            stack="".join(traceback.format_list(stack)),
        )
        where = f"{report.doing}, {'' if report.waits else 'not '}waiting for other ranks:\n{report.stack}"
        who = f"rank {report.rank} ({report.host}, pid {report.pid})"
        print(f"{who} made no progress for {report.idle:.4g} seconds in {where}", file=sys.stderr, flush=True)
        return report

    def _listen(self, store: "dist.Store") -> None:
        """Give signs of life, and exchange reports once this rank or another notices a stall."""
        signs = SignsOfLife(store, self._key, self._rank, time.monotonic)
        with contextlib.suppress(RuntimeError):  # the store is gone: its host is, or the run has ended
            while not self._closed.is_set():
                signs.give()
                if self._reported.wait(self._pause) or store.check([f"{self._key}/judge"]):
                    self._heard.set()
                    self._reported.wait()
                    self._exchange(store, signs)
                    self._judged.set()
                    return

    def _exchange(self, store: "dist.Store", signs: SignsOfLife) -> None:
        """Send this rank's report. The first rank judges, and the others stay until it is done: their end would be its
        own."""
        # the counter is atomic: exactly one rank gets 1
        is_judge = store.add(f"{self._key}/judge", 1) == 1
        store.append(f"{self._key}/reports", json.dumps(asdict(self._own)) + "\n")  # type: ignore[attr-defined]
        if not is_judge:
            store.wait([f"{self._key}/said"], timedelta(seconds=self._longest + _GRACE_SECONDS))
            return

        def arrived() -> dict[int, StallReport]:
            lines = store.get(f"{self._key}/reports").decode().splitlines()
            reports = [StallReport(**json.loads(line)) for line in lines]
            return {report.rank: report for report in reports}

        until = time.monotonic() + self._longest
        pauses = itertools.takewhile(lambda _: time.monotonic() < until, map(time.sleep, itertools.repeat(0.1)))
        alive = set(range(self._world)) - signs.silent(self._world, self._timeout / 2)
        by_rank, late = collect(alive, arrived, pauses)
        reports = list(by_rank.values())
        self._say(verdict_of(reports, self._hosts, self._timeout, late), reports)
        store.set(f"{self._key}/said", "")

    def _judge_the_store(self) -> None:
        """Blame the host of the store if most ranks cannot reach it; each leaves a file in the run folder."""
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"cut-off-{self._rank}").touch()
            time.sleep(_GRACE_SECONDS)
            if 2 * len(list(self._folder.glob("cut-off-*"))) > self._world:
                why = f"most ranks do not reach the store on the host of rank 0 ({self._hosts[0]})"
                self._say(Verdict([0], sorted({self._hosts[0]} - {""}), why), [self._own])

    def _say(self, verdict: Verdict, reports: Sequence[StallReport]) -> None:
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


def _waits(stack: traceback.StackSummary) -> bool:
    """Return whether a stack is inside a collective or the store, or in DeepSpeed's wait for an earlier collective."""
    # a handle of an asynchronous collective waits in a file that also does other things, so its name counts
    for entry in stack[-3:]:
        if entry.name == "wait" and _DEEPSPEED_FILES in entry.filename:
            return True
    return any(part in entry.filename for entry in stack for part in _WAITING_FILES)

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
_WAITING_FILES = tuple(
    os.path.join(*parts)
    for parts in (("torch", "distributed", ""), ("deepspeed", "comm", ""), ("pst_ds", "parallel", "store.py"))
)
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

        self._folder, self._timeout = folder, timeout_seconds
        self._rank, self._world = rank(), world_size()
        self._hosts = hosts or [""] * self._world
        self._longest = longest_wait(timeout_seconds)
        self._pause = 2 * timeout_seconds / MARKS
        self._main = threading.get_ident()
        self._closed, self._heard, self._reported, self._judged = (threading.Event() for _ in range(4))
        self._beats, self._armed = 0, -math.inf
        self._key = f"pst_ds/stall/{next(_numbers)}"
        self.heartbeat("start")
        self._store = store_connection()
        threading.Thread(target=self._watch, daemon=True).start()
        if self._store is not None:
            threading.Thread(target=self._listen, args=(self._store,), daemon=True).start()

    def heartbeat(self, doing: str, worker: threading.Thread | None = None) -> None:
        """Note progress, and that ``doing`` comes next, in this thread or in a ``worker`` that it waits for."""
        self._last, self._doing, self._beats = time.monotonic(), doing, self._beats + 1
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
        os._exit(_EXIT_CODE)

    def _report(self) -> StallReport:
        idle, frames = time.monotonic() - self._last, sys._current_frames()
        worker = self._worker.ident if self._worker is not None else None
        stack = traceback.extract_stack(frames[worker if worker in frames else self._main])
        text, waits, host = "".join(traceback.format_list(stack)), _waits(stack), socket.gethostname()
        where = f"{self._doing}, {'' if waits else 'not '}waiting for other ranks:\n{text}"
        who = f"rank {self._rank} ({host}, pid {os.getpid()})"
        print(f"{who} made no progress for {idle:.4g} seconds in {where}", file=sys.stderr, flush=True)
        return StallReport(self._rank, host, os.getpid(), self._doing, self._beats, idle, waits, text)

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
        is_judge = store.add(f"{self._key}/judge", 1) == 1
        store.append(f"{self._key}/reports", json.dumps(asdict(self._own)) + "\n")  # type: ignore[attr-defined]
        if not is_judge:
            store.wait([f"{self._key}/said"], timedelta(seconds=self._longest + _GRACE_SECONDS))
            return

        def arrived() -> dict[int, StallReport]:
            lines = store.get(f"{self._key}/reports").decode().splitlines()
            return {report.rank: report for report in (StallReport(**json.loads(line)) for line in lines)}

        until = time.monotonic() + self._longest
        pauses = itertools.takewhile(lambda _: time.monotonic() < until, map(time.sleep, itertools.repeat(0.1)))
        alive = set(range(self._world)) - signs.silent(self._world, self._timeout / 2)
        found, late = collect(alive, arrived, pauses)
        reports = list(found.values())
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
    handles = (entry for entry in stack[-3:] if entry.name == "wait" and _DEEPSPEED_FILES in entry.filename)
    return any(handles) or any(part in entry.filename for entry in stack for part in _WAITING_FILES)

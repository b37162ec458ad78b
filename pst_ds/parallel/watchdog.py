"""Ends a process that no longer gets on, and says which rank, where it stands, and whom it waits for. A rank that hangs
makes all others wait in a collective. Each has a thread that notices, puts the rank's stack into the run folder and on
stderr, reads what the others put there, and ends the process; the first rank says who is at fault."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import pickle
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from pst_ds.parallel.ranks import rank, world_size
from pst_ds.parallel.stall_verdict import VERDICT_FILE, StallReport, verdict_of

_GRACE_SECONDS = 5.0
_BACKSTOP_SECONDS = 30.0
_ARM_SECONDS = 1.0
"""The backstop, which takes a thread each time, is put off no more often."""
_EXIT_CODE = 1
_COLLECTIVE_FILES = (os.path.join("torch", "distributed", ""), os.path.join("deepspeed", "comm", ""))
_DEEPSPEED_FILES = os.path.join("deepspeed", "")


class Watchdog:
    """Watches the thread that makes it, until it is closed. ``hosts``: of every rank, where they are known."""

    def __init__(self, folder: Path, timeout_seconds: float, hosts: Sequence[str] = ()):
        self._folder, self._timeout, self._hosts = folder, timeout_seconds, hosts
        self._rank, self._world = rank(), world_size()
        self._main = threading.get_ident()
        self._closed = threading.Event()
        self._beats, self._armed = 0, -math.inf
        self.heartbeat("start")
        threading.Thread(target=self._watch, daemon=True).start()

    def heartbeat(self, doing: str, worker: threading.Thread | None = None) -> None:
        """Progress was made, and ``doing`` comes next, which a ``worker`` may do while the main thread waits for it."""
        self._last, self._doing, self._beats = time.monotonic(), doing, self._beats + 1
        self._worker = worker
        # for a main thread that never gives the interpreter to ours; this one is C and needs no interpreter
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
        self._leave_collectives()
        others = _gather(self._folder, self._world, min(_GRACE_SECONDS, self._timeout))
        if self._rank == min([own.rank, *(report.rank for report in others)]):
            verdict = verdict_of(others, self._hosts or [""] * self._world)
            print(verdict.message(self._timeout), file=sys.stderr, flush=True)
            with contextlib.suppress(OSError):
                verdict.write(self._folder)
        else:
            _wait_for(self._folder / VERDICT_FILE, min(_GRACE_SECONDS, self._timeout))
        os._exit(_EXIT_CODE)

    def _leave_collectives(self) -> None:
        """Leave the flight recorder's trace of the last collectives, if it records them, where torchfrtrace looks."""
        with contextlib.suppress(Exception):  # nothing may keep the process alive
            if data := recorded_collectives():
                (self._folder / f"collectives_{self._rank}").write_bytes(data)


_current: Watchdog | None = None


def recorded_collectives() -> bytes:
    """Return what torch's flight recorder has of this rank's collectives, a pickle; nothing where it records none."""
    from torch._C import _distributed_c10d

    dump = getattr(_distributed_c10d, "_dump_fr_trace", None)
    data = dump() if dump is not None and dist.is_initialized() else b""
    return data if data and pickle.loads(data).get("entries") else b""


@contextlib.contextmanager
def watching(folder: Path, timeout_seconds: float, hosts: Sequence[str] = ()) -> Iterator[None]:
    """End the process with code 1 when :func:`heartbeat` was not called for so long inside; 0 watches nothing.
    ``folder`` is where the ranks, each on its one of ``hosts``, leave their reports for each other."""
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
    """Tell the watchdog of this process, if there is one, that progress was made, and what comes next; with the thread
    that does it, if that is not the one that watched, whose stack then tells where it hangs."""
    if _current is not None:
        _current.heartbeat(doing, worker)


def _waits(stack: traceback.StackSummary) -> bool:
    """Return whether a stack is inside a collective, or in DeepSpeed's wait for one that was begun before."""
    handles = (entry for entry in stack[-3:] if entry.name == "wait" and _DEEPSPEED_FILES in entry.filename)
    return any(handles) or any(part in entry.filename for entry in stack for part in _COLLECTIVE_FILES)


def _write(folder: Path, report: StallReport) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"rank-{report.rank}.{os.getpid()}.partial"
    partial.write_text(json.dumps(asdict(report)), encoding="utf-8")
    partial.replace(folder / f"rank-{report.rank}.json")


def _wait_for(path: Path, seconds: float) -> None:
    """Until ``path`` exists. A rank that leaves before the verdict cuts off the one that is about to say it."""
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def _gather(folder: Path, world: int, seconds: float) -> list[StallReport]:
    """The reports of all ranks; of those alone that came within ``seconds``."""
    deadline = time.monotonic() + seconds
    while len(paths := sorted(folder.glob("rank-*.json"))) < world and time.monotonic() <= deadline:
        time.sleep(0.05)
    return [StallReport(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]

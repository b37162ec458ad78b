"""Time of a training step: its parts, how long each rank is busy with it, and the rank that the others wait for."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch

from pst_ds.parallel.engine import Engine, time_waits

WINDOW = 10
"""Last steps in which a straggler is looked for."""
LEAST_SLOW = 8
"""Slow steps of a straggler in the window."""
SLOWER = 1.2
"""A slow step takes longer than this many times the median rank's time, plus :data:`LEAST_SECONDS`."""
LEAST_SECONDS = 0.01
"""Seconds by which a step may always exceed that time."""
_NOT_IN_A_STEP = nullcontext()


class StepClock:
    """Adds up the seconds of ``parts``. On a GPU it uses events, which are waited for only when they are read.

    A part is not timed inside itself.
    """

    def __init__(self, device: str, parts: Sequence[str]):
        self._seconds = dict.fromkeys(parts, 0.0)
        self._uses_events = device.startswith("cuda")
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._free: list[torch.cuda.Event] = []
        """Events to use again: ZeRO-3 waits hundreds of times per step."""

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Count the time inside as ``part`` of the step."""
        first = None
        if self._uses_events:
            first = self._recorded()
        started = time.perf_counter()
        try:
            yield
        finally:
            if first is None:
                self._seconds[part] += time.perf_counter() - started
            else:
                self._events.append((part, first, self._recorded()))

    def _recorded(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Return the seconds of each part since the last call. Waits for a GPU to reach the last event."""
        for part, first, last in self._events:
            last.synchronize()
            self._seconds[part] += first.elapsed_time(last) / 1e3  # milliseconds
            self._free += (first, last)
        self._events.clear()
        seconds = self._seconds
        self._seconds = dict.fromkeys(seconds, 0.0)
        return seconds


class OwnTime:
    """Measures how long this rank is busy with a step, without waiting for other ranks."""

    def __init__(self, device: str, engine: Engine):
        self._waits = StepClock(device, ("waits",))
        self._busy = 0.0
        """Seconds in the current step before ``_since``, waits included."""
        self._since = 0.0
        """When the current stretch of work started; 0 between steps."""
        self.seconds = 0.0
        """Busy seconds of the last finished step; 0 before the first."""
        time_waits(engine, self.waiting)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Count the time inside as part of a step, unlike the time between steps."""
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self._busy += time.perf_counter() - self._since
            self._since = 0.0

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """End a step with the exchange of numbers inside, for which all ranks wait."""
        with self.waiting():
            yield
        now = time.perf_counter()
        self.seconds = max(0.0, self._busy + now - self._since - self._waits.read()["waits"])
        self._busy = 0.0
        self._since = now

    def waiting(self) -> AbstractContextManager[None]:
        """Count the time inside as waiting for other ranks."""
        return self._waits.timing("waits") if self._since else _NOT_IN_A_STEP


@dataclass(frozen=True, slots=True)
class Straggler:
    """The slowest of the ranks that are too slow."""

    rank: int
    host: str
    step_seconds: float
    """Median busy seconds per step in the window."""
    median_step_seconds: float
    """Median busy seconds per step of the median rank."""
    memory_bytes: int
    others: int
    """Number of other ranks that are too slow."""

    def __str__(self) -> str:
        more = f" and {self.others} more" if self.others else ""
        return (
            f"the others wait for rank {self.rank} on {self.host}{more}: it is busy with a step for "
            f"{self.step_seconds:.3g} s, the median rank for {self.median_step_seconds:.3g} s"
        )


@dataclass(slots=True)
class Pace:
    """Busy time of each rank in the last steps, and its peak memory. ``hosts``: host of each rank."""

    hosts: Sequence[str]
    _steps: deque[np.ndarray] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _is_slow: deque[np.ndarray] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _memory: np.ndarray = field(default_factory=lambda: np.zeros(0))
    _named: int | None = None

    def add(self, seconds: Sequence[float], memory: Sequence[float]) -> None:
        """Record a step by its busy seconds and peak memory of each rank. Times count only if all ranks have one."""
        if all(seconds):
            step = np.array(seconds)
            self._steps.append(step)
            self._is_slow.append(step > _typical(step) * SLOWER + LEAST_SECONDS)
        self._memory = np.array(memory)

    def figures(self) -> dict[str, float]:
        """Return figures of the ranks for metrics.jsonl; {} before the first step, and for one rank."""
        if not self._steps or len(self.hosts) == 1:
            return {}
        seconds = np.median(self._steps, axis=0)
        return {
            "ranks/least_seconds": float(seconds.min()),
            "ranks/median_seconds": float(_typical(seconds)),
            "ranks/most_seconds": float(seconds.max()),
            "ranks/slowest": int(seconds.argmax()),
            "ranks/least_memory_bytes": int(self._memory.min()),
            "ranks/median_memory_bytes": int(_typical(self._memory)),
        }

    def slow(self) -> Straggler | None:
        """Return the straggler, if there is one in the window."""
        if len(self._steps) < WINDOW:
            return None
        slow = np.sum(self._is_slow, axis=0) >= LEAST_SLOW
        if not slow.any():
            return None
        seconds = np.median(self._steps, axis=0)
        rank = int(np.where(slow, seconds, 0.0).argmax())
        return Straggler(
            rank=rank,
            host=self.hosts[rank],
            step_seconds=float(seconds[rank]),
            median_step_seconds=float(_typical(seconds)),
            memory_bytes=int(self._memory[rank]),
            others=int(slow.sum()) - 1,
        )

    def newly_slow(self) -> Straggler | None:
        """Return the straggler, unless the last call returned the same one."""
        straggler = self.slow()
        before = self._named
        self._named = None
        if straggler is None:
            return None
        self._named = straggler.rank
        return straggler if straggler.rank != before else None


def _typical(values: np.ndarray) -> float:
    """Return the median; the lower one of two in the middle."""
    middle = (len(values) - 1) // 2
    return np.partition(values, middle)[middle]

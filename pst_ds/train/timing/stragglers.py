"""Find the rank that the others wait for, from the time that each is busy with a step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np

from pst_ds.parallel.engine import Engine, time_waits
from pst_ds.train.timing.step_clock import StepClock

WINDOW, LEAST_SLOW = 10, 8
"""A straggler is slow in LEAST_SLOW of the last WINDOW steps."""
SLOWER, LEAST_SECONDS = 1.2, 0.01
"""A slow step takes SLOWER times as long as the median rank's, and LEAST_SECONDS more."""
_NOT_IN_A_STEP = nullcontext()


class OwnTime:
    """Measures how long this rank is busy with a step, without waiting for other ranks."""

    def __init__(self, device: str, engine: Engine):
        self._waits = StepClock(device, ("waits",))
        self._busy, self._since = 0.0, 0.0
        self.seconds = 0.0
        """Of the last step that is over; 0 before there is one."""
        time_waits(engine, self.waiting)

    @contextmanager
    def working(self) -> Iterator[None]:
        """What is done inside belongs to a step; what a run does between steps does not."""
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self._busy += time.perf_counter() - self._since
            self._since = 0.0

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """What is done inside ends a step: the numbers that all ranks wait for."""
        with self.waiting():
            yield
        now = time.perf_counter()
        self.seconds = max(0.0, self._busy + now - self._since - self._waits.read()["waits"])
        self._busy, self._since = 0.0, now

    def waiting(self) -> AbstractContextManager[None]:
        """What is done inside waits for other ranks."""
        return self._waits.timing("waits") if self._since else _NOT_IN_A_STEP


@dataclass(frozen=True, slots=True)
class Straggler:
    """The slowest of the ranks that are too slow."""

    rank: int
    host: str
    step_seconds: float
    """Median over the window of what a step takes it."""
    median_step_seconds: float
    """The same of the median rank."""
    memory_bytes: int
    others: int
    """How many more ranks are too slow."""

    def __str__(self) -> str:
        more = f" and {self.others} more" if self.others else ""
        return (
            f"the others wait for rank {self.rank} on {self.host}{more}: it is busy with a step for "
            f"{self.step_seconds:.3g} s, the median rank for {self.median_step_seconds:.3g} s"
        )


@dataclass(slots=True)
class Pace:
    """How long the ranks, each on its one of ``hosts``, were busy with the last steps, and the most memory of each."""

    hosts: Sequence[str]
    _steps: deque[np.ndarray] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _is_slow: deque[np.ndarray] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _memory: np.ndarray = field(default_factory=lambda: np.zeros(0))
    _named: int | None = None

    def add(self, seconds: Sequence[float], memory: Sequence[float]) -> None:
        """Note a step: a number for every rank. One without a rank that was measured does not count."""
        if all(seconds):
            step = np.array(seconds)
            self._steps.append(step)
            self._is_slow.append(step > _typical(step) * SLOWER + LEAST_SECONDS)
        self._memory = np.array(memory)

    def figures(self) -> dict[str, float]:
        """Return what metrics.jsonl has of the ranks; nothing before a step, or of one rank."""
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
        """Return the straggler, if there is one now."""
        if len(self._steps) < WINDOW:
            return None
        slow = np.sum(self._is_slow, axis=0) >= LEAST_SLOW
        if not slow.any():
            return None
        seconds = np.median(self._steps, axis=0)
        rank = int(np.where(slow, seconds, 0.0).argmax())
        figures = float(seconds[rank]), float(_typical(seconds)), int(self._memory[rank])
        return Straggler(rank, self.hosts[rank], *figures, others=int(slow.sum()) - 1)

    def newly_slow(self) -> Straggler | None:
        """Return the straggler if it is another one than before, or slow again."""
        found = self.slow()
        before, self._named = self._named, found.rank if found else None
        return found if found and found.rank != before else None


def _typical(values: np.ndarray) -> float:
    """Return the median, of two in the middle the lesser."""
    return np.partition(values, (len(values) - 1) // 2)[(len(values) - 1) // 2]

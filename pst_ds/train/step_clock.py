"""How the time of a step divides: forward and backward passes, the optimizer, the masks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

PARTS = ("forward", "backward", "optimizer", "masks")


@dataclass(slots=True)
class StepClock:
    """Adds up the seconds of :data:`PARTS`, on a GPU those of its own clock, which nobody waits for before they are
    read."""

    device: str
    _seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    _events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """What is done inside is a ``part`` of the step."""
        if not self.device.startswith("cuda"):
            start = time.perf_counter()
            yield
            self._seconds[part] += time.perf_counter() - start
            return
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        yield
        end_event.record()
        self._events.append((part, start_event, end_event))

    def read(self) -> dict[str, float]:
        """Return the seconds of each part since they were read before. Waits for what is under way on a GPU."""
        for part, start, end in self._events:
            end.synchronize()
            self._seconds[part] += start.elapsed_time(end) / 1e3
        found = dict(self._seconds)
        self._events.clear()
        self._seconds.update(dict.fromkeys(PARTS, 0.0))
        return found

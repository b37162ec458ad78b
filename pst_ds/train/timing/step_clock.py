"""How the time of a step divides: forward and backward passes, the optimizer, the masks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

PARTS = ("forward", "backward", "optimizer", "masks")


class StepClock:
    """Adds up the seconds of ``parts``, on a GPU those of its own clock, which nobody waits for before they are
    read."""

    def __init__(self, device: str, parts: Sequence[str] = PARTS):
        self._on_gpu = device.startswith("cuda")
        self._seconds = dict.fromkeys(parts, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._read: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """What is done inside is a ``part`` of the step."""
        if not self._on_gpu:
            start = time.perf_counter()
            yield
            self._seconds[part] += time.perf_counter() - start
            return
        start_event, end_event = self._read.pop() if self._read else (_event(), _event())
        start_event.record()
        yield
        end_event.record()
        self._events.append((part, start_event, end_event))

    def read(self) -> dict[str, float]:
        """Return the seconds of each part since they were read before. Waits for what is under way on a GPU."""
        for part, start, end in self._events:
            end.synchronize()
            self._seconds[part] += start.elapsed_time(end) / 1e3
            self._read.append((start, end))
        found = dict(self._seconds)
        self._events.clear()
        self._seconds.update(dict.fromkeys(found, 0.0))
        return found


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)

"""How the time of a step divides: forward and backward passes, the optimizer, the masks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

PARTS = ("forward", "backward", "optimizer", "masks")


class StepClock:
    """Adds up the seconds of ``parts``. On a GPU it uses events, which are waited for only when they are read.

    A part is not timed inside itself.
    """

    def __init__(self, device: str, parts: Sequence[str] = PARTS):
        kind = _DevicePart if device.startswith("cuda") else _HostPart
        self._parts: dict[str, _HostPart | _DevicePart] = {part: kind() for part in parts}

    def timing(self, part: str) -> AbstractContextManager[None]:
        """Return a context whose time counts as ``part`` of the step."""
        return self._parts[part]

    def read(self) -> dict[str, float]:
        """Return the seconds of each part since the last call. Waits for a GPU to reach the last event."""
        return {name: part.read() for name, part in self._parts.items()}


class _HostPart(AbstractContextManager[None]):
    """Entered hundreds of times per step, for every wait, so it is not a generator and allocates nothing."""

    __slots__ = ("_seconds", "_started")

    def __init__(self) -> None:
        self._seconds = self._started = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._started

    def read(self) -> float:
        found, self._seconds = self._seconds, 0.0
        return found


class _DevicePart(AbstractContextManager[None]):
    """Records an event on entry and on exit; events are reused once they were read."""

    def __init__(self) -> None:
        self._free: list[torch.cuda.Event] = []
        self._recorded: list[torch.cuda.Event] = []

    def __enter__(self) -> None:
        self._record()

    def __exit__(self, *_: object) -> None:
        self._record()

    def _record(self) -> None:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        self._recorded.append(event)

    def read(self) -> float:
        seconds = 0.0
        for start, end in zip(self._recorded[::2], self._recorded[1::2], strict=True):
            end.synchronize()
            seconds += start.elapsed_time(end) / 1e3
        self._free += self._recorded
        self._recorded.clear()
        return seconds

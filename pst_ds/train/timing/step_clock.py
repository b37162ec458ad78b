"""How the time of a step divides: forward and backward passes, the optimizer, the masks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

PARTS = ("forward", "backward", "optimizer", "masks")


class StepClock:
    """Adds up the seconds of ``parts``, on a GPU those of its own clock, which nobody waits for before they are
    read. A part is not timed inside itself."""

    def __init__(self, device: str, parts: Sequence[str] = PARTS):
        kind = _DevicePart if device.startswith("cuda") else _HostPart
        self._parts: dict[str, _HostPart | _DevicePart] = {part: kind() for part in parts}

    def timing(self, part: str) -> AbstractContextManager[None]:
        """What is done inside is a ``part`` of the step."""
        return self._parts[part]

    def read(self) -> dict[str, float]:
        """Return the seconds of each part since they were read before. Waits for what is under way on a GPU."""
        return {name: part.read() for name, part in self._parts.items()}


class _HostPart(AbstractContextManager[None]):
    """Entered hundreds of times a step, for every wait: no generator, and nothing is made."""

    __slots__ = ("_began", "_seconds")

    def __init__(self) -> None:
        self._seconds = self._began = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._began

    def read(self) -> float:
        found, self._seconds = self._seconds, 0.0
        return found


class _DevicePart(AbstractContextManager[None]):
    """Records an event at either end; events that were read are used again."""

    __slots__ = ("_began", "_free", "_recorded")

    def __init__(self) -> None:
        self._free: list[torch.cuda.Event] = []
        self._recorded: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._began: torch.cuda.Event | None = None

    def __enter__(self) -> None:
        self._began = self._record()

    def __exit__(self, *_: object) -> None:
        assert self._began is not None
        self._recorded.append((self._began, self._record()))

    def _record(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> float:
        seconds = 0.0
        for start, end in self._recorded:
            end.synchronize()
            seconds += start.elapsed_time(end) / 1e3
            self._free += (start, end)
        self._recorded.clear()
        return seconds

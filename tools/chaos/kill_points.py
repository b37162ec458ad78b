"""Random moments to kill a run at, and the observable state of its folder."""

from __future__ import annotations

import os
import random
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

WHERE = ("start", "step", "saving", "named", "final", "any")
"""Aims of a kill: start and resume; a training step; a partially written checkpoint; a renamed one, before links and
retention; the end of the run; any moment.
"""
HALF = "half"
"""The step halfway through the run; only on request."""
NAMED_SECONDS = 0.02
"""Approximate seconds of links and retention after a checkpoint has its name."""
_STEP_FOLDER = re.compile(r"step-(\d+)(\.partial)?")


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of the uninterrupted run in seconds."""

    start: float
    """Seconds from the first observation of the ranks to the first line of metrics."""
    step: float
    save: float
    whole: float
    num_steps: int


class Watch:
    """Observable state of a run folder since the last start; :meth:`look` is cheap."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._metrics, self._checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
        self._stale = {name for name in self._names() if name.endswith(".partial")}
        self._old_metrics = _identity(self._metrics)
        self.partial_at: dict[int, float] = {}
        self.named_at: dict[int, float] = {}
        self._before = {step for step, partial in map(_parse, self._names()) if not partial}
        self.newest = max(self._before, default=0)
        self.first_line_at = self._ranks_at = 0.0

    def look(self) -> None:
        now, names = time.monotonic(), self._names()
        self._stale &= names
        for step, partial in map(_parse, names - self._stale):
            if partial and step > self.newest:
                self.partial_at.setdefault(step, now)
            elif not partial and step not in self._before:
                self.named_at.setdefault(step, now)
                self.newest = max(self.newest, step)
        if not self.first_line_at and self.has_begun() and self._metrics.stat().st_size:
            self.first_line_at = now

    def ranks_seen(self) -> None:
        """Note that the ranks run."""
        self._ranks_at = self._ranks_at or time.monotonic()

    def timing(self, ended: float, num_steps: int) -> Timing:
        """Return the times of a run that was not killed and has just ended."""
        saves = [named - self.partial_at[step] for step, named in self.named_at.items() if step in self.partial_at]
        return Timing(
            start=self.first_line_at - self._ranks_at,
            step=(ended - self.first_line_at) / num_steps,
            save=statistics.median(saves) if saves else 0.0,
            whole=ended - self._ranks_at,
            num_steps=num_steps,
        )

    def has_partial(self) -> bool:
        return any(name.endswith(".partial") for name in self._names())

    def has_begun(self) -> bool:
        """Return whether this start has truncated the metrics and trains."""
        return _identity(self._metrics) not in (self._old_metrics, 0)

    def last_step(self) -> int:
        """Return the last step that this start reported; 0 for none."""
        return last_step(self._metrics) if self.has_begun() else 0

    def _names(self) -> set[str]:
        with suppress(FileNotFoundError):
            return {name for name in os.listdir(self._checkpoints) if _STEP_FOLDER.fullmatch(name)}
        return set()


def _parse(name: str) -> tuple[int, bool]:
    match = _STEP_FOLDER.fullmatch(name)
    assert match is not None
    return int(match[1]), bool(match[2])


def _identity(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_ino
    return 0


def last_step(metrics: Path) -> int:
    """Return the largest step in the last complete lines of a metrics file; 0 for none."""
    with suppress(FileNotFoundError), metrics.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - 8192))
        found = re.findall(rb'^\{"step": (\d+), .*"event": "step".*\}$', stream.read(), re.M)
        return max(map(int, found), default=0)
    return 0


def deck(kills: int, rng: random.Random) -> list[str]:
    """Return the aim of each kill: random permutations of all aims."""
    aims: list[str] = []
    while len(aims) < kills:
        aims += rng.sample(WHERE, len(WHERE))
    return aims[:kills]


def victims(num_ranks: int, rng: random.Random) -> list[int]:
    """Return the ranks to kill: one, some or all, with similar probability."""
    count = rng.choice([1, rng.randint(1, num_ranks), num_ranks])
    return sorted(rng.sample(range(num_ranks), count))


def moment(where: str, watch: Watch, timing: Timing, rng: random.Random) -> Iterator[None]:
    """Yield until it is time to kill; call next after every look of ``watch``."""
    if where == "start":
        share = rng.choice([rng.random(), 1.0 - rng.random() / 5])  # imports take most of it, loading is last
        yield from _pause(share * timing.start)
    elif where in ("step", HALF):
        target = min(watch.newest + rng.randint(1, max(1, timing.num_steps // 4)), timing.num_steps - 1)
        while watch.last_step() < (timing.num_steps // 2 if where == HALF else target):
            yield
        yield from _pause(rng.uniform(0, timing.step))
    elif where in ("saving", "named"):
        seen, most = (watch.partial_at, timing.save / 2) if where == "saving" else (watch.named_at, NAMED_SECONDS)
        count = rng.randint(1, 3)
        while len(seen) < count:
            yield
        yield from _pause(rng.uniform(0, most))
    elif where == "final":
        seen, most = rng.choice([(watch.partial_at, timing.save), (watch.named_at, 3 * NAMED_SECONDS)])
        while timing.num_steps not in seen:
            yield
        yield from _pause(rng.uniform(0, most))
    else:
        yield from _pause(rng.uniform(0, timing.whole))


def _pause(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield

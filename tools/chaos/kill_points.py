"""When to kill: what a run folder shows from outside, and random moments that are aimed at it."""

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
"""What a kill is aimed at: loading and resuming; a training step; a checkpoint half written; one that has just got its
name, when links and retention follow; the end of the run; anything, after a random time."""
HALF = "half"
"""Only where it is asked for: the step in the middle of the run."""
NAMED_SECONDS = 0.02
"""About what the links and the retention take after a checkpoint has its name."""
_STEP_FOLDER = re.compile(r"step-(\d+)(\.partial)?")


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of the uninterrupted run."""

    start: float
    """From the first sight of the ranks to the first line of metrics."""
    step: float
    save: float
    whole: float
    num_steps: int


class Watch:
    """What a run folder shows from outside since a start of the run; :meth:`look` is cheap."""

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
        """To be called when the ranks are there."""
        self._ranks_at = self._ranks_at or time.monotonic()

    def timing(self, ended: float, num_steps: int) -> Timing:
        """Of a run that was not killed, and ended now."""
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
        """Whether this start got as far as to cut the metrics back and to train."""
        return _identity(self._metrics) not in (self._old_metrics, 0)

    def last_step(self) -> int:
        """The last step that this start reported; 0 for none."""
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
    """The largest step of the last whole lines of a metrics file; 0 for none."""
    with suppress(FileNotFoundError), metrics.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - 8192))
        found = re.findall(rb'^\{"step": (\d+), .*"event": "step".*\}$', stream.read(), re.M)
        return max(map(int, found), default=0)
    return 0


def deck(kills: int, rng: random.Random) -> list[str]:
    """What each kill is aimed at: every class comes up in every len(WHERE) of them, in random order."""
    aims: list[str] = []
    while len(aims) < kills:
        aims += rng.sample(WHERE, len(WHERE))
    return aims[:kills]


def victims(num_ranks: int, rng: random.Random) -> list[int]:
    """The ranks to kill: one, some or all, each about as often."""
    count = rng.choice([1, rng.randint(1, num_ranks), num_ranks])
    return sorted(rng.sample(range(num_ranks), count))


def moment(where: str, watch: Watch, timing: Timing, rng: random.Random) -> Iterator[None]:
    """Ends when it is time to kill; to be asked after every look of ``watch``."""
    if where == "start":
        share = rng.choice([rng.random(), 1.0 - rng.random() / 5])  # imports take most of it, loading comes last
        yield from _pause(share * timing.start)
    elif where == "step":
        target = min(watch.newest + rng.randint(1, max(1, timing.num_steps // 4)), timing.num_steps - 1)
        while watch.last_step() < target:
            yield
        yield from _pause(rng.uniform(0, timing.step))
    elif where == HALF:
        while watch.last_step() < timing.num_steps // 2:
            yield
        yield from _pause(rng.uniform(0, timing.step))
    elif where == "saving":
        yield from _until_saves(watch.partial_at, rng.randint(1, 3))
        yield from _pause(rng.uniform(0, timing.save / 2))
    elif where == "named":
        yield from _until_saves(watch.named_at, rng.randint(1, 3))
        yield from _pause(rng.uniform(0, NAMED_SECONDS))
    elif where == "final":
        seen, most = rng.choice([(watch.partial_at, timing.save), (watch.named_at, 3 * NAMED_SECONDS)])
        while timing.num_steps not in seen:
            yield
        yield from _pause(rng.uniform(0, most))
    else:
        yield from _pause(rng.uniform(0, timing.whole))


def _until_saves(seen: dict[int, float], count: int) -> Iterator[None]:
    while len(seen) < count:
        yield


def _pause(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield

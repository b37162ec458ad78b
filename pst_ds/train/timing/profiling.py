"""Profile some steps with torch.profiler: a trace for Perfetto or Chrome, and a table of operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pst_ds.file_names import PROFILE
from pst_ds.parallel.ranks import is_main

if TYPE_CHECKING:
    from torch.profiler import profile

_ROWS = 60
"""Rows printed in the profiler's table."""


class Recorder:
    """Records on rank 0 the steps of ``window``, its first and its last, as far as the run has them; none for 0."""

    def __init__(self, window: tuple[int, int], num_steps: int, folder: Path):
        first, last = window if is_main() else (0, 0)  # steps begin with 1
        self._first, self._last = first, min(last, num_steps)
        self._folder = folder / PROFILE
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Begin, if the first of the steps is next or some of them are past; ``step`` is the one that is next."""
        if self._profile is None and self._first <= step <= self._last:
            from torch.profiler import profile

            self._first = step
            self._profile = profile()
            self._profile.start()

    def after(self, step: int) -> None:
        """End, if ``step`` was the last, and write what was recorded."""
        if self._profile is None or step < self._last:
            return
        recorded = self._stopped()
        self._folder.mkdir(exist_ok=True)
        name = f"steps-{self._first}-{step}"
        recorded.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
        averages = recorded.key_averages()
        on_device = any(event.device_time_total for event in averages)
        table = averages.table(f"self_{'device' if on_device else 'cpu'}_time_total", row_limit=_ROWS)
        (self._folder / f"{name}.txt").write_text(table + "\n", encoding="utf-8")

    def drop(self) -> None:
        """End a recording without writing it."""
        if self._profile is not None:
            self._stopped()

    def _stopped(self) -> profile:
        assert self._profile is not None
        recorded, self._profile = self._profile, None
        recorded.stop()
        return recorded


@contextmanager
def recording(window: tuple[int, int], num_steps: int, folder: Path) -> Iterator[Recorder]:
    """Yield a :class:`Recorder`; a recording that is not over when the context ends is dropped."""
    recorder = Recorder(window, num_steps, folder)
    try:
        yield recorder
    finally:
        recorder.drop()

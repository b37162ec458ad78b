"""Profile some steps with torch.profiler: a trace for Perfetto or Chrome, and a table of operators."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from pst_ds.file_names import PROFILE
from pst_ds.parallel.ranks import is_main

if TYPE_CHECKING:
    from torch.profiler import profile

_ROWS = 60
"""Rows printed in the profiler's table."""


class Recorder(AbstractContextManager["Recorder"]):
    """Records steps on rank 0, from the first of ``window`` to its last, or to the end of the run; none for (0, 0).

    A recording that is not finished when the context ends is dropped.
    """

    def __init__(self, window: tuple[int, int], num_steps: int, folder: Path):
        self._first, last = window if is_main() else (0, 0)
        self._last = min(last, num_steps)
        self._folder = folder / PROFILE
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Start recording before ``step`` if it is in the window; a resumed run may start in its middle."""
        if self._profile is None and self._first <= step <= self._last:
            from torch.profiler import profile

            self._first = step
            self._profile = profile()
            self._profile.start()

    def after(self, step: int) -> None:
        """Write the recording if ``step`` was its last."""
        if self._profile is None or step < self._last:
            return
        recorded, self._profile = self._profile, None  # __exit__ must not stop it again if writing fails
        recorded.stop()
        self._folder.mkdir(exist_ok=True)
        name = f"steps-{self._first}-{step}"
        recorded.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
        averages = recorded.key_averages()
        on_device = any(event.device_time_total for event in averages)
        table = averages.table(f"self_{'device' if on_device else 'cpu'}_time_total", row_limit=_ROWS)
        (self._folder / f"{name}.txt").write_text(table + "\n", encoding="utf-8")

    def __exit__(self, *_: object) -> None:
        if self._profile is not None:
            self._profile.stop()

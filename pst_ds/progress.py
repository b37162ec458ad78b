"""Progress of long work on stderr: a bar on a terminal, an occasional plain line elsewhere. Only rank 0 reports, and of
nested work only the outermost; :data:`quiet` silences everything."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

quiet = False
"""Set by ``--quiet``."""
DRAW_SECONDS = 0.1
"""Least time between two updates of a bar."""
LINE_SECONDS = 10.0
"""Least time between two plain lines."""
_BAR_COLUMNS = 24
_outermost: Progress | None = None
"""The work that is shown, if any; work inside it is not."""
_listener: Callable[[], None] | None = None
"""Called by all work, see :func:`heard_by`."""


@contextmanager
def heard_by(listener: Callable[[], None]) -> Iterator[None]:
    """Call ``listener`` whenever work makes progress in this process, shown or not, after those that hear of it
    already. What it raises ends the work."""
    global _listener
    before = _listener

    def both() -> None:
        if before is not None:
            before()
        listener()

    _listener = both
    try:
        yield
    finally:
        _listener = before


def is_first_rank() -> bool:
    """Return whether this process is rank 0 of its launcher, or has no launcher."""
    rank = os.environ.get("RANK", "0")
    return not rank.isdigit() or int(rank) == 0


class Progress:
    """Count work against a total and estimate when it ends. Use it as a context manager, or :meth:`close` it.

    Args:
        what: name of the work.
        total: number of units in all.
        unit: what is counted, in the plural; "bytes" are shown as GB with their rate.
        done: units that were done before.
        line_seconds: least time between two plain lines; shorter work prints nothing off a terminal.
    """

    def __init__(self, what: str, total: int, unit: str = "", *, done: int = 0, line_seconds: float = LINE_SECONDS):
        global _outermost
        self._what = what
        self._total = total
        self._unit = unit
        self._done_before = done
        self._done = done
        self._interval = line_seconds
        self._start = time.monotonic()
        self._last_shown = self._start
        self._bar: tqdm[None] | None = None
        self._is_shown = not quiet and _outermost is None and is_first_rank()
        if self._is_shown:
            _outermost = self
            # A dumb terminal, such as an editor's, cannot move the cursor back to the start of a bar.
            if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
                self._interval = DRAW_SECONDS
                self._bar = _new_bar(what, total, done, self._text(""))

    def add(self, count: int, note: str = "") -> None:
        """Count ``count`` more units; ``note`` says what is going on."""
        self.at(self._done + count, note)

    def at(self, done: int, note: str = "") -> None:
        """Set the number of units that are done."""
        self._done = done
        # Also for work that is not shown: the listener watches for stalls and stops.
        if _listener is not None:
            _listener()
        now = time.monotonic()
        if not self._is_shown or now - self._last_shown < self._interval:
            return
        self._last_shown = now
        text = self._text(note)
        if self._bar is None:
            print(f"{self._what} {text}", file=sys.stderr, flush=True)
            return
        # The window may have been resized. A line that is too long would wrap, and each update would start a new one.
        self._bar.n = done
        self._bar.ncols = _columns()
        room = self._bar.ncols - len(f"{self._what}  ") - _BAR_COLUMNS
        if len(text) > room:
            text = text[: room - 1] + "…"
        self._bar.set_description_str(text)

    def say(self, text: str) -> None:
        """Print a separate line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._is_shown:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Wipe the bar."""
        global _outermost
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if _outermost is self:
            _outermost = None
        self._is_shown = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _text(self, note: str) -> str:
        """Return the count and, once they are known, rate and estimated time; then ``note``."""
        is_bytes = self._unit == "bytes"
        count = f"{self._done}/{self._total} {self._unit}".rstrip()
        if is_bytes:
            count = f"{self._done / 1e9:.2f}/{self._total / 1e9:.2f} GB"
        parts = [count]
        # Units that were done before took no time of this process.
        done_here = self._done - self._done_before
        if done_here > 0:
            seconds_each = (time.monotonic() - self._start) / done_here
            if is_bytes and seconds_each:
                parts.append(f"{1e-6 / seconds_each:.0f} MB/s")
            remaining = max(0, self._total - self._done)  # a total may be an estimate
            parts.append(f"eta {duration_text(seconds_each * remaining)}")
        if note:
            parts.append(note)
        return " | ".join(parts)


def _new_bar(what: str, total: int, done: int, text: str) -> tqdm[None]:
    """Return a bar on stderr with ``text`` after it, which :meth:`Progress.at` composes instead of tqdm."""
    from tqdm import tqdm

    form = f"{what} {{bar:{_BAR_COLUMNS}}} {{desc}}"
    return tqdm(total=total, initial=done, desc=text, bar_format=form, ncols=_columns(), leave=False, disable=False)


def _columns() -> int:
    """Return the width of the terminal, 80 if unknown: tqdm hangs on the 0 that some terminals report."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80


def duration_text(seconds: float) -> str:
    """Format seconds as "1h02m" or "3m07s"."""
    total_minutes, seconds_left = divmod(int(seconds), 60)
    hours, minutes = divmod(total_minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds_left:02d}s"

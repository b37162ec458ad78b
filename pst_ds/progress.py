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
DRAW_SECONDS, LINE_SECONDS = 0.1, 10.0
"""Least time between two updates of a bar, and between two plain lines."""
_BAR_COLUMNS = 24
_outermost: Progress | None = None
_listener: Callable[[], None] | None = None


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
        self._what, self._total, self._unit = what, total, unit
        self._first = self._done = done
        self._interval = line_seconds
        self._start = self._last = time.monotonic()
        self._bar: tqdm[None] | None = None
        self._is_shown = not quiet and _outermost is None and is_first_rank()
        if self._is_shown:
            _outermost = self
            if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
                self._interval = DRAW_SECONDS
                self._bar = _new_bar(what, total, done, self._text(""))

    def add(self, count: int, note: str = "") -> None:
        """Count ``count`` more units; ``note`` says what is going on."""
        self.at(self._done + count, note)

    def at(self, done: int, note: str = "") -> None:
        """Set the number of units that are done."""
        self._done = done
        if _listener is not None:
            _listener()
        now = time.monotonic()
        if not self._is_shown or now - self._last < self._interval:
            return
        self._last, text = now, self._text(note)
        if self._bar is None:
            print(f"{self._what} {text}", file=sys.stderr, flush=True)
            return
        self._bar.n, self._bar.ncols = done, _columns()
        room = self._bar.ncols - len(f"{self._what}  ") - _BAR_COLUMNS
        self._bar.set_description_str(text if len(text) <= room else text[: room - 1] + "…")

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
        since, is_bytes = self._done - self._first, self._unit == "bytes"
        count = f"{self._done}/{self._total} {self._unit}".rstrip()
        parts = [f"{self._done / 1e9:.2f}/{self._total / 1e9:.2f} GB" if is_bytes else count]
        if since > 0:
            seconds_each = (time.monotonic() - self._start) / since
            parts.append(f"{1e-6 / seconds_each:.0f} MB/s" if is_bytes and seconds_each else "")
            parts.append(f"eta {duration_text(seconds_each * max(0, self._total - self._done))}")
        return " | ".join(filter(None, [*parts, note]))


def _new_bar(what: str, total: int, done: int, text: str) -> tqdm[None]:
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
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"

"""How far a long piece of work has come, on stderr: a bar on a terminal, a plain line now and then elsewhere.

Rank 0 alone speaks, and of pieces of work inside one another the outermost; ``quiet`` silences all.
"""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.progress

quiet = False
"""Set by ``--quiet``."""
DRAW_SECONDS, LINE_SECONDS = 0.1, 10.0
"""Between two pictures of a bar, and two plain lines."""
_BAR_COLUMNS, _LEAST_NOTE = 24, 4
"""Widths on a terminal: of a bar, and of the shortest note beside it."""
_outermost: Progress | None = None


def is_first_rank() -> bool:
    """Whether this process is rank 0 of its launcher, or has none: the one that speaks to people."""
    rank = os.environ.get("RANK", "0")
    return not rank.isdigit() or int(rank) == 0


class Progress:
    """Counts what is done against a total, and says when it will end. Use it as a context; at the end a bar is wiped.

    ``unit``: what is counted, in the plural; "bytes" are shown as GB, with their rate. ``done``: where the work begins.
    ``line_seconds``: least time between two plain lines; work that is done before says nothing off a terminal.
    """

    def __init__(self, what: str, total: int, unit: str = "", *, done: int = 0, line_seconds: float = LINE_SECONDS):
        self._what, self._total, self._unit = what, total, unit
        self._first = self._done = done
        self._interval = line_seconds
        self._start = self._said = time.monotonic()
        self._note = ""
        self._bar: rich.progress.Progress | None = None
        self._is_shown: bool | None = None

    def add(self, count: int, note: str = "") -> None:
        """``count`` more are done; ``note`` says what is going on."""
        self.at(self._done + count, note)

    def at(self, done: int, note: str = "") -> None:
        """``done`` of the total are done."""
        self._done, self._note = done, note
        now = time.monotonic()
        if not self._begin() or now - self._said < self._interval:
            return
        self._said = now
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, text=self._text(), refresh=True)
        else:
            print(f"{self._what} {self._text()}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line of its own, above the bar if there is one."""
        if self._begin():
            print(text, file=sys.stderr, flush=True)  # which a bar that is shown redirects

    def close(self) -> None:
        """Wipe the bar."""
        global _outermost
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if _outermost is self:
            _outermost = None
        self._is_shown = False

    def __enter__(self) -> Progress:
        self._begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _begin(self) -> bool:
        """Whether this work is shown; its bar is there from now on."""
        global _outermost
        if self._is_shown is None:
            self._is_shown = not quiet and _outermost is None and is_first_rank()
            if self._is_shown:
                _outermost = self
                if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
                    self._bar, self._interval = _new_bar(), DRAW_SECONDS
                    self._bar.add_task(self._what, total=self._total, completed=self._done, text=self._text())
                    self._bar.start()
                    self._bar.console.show_cursor()  # or a process that is killed would leave the terminal without
        return self._is_shown

    def _text(self) -> str:
        """How far it has come, and last the note, beside a bar cut to the room that is left."""
        since, is_bytes = self._done - self._first, self._unit == "bytes"
        parts = [
            f"{self._done / 1e9:.2f}/{self._total / 1e9:.2f} GB"
            if is_bytes
            else f"{self._done}/{self._total} {self._unit}".rstrip()
        ]
        if since > 0:
            seconds_each = (time.monotonic() - self._start) / since
            parts.append(f"{1e-6 / seconds_each:.0f} MB/s" if is_bytes and seconds_each else "")
            parts.append(f"eta {duration_text(seconds_each * max(0, self._total - self._done))}")
        text = " | ".join(filter(None, parts))
        note = self._note if self._bar is None else _cut(self._note, self._room(self._bar) - len(f"{text} | "))
        return f"{text} | {note}" if note else text

    def _room(self, bar: rich.progress.Progress) -> int:
        """Columns of the terminal that are left beside the name and the bar."""
        return bar.console.width - len(f"{self._what}  ") - _BAR_COLUMNS


def _cut(text: str, columns: int) -> str:
    """``text``, or its beginning with an ellipsis; nothing where that is too short to say something."""
    from rich.text import Text

    if columns < _LEAST_NOTE:
        return ""
    cut = Text(text)
    cut.truncate(columns, overflow="ellipsis")
    return cut.plain


def _new_bar() -> rich.progress.Progress:
    """One line, drawn when it is told to: a thread that drew it would take time from the work."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    text = Column(no_wrap=True, overflow="ellipsis")
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=_BAR_COLUMNS),
        TextColumn("{task.fields[text]}", markup=False, table_column=text),
        console=Console(stderr=True, force_terminal=True, highlight=False, markup=False, emoji=False),
        auto_refresh=False,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # which elsewhere is for what a program reads
    )


def duration_text(seconds: float) -> str:
    """ "1h02m" or "3m07s"."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"

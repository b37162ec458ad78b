"""How far a long piece of work has come, on stderr: one line rewritten on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

ON_TERMINAL_SECONDS, OFF_TERMINAL_SECONDS = 0.2, 10.0


class Progress:
    """Counts bytes against a total. Use it as a context; work that is quickly done says nothing off a terminal."""

    def __init__(self, what: str, total: int):
        self._what, self._total, self._done = what, max(total, 1), 0
        self._terminal = sys.stderr.isatty()
        self._interval = ON_TERMINAL_SECONDS if self._terminal else OFF_TERMINAL_SECONDS
        self._start = self._said = time.monotonic()

    def add(self, nbytes: int) -> None:
        """``nbytes`` more are done."""
        self._done += nbytes
        now = time.monotonic()
        if now - self._said < self._interval:
            return
        self._said = now
        rate = self._done / (now - self._start)
        left = (self._total - self._done) / rate if rate else 0.0
        text = (
            f"{self._what}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB ({self._done / self._total:.0%}), "
            f"{rate / 1e6:.0f} MB/s, {left:.0f} s left"
        )
        print(f"\r{text}\x1b[K" if self._terminal else text, end="" if self._terminal else "\n", file=sys.stderr)
        sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

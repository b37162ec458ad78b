"""A limit on the CPU time of Python code that may loop, such as a chat template."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from itertools import count
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from _typeshed import TraceFunction

_EVENTS = 256
"""Lines and calls between two looks at the clock, which takes longer than they do."""
Result = TypeVar("Result")


def call_within(seconds: float, function: Callable[[], Result]) -> Result:
    """Return what ``function`` returns. Raises TimeoutError once it has computed for ``seconds``.

    Python stops no thread from outside, so the code checks itself, at each of its lines and calls; a single call of C
    code is not interrupted. Time that the thread waits for others does not count.
    """
    end, events = time.thread_time() + seconds, count(1)

    def check(frame: FrameType, event: str, arg: object) -> TraceFunction:
        if not next(events) % _EVENTS and time.thread_time() > end:
            raise TimeoutError(f"it ran for more than {seconds:g} seconds")
        return check

    before = sys.gettrace()
    sys.settrace(check)
    try:
        return function()
    finally:
        sys.settrace(before)

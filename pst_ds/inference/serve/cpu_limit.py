"""A limit on the CPU time of Python code that others wrote, such as a chat template."""

import sys
import time
from collections.abc import Callable
from itertools import count
from types import FrameType
from typing import Any, TypeVar

Result = TypeVar("Result")
_TRACE_EVENTS = 256
"""Lines and calls between two readings of the clock, which is slower than they are."""


def call_within(seconds: float, function: Callable[[], Result]) -> Result:
    """Return the result of ``function``. Raises TimeoutError after ``seconds`` of CPU time.

    Python cannot stop a thread from outside, so the code checks the time at its lines and calls. A single call of C
    code is not interrupted. Time that the thread waits does not count.
    """
    end = time.thread_time() + seconds
    events = count(1)

    def check(frame: FrameType, event: str, arg: object) -> Any:
        if not next(events) % _TRACE_EVENTS and time.thread_time() > end:
            raise TimeoutError(f"it ran for more than {seconds:g} seconds")
        return check

    before = sys.gettrace()
    sys.settrace(check)
    try:
        return function()
    finally:
        sys.settrace(before)

"""Threads that read requests: a long request delays no short one, and what waits is limited."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pst_ds.inference.serve.queue import busy

Result = TypeVar("Result")
LONG_BYTES = 1 << 14
"""Body size from which a request is read in the thread for long ones."""
_PAUSE_FACTOR = 3.0
"""Pause after a long read, in multiples of its time: long requests use at most a quarter of a core."""
_RECEIVE_SECONDS = 1e-8
"""Time per byte that the event loop spends on a body before it is read, which counts as time of the read."""
_LONG_SHARE = 4
"""Divisor of the number of waiting requests that gives the number of long ones among them."""


class Readers:
    """Two threads: one for short requests, and one for long ones, which pauses after each.

    Parsing JSON holds the interpreter lock, so that without pauses a client that sends one long request after another
    would stop the threads that write answers. Tokenizers are not thread-safe: each thread needs its own.
    """

    def __init__(self, most_waiting: int):
        """``most_waiting``: requests that may wait or be read, a quarter of them long."""
        self._most_waiting = most_waiting
        self._most_long = max(1, most_waiting // _LONG_SHARE)
        self._short = ThreadPoolExecutor(1, "reader")
        self._long = ThreadPoolExecutor(1, "long-reader")
        self._waiting = {True: 0, False: 0}
        """Requests that wait or are being read: long ones, short ones. Only the event loop changes them."""
        self._pauses_until = 0.0
        self._is_closing = threading.Event()

    @property
    def waiting(self) -> int:
        """Number of requests that wait to be read, or are being read."""
        return sum(self._waiting.values())

    async def read(self, body: bytes, function: Callable[[bytes, bool], Result], already_waiting: int) -> Result:
        """Return ``function(body, is_long)``, called in a thread. Raises ProtocolError if too many requests wait.

        ``already_waiting``: requests that have been read and wait for the model.
        """
        # from here to the increment nothing awaits, so two requests cannot both take the last place
        is_long = len(body) >= LONG_BYTES
        if self.waiting + already_waiting >= self._most_waiting:
            raise busy()
        # long requests may not fill all places, since each of them waits for pauses
        if is_long and self._waiting[True] >= self._most_long:
            raise busy()
        self._waiting[is_long] += 1
        try:
            loop = asyncio.get_running_loop()
            if is_long:
                return await loop.run_in_executor(self._long, self._read_and_pause, body, function)
            return await loop.run_in_executor(self._short, function, body, False)
        finally:
            self._waiting[is_long] -= 1

    def close(self) -> None:
        """End both threads after the reads in progress."""
        self._is_closing.set()
        self._short.shutdown()
        self._long.shutdown()

    def _read_and_pause(self, body: bytes, function: Callable[[bytes, bool], Result]) -> Result:
        """Read a long request after the pause that the last one caused; its own answer does not wait for its pause."""
        # an event and not time.sleep, so that closing ends the pause
        self._is_closing.wait(max(0.0, self._pauses_until - time.monotonic()))
        began = time.monotonic()
        try:
            return function(body, True)
        finally:
            # a read that fails has held the interpreter lock, too
            now = time.monotonic()
            took = now - began + _RECEIVE_SECONDS * len(body)
            self._pauses_until = now + _PAUSE_FACTOR * took

"""Prefetch batches in a thread while the device works on earlier ones."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self, TypeVar

from pst_ds.parallel.watchdog import heartbeat

T = TypeVar("T")
AHEAD = 2
"""Batches kept ready."""


class Prefetched(Iterator[T]):
    """Iterator over ``items``, computed by a thread at most :data:`AHEAD` items ahead. A context manager.

    An exception is raised where its item is requested. ``items`` must not draw from the process-wide random generators:
    when the thread would do so is undefined.
    """

    def __init__(self, items: Iterator[T]):
        self._items = items
        self._pool = ThreadPoolExecutor(1, "prefetch")
        self._ready: deque[Future[T]] = deque()
        self.waited_seconds = 0.0
        """Total seconds that :meth:`__next__` has waited."""

    def __enter__(self) -> Self:
        self._thread = self._pool.submit(threading.current_thread).result()
        self._ready.extend(self._pool.submit(self._items.__next__) for _ in range(AHEAD))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __next__(self) -> T:
        heartbeat("reading a batch", self._thread)
        self._ready.append(self._pool.submit(self._items.__next__))
        start = time.perf_counter()
        try:
            return self._ready.popleft().result()
        finally:
            self.waited_seconds += time.perf_counter() - start

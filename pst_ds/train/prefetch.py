"""Prefetch batches in a thread while the device works on earlier ones."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

from pst_ds.parallel.watchdog import heartbeat

T = TypeVar("T")
AHEAD = 2
"""Batches kept ready."""
_PATIENCE_SECONDS = 0.1
"""Seconds that the thread waits for room before it checks whether it should stop."""


class Prefetched(Generic[T]):
    """Iterator over the items of ``make()``, computed by a thread at most :data:`AHEAD` items ahead. A context manager.

    An exception in ``make()`` is raised where its item is requested. ``make()`` must not draw from the process-wide
    random generators: when the thread would do so is undefined.
    """

    def __init__(self, make: Callable[[], Iterator[T]]):
        self._make = make
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(AHEAD)
        self._unwanted = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self.waited_seconds = 0.0
        """Total seconds that :meth:`__next__` has waited."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unwanted.set()
        self._thread.join()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        heartbeat("reading a batch", self._thread)
        start = time.perf_counter()
        item, error = self._ready.get()
        self.waited_seconds += time.perf_counter() - start
        if error is not None:
            raise error
        assert item is not None
        return item

    def _work(self) -> None:
        try:
            for item in self._make():
                if not self._put(item, None):
                    return
            self._put(None, StopIteration())
        except BaseException as error:  # raised where the item is requested
            self._put(None, error)

    def _put(self, item: T | None, error: BaseException | None) -> bool:
        """Hand an item over; return False once nobody wants it."""
        while not self._unwanted.is_set():
            try:
                self._ready.put((item, error), timeout=_PATIENCE_SECONDS)
            except queue.Full:
                continue
            return True
        return False

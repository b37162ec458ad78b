"""Contestants in processes of their own, which take turns: no runtime's threads, memory or settings reach another's."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

REST_SECONDS = 0.03
"""Between two turns: threads of OpenMP and the like wait for work in a loop for some milliseconds before they sleep."""


class Seat:
    """A process that has opened one contestant and does what it is asked."""

    def __init__(self, name: str, opener: Callable[[], Any], context: Any) -> None:
        """Start the process. ``opener`` makes what the work is done with, there; ``context``: of multiprocessing."""
        self.name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, opener), daemon=True)
        self._process.start()
        theirs.close()
        self._result()

    def ask(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Return ``work(opened, *arguments)``, computed there. Raises RuntimeError with the traceback of an error."""
        self._connection.send((work, arguments))
        return self._result()

    def close(self) -> None:
        with suppress(OSError):
            self._connection.send(None)
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()

    def _result(self) -> Any:
        try:
            failed, result = self._connection.recv()
        except EOFError:
            self._process.join(10)
            raise RuntimeError(f"{self.name}: its process ended with {self._process.exitcode}") from None
        if failed:
            raise RuntimeError(f"{self.name}: {result}")
        return result


@contextmanager
def seated(
    openers: Mapping[str, Callable[[], Any]], threads: int, preload: Sequence[str] = (), method: str = "forkserver"
) -> Iterator[dict[str, Seat]]:
    """Seat all contestants, one after another, and end their processes in any case.

    ``threads``: what OpenMP is told. ``preload``: modules that are imported once, before processes are forked.
    """
    context: Any = multiprocessing.get_context(method)
    context.set_forkserver_preload(list(preload))
    seats: dict[str, Seat] = {}
    try:
        with _environment(OMP_NUM_THREADS=str(threads)):
            for name, opener in openers.items():
                seats[name] = Seat(name, opener, context)
        yield seats
    finally:
        for seat in seats.values():
            seat.close()


def medians_in_turn(
    seats: Mapping[str, Seat], work: Callable[..., float], *arguments: Any, repeats: int, rest: float = REST_SECONDS
) -> dict[str, float]:
    """Return the median of ``work`` for each contestant over ``repeats`` rounds, after one that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in seats}
    for counted in range(repeats + 1):
        for name, seat in seats.items():
            value = seat.ask(work, *arguments)
            if counted:
                found[name].append(value)
            time.sleep(rest)
    return {name: statistics.median(values) for name, values in found.items()}


def _serve(connection: Any, opener: Callable[[], Any]) -> None:
    try:
        opened = opener()
    except BaseException:
        connection.send((True, traceback.format_exc()))
        return
    connection.send((False, None))
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            return
        if asked is None:
            return
        work, arguments = asked
        try:
            connection.send((False, work(opened, *arguments)))
        except Exception:
            connection.send((True, traceback.format_exc()))


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

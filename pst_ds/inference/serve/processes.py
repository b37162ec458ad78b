"""Server processes and their connections: this process, or workers with a model each, restarted when they die."""

import asyncio
import math
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import cast

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.config import STARTUP_FAILURE
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.supervisors import Multiprocess

from pst_ds.errors import InputError

GRACE_SECONDS = 30
"""Seconds for answers in progress after the server is told to stop."""
_READ_SECONDS = 60
"""Seconds after which a client that does not read its answer is disconnected."""
_HANG_SECONDS = 20
"""Seconds after which an unresponsive worker is replaced."""


def bound(host: str, port: int) -> socket.socket:
    """Return a bound socket, which refuses connections until a server listens on it. Raises InputError."""
    try:
        # the system's preferred address of a name that has several
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        # so that a restart does not wait for connections of the previous server that are in TIME_WAIT
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # in milliseconds; accepted sockets inherit it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _READ_SECONDS)
        listener.bind(address)
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port}: {error}. Use another port or host") from None
    return listener


def answer(app: FastAPI, at: socket.socket) -> None:
    """Serve from this process until it is told to stop."""
    uvicorn.Server(config(app)).run(sockets=[at])


def answer_from_workers(make: Callable[[], FastAPI], at: socket.socket, workers: int) -> bool:
    """Serve from ``workers`` processes, which are restarted when they die. ``make`` is pickled.

    Returns whether the server was told to stop, rather than failed to start a worker.
    """
    # all workers accept connections from the same socket
    settings = config(partial(_made, make), factory=True, workers=workers)
    supervisor = Multiprocess(settings, sockets=[at])
    supervisor.run()
    return all(process.exitcode != STARTUP_FAILURE for process in supervisor.processes)


def config(app: FastAPI | Callable[[], FastAPI], *, factory: bool = False, workers: int = 1) -> uvicorn.Config:
    """Return the settings of a server, one of ``workers``."""
    level = "warning"
    if workers > 1:
        level = "info"  # at which uvicorn logs when workers start and die
    return uvicorn.Config(
        app,
        factory=factory,
        workers=workers,
        log_level=level,
        access_log=False,
        http=Connection,
        ws="none",
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_worker_healthcheck=_HANG_SECONDS,
    )


def _made(make: Callable[[], FastAPI]) -> FastAPI:
    """Create the application in a worker. If that fails the server stops, because it would fail again."""
    try:
        return make()
    except InputError as error:
        print(f"pst-ds serve: {error}", file=sys.stderr, flush=True)
        sys.exit(STARTUP_FAILURE)


class Connection(H11Protocol):
    """uvicorn's connection with a time limit for headers; uvicorn only limits the wait for the first byte.

    Beyond ``most`` connections, a new one replaces the one that has waited longest for headers.
    """

    most = 512
    header_seconds = 10.0
    _deadline: asyncio.TimerHandle | None = None
    """Timer that closes the connection; None while a request is read or answered."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._update_deadline()
        if len(self.connections) > self.most:
            self._close_longest_waiting()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_deadline()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._clear_deadline()

    def _close_longest_waiting(self) -> None:
        """Close the connection that has waited longest for headers; this one, if all others have a request."""
        longest: Connection | None = None
        earliest = math.inf
        for other in cast("set[Connection]", self.connections):
            # all deadlines are equally far from the start of the wait, so the earliest one belongs to the longest wait
            if other._deadline is not None and other._deadline.when() < earliest:
                longest = other
                earliest = other._deadline.when()
        if longest is not None:
            longest._close()

    def _update_deadline(self) -> None:
        # a client is idle from its first byte, or its last answer, until its headers are complete
        if self.conn.their_state is not h11.IDLE:
            self._clear_deadline()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.header_seconds, self._close)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _close(self) -> None:
        self._clear_deadline()
        self.transport.close()

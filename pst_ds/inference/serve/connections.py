"""Connections: limited in number, and closed if the headers of a request do not arrive."""

from __future__ import annotations

import asyncio
from typing import cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """uvicorn's connection with a time limit for headers; uvicorn only limits the wait for the first byte of the next
    request.

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
            waiting = [other for other in cast("set[Connection]", self.connections) if other._deadline is not None]
            min(waiting, key=lambda other: other._deadline.when())._close()  # type: ignore[union-attr]

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_deadline()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._clear_deadline()

    def _update_deadline(self) -> None:
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

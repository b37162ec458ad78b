"""Bodies of requests: read before anything answers them, up to a size and within a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from fastapi.responses import JSONResponse
from starlette.types import Message, Receive, Send

from pst_ds.serve.protocol import ProtocolError


class BodyLimit:
    """Answers 413 to a request whose body is longer than ``most`` bytes, whatever it says of its length, and 408 to one
    whose body is not there after ``seconds``; all others go on to ``app``."""

    def __init__(self, app: Callable[..., Awaitable[None]], most: int, seconds: float):
        self._app, self._most, self._seconds = app, most, seconds

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._seconds):
                whole = await self._body(receive)
        except TimeoutError:
            await _refuse(ProtocolError(408, f"the body was not there after {self._seconds:g} seconds"), scope, send)
        except ProtocolError as error:
            await _refuse(error, scope, send)
        else:
            if whole is not None:
                await self._app(scope, _after(whole, receive), send)

    async def _body(self, receive: Receive) -> bytes | None:
        """Return the body, or None when its client has gone. Raises ProtocolError."""
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._most:
                raise ProtocolError(413, f"the body has more than {self._most} bytes")
        return bytes(body)


def _after(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives ``body`` first."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return waiting.pop() if waiting else await receive()

    return receive_again


async def _refuse(error: ProtocolError, scope: Message, send: Send) -> None:
    async def nothing() -> Message:
        return {"type": "http.disconnect"}

    closes = {"Connection": "close"}  # the rest of the body is not read
    await JSONResponse(error.body(), error.status, headers=closes)(scope, nothing, send)

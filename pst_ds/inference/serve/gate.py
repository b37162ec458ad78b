"""Checks before a request is processed: its sender, the size of its body, and the time until it has arrived."""

import asyncio
import hmac
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Send

from pst_ds.inference.serve.protocol import ProtocolError

HEALTH = "/health"
"""Route of the server's state, which needs no key."""
PAGE = "/"
"""Route of the chat page, which needs no key: it asks for one."""


@dataclass(frozen=True, slots=True)
class Access:
    """Who may send requests: clients with one of ``keys``, or without keys every program that can reach the server.

    Web pages may not. A browser sends requests of any page to local servers, with the page's Origin or, after a change
    of its DNS entry, with the page's Host. With keys, which a page does not know, both may name a proxy.
    """

    keys: Sequence[str] = ()
    host: str = "localhost"
    """Host name of the server, accepted without keys in addition to localhost and IP addresses."""

    def require(self, method: str, headers: Headers) -> None:
        """Raise ProtocolError unless the sender may send the request."""
        if self.keys:
            self._require_key(headers)
        else:
            self._require_program(headers)
        # a page may send other types to any server without asking it first (a "simple request" of CORS)
        content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and content_type != "application/json":
            raise ProtocolError(415, "the body must be JSON; send the header Content-Type: application/json")

    def _require_key(self, headers: Headers) -> None:
        # headers are bytes, which starlette decodes as Latin-1; this undoes it
        scheme, _, sent_key = headers.get("authorization", "").encode("latin-1").partition(b" ")
        # compare with all keys, so that the time reveals nothing
        is_known = False
        for key in self.keys:
            for code in _on_the_wire(key):
                is_known |= hmac.compare_digest(sent_key.strip(), code)
        if scheme.lower() != b"bearer" or not is_known:
            why = "this server requires one of its keys (Authorization: Bearer KEY)"
            raise ProtocolError(401, why, code="invalid_api_key")

    def _require_program(self, headers: Headers) -> None:
        host = headers.get("host", "")
        origin = headers.get("origin")
        if not self._is_name(host):
            why = "is not a name of this server, which has no keys. Use its IP address, or start the server with keys"
            raise ProtocolError(403, f"Host {host[:200]!r} {why}")
        # an origin is its scheme, "://" and the host
        if origin is not None and origin.lower().partition("://")[2] != host.lower():
            why = "requests from web pages are refused by a server without keys. Start the server with keys"
            raise ProtocolError(403, f"Origin {origin[:200]!r}: {why}")

    def _is_name(self, host: str) -> bool:
        """Return whether a Host header, with or without a port, names this server or an IP address."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name in ("localhost", self.host.lower()) or bool(ip_address(name))
        except ValueError:
            return False


class Gate:
    """Reads the bodies of requests that ``access`` permits, and passes these on to ``app``.

    Answers 401, 403 or 415 to others without reading their body, 413 to a body of more than ``most`` bytes, regardless
    of its stated length, and 408 to one that has not arrived after ``seconds``.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], access: Access, most: int, seconds: float):
        self._app = app
        self._access = access
        self._most = most
        self._seconds = seconds

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            # before the body, so that a stranger cannot make the server read one
            if scope["path"] not in (HEALTH, PAGE):
                self._access.require(scope["method"], Headers(scope=scope))
            body = await self._body(receive)
        except ProtocolError as error:
            closes = {"Connection": "close"}  # the rest of the body is not read
            await JSONResponse(error.body(), error.status, headers=closes)(scope, receive, send)
            return
        if body is None:
            return
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            if waiting:
                return waiting.pop()
            return await receive()  # only that the client has disconnected

        await self._app(scope, receive_again, send)

    async def _body(self, receive: Receive) -> bytes | None:
        """Return the body, or None if its client has disconnected. Raises ProtocolError."""
        body = bytearray()
        is_complete = False
        try:
            # of the whole body: a client that sends a byte now and then keeps a connection open
            async with asyncio.timeout(self._seconds):
                while not is_complete:
                    message = await receive()
                    if message["type"] != "http.request":
                        return None
                    body += message.get("body", b"")
                    is_complete = not message.get("more_body", False)
                    if len(body) > self._most:
                        raise ProtocolError(413, f"the body has more than {self._most} bytes")
        except TimeoutError:
            raise ProtocolError(408, f"the body did not arrive within {self._seconds:g} seconds") from None
        return bytes(body)


def _on_the_wire(key: str) -> set[bytes]:
    """Return the bytes that clients send for a key: its bytes in the environment, or Latin-1."""
    codes = {os.fsencode(key)}
    with suppress(UnicodeEncodeError):
        codes.add(key.encode("latin-1"))
    return codes

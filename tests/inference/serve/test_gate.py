"""Who may send requests, and connections that send none; a real server without a model."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager

import pytest

from tests.lazy_module import need_packages
from tests.pairs import every_pair

need_packages("fastapi", "uvicorn", "openai")

import httpx2 as httpx  # noqa: E402
from fastapi import FastAPI  # noqa: E402

from pst_ds.inference.serve.gate import Access, Gate  # noqa: E402
from pst_ds.inference.serve.processes import Connection, bound  # noqa: E402
from tests.inference.serve.servers import start, stop  # noqa: E402

JSON = {"Content-Type": "application/json"}
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
WAIT = HEALTH.replace(b"health", b"wait")
KEYS = ("ascii", "schlüssel", "鍵")


@contextmanager
def _served(access, seconds=30.0, wait=None):
    app = FastAPI()
    app.get("/health")(lambda: "ok")
    if wait is not None:
        app.get("/wait")(wait)
    app.post("/v1/x")(lambda: "answered")
    app.add_middleware(Gate, access=access, most=100, seconds=seconds)
    server, thread, url = start(app)
    try:
        with httpx.Client(base_url=url, timeout=30.0) as client:
            yield client
    finally:
        stop(server, thread)


@pytest.fixture(scope="module")
def locked():
    with _served(Access(KEYS)) as client:
        yield client


@pytest.fixture(scope="module")
def keyless():
    with _served(Access(host="Model.example")) as client:
        yield client


def _status(client, headers, path="/v1/x"):
    return client.post(path, content=b"{}", headers=headers).status_code


@every_pair
@pytest.mark.parametrize("scheme", [b"Bearer ", b"bearer ", b"BEARER  "])
@pytest.mark.parametrize(
    "key", [b"ascii", "schlüssel".encode(), "schlüssel".encode("latin-1"), "鍵".encode()], ids=range(4)
)
def test_a_key_is_known_in_any_script(locked, scheme, key):
    assert _status(locked, JSON | {"Authorization": scheme + key}) == 200


@pytest.mark.parametrize(
    "given", [b"", b"ascii", b"Basic ascii", b"Bearer", b"Bearer asci", b"Bearer ?", b"Bearer \xff"]
)
def test_another_key_is_not(locked, given):
    assert _status(locked, JSON | {"Authorization": given}) == 401
    assert _status(locked, {"Authorization": given}, "/nowhere") == 401
    assert locked.get("/health", headers={"Authorization": given}).status_code == 200


@pytest.mark.parametrize("origin", [None, "https://proxy.example"])
def test_with_keys_a_proxy_may_pass_its_own_host(locked, origin):
    headers = JSON | {"Authorization": "Bearer ascii", "Host": "proxy.example"}
    assert _status(locked, headers if origin is None else headers | {"Origin": origin}) == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Content-Type": "Application/JSON; charset=utf-8"}, 200),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "model.example"}, 200),
        ({"Host": "192.168.1.7:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "rebound.example"}, 403),
        ({"Host": "127.0.0.1.rebound.example"}, 403),
        ({"Host": "localhost@rebound.example"}, 403),
        ({"Host": "["}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
        ({"Host": "localhost:1", "Origin": "http://localhost:3000"}, 403),
        ({"Origin": "https://page.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_web_pages_do_not_reach_a_server_without_keys(keyless, headers, status):
    assert _status(keyless, JSON | headers) == status


def test_a_request_that_is_refused_is_not_read():
    head = b"POST /v1/x HTTP/1.1\r\nHost: x\r\nContent-Length: 90\r\nContent-Type: application/json\r\n\r\n"
    with _served(Access(KEYS), seconds=0.01) as client, _link(client, head) as link:
        assert link.recv(1000).startswith(b"HTTP/1.1 401")


def _link(client, sent=b""):
    link = socket.create_connection((client.base_url.host, client.base_url.port), timeout=30)
    link.sendall(sent)
    return link


def _answer(link):
    """Return the body of a small answer, which comes after its headers."""
    head, _, body = link.recv(1000).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    return body or link.recv(1000)


class _Wait:
    """A route that answers once it is told to."""

    def __init__(self):
        self.begun, self.ends = threading.Event(), threading.Event()

    def __call__(self):
        self.begun.set()
        return self.ends.wait(30)


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_headers_that_do_not_arrive_end_their_connection_alone(monkeypatch, sent):
    monkeypatch.setattr(Connection, "header_seconds", 0.3)
    wait = _Wait()
    with _served(Access(), wait=wait) as client, _link(client, WAIT) as busy, _link(client, HEALTH) as kept:
        assert _answer(kept) == b'"ok"'
        kept.sendall(sent)
        with _link(client, sent) as slow:
            assert slow.recv(1000) == kept.recv(1000) == b""
        wait.ends.set()
        assert _answer(busy) == b"true"


def test_a_new_connection_takes_the_place_of_the_one_idle_longest(monkeypatch):
    monkeypatch.setattr(Connection, "most", 3)
    wait = _Wait()
    with _served(Access(), wait=wait) as client, _link(client, WAIT) as busy:
        assert wait.begun.wait(30)
        with _link(client) as first, _link(client) as second, _link(client, HEALTH) as third:
            assert _answer(third) == b'"ok"'
            assert first.recv(1000) == b""
            second.sendall(HEALTH)
            assert _answer(second) == b'"ok"'
        wait.ends.set()
        assert _answer(busy) == b"true"


def test_a_client_that_does_not_read_is_disconnected_by_the_kernel():
    with bound("127.0.0.1", 0) as at:
        at.listen()
        with socket.create_connection(at.getsockname(), timeout=30):
            accepted, _ = at.accept()
            with accepted:
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000

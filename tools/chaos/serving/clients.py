"""Clients of a server, in threads: the official one for valid requests, plain HTTP for invalid ones."""

from __future__ import annotations

import itertools
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx
import openai

from tools.chaos.serving.model import LOOP, MOST_TOKENS, PROMPTS, Answers

KEY = "a key of this load"
BODY_BYTES = 1 << 16
_TRIES, _PAUSE = 200, 0.1
"""Attempts, and the pause between them in seconds, while workers are replaced."""


@dataclass(slots=True)
class Load:
    """Requests and their outcomes, of all clients."""

    answers: Answers
    """Expected texts."""
    name: str
    url: str
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    """Unexpected texts, and statuses of valid requests."""
    refused: Counter[str] = field(default_factory=Counter)
    """Invalid requests with the expected status, by kind."""
    misjudged: list[str] = field(default_factory=list)
    """Invalid requests with another status."""
    cut: int = 0
    """Connections that broke before the answer; each request was repeated."""
    left: int = 0
    """Streams that the client abandoned."""
    held: list[socket.socket] = field(default_factory=list)
    """Connections with half a request."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def asked(self) -> int:
        return self.right + len(self.wrong) + self.refused.total() + len(self.misjudged) + self.left + len(self.held)


@dataclass(frozen=True, slots=True)
class Mistake:
    """An invalid request and its expected status."""

    status: int
    change: dict[str, Any] = field(default_factory=dict)
    content: bytes | None = None
    key: str = KEY
    path: str = "/chat/completions"
    kind: str = "application/json"


MISTAKES = {
    "unknown user": Mistake(404, {"model": "{name}:nobody"}),
    "a path for a user": Mistake(404, {"model": "{name}:../../user 00"}),
    "unknown route": Mistake(404, path="/completion"),
    "unknown field": Mistake(400, {"temprature": 0}),
    "no JSON by its type": Mistake(415, kind="text/plain"),
    "long stop strings": Mistake(400, {"stop": ["a" * 15_000] * 4}),
    "many messages": Mistake(400, {"messages": [{"role": "user", "content": ""}] * 1500}),
    "a template that loops": Mistake(400, {"messages": [{"role": "user", "content": LOOP}]}),
    "temperature of 9": Mistake(400, {"temperature": 9}),
    "too many new tokens": Mistake(400, {"max_tokens": 1 << 20}),
    "a tool without a name": Mistake(400, {"tools": [{"type": "function"}]}),
    "no such JSON schema": Mistake(
        400, {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "film"}}}}
    ),
    "more answers than one may have": Mistake(400, {"n": 128}),
    "no messages": Mistake(400, {"messages": []}),
    "longer than positions": Mistake(400, {"messages": [{"role": "user", "content": "film " * 4000}]}),
    "no JSON": Mistake(400, content=b'{"model": '),
    "no UTF-8": Mistake(400, content=b'{"model": "\xff"}'),
    "nested without end": Mistake(400, content=b"[" * 20_000),
    "a body of many bytes": Mistake(413, content=b" " * (BODY_BYTES + 1)),
    "another's key": Mistake(401, key="guessed"),
}

_HEAD = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
HALVES = {
    "half a head": _HEAD.encode(),
    "half a body": f"{_HEAD}Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{{".encode(),
}
"""Starts of requests that are never completed."""


def client(load: Load, seed: int, goes_on: Callable[[int], bool], bad_share: float) -> None:
    """Send requests until ``goes_on(number of this client's requests)`` is false; ``bad_share`` of them are invalid."""
    draw = random.Random(seed)
    limits = httpx.Timeout(120.0)
    with (
        openai.OpenAI(base_url=load.url, api_key=KEY, max_retries=0, timeout=120.0) as official,
        httpx.Client(timeout=limits) as plain,
    ):
        number = 0
        while goes_on(number):
            number += 1
            if draw.random() < bad_share:
                kind = draw.choice([*sorted(MISTAKES), *HALVES])
                if kind in HALVES:
                    _hold(load, HALVES[kind])
                else:
                    _ask_wrongly(load, plain, kind)
            elif draw.random() < bad_share:
                _leave(load, official, draw)
            else:
                _ask(load, official, draw)


def _ask(load: Load, official: openai.OpenAI, draw: random.Random) -> None:
    asked = draw.choice(sorted(load.answers, key=str))
    streams = draw.random() < 0.5
    request = _request(load, *asked)
    if asked[2] is None:
        request["temperature"] = draw.choice((0, 1e-45))
    for _ in range(_TRIES):
        try:
            text = _text(official, request, streams)
        except (openai.APIConnectionError, httpx.TransportError):
            with load.lock:
                load.cut += 1
            time.sleep(_PAUSE)
            continue
        except openai.APIStatusError as error:
            text = f"status {error.status_code}"
        except openai.APIError as error:  # in the middle of a stream
            text = f"{type(error).__name__}: {error}"
        with load.lock:
            if text == load.answers[asked]:
                load.right += 1
            else:
                load.wrong.append(f"{asked}: {text!r} instead of {load.answers[asked]!r}")
        return
    with load.lock:
        load.wrong.append(f"{asked}: no answer after {_TRIES} tries")


def _leave(load: Load, official: openai.OpenAI, draw: random.Random) -> None:
    """Read the first chunk of a stream, and abandon it."""
    request = _request(load, *draw.choice(sorted(load.answers, key=str)))
    try:
        with official.chat.completions.create(**request, stream=True) as stream:
            next(iter(stream))
    except (openai.APIError, httpx.TransportError, StopIteration):
        pass  # the worker was killed, which does not matter here
    with load.lock:
        load.left += 1


def _hold(load: Load, half: bytes) -> None:
    """Send half a request, and keep its connection until the load ends."""
    address = httpx.URL(load.url)
    with suppress(OSError):
        held = socket.create_connection((address.host, address.port or 80))
        held.sendall(half)
        with load.lock:
            load.held.append(held)


def _ask_wrongly(load: Load, plain: httpx.Client, kind: str) -> None:
    mistake = MISTAKES[kind]
    url = load.url + mistake.path
    body = _request(load, None, "the film", None) | mistake.change
    body["model"] = body["model"].format(name=load.name)
    how: dict[str, Any] = {"json": body} if mistake.content is None else {"content": mistake.content}
    for _ in range(_TRIES):
        try:
            headers = {"Authorization": f"Bearer {mistake.key}", "Content-Type": mistake.kind}
            status = plain.post(url, headers=headers, **how).status_code
        except httpx.TransportError:
            with load.lock:
                load.cut += 1
            time.sleep(_PAUSE)
            continue
        with load.lock:
            if status == mistake.status:
                load.refused[kind] += 1
            else:
                load.misjudged.append(f"{kind}: {status} instead of {mistake.status}")
        return


def ask_alone(url: str, name: str, users: Sequence[str | None], seeds: Sequence[int | None]) -> Answers:
    """Return what a server without other requests answers."""
    found: Answers = {}
    load = Load(found, name, url)
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=120.0) as official:
        for asked in itertools.product(users, PROMPTS, seeds):
            found[asked] = _text(official, _request(load, *asked), streams=False)
    return found


def _request(load: Load, user: str | None, prompt: str, seed: int | None) -> dict[str, Any]:
    model = load.name if user is None else f"{load.name}:{user}"
    messages = [{"role": "user", "content": prompt}]
    drawn = {"temperature": 0} if seed is None else {"temperature": 1.0, "top_p": 0.9, "seed": seed}
    return {"model": model, "messages": messages, "max_tokens": MOST_TOKENS, **drawn}


def _text(official: openai.OpenAI, request: dict[str, Any], streams: bool) -> str:
    if not streams:
        return official.chat.completions.create(**request).choices[0].message.content or ""
    ended, pieces = False, []
    with official.chat.completions.create(**request, stream=True) as stream:
        for chunk in stream:
            pieces.append(chunk.choices[0].delta.content or "")
            ended = ended or bool(chunk.choices[0].finish_reason)
    if not ended:
        raise httpx.RemoteProtocolError("the stream has no end")
    return "".join(pieces)

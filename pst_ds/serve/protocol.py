"""The chat-completions protocol: what a request may say, and the answers to it as JSON values."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pst_ds.decoder.sampling import Sampling

JsonTable = dict[str, Any]
_ROLES = ("system", "developer", "user", "assistant", "tool")
_NOT_HERE = {
    "tools": None, "functions": None, "logprobs": False, "audio": None, "logit_bias": None, "response_format": None,
    "presence_penalty": 0, "frequency_penalty": 0,
}  # fmt: skip
"""Parameters that change the answer and are not served, with the values that change nothing."""
_MOST_SEED = 1 << 63


class ProtocolError(Exception):
    """A request that is refused: an HTTP status, and the protocol's error object."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> JsonTable:
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request that was checked."""

    model: str
    messages: list[JsonTable]
    max_tokens: int | None
    sampling: Sampling
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    with_usage: bool
    """Whether the last chunk of a stream says how many tokens there were."""


def chat_request(table: object) -> ChatRequest:
    """Read a request. Raises ProtocolError for what is wrong, or not served."""
    if not isinstance(table, dict):
        raise ProtocolError(400, "the body must be a JSON object")
    for name, plain in _NOT_HERE.items():
        if table.get(name) not in (plain, None, False, [], {}, {"type": "text"}):
            raise ProtocolError(400, f"{name} is not supported here; leave it out", param=name)
    if table.get("n") not in (None, 1):
        raise ProtocolError(400, "n must be 1", param="n")
    most = "max_completion_tokens" if table.get("max_completion_tokens") is not None else "max_tokens"
    options = table.get("stream_options") or {}
    temperature = _number(table, "temperature", 1.0, 0.0, 2.0)
    return ChatRequest(
        model=_text(table, "model"),
        messages=_messages(table.get("messages")),
        max_tokens=_whole(table, most, 1),
        sampling=Sampling(temperature, top_p=_number(table, "top_p", 1.0, 1e-6, 1.0)),
        seed=_whole(table, "seed", -_MOST_SEED),
        stop=_stop(table.get("stop")),
        stream=_flag(table, "stream"),
        with_usage=isinstance(options, dict) and bool(options.get("include_usage")),
    )


def completion(model: str, text: str, why: str, prompt_tokens: int, new_tokens: int) -> JsonTable:
    """Return the answer to a request without ``stream``."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": None, "finish_reason": why}
    return _head(model, "chat.completion") | {"choices": [choice], "usage": usage(prompt_tokens, new_tokens)}


class Chunks:
    """The pieces of the answer to a request with ``stream``; all have one id."""

    def __init__(self, model: str):
        self._head = _head(model, "chat.completion.chunk")

    def delta(self, delta: Mapping[str, str], why: str | None = None) -> JsonTable:
        choice = {"index": 0, "delta": dict(delta), "logprobs": None, "finish_reason": why}
        return self._head | {"choices": [choice]}

    def usage(self, prompt_tokens: int, new_tokens: int) -> JsonTable:
        return self._head | {"choices": [], "usage": usage(prompt_tokens, new_tokens)}


def usage(prompt_tokens: int, new_tokens: int) -> JsonTable:
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": new_tokens, "total_tokens": prompt_tokens + new_tokens,
    }  # fmt: skip


def _head(model: str, kind: str) -> JsonTable:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _messages(messages: object) -> list[JsonTable]:
    if not isinstance(messages, list) or not messages:
        raise ProtocolError(400, "messages must be a list with at least one message", param="messages")
    read = []
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise ProtocolError(400, f"{place}.role must be one of {', '.join(_ROLES)}", param=f"{place}.role")
        content = message.get("content")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str):
            raise ProtocolError(400, f"{place}.content must be a text", param=f"{place}.content")
        role = "system" if message["role"] == "developer" else message["role"]
        read.append({"role": role, "content": content})
    return read


def _text(table: JsonTable, name: str) -> str:
    value = table.get(name)
    if not isinstance(value, str) or not value:
        raise ProtocolError(400, f"{name} must be a text", param=name)
    return value


def _number(table: JsonTable, name: str, default: float, least: float, most: float) -> float:
    value = table.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ProtocolError(400, f"{name} must be a number from {least:g} to {most:g}", param=name)
    return float(value)


def _whole(table: JsonTable, name: str, least: int) -> int | None:
    value = table.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < _MOST_SEED:
        raise ProtocolError(400, f"{name} must be a whole number of at least {least}", param=name)
    return value


def _flag(table: JsonTable, name: str) -> bool:
    value = table.get(name)
    if value not in (None, True, False):
        raise ProtocolError(400, f"{name} must be true or false", param=name)
    return bool(value)


def _stop(value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or len(texts) > 4 or not all(isinstance(text, str) and text for text in texts):
        raise ProtocolError(400, "stop must be a text, or up to four", param="stop")
    return tuple(texts)

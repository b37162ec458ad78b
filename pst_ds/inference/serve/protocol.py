"""The chat-completions protocol: valid requests, and the answers as JSON values."""

from __future__ import annotations

import difflib
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from pst_ds.inference.decoder.sampling import Sampling

JsonTable = dict[str, object]
ChatMessage = dict[str, str]
"""``role`` and ``content``."""
_ROLES = ("system", "developer", "user", "assistant", "tool")
_MOST_SEED = 1 << 63
_STOPS, _STOP_CHARACTERS = 4, 256
_NAME_CHARACTERS = 64
"""Characters of an unknown field's name that a message quotes."""

_SERVED = (
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "stream",
    "stream_options", "n",
)  # fmt: skip
_WITHOUT_EFFECT = (
    "user",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
)
"""Fields of the protocol that never change an answer."""
_NOT_SERVED: dict[str, tuple[object, ...]] = {
    "tools": (), "tool_choice": ("none", "auto"), "functions": (), "function_call": ("none", "auto"),
    "logprobs": (), "top_logprobs": (), "logit_bias": (), "presence_penalty": (), "frequency_penalty": (),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (), "store": (),
    "reasoning_effort": (), "verbosity": (), "web_search_options": (),
}  # fmt: skip
"""Fields of the protocol that are not supported, with the values that are accepted besides null and empty ones."""
_OF_MESSAGES: dict[str, tuple[object, ...]] = {
    "refusal": (),
    "annotations": (),
    "audio": (),
    "tool_calls": (),
    "function_call": (),
}


class ProtocolError(Exception):
    """A rejected request: an HTTP status, and the protocol's error object."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> JsonTable:
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A validated request."""

    model: str
    messages: list[ChatMessage]
    max_tokens: int | None
    sampling: Sampling
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    with_usage: bool
    """True if the last chunk of a stream reports the number of tokens."""


def read_request(body: bytes) -> ChatRequest:
    """Parse the body of a request. Raises ProtocolError for an invalid request, and for an unsupported field."""
    try:
        table = json.loads(body)
        if rb"\ud" in body.lower():
            json.dumps(table, ensure_ascii=False).encode()  # an unpaired surrogate cannot be encoded
    except (ValueError, RecursionError):
        raise ProtocolError(400, "the body is not JSON") from None
    return chat_request(table)


def chat_request(table: object) -> ChatRequest:
    """Validate a request. Raises ProtocolError as :func:`read_request` does."""
    if not isinstance(table, dict):
        raise ProtocolError(400, "the body must be a JSON object")
    _require_known(table, _SERVED, _WITHOUT_EFFECT, _NOT_SERVED)
    if table.get("n") not in (None, 1):
        raise ProtocolError(400, "n must be 1", param="n")
    most = "max_completion_tokens" if table.get("max_completion_tokens") is not None else "max_tokens"
    options = table.get("stream_options") or {}
    if not isinstance(options, dict):
        raise ProtocolError(400, "stream_options must be an object", param="stream_options")
    _require_known(options, ("include_usage",), ("include_obfuscation",), place="stream_options.")
    temperature = _number(table, "temperature", 1.0, 0.0, 2.0)
    return ChatRequest(
        model=_text(table, "model"),
        messages=_messages(table.get("messages")),
        max_tokens=_whole(table, most, 1),
        sampling=Sampling(temperature, top_p=_number(table, "top_p", 1.0, 1e-6, 1.0)),
        seed=_whole(table, "seed", -_MOST_SEED),
        stop=_stop(table.get("stop")),
        stream=_flag(table, "stream"),
        with_usage=_flag(options, "include_usage", place="stream_options."),
    )


def completion(model: str, text: str, why: str, prompt_tokens: int, new_tokens: int) -> JsonTable:
    """Return the answer to a request without ``stream``."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": None, "finish_reason": why}
    return _head(model, "chat.completion") | {"choices": [choice], "usage": usage(prompt_tokens, new_tokens)}


class Chunks:
    """The chunks of the answer to a request with ``stream``; all have one id."""

    def __init__(self, model: str):
        self._head = _head(model, "chat.completion.chunk")

    def delta(self, delta: Mapping[str, str], why: str | None = None) -> JsonTable:
        choice = {"index": 0, "delta": dict(delta), "logprobs": None, "finish_reason": why}
        return self._head | {"choices": [choice]}

    def usage(self, prompt_tokens: int, new_tokens: int) -> JsonTable:
        return self._head | {"choices": [], "usage": usage(prompt_tokens, new_tokens)}


def usage(prompt_tokens: int, new_tokens: int) -> JsonTable:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }


def _head(model: str, kind: str) -> JsonTable:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _messages(messages: object) -> list[ChatMessage]:
    if not isinstance(messages, list) or not messages:
        raise ProtocolError(400, "messages must be a list with at least one message", param="messages")
    read = []
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise ProtocolError(400, f"{place}.role must be one of {', '.join(_ROLES)}", param=f"{place}.role")
        _require_known(message, ("role", "content"), ("name", "tool_call_id"), _OF_MESSAGES, place=f"{place}.")
        content = message.get("content")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            texts = [part.get("text") for part in content]
            content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
        if not isinstance(content, str):
            where = f"{place}.content"
            raise ProtocolError(400, f"{where} must be a string, or a list of text parts", param=where)
        role = "system" if message["role"] == "developer" else message["role"]
        read.append({"role": role, "content": content})
    return read


def _require_known(
    table: JsonTable,
    served: Sequence[str],
    without_effect: Sequence[str] = (),
    not_served: Mapping[str, tuple[object, ...]] = MappingProxyType({}),
    *,
    place: str = "",
) -> None:
    """Raise ProtocolError for the first field of ``table`` that is unknown or has an unsupported value."""
    for name, value in table.items():
        if name in served or name in without_effect:
            continue
        shown = name[:_NAME_CHARACTERS]
        if name not in not_served:
            near = difflib.get_close_matches(shown, served, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "Omit it."
            raise ProtocolError(400, f"unknown field '{place}{shown}'. {hint}", param=f"{place}{shown}")
        if value not in (None, False, [], {}, *not_served[name]):
            raise ProtocolError(400, f"{place}{name} is not supported. Omit it.", param=f"{place}{name}")


def _text(table: JsonTable, name: str) -> str:
    value = table.get(name)
    if not isinstance(value, str) or not value:
        raise ProtocolError(400, f"{name} must be a string", param=name)
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


def _flag(table: JsonTable, name: str, place: str = "") -> bool:
    value = table.get(name)
    if value is not None and not isinstance(value, bool):
        raise ProtocolError(400, f"{place}{name} must be true or false", param=f"{place}{name}")
    return bool(value)


def _stop(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    given = value if isinstance(value, list) else [value]
    texts = [text for text in given if isinstance(text, str) and 0 < len(text) <= _STOP_CHARACTERS]
    if len(texts) < len(given) or len(texts) > _STOPS:
        most = f"{_STOP_CHARACTERS} characters"
        raise ProtocolError(400, f"stop must be a string of 1 to {most}, or a list of up to {_STOPS}", param="stop")
    return tuple(texts)

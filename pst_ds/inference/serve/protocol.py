"""The chat-completions protocol: valid requests, and the answers as JSON values."""

from __future__ import annotations

import difflib
import json
import time
import uuid
from collections.abc import Collection, Mapping
from typing import Annotated, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pst_ds.inference.decoder.sampling import Sampling

JsonTable = dict[str, object]
ChatMessage = dict[str, str]
"""``role`` and ``content``."""
_NAME_CHARACTERS = 64
"""Characters of an unknown field's name that a message quotes."""
_WITHOUT_EFFECT = {
    *("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls", "max_tokens"),
}
"""Fields of the protocol that never change an answer, and max_tokens next to max_completion_tokens."""
_NOT_SERVED: dict[str, tuple[object, ...]] = {
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    **dict.fromkeys(("tools", "functions", "logprobs", "top_logprobs", "logit_bias", "presence_penalty"), ()),
    **dict.fromkeys(("frequency_penalty", "audio", "prediction", "store", "reasoning_effort", "verbosity"), ()),
    "web_search_options": (),
}
"""Fields of the protocol that are not supported, with the values that are accepted besides null and empty ones."""
_NOT_SERVED_IN_MESSAGES: dict[str, tuple[object, ...]] = dict.fromkeys(
    ("refusal", "annotations", "audio", "tool_calls", "function_call"), ()
)


class ProtocolError(Exception):
    """A rejected request: an HTTP status, and the protocol's error object."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> JsonTable:
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Object(BaseModel):
    """A JSON object whose null fields count as absent."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, table: object) -> object:
        return {name: value for name, value in table.items() if value is not None} if isinstance(table, dict) else table

    def require_known(
        self, place: str, without_effect: Collection[str], not_served: Mapping[str, tuple[object, ...]]
    ) -> None:
        """Raise ProtocolError for the first other field that is unknown or has an unsupported value."""
        for name, value in (self.model_extra or {}).items():
            shown = place + name[:_NAME_CHARACTERS]
            if name not in without_effect and name not in not_served:
                near = difflib.get_close_matches(name[:_NAME_CHARACTERS], type(self).model_fields, n=1)
                hint = f"Did you mean {near[0]!r}?" if near else "Omit it."
                raise ProtocolError(400, f"unknown field '{shown}'. {hint}", param=shown)
            if name in not_served and value not in (False, [], {}, *not_served[name]):
                raise ProtocolError(400, f"{shown} is not supported. Omit it.", param=shown)


def _joined_parts(content: object) -> object:
    if not isinstance(content, list):
        return content
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        raise ValueError("a list must consist of text parts")
    return "".join(map(str, texts))


class _Message(_Object):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_joined_parts)]
    """A string, or a list of text parts."""


class _StreamOptions(_Object):
    include_usage: bool = False


class ChatRequest(_Object):
    """A validated request."""

    model: Annotated[str, Field(min_length=1)]
    messages: Annotated[list[_Message], Field(min_length=1, fail_fast=True)]
    """Validated up to the first wrong message: pydantic keeps a kilobyte per error."""
    max_tokens: Annotated[
        int | None, Field(ge=1, lt=1 << 63, validation_alias=AliasChoices("max_completion_tokens", "max_tokens"))
    ] = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=1e-6, le=1)] = 1.0
    seed: Annotated[int | None, Field(ge=-(1 << 63), lt=1 << 63)] = None
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=256)], ...],
        Field(max_length=4, fail_fast=True),
        BeforeValidator(lambda stop: tuple(stop) if isinstance(stop, list) else (stop,)),
    ] = ()
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    n: Literal[1] = 1

    @property
    def chat(self) -> list[ChatMessage]:
        """Messages as chat templates read them."""
        roles = {"developer": "system"}
        return [{"role": roles.get(one.role, one.role), "content": one.content} for one in self.messages]

    @property
    def sampling(self) -> Sampling:
        return Sampling(float(self.temperature), top_p=float(self.top_p))


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
    try:
        asked = ChatRequest.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        loc = first["loc"][:1] if first["loc"][0] == "stop" else first["loc"]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")
        what = "Input should be an object" if first["type"] == "model_type" else first["msg"]
        raise ProtocolError(400, f"{place}: {what}", param=place) from None
    asked.require_known("", _WITHOUT_EFFECT, _NOT_SERVED)
    asked.stream_options.require_known("stream_options.", ("include_obfuscation",), {})
    for number, message in enumerate(asked.messages):
        message.require_known(f"messages[{number}].", ("name", "tool_call_id"), _NOT_SERVED_IN_MESSAGES)
    return asked


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
    total = prompt_tokens + new_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": new_tokens, "total_tokens": total}


def _head(model: str, kind: str) -> JsonTable:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}

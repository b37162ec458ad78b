"""Answers as JSON values of the chat-completions and completions protocols."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from pst_ds.inference.serve.protocol import JsonTable


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token with its log-probability, and the most likely ones at its place."""

    data: bytes
    logprob: float
    likeliest: Sequence[Self] = ()

    @property
    def text(self) -> str:
        return self.data.decode(errors="replace")


@dataclass(slots=True)
class Piece:
    """A part of one of a request's answers, or all of it."""

    index: int
    text: str = ""
    tokens: list[TokenText] = field(default_factory=list)
    """Empty unless log-probabilities are wanted."""
    calls: list[JsonTable] = field(default_factory=list)
    why: str | None = None
    """Finish reason, in the last piece."""

    def append(self, other: Self) -> None:
        """Add the next piece of the same answer."""
        self.text += other.text
        self.tokens += other.tokens
        self.calls += other.calls
        self.why = other.why


class Reply(ABC):
    """The JSON of a request's answers; all chunks of a stream have one id."""

    kind, chunk_kind, prefix = "", "", ""

    def __init__(self, model: str, has_logprobs: bool):
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._has_logprobs = has_logprobs

    def opening(self, index: int) -> JsonTable | None:
        """Return the first chunk of an answer, if the protocol has one."""
        return None

    def chunk(self, piece: Piece) -> JsonTable:
        return self._of([self._choice(piece, "delta")], self.chunk_kind)

    def whole(self, answers: Sequence[Piece], used: JsonTable) -> JsonTable:
        """Return the answer to a request without ``stream``."""
        return self._of([self._choice(piece, "message") for piece in answers], self.kind) | {"usage": used}

    def usage(self, used: JsonTable) -> JsonTable:
        """Return the chunk with the usage."""
        return self._of([], self.chunk_kind) | {"usage": used}

    def _of(self, choices: list[JsonTable], kind: str) -> JsonTable:
        return {**self._head, "object": kind, "choices": choices}

    def _choice(self, piece: Piece, place: str) -> JsonTable:
        logprobs = self._logprobs(piece.tokens) if self._has_logprobs else None
        return {"index": piece.index, **self._said(piece, place), "logprobs": logprobs, "finish_reason": piece.why}

    @abstractmethod
    def _said(self, piece: Piece, place: str) -> JsonTable: ...

    @abstractmethod
    def _logprobs(self, tokens: Sequence[TokenText]) -> JsonTable: ...


class ChatReply(Reply):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self, index: int) -> JsonTable:
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._of([choice], self.chunk_kind)

    def _said(self, piece: Piece, place: str) -> JsonTable:
        if place == "message":
            calls: JsonTable = {"tool_calls": piece.calls} if piece.calls else {}
            return {place: {"role": "assistant", "content": piece.text if piece.text or not calls else None, **calls}}
        calls = {"tool_calls": [{"index": at, **call} for at, call in enumerate(piece.calls)]} if piece.calls else {}
        return {place: ({"content": piece.text} if piece.text else {}) | calls}

    def _logprobs(self, tokens: Sequence[TokenText]) -> JsonTable:
        return {
            "content": [self._token(one) | {"top_logprobs": list(map(self._token, one.likeliest))} for one in tokens]
        }

    def _token(self, one: TokenText) -> JsonTable:
        return {"token": one.text, "bytes": list(one.data), "logprob": one.logprob}


class CompletionReply(Reply):
    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def _said(self, piece: Piece, place: str) -> JsonTable:
        return {"text": piece.text}

    def _logprobs(self, tokens: Sequence[TokenText]) -> JsonTable:
        offsets, at = [], 0
        for one in tokens:
            offsets.append(at)
            at += len(one.text)
        return {
            "tokens": [one.text for one in tokens],
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [{other.text: other.logprob for other in one.likeliest} for one in tokens],
            "text_offset": offsets,
        }


def usage(prompt_tokens: int, new_tokens: int, cached: int = 0) -> JsonTable:
    """Return the tokens of a request; ``cached``: tokens of its prompts that were not computed again."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }

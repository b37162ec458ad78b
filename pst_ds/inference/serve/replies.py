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

    kind = ""
    """"object" of an answer that is sent at once."""
    chunk_kind = ""
    """"object" of a chunk of a stream."""
    prefix = ""
    """Start of the id."""

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
        logprobs = None
        if self._has_logprobs:
            logprobs = self._logprobs(piece.tokens)
        return {"index": piece.index, **self._content(piece, place), "logprobs": logprobs, "finish_reason": piece.why}

    @abstractmethod
    def _content(self, piece: Piece, place: str) -> JsonTable:
        """Return the fields with the text and the calls; ``place``: "message", or "delta" in a chunk."""

    @abstractmethod
    def _logprobs(self, tokens: Sequence[TokenText]) -> JsonTable:
        """Return the log-probabilities of the tokens of a piece."""


class ChatReply(Reply):
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def opening(self, index: int) -> JsonTable:
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._of([choice], self.chunk_kind)

    def _content(self, piece: Piece, place: str) -> JsonTable:
        if place == "message":
            return {place: self._message(piece)}
        return {place: self._delta(piece)}

    def _message(self, piece: Piece) -> JsonTable:
        message: JsonTable = {"role": "assistant", "content": piece.text}
        if piece.calls:
            if not piece.text:
                message["content"] = None  # the protocol's content of an answer that only calls
            message["tool_calls"] = piece.calls
        return message

    def _delta(self, piece: Piece) -> JsonTable:
        delta: JsonTable = {}
        if piece.text:
            delta["content"] = piece.text
        if piece.calls:
            # clients join the parts of a call by its index; a call is never split here
            delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(piece.calls)]
        return delta

    def _logprobs(self, tokens: Sequence[TokenText]) -> JsonTable:
        content = []
        for token in tokens:
            likeliest = [self._token(other) for other in token.likeliest]
            content.append(self._token(token) | {"top_logprobs": likeliest})
        return {"content": content}

    def _token(self, token: TokenText) -> JsonTable:
        # the bytes too, because a token may be a part of a character
        return {"token": token.text, "bytes": list(token.data), "logprob": token.logprob}


class CompletionReply(Reply):
    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def _content(self, piece: Piece, place: str) -> JsonTable:
        return {"text": piece.text}

    def _logprobs(self, tokens: Sequence[TokenText]) -> JsonTable:
        offsets: list[int] = []
        likeliest: list[dict[str, float]] = []
        offset = 0  # characters of this piece's tokens before a token
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
            likeliest.append({other.text: other.logprob for other in token.likeliest})
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": likeliest,
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

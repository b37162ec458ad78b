"""Texts that are tokenised as they come, without a store: a reader knows its place in them by a few numbers."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pst_ds.data.preparation.chats import tokenize_chats
from pst_ds.data.preparation.pieces import Reading, Span
from pst_ds.data.preparation.readers import texts_of
from pst_ds.data.tokens.identity import identity_of
from pst_ds.data.tokens.order import permuted
from pst_ds.data.tokens.tokenize import Documents, tokenize
from pst_ds.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

PIECE_BYTES = 16 << 20
"""Of a file that is cut: a reader that goes on reads at most so many again."""
WINDOW = 128
"""Sequences among which the next one is chosen."""
ENDLESS = 1 << 40
"""The length of a stream: more sequences than a run takes."""


class Place(NamedTuple):
    """Where a reader is in a stream; a list of numbers in a checkpoint."""

    passes: int = 0
    """How often it has read its part."""
    span: int = 0
    """Spans of this pass that it is done with."""
    batch: int = 0
    """Batches of texts of this span that it is done with."""
    token: int = 0
    """Tokens that it is done with of the next batch."""
    given: int = 0
    """Sequences that it has given of the window that begins here."""


BEGIN = Place()


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """Tokens to train on, in memory."""

    tokens: np.ndarray
    """(length,), of an integer type."""
    starts: np.ndarray
    """Where documents begin, behind the first token: int64."""
    predicted: np.ndarray
    """Which tokens are predicted: (length,) bool."""


@dataclass(frozen=True, slots=True, eq=False)
class TextStream:
    """Files or data sets as an endless stream of sequences, of which nothing is kept and none has a number."""

    what: str
    """Names it in messages."""
    spans: tuple[Span, ...]
    reading: Reading
    tokenizer: Tokenizer
    length: int
    """Tokens of each sequence."""
    apart: bool
    """Whether documents of a sequence do not see each other."""

    def __len__(self) -> int:
        return ENDLESS

    @property
    def masks_tokens(self) -> bool:
        """Whether some tokens are not to be learned."""
        return self.reading.kind == "chat"

    @property
    def several_documents(self) -> bool:
        """Whether a sequence may have documents that do not see each other."""
        return self.apart

    @property
    def digest(self) -> str:
        """A SHA-256 of names and sizes of the files, of the tokenizer, and of how they are read; of no contents."""
        spans = [asdict(replace(span, path=Path(span.path).name)) for span in self.spans]
        about = [spans, asdict(self.reading), identity_of(self.tokenizer).sha256, self.length, self.apart]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()


class StreamReader:
    """Gives the sequences of one of ``parts`` of a stream, without an end and from ``place`` on.

    Where there are as many spans as parts, a part is every ``parts``-th span, and else every ``parts``-th text. Each
    pass takes its spans in another order, and each ``window`` of sequences is shuffled; ``key`` decides both.
    """

    def __init__(
        self, stream: TextStream, key: str, part: int, parts: int, place: Place = BEGIN, *, window: int = WINDOW
    ):
        self._stream, self._key, self._window_size = stream, f"{key}/{part}", window
        deals_spans = len(stream.spans) >= parts
        self._spans = stream.spans[part::parts] if deals_spans else stream.spans
        self._part, self._parts = (0, 1) if deals_spans else (part, parts)
        self._start, self._given = place._replace(given=0), place.given
        self._sequences = self._cut(self._start)
        self._behind = self._start
        self._window: list[TokenSequence] = []
        self._coming: list[TokenSequence] = []
        """The next window, of which a sequence is read for each that is given of this one."""
        self._coming_start = self._start
        self._order: list[int] = []

    @property
    def place(self) -> Place:
        """From where another reader gives what this one would give next."""
        return self._start._replace(given=self._given)

    def next(self) -> TokenSequence:
        """Return the next sequence. Raises InputError for a text that cannot be read, or no text at all."""
        if not self._order:
            self._begin_window()
        found = self._window[self._order[self._given]]
        self._coming.append(self._read())
        self._given += 1
        if self._given == self._window_size:
            self._start, self._given, self._coming_start = self._coming_start, 0, self._behind
            self._window, self._coming, self._order = self._coming, [], []
        return found

    def _begin_window(self) -> None:
        if not self._window:
            self._window = [self._read() for _ in range(self._window_size)]
            self._coming_start = self._behind
            self._coming = [self._read() for _ in range(self._given)]
        key = f"{self._key}/{list(self._start)}"
        self._order = permuted(np.arange(self._window_size), self._window_size, key).tolist()

    def _read(self) -> TokenSequence:
        sequence, self._behind = next(self._sequences)
        return sequence

    def _cut(self, place: Place) -> Iterator[tuple[TokenSequence, Place]]:
        """Yield sequences from ``place`` on, each with the place behind it."""
        parts: list[TokenSequence] = []
        filled, length = 0, self._stream.length
        for at, documents in self._batches(place):
            begin, count = at.token, len(documents.tokens)
            while begin < count:
                end = min(begin + length - filled, count)
                parts.append(_part(documents, begin, end, filled))
                begin, filled = end, filled + end - begin
                if filled == length:
                    yield _joined(parts, apart=self._stream.apart), at._replace(token=end)
                    parts, filled = [], 0

    def _batches(self, place: Place) -> Iterator[tuple[Place, Documents]]:
        """Yield tokenised batches of texts from that of ``place`` on, each with its place."""
        begin, has_text = place, place != BEGIN
        for passes in itertools.count(place.passes):
            order = permuted(np.arange(len(self._spans)), len(self._spans), f"{self._key}/{passes}")
            for span in range(begin.span, len(order)):
                texts = texts_of(self._spans[order[span]], self._stream.reading)
                for batch, of_batch in itertools.islice(enumerate(texts), begin.batch, None):
                    documents = self._tokenized(of_batch[(self._part - batch) % self._parts :: self._parts])
                    has_text = has_text or len(documents.tokens) > 0
                    yield Place(passes, span, batch, begin.token), documents
                    begin = BEGIN
                begin = BEGIN
            if not has_text:
                part = f" for reader {self._part + 1} of {self._parts}" if self._parts > 1 else ""
                raise InputError(f"{self._stream.what} has no text{part}; give more text, or take fewer ranks")

    def _tokenized(self, texts: list[str]) -> Documents:
        tokenizer = self._stream.tokenizer
        if self._stream.reading.kind == "chat" and texts:
            return tokenize_chats(texts, tokenizer, self._stream.what)
        return tokenize(texts, tokenizer)


def _part(documents: Documents, start: int, stop: int, filled: int) -> TokenSequence:
    """Return tokens [start, stop) of ``documents`` as the part of a sequence behind its first ``filled`` tokens."""
    starts = np.cumsum(documents.lengths) - documents.lengths
    inside = starts[np.searchsorted(starts, start) : np.searchsorted(starts, stop)] - start + filled
    learned = np.ones(stop - start, bool) if documents.learned is None else documents.learned[start:stop]
    return TokenSequence(documents.tokens[start:stop], inside[inside > 0], learned)


def _joined(parts: list[TokenSequence], *, apart: bool) -> TokenSequence:
    """Return parts as one sequence, whose first token is not predicted, nor are those that begin documents."""
    starts = np.concatenate([part.starts for part in parts]) if apart else np.empty(0, np.int64)
    predicted = np.concatenate([part.predicted for part in parts])
    predicted[0] = False
    predicted[starts] = False
    return TokenSequence(np.concatenate([part.tokens for part in parts]), starts, predicted)

"""Text that is tokenised while training, without a store; the state of a reader is a few numbers."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pst_ds.data.preparation.pieces import Reading, Span
from pst_ds.data.preparation.readers import texts_of, tokenize_texts
from pst_ds.data.tokens.order import permuted
from pst_ds.data.tokens.sequences import TokenSequence
from pst_ds.data.tokens.tokenize import Documents, identity_of
from pst_ds.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

PIECE_BYTES = 16 << 20
"""Bytes of a part of a file, which a resumed reader may read again."""
WINDOW = 128
"""Sequences of the shuffle buffer."""
ENDLESS = 1 << 40
"""Nominal number of sequences of a stream: more than any run uses."""


class Place(NamedTuple):
    """Position of a reader in a stream; a list of numbers in checkpoints."""

    passes: int = 0
    """Completed epochs over the reader's part."""
    span: int = 0
    """Completed spans of this epoch."""
    batch: int = 0
    """Completed batches of documents of this span."""
    token: int = 0
    """Used tokens of the next batch."""
    given: int = 0
    """Sequences already returned from the shuffle buffer that starts here."""


BEGIN = Place()


@dataclass(frozen=True, slots=True, eq=False)
class TextStream:
    """Files or datasets as an endless stream of sequences without indices."""

    what: str
    """Name in messages."""
    spans: tuple[Span, ...]
    reading: Reading
    tokenizer: Tokenizer
    length: int
    """Tokens of each sequence."""
    apart: bool

    def __len__(self) -> int:
        return ENDLESS

    @property
    def masks_tokens(self) -> bool:
        return self.reading.kind == "chat"

    @property
    def several_documents(self) -> bool:
        return self.apart

    @property
    def digest(self) -> str:
        """SHA-256 of file names, file sizes, tokenizer and settings, without contents."""
        spans = [asdict(replace(span, path=Path(span.path).name)) for span in self.spans]
        about = [spans, asdict(self.reading), identity_of(self.tokenizer).sha256, self.length, self.apart]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()


class StreamReader:
    """Endless reader of part ``part`` of ``parts`` of a stream, starting at ``place``.

    A part is every ``parts``-th span if there are enough spans, else every ``parts``-th document. Spans are shuffled in
    each epoch and sequences within each buffer of ``window`` sequences; ``key`` seeds both.
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
        """The next buffer, which grows by one sequence for each that is returned from the current one."""
        self._coming_start = self._start
        self._order: list[int] = []

    @property
    def place(self) -> Place:
        """Position at which another reader would continue like this one."""
        return self._start._replace(given=self._given)

    def next(self) -> TokenSequence:
        """Return the next sequence. Raises InputError for unreadable or missing text."""
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
        """Yield sequences from ``place`` on, each with the position after it."""
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
        """Yield tokenised batches of documents from ``place`` on, each with its position."""
        begin, has_text, reading = place, place != BEGIN, self._stream.reading
        for passes in itertools.count(place.passes):
            order = permuted(np.arange(len(self._spans)), len(self._spans), f"{self._key}/{passes}")
            for span in range(begin.span, len(order)):
                texts = texts_of(self._spans[order[span]], reading)
                for batch, of_batch in itertools.islice(enumerate(texts), begin.batch, None):
                    own = of_batch[(self._part - batch) % self._parts :: self._parts]
                    documents = tokenize_texts(own, reading, self._stream.tokenizer, self._stream.what)
                    has_text = has_text or len(documents.tokens) > 0
                    yield Place(passes, span, batch, begin.token), documents
                    begin = BEGIN
                begin = BEGIN
            if not has_text:
                part = f" for reader {self._part + 1} of {self._parts}" if self._parts > 1 else ""
                raise InputError(f"{self._stream.what} has no text{part}. Add text, or start fewer ranks")


def _part(documents: Documents, start: int, stop: int, filled: int) -> TokenSequence:
    """Return tokens [start, stop) of ``documents`` as a part of a sequence, after its first ``filled`` tokens."""
    starts = np.cumsum(documents.lengths) - documents.lengths
    inside = starts[np.searchsorted(starts, start) : np.searchsorted(starts, stop)] - start + filled
    learned = np.ones(stop - start, bool) if documents.learned is None else documents.learned[start:stop]
    return TokenSequence(documents.tokens[start:stop], inside[inside > 0], learned)


def _joined(parts: list[TokenSequence], *, apart: bool) -> TokenSequence:
    """Concatenate parts to one sequence; first tokens of the sequence and of documents are not predicted."""
    starts = np.concatenate([part.starts for part in parts]) if apart else np.empty(0, np.int64)
    predicted = np.concatenate([part.predicted for part in parts])
    predicted[0] = False
    predicted[starts] = False
    return TokenSequence(np.concatenate([part.tokens for part in parts]), starts, predicted)

"""A token stream cut into sequences of equal length, which are read when a batch needs them."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from pst_ds.data.tokens.arrays import Array, between
from pst_ds.data.tokens.order import in_passes
from pst_ds.data.tokens.store import TokenStream

_TOKENS_AT_A_TIME = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """One sequence of tokens."""

    tokens: np.ndarray
    """(length,), of an integer type."""
    starts: np.ndarray
    """Document starts without the first token: int64."""
    predicted: np.ndarray
    """Mask of predicted tokens: (length,) bool."""


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """Consecutive pieces of a token stream; sequence i starts at token ``i * (length - overlap)``.

    Without ``overlap`` (for training), every sequence has ``length`` tokens and an incomplete last one is dropped. With
    an overlap of 1 (for evaluation), a sequence starts with the last token of the one before, so that every token
    except the stream's first is predicted exactly once; the last sequence may have as few as 2 tokens.
    """

    tokens: Array
    """(tokens of the stream,), of an integer type."""
    length: int
    overlap: int = 0
    num_bytes: Array | None = None
    """Bytes of text that each token represents: (tokens of the stream,). None if not counted."""
    borders: np.ndarray | None = None
    """Document starts, where positions and attention restart and whose first token is not predicted. None treats all
    documents as one text."""
    learned: Array | None = None
    """Mask of the tokens that are trained on, apart from first tokens: (tokens of the stream,). None for all."""
    stream_digest: str = ""
    """SHA-256 of the stream. Empty computes it from all tokens."""

    @classmethod
    def of(cls, stream: TokenStream, length: int, *, trains: bool, apart: bool) -> Self:
        """Cut a stream, for training or for evaluation; ``apart`` restricts attention to each document."""
        return cls(
            tokens=stream.tokens,
            length=length,
            overlap=0 if trains else 1,
            num_bytes=None if trains else stream.num_bytes,  # only evaluations report losses per byte
            borders=stream.borders if apart else None,
            learned=stream.learned,
            stream_digest=stream.digest,
        )

    def __len__(self) -> int:
        if self.overlap:
            return max(0, -(-(len(self.tokens) - 1) // self._stride))
        return len(self.tokens) // self.length

    @property
    def _stride(self) -> int:
        return self.length - self.overlap

    @property
    def apart(self) -> bool:
        """True if attention is restricted to each document."""
        return self.borders is not None

    @property
    def masks_tokens(self) -> bool:
        """True if some tokens are not trained on."""
        return self.learned is not None

    @property
    def several_documents(self) -> bool:
        """True if a sequence may have several documents with separate attention."""
        return self.borders is not None and len(self.borders) > 1

    @property
    def digest(self) -> str:
        stream = self.stream_digest or hashlib.sha256(np.ascontiguousarray(self.tokens[:]).data).hexdigest()
        about = f"{self.length} {self.overlap} {len(self.tokens)} {self.apart} {stream}"
        return hashlib.sha256(about.encode()).hexdigest()

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence: (sequences,) int64; a broadcast view for training."""
        if not self.overlap or not len(self):
            return np.broadcast_to(np.int64(self.length), len(self))
        lengths = np.full(len(self), self.length)
        lengths[-1] = len(self.tokens) - (len(self) - 1) * self._stride
        return lengths

    def __getitem__(self, index: int) -> TokenSequence:
        """Return one sequence, with a view of its tokens."""
        first = index * self._stride
        stop = min(first + self.length, len(self.tokens))
        starts = np.empty(0, np.int64)
        if self.borders is not None:
            starts = between(self.borders, first + 1, stop) - first
        predicted = self._learned_between(first, stop)
        # a first token has no token before it from which it could be predicted
        predicted[0] = False
        predicted[starts] = False
        return TokenSequence(self.tokens[first:stop], starts, predicted)

    def _learned_between(self, start: int, stop: int) -> np.ndarray:
        """Return the mask of some tokens: a copy, which callers change."""
        if self.learned is None:
            return np.ones(stop - start, bool)
        return self.learned[start:stop] != 0

    @property
    def num_predicted(self) -> int:
        """Predicted tokens of all sequences."""
        if not self.overlap:
            return sum(int(self[i].predicted.sum()) for i in range(len(self)))
        return sum(int(predicted.sum()) for _, predicted in self._predicted_windows())

    @property
    def predicted_bytes(self) -> int | None:
        """Bytes of text that the predicted tokens represent; None without an overlap."""
        if self.num_bytes is None or not self.overlap:
            return None
        windows = self._predicted_windows()
        return sum(int(self.num_bytes[window][predicted].sum(dtype=np.int64)) for window, predicted in windows)

    def _predicted_windows(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield windows of the stream, each with a mask of the tokens that an evaluation predicts."""
        for first in range(0, len(self.tokens), _TOKENS_AT_A_TIME):
            stop = min(first + _TOKENS_AT_A_TIME, len(self.tokens))
            predicted = self._learned_between(first, stop)
            predicted[0] &= first > 0  # the stream's first token
            if self.borders is not None:
                predicted[between(self.borders, first, stop) - first] = False
            yield slice(first, stop), predicted

    def ordered(self, numbers: np.ndarray, seed: int) -> np.ndarray:
        """Return the sequences at ``numbers`` of an endless shuffled order: int64."""
        return in_passes(numbers, len(self), f"{seed}")

    def first(self, count: int) -> Self:
        """Return the first ``count`` sequences."""
        num_tokens = min(count, len(self)) * self._stride + self.overlap
        num_bytes = self.num_bytes
        if num_bytes is not None:
            num_bytes = num_bytes[:num_tokens]
        return replace(self, tokens=self.tokens[:num_tokens], num_bytes=num_bytes)

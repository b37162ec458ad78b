"""Read a mixture with streams: one reader draws its sequences in order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pst_ds.data.tokens.mixed import MixedSequences
from pst_ds.data.tokens.streamed import BEGIN, WINDOW, Place, StreamReader, TextStream, TokenSequence


@dataclass(frozen=True, slots=True, eq=False)
class DrawnSequences:
    """Sequences of one length in memory."""

    sequences: tuple[TokenSequence, ...]
    apart: bool
    """Whether attention is restricted to each document."""
    masks_tokens: bool
    """Whether some tokens are not trained on."""

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def length(self) -> int:
        """Tokens of every sequence."""
        return len(self.sequences[0].tokens)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence: (sequences,) int64."""
        return np.full(len(self), self.length)

    @property
    def digest(self) -> str:
        """A SHA-256 of all tokens."""
        return hashlib.sha256(b"".join(one.tokens.tobytes() for one in self.sequences)).hexdigest()

    def __getitem__(self, index: int) -> np.ndarray:
        """Return the tokens of one sequence."""
        return self.sequences[index].tokens

    def starts_in(self, index: int) -> np.ndarray:
        """Return the document starts in a sequence, without the first token: int64."""
        return self.sequences[index].starts

    def predicted_in(self, index: int) -> np.ndarray:
        """Return which tokens of a sequence are predicted: (length,) bool."""
        return self.sequences[index].predicted

    def first(self, count: int) -> DrawnSequences:
        """Return the first ``count`` sequences."""
        return replace(self, sequences=self.sequences[:count])


class MixedReader:
    """Reader number ``part`` of ``parts`` of a mixture, which resumes its streams at ``places``.

    A stream yields the next sequence of the reader's part; other sources are read by index.
    """

    def __init__(
        self,
        mixed: MixedSequences,
        seed: int,
        part: int,
        parts: int,
        places: Sequence[Sequence[int]] = (),
        *,
        window: int = WINDOW,
    ):
        streams = {i: source for i, source in enumerate(mixed.sources) if isinstance(source, TextStream)}
        begins = [Place(*numbers) for numbers in places] or [BEGIN] * len(streams)
        self._mixed = mixed
        self._readers = {
            i: StreamReader(stream, f"{seed}/{i}", part, parts, begin, window=window)
            for (i, stream), begin in zip(streams.items(), begins, strict=True)
        }

    @property
    def places(self) -> list[list[int]]:
        """The :class:`Place` of each stream at which another reader would continue like this one."""
        return [list(reader.place) for reader in self._readers.values()]

    def take(self, indices: Sequence[int]) -> DrawnSequences:
        """Return the sequences of ``indices``, in their order. Raises InputError for a stream that cannot be read."""
        found = tuple(self._one(index) for index in indices)
        return DrawnSequences(found, self._mixed.apart, self._mixed.masks_tokens)

    def _one(self, index: int) -> TokenSequence:
        reader = self._readers.get(self._mixed.source_of(index))
        if reader is not None:
            return reader.next()
        mixed = self._mixed
        return TokenSequence(mixed[index], mixed.starts_in(index), mixed.predicted_in(index))

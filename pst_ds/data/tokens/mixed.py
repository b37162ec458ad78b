"""Sequences of several sources, mixed by weight, and the reader that draws them where some are streams."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pst_ds.data.tokens.order import Mixture, in_passes
from pst_ds.data.tokens.sequences import Sequences, TokenSequence
from pst_ds.data.tokens.streamed import BEGIN, WINDOW, Place, StreamReader, TextStream


class MixedSequences:
    """The concatenated sequences of several sources; a run uses them in the order of :meth:`ordered`.

    Without ``weights``, each sequence occurs once per epoch. With weights, each source has its fraction of any number
    of sequences, and restarts in another order when it is used up. For a stream, an index says only that it is the
    stream's turn: :class:`MixedReader` draws the sequence.

    Args:
        sources: Training sequences of equal length.
    """

    def __init__(self, sources: Sequence[Sequences | TextStream], weights: tuple[float, ...] = ()):
        self.sources, self.weights = tuple(sources), weights
        self._mixture = Mixture(weights) if weights else None
        self._starts = np.cumsum([0, *map(len, sources)], dtype=np.int64)
        self.apart = any(source.apart for source in sources)
        self.masks_tokens = any(source.masks_tokens for source in sources)
        self.several_documents = any(source.several_documents for source in sources)
        self.has_streams = any(isinstance(source, TextStream) for source in sources)
        """True if some sources are tokenised while training."""

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence: a broadcast view."""
        return np.broadcast_to(np.int64(self.sources[0].length), len(self))

    def __getitem__(self, index: int) -> TokenSequence:
        """Return one sequence, not of a stream."""
        number = self.source_of(index)
        source = self.sources[number]
        assert isinstance(source, Sequences), "the sequences of a stream are drawn, not looked up"
        return source[index - int(self._starts[number])]

    def source_of(self, index: int) -> int:
        """Return the number of the source of a sequence."""
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    @property
    def digest(self) -> str:
        """SHA-256 of all sources and their mixture."""
        about = [*(source.digest for source in self.sources), repr(self.weights)]
        return hashlib.sha256(" ".join(about).encode()).hexdigest()

    @property
    def num_predicted(self) -> int:
        """Predicted tokens of all sequences, without streams."""
        return sum(source.num_predicted for source in self.sources if isinstance(source, Sequences))

    def ordered(self, numbers: np.ndarray, seed: int | str) -> np.ndarray:
        """Return the sequences at ``numbers`` of the shuffled mixture: int64."""
        if self._mixture is None:
            return in_passes(numbers, len(self), f"{seed}")
        sources, before = self._mixture.at(numbers)
        found = np.empty_like(before)
        for source in np.unique(sources):
            chosen, of = sources == source, self.sources[source]
            key = f"{seed}/{source}"
            inside = before[chosen] if isinstance(of, TextStream) else in_passes(before[chosen], len(of), key)
            found[chosen] = self._starts[source] + inside
        return found

    def first(self, count: int) -> MixedSequences:
        """Return the first ``count`` sequences by index, without streams."""
        kept = [
            of.first(max(0, count - int(begin)))
            for of, begin in zip(self.sources, self._starts, strict=False)
            if isinstance(of, Sequences)
        ]
        return MixedSequences([of for of in kept if len(of)])


@dataclass(frozen=True, slots=True, eq=False)
class DrawnSequences:
    """Sequences of one length in memory."""

    sequences: tuple[TokenSequence, ...]
    apart: bool
    masks_tokens: bool

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def lengths(self) -> list[int]:
        return [len(one.tokens) for one in self.sequences]

    @property
    def digest(self) -> str:
        return hashlib.sha256(b"".join(one.tokens.tobytes() for one in self.sequences)).hexdigest()

    def __getitem__(self, index: int) -> TokenSequence:
        return self.sequences[index]

    def first(self, count: int) -> DrawnSequences:
        return replace(self, sequences=self.sequences[:count])


class MixedReader:
    """Reader number ``part`` of ``parts`` of a mixture, which resumes its streams at ``places``. A stream yields the
    next sequence of the reader's part; other sources are read by index."""

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
        found = []
        for index in indices:
            reader = self._readers.get(self._mixed.source_of(index))
            found.append(self._mixed[index] if reader is None else reader.next())
        return DrawnSequences(tuple(found), self._mixed.apart, self._mixed.masks_tokens)

"""One-dimensional arrays that are read slice by slice: in several parts or as bits, and document starts."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Sliced(Protocol):
    """One-dimensional array that is read slice by slice."""

    def __len__(self) -> int: ...
    def __getitem__(self, place: slice, /) -> np.ndarray: ...


class Bits:
    """``length`` booleans, packed with the lowest bit first: (ceil(length / 8),) uint8."""

    dtype = np.dtype(bool)

    def __init__(self, bits: np.ndarray, length: int):
        self._bits, self._length = bits, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: slice) -> np.ndarray:
        start, stop, step = place.indices(self._length)
        window = np.unpackbits(self._bits[start // 8 : -(-stop // 8)], bitorder="little")
        return window[start % 8 : start % 8 + max(0, stop - start)].astype(bool)[::step]


class JoinedArray:
    """Concatenation of arrays of one type. Slices within one part are views; others are copies."""

    def __init__(self, parts: Sequence[np.ndarray | Bits]):
        self.parts = list(parts)
        self._starts = np.cumsum([0, *map(len, self.parts)], dtype=np.int64)
        self.dtype: np.dtype = self.parts[0].dtype if self.parts else np.dtype("<u2")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, place: slice) -> np.ndarray:
        start, stop, step = place.indices(len(self))
        pieces = [self.parts[part][first:last] for part, _, first, last in windows(self._starts, start, stop)]
        return (pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, self.dtype), *pieces]))[::step]


Array = np.ndarray | Bits | JoinedArray


def windows(starts: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (part, its start, first index, last index within it) for each part that overlaps [start, stop).

    Args:
        starts: start of each part, and the end of the last: (parts + 1,) int64.
    """
    part = int(np.searchsorted(starts[1:], start, side="right"))
    while start < stop and part < len(starts) - 1:
        begin, end = int(starts[part]), int(starts[part + 1])
        yield part, begin, start - begin, min(stop, end) - begin
        start, part = end, part + 1


def joined(arrays: Sequence[Array]) -> Array:
    """Concatenate arrays without a copy; a single non-empty one is returned unchanged."""
    parts = [part for array in arrays for part in (array.parts if isinstance(array, JoinedArray) else [array])]
    filled = [part for part in parts if len(part)]
    return filled[0] if len(filled) == 1 else JoinedArray(filled or parts[:1])


class Borders:
    """Document starts of a token stream."""

    several = True
    """True if there may be more than one document."""

    def between(self, start: int, stop: int) -> np.ndarray:
        """Return the document starts in [start, stop): int64, ascending."""
        raise NotImplementedError


class Starts(Borders):
    """Document starts from the sorted indices of first tokens: (documents,) int64. Equal ones are empty documents."""

    def __init__(self, starts: Sliced):
        self.starts, self.several = starts, len(starts) > 1

    def between(self, start: int, stop: int) -> np.ndarray:
        places = range(len(self.starts))
        first = bisect.bisect_left(places, start, key=lambda i: self.starts[i : i + 1][0])
        last = bisect.bisect_left(places, stop, first, key=lambda i: self.starts[i : i + 1][0])
        return np.unique(np.array(self.starts[first:last], dtype=np.int64))


@dataclass(frozen=True, slots=True, eq=False)
class AfterEnds(Borders):
    """Document starts of a stream in which every document ends with the end-of-text token ``end``."""

    tokens: np.ndarray
    end: int

    def between(self, start: int, stop: int) -> np.ndarray:
        first = max(start - 1, 0)
        starts = np.flatnonzero(self.tokens[first : max(stop - 1, first)] == self.end) + first + 1
        return np.concatenate([[0], starts]) if start == 0 < stop else starts


@dataclass(frozen=True, slots=True, eq=False)
class JoinedBorders(Borders):
    """Document starts of concatenated streams; ``starts`` as in :func:`windows`."""

    parts: tuple[Borders, ...]
    starts: np.ndarray

    def between(self, start: int, stop: int) -> np.ndarray:
        found = (
            self.parts[part].between(first, last) + begin
            for part, begin, first, last in windows(self.starts, start, stop)
        )
        return np.concatenate([np.empty(0, np.int64), *found])

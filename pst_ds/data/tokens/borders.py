"""Document starts in a token stream, read window by window."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pst_ds.data.tokens.arrays import Array, FileArray, windows


class Borders(Protocol):
    """Document starts of a token stream."""

    @property
    def several(self) -> bool:
        """Whether there may be more than one document."""
        ...

    def between(self, start: int, stop: int) -> np.ndarray:
        """Return the document starts in [start, stop): int64, ascending."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Starts:
    """Document starts from the sorted indices of first tokens."""

    starts: np.ndarray | FileArray
    """(documents,) int64."""

    @property
    def several(self) -> bool:
        return len(self.starts) > 1

    def between(self, start: int, stop: int) -> np.ndarray:
        first = bisect.bisect_left(self.starts, start)
        last = bisect.bisect_left(self.starts, stop, first)
        return np.array(self.starts[first:last], dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Ends:
    """Document starts from the sorted indices after last tokens; the first document starts at 0."""

    ends: np.ndarray

    @property
    def several(self) -> bool:
        return len(self.ends) > 1

    def between(self, start: int, stop: int) -> np.ndarray:
        first, last = np.searchsorted(self.ends[: max(0, len(self.ends) - 1)], [start, stop])
        inside = np.unique(np.array(self.ends[first:last], dtype=np.int64))  # empty documents end where they start
        return np.concatenate([[0], inside[inside > 0]]) if start == 0 < stop else inside


@dataclass(frozen=True, slots=True, eq=False)
class AfterEnds:
    """Document starts of a stream in which every document ends with the end-of-text token."""

    tokens: Array
    end: int

    @property
    def several(self) -> bool:
        return True

    def between(self, start: int, stop: int) -> np.ndarray:
        first = max(start - 1, 0)
        starts = np.flatnonzero(self.tokens[first : max(stop - 1, first)] == self.end) + first + 1
        return np.concatenate([[0], starts]) if start == 0 < stop else starts


@dataclass(frozen=True, slots=True, eq=False)
class JoinedBorders:
    """Document starts of concatenated streams."""

    parts: tuple[Borders, ...]
    starts: np.ndarray
    """Start of each stream, and the end of the last: (parts + 1,) int64."""

    @property
    def several(self) -> bool:
        return True

    def between(self, start: int, stop: int) -> np.ndarray:
        found = (
            self.parts[part].between(first, last) + begin
            for part, begin, first, last in windows(self.starts, start, stop)
        )
        return np.concatenate([np.empty(0, np.int64), *found])

"""One array out of several, read piece by piece where it lies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np


def windows(starts: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (number of a part, where it begins, first and last place in it) for the parts that [start, stop) meets.

    ``starts``: where each part begins, and behind them where the last ends, (parts + 1,) int64.
    """
    part = int(np.searchsorted(starts[1:], start, side="right"))
    while start < stop and part < len(starts) - 1:
        begin, end = int(starts[part]), int(starts[part + 1])
        yield part, begin, start - begin, min(stop, end) - begin
        start, part = end, part + 1


class JoinedArray:
    """Several arrays of one dimension and one type as if they stood one after another.

    A slice within one part is a view of it; one that crosses a border is a copy.
    """

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts = list(parts)
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)])
        self.dtype: np.dtype = self.parts[0].dtype if self.parts else np.dtype("<u2")

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, place: int) -> np.generic: ...
    @overload
    def __getitem__(self, place: slice) -> np.ndarray: ...
    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            return self._between(start, stop)[::step]
        if not -len(self) <= place < len(self):
            raise IndexError(f"{place} of {len(self)}")
        return self._between(place % len(self), place % len(self) + 1)[0]

    def _between(self, start: int, stop: int) -> np.ndarray:
        pieces = [self.parts[part][first:last] for part, _, first, last in windows(self._starts, start, stop)]
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, self.dtype), *pieces])

    def first(self, count: int) -> JoinedArray:
        """Return the first ``count`` values, as a joined array."""
        kept = [part[: max(0, count - int(begin))] for part, begin in zip(self.parts, self._starts, strict=False)]
        return JoinedArray([part for part in kept if len(part)] or kept[:1])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._between(0, len(self)), dtype=dtype, copy=copy if copy is None else True)

    def tolist(self) -> list[int]:
        """Return all of it as a list."""
        return self[:].tolist()


Array = np.ndarray | JoinedArray


def parts_of(array: Array) -> list[np.ndarray]:
    """Return the arrays that one was joined from, or it alone."""
    return [array] if isinstance(array, np.ndarray) else array.parts


def joined(parts: Sequence[np.ndarray]) -> Array:
    """Return the only part that is not empty as it is, or all of them joined."""
    filled = [part for part in parts if len(part)]
    return filled[0] if len(filled) == 1 else JoinedArray(filled or parts[:1])

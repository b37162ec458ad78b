"""One-dimensional arrays that stay in files or consist of several parts, and are read piece by piece."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np


class FileArray:
    """A file of numbers of one ``dtype`` as a one-dimensional array that holds nothing in memory.

    Single values are read with pread: a bisection through a memory-mapped file would map most of it. ``bisect``
    supports it, and a copy that is sent to another process opens the file there.
    """

    def __init__(self, path: Path, dtype: np.dtype):
        self._path, self.dtype = path, dtype
        self._file = path.open("rb", buffering=0)
        self._length = os.fstat(self._file.fileno()).st_size // dtype.itemsize

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> np.ndarray: ...
    def __getitem__(self, place: int | slice) -> int | np.ndarray:
        if isinstance(place, slice):
            start, stop, step = place.indices(self._length)
            return self._read(start, stop)[::step]
        if not -self._length <= place < self._length:
            raise IndexError(f"{place} of {self._length}")
        return int(self._read(place % self._length, place % self._length + 1)[0])

    def _read(self, start: int, stop: int) -> np.ndarray:
        size = self.dtype.itemsize
        data = os.pread(self._file.fileno(), max(0, stop - start) * size, start * size)
        return np.frombuffer(data, self.dtype)

    def __reduce__(self) -> tuple[type[FileArray], tuple[Path, np.dtype]]:
        return FileArray, (self._path, self.dtype)


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


class JoinedArray:
    """Concatenation of one-dimensional arrays of one type. Slices within one part are views; others are copies."""

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
    def __getitem__(self, place: int | slice) -> np.generic | np.ndarray:
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

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._between(0, len(self)), dtype=dtype, copy=copy if copy is None else True)

    def tolist(self) -> list[int]:
        """Return all values as a list."""
        return self[:].tolist()


Array = np.ndarray | JoinedArray


def parts_of(array: Array) -> list[np.ndarray]:
    """Return the parts of a joined array, or the array itself."""
    return [array] if isinstance(array, np.ndarray) else array.parts


def joined(parts: Sequence[np.ndarray]) -> Array:
    """Concatenate ``parts`` without a copy; a single non-empty part is returned unchanged."""
    filled = [part for part in parts if len(part)]
    return filled[0] if len(filled) == 1 else JoinedArray(filled or parts[:1])

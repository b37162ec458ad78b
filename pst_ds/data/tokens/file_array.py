"""Numbers in a file, read one by one or by the slice: a bisection through a mapped file would map most of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, overload

import numpy as np


class FileArray:
    """A file of numbers of one ``dtype`` as an array of one dimension. Nothing of it stays in memory.

    ``bisect`` takes it, and a copy, sent to another process, opens the file there.
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
    def __getitem__(self, place: int | slice) -> Any:
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

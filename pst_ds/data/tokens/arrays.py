"""One-dimensional arrays that are read slice by slice: in several parts or as bits, and document starts."""

from collections.abc import Sequence

import numpy as np


class Bits:
    """``length`` booleans, packed with the lowest bit first: (ceil(length / 8),) uint8."""

    dtype = np.dtype(bool)

    def __init__(self, bits: np.ndarray, length: int):
        self._bits = bits
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: slice) -> np.ndarray:
        start, stop, step = place.indices(self._length)
        # the bytes with these bits, which may start and end inside a byte
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
        # the parts with the first element and with the one after the last
        first, last = np.searchsorted(self._starts[1:], (start, stop), side="right")
        pieces = []
        for index in range(first, min(last + 1, len(self.parts))):
            begin = int(self._starts[index])
            pieces.append(self.parts[index][max(0, start - begin) : max(0, stop - begin)])
        if len(pieces) == 1:
            return pieces[0][::step]
        # the empty array gives the type where no part is left
        return np.concatenate([np.empty(0, self.dtype), *pieces])[::step]


Array = np.ndarray | Bits | JoinedArray


def joined(parts: Sequence[np.ndarray | Bits]) -> Array:
    """Concatenate arrays without a copy; a single non-empty one is returned unchanged."""
    filled = [part for part in parts if len(part)]
    if len(filled) == 1:
        return filled[0]
    return JoinedArray(filled or parts[:1])  # an empty part still has the type


def between(starts: np.ndarray, first: int, stop: int) -> np.ndarray:
    """Return the document starts, ascending, that are in [first, stop): a copy, int64."""
    return np.array(starts[slice(*np.searchsorted(starts, (first, stop)))])

"""Masks of the tokens that are trained on, read window by window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pst_ds.data.tokens.arrays import windows


class Learned(Protocol):
    """Mask of the tokens that are predicted."""

    def between(self, start: int, stop: int) -> np.ndarray:
        """Return whether each token of [start, stop) is predicted: (stop - start,) bool."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class All:
    """Mask that selects every token."""

    def between(self, start: int, stop: int) -> np.ndarray:
        return np.ones(stop - start, bool)


@dataclass(frozen=True, slots=True, eq=False)
class Bits:
    """Mask with one bit per token, lowest bit first."""

    bits: np.ndarray
    """Packed bits: (ceil(tokens / 8),) uint8."""

    def between(self, start: int, stop: int) -> np.ndarray:
        window = np.unpackbits(self.bits[start // 8 : -(-stop // 8)], bitorder="little")
        return window[start % 8 : start % 8 + stop - start].astype(bool)


@dataclass(frozen=True, slots=True, eq=False)
class Bytes:
    """Mask with one byte per token, 0 or 1."""

    bytes: np.ndarray

    def between(self, start: int, stop: int) -> np.ndarray:
        return self.bytes[start:stop] != 0


@dataclass(frozen=True, slots=True, eq=False)
class JoinedLearned:
    """Concatenation of masks."""

    parts: Sequence[Learned]
    starts: np.ndarray
    """Start of each part, and the end of the last: (parts + 1,) int64."""

    def between(self, start: int, stop: int) -> np.ndarray:
        found = (self.parts[part].between(first, last) for part, _, first, last in windows(self.starts, start, stop))
        return np.concatenate([np.empty(0, bool), *found])

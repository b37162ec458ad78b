"""Which tokens of a stream the model is to predict; a window of it is looked at, never all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pst_ds.data.tokens.arrays import windows


class Learned(Protocol):
    """Says which tokens are predicted."""

    def between(self, start: int, stop: int) -> np.ndarray:
        """Return whether each token of [start, stop) is predicted: (stop - start,) bool."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class All:
    """Every token."""

    def between(self, start: int, stop: int) -> np.ndarray:
        return np.ones(stop - start, bool)


@dataclass(frozen=True, slots=True, eq=False)
class Bits:
    """A bit for each token, the lowest first."""

    bits: np.ndarray
    """(tokens / 8, rounded up,) uint8."""

    def between(self, start: int, stop: int) -> np.ndarray:
        window = np.unpackbits(self.bits[start // 8 : -(-stop // 8)], bitorder="little")
        return window[start % 8 : start % 8 + stop - start].astype(bool)


@dataclass(frozen=True, slots=True, eq=False)
class Bytes:
    """A byte for each token, 0 or 1."""

    bytes: np.ndarray

    def between(self, start: int, stop: int) -> np.ndarray:
        return self.bytes[start:stop] != 0


@dataclass(frozen=True, slots=True, eq=False)
class JoinedLearned:
    """Those of streams one after another."""

    parts: Sequence[Learned]
    starts: np.ndarray
    """Where each stream begins, and behind them where the last ends: (parts + 1,) int64."""

    def between(self, start: int, stop: int) -> np.ndarray:
        found = (self.parts[part].between(first, last) for part, _, first, last in windows(self.starts, start, stop))
        return np.concatenate([np.empty(0, bool), *found])

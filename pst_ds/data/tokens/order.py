"""Keyed permutations: a shuffled order in which each element is computed separately, without holding the order."""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 8
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
"""Multipliers of splitmix64 (Steele, Lea, Flood, OOPSLA 2014)."""


def permuted(places: np.ndarray, count: int, key: str) -> np.ndarray:
    """Return the elements at ``places`` of a random permutation of ``range(count)``, seeded by ``key``: int64.

    A Feistel network permutes the next power of two (Luby and Rackoff, SIAM J. Comput. 1988). Values outside
    ``range(count)`` are permuted again (cycle walking: Black and Rogaway, CT-RSA 2002), less than twice on average. The
    result is the same on every machine.
    """
    bits = (count - 1).bit_length()
    keys = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest(), "<u8")
    values = np.asarray(places).astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        values[outside] = _feistel(values[outside], bits, keys)
        outside = outside[values[outside] >= count]
    return values.astype(np.int64)


def in_passes(numbers: np.ndarray, count: int, key: str) -> np.ndarray:
    """Return the elements at ``numbers`` of an endless sequence of permutations of ``range(count)``, one per epoch:
    int64."""
    passes, places = np.divmod(np.asarray(numbers, np.int64), count)
    found = np.empty_like(places)
    for number in np.unique(passes):
        chosen = passes == number
        found[chosen] = permuted(places[chosen], count, f"{key}/{number}")
    return found


def _feistel(values: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """Permute values of ``bits`` bits. Each of an even number of rounds swaps the halves, and their widths."""
    low_bits = bits // 2
    high_bits = bits - low_bits
    high, low = values >> np.uint64(low_bits), values & _mask(low_bits)
    for key in keys:
        high, low = low, high ^ (_mixed(low + key) & _mask(high_bits))
        high_bits, low_bits = low_bits, high_bits
    return high << np.uint64(low_bits) | low


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


def _mixed(values: np.ndarray) -> np.ndarray:
    for shift, factor in zip((30, 27), _MIX, strict=True):
        values = (values ^ values >> np.uint64(shift)) * factor
    return values ^ values >> np.uint64(31)

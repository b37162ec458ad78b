"""An order of many things that nobody holds: a keyed permutation, from which each place is computed by itself."""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 8
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
"""Multipliers of splitmix64 (Steele, Lea, Flood, OOPSLA 2014)."""


def permuted(places: np.ndarray, count: int, key: str) -> np.ndarray:
    """Return what stands at some ``places`` of a random order of ``range(count)``, which ``key`` decides: int64.

    A Feistel network permutes the next power of two (Luby and Rackoff, SIAM J. Comput. 1988); what falls outside
    ``range(count)`` goes through it again (cycle walking: Black and Rogaway, CT-RSA 2002), less than twice on average.
    The same on every machine.
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
    """Return which of ``count`` things come at some ``numbers`` of an endless order: each once in every pass, in the
    pass's own order. int64."""
    passes, places = np.divmod(np.asarray(numbers, np.int64), count)
    found = np.empty_like(places)
    for number in np.unique(passes):
        chosen = passes == number
        found[chosen] = permuted(places[chosen], count, f"{key}/{number}")
    return found


def _feistel(values: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """Permute numbers of so many bits. The halves change places, and so widths, in each of an even number of rounds."""
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

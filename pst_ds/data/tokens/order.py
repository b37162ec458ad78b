"""The order in which a run reads sequences: keyed permutations, and mixtures of sources by weight.

A permutation computes each element separately, without holding the order. A mixture gives each source its share, with
an error of less than one sequence at any time.
"""

import hashlib
import heapq
import math
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction

import numpy as np

_ROUNDS = 8
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
"""Multipliers of splitmix64 (Steele, Lea, Flood, OOPSLA 2014)."""
MOST_PARTS = 100_000
"""Denominator up to which weights are exact; enough for weights with five decimals."""


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
    elements = np.empty_like(places)
    for number in np.unique(passes):
        chosen = passes == number
        elements[chosen] = permuted(places[chosen], count, f"{key}/{number}")
    return elements


def _feistel(values: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """Permute values of ``bits`` bits. Each of an even number of rounds swaps the halves, and their widths."""
    low_bits = bits // 2
    high_bits = bits - low_bits
    high = values >> np.uint64(low_bits)
    low = values & _mask(low_bits)
    for key in keys:
        high, low = low, high ^ (_mixed(low + key) & _mask(high_bits))
        high_bits, low_bits = low_bits, high_bits
    return high << np.uint64(low_bits) | low


def _mask(bits: int) -> np.uint64:
    """Return a number with the lowest ``bits`` set."""
    return np.uint64((1 << bits) - 1)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Return the output function of splitmix64: every bit of a value changes about half of the bits."""
    for shift, factor in zip((30, 27), _MIX, strict=True):
        values = (values ^ values >> np.uint64(shift)) * factor
    return values ^ values >> np.uint64(31)


def parts_of_weights(weights: Sequence[float]) -> list[int]:
    """Return weights above 0 as integers in the same ratio, rounded to fractions of MOST_PARTS if necessary."""
    # The shortest decimal of a weight is what its author wrote: 0.1 is one tenth, not the nearest binary fraction.
    exact = [Fraction(Decimal(repr(weight))) for weight in weights]
    total = sum(exact)
    shares = [weight / total for weight in exact]
    common = 1
    for share in shares:
        common = math.lcm(common, share.denominator)
    if common <= MOST_PARTS:
        return [int(share * common) for share in shares]
    # at least one part, so that every source is read
    parts = [max(1, math.floor(share * MOST_PARTS)) for share in shares]
    # Rounding down leaves parts over, which the sources that lost most by it get.
    by_loss = sorted(range(len(shares)), key=lambda source: (parts[source] - shares[source] * MOST_PARTS, source))
    for number in range(MOST_PARTS - sum(parts)):
        parts[by_loss[number % len(parts)]] += 1
    return parts


def turns(parts: Sequence[int]) -> np.ndarray:
    """Return the source of each sequence in a period of ``sum(parts)`` sequences: (sum(parts),) int64.

    After n sequences, a source with weight w has between wn - 1 and wn + 1 of them: its j-th sequence, counted from 0,
    is scheduled between j / w and (j + 1) / w, earliest deadline first (Baruah, Cohen, Plaxton, Varvel, Algorithmica
    1996, for one processor).
    """
    total = sum(parts)
    released: list[list[tuple[int, int, int]]] = [[] for _ in range(total + 1)]
    for source, share in enumerate(parts):
        released[0].append((-(-total // share), source, 0))
    ready: list[tuple[int, int, int]] = []
    source_of_turn = np.empty(total, np.int64)
    for now in range(total):
        for job in released[now]:
            heapq.heappush(ready, job)
        released[now] = []  # free the memory of finished turns
        _, source, number = heapq.heappop(ready)
        source_of_turn[now] = source
        following = number + 1
        share = parts[source]
        if following < share:
            job = (-(-(following + 1) * total // share), source, following)
            begin = following * total // share
            if begin <= now:
                heapq.heappush(ready, job)
            else:
                released[begin].append(job)
    return source_of_turn


class Mixture:
    """Assignment of sequences to sources by ``weights`` above 0, of which only ratios matter."""

    def __init__(self, weights: Sequence[float]):
        parts = parts_of_weights(weights)
        self._turns = turns(parts)
        self._parts = np.array(parts)
        self._before = np.empty_like(self._turns)
        """Number of earlier turns of the same source in a period: (turns,) int64."""
        for source, count in enumerate(parts):
            self._before[self._turns == source] = np.arange(count)

    def at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of some sequences of the mixture, and how many of that source came before: both int64."""
        rounds, turn = np.divmod(np.asarray(numbers, np.int64), len(self._turns))
        source = self._turns[turn]
        return source, rounds * self._parts[source] + self._before[turn]

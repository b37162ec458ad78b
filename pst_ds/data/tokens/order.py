"""The order in which a run reads sequences: keyed permutations, and mixtures of sources by weight.

A permutation computes each element separately, without holding the order. A mixture gives each source its share, with
an error of less than one sequence at any time.
"""

from __future__ import annotations

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


def parts_of_weights(weights: Sequence[float]) -> list[int]:
    """Return weights above 0 as integers in the same ratio, rounded to fractions of MOST_PARTS if necessary."""
    exact = [Fraction(Decimal(repr(weight))) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    common = math.lcm(*(share.denominator for share in shares))
    if common <= MOST_PARTS:
        return [int(share * common) for share in shares]
    parts = [max(1, math.floor(share * MOST_PARTS)) for share in shares]
    rests = sorted(range(len(shares)), key=lambda i: (parts[i] - shares[i] * MOST_PARTS, i))
    for i in range(MOST_PARTS - sum(parts)):
        parts[rests[i % len(parts)]] += 1
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
    found = np.empty(total, np.int64)
    for now in range(total):
        for job in released[now]:
            heapq.heappush(ready, job)
        released[now] = []
        _, source, number = heapq.heappop(ready)
        found[now] = source
        following, share = number + 1, parts[source]
        if following < share:
            job = (-(-(following + 1) * total // share), source, following)
            begin = following * total // share
            if begin <= now:
                heapq.heappush(ready, job)
            else:
                released[begin].append(job)
    return found


class _Phase:
    """A part of the order, from sequence ``start`` on, in which only the sources ``left`` have turns.

    Attributes:
        taken: Sequences of each source before this phase: (sources,) int64.
        turns: Source of each turn of a period: (turns,) int64.
        before: Number of earlier turns of the same source: (turns,) int64.
        parts: Turns of each source: (sources,) int64.
    """

    def __init__(self, start: int, taken: np.ndarray, parts: Sequence[int], left: Sequence[int]):
        common = math.gcd(*(parts[i] for i in left))
        self.start, self.taken = start, taken
        self.turns = np.array(left)[turns([parts[i] // common for i in left])]
        self.before, self.parts = np.empty_like(self.turns), np.zeros(len(parts), np.int64)
        for i in left:
            places = np.flatnonzero(self.turns == i)
            self.before[places], self.parts[i] = np.arange(len(places)), len(places)

    def at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rounds, turn = np.divmod(numbers - self.start, len(self.turns))
        source = self.turns[turn]
        return source, self.taken[source] + rounds * self.parts[source] + self.before[turn]

    def end_of(self, source: int, limit: int) -> int:
        """Return the number of the sequence after the last of ``source``, which has ``limit`` sequences."""
        rounds, turn = divmod(limit - int(self.taken[source]) - 1, int(self.parts[source]))
        return self.start + rounds * len(self.turns) + int(np.flatnonzero(self.turns == source)[turn]) + 1


class Mixture:
    """Assignment of sequences to sources by weight.

    Args:
        weights: weight of each source, above 0; only ratios matter.
        limits: maximum sequences of each source, None for no limit. The other sources replace one that is used up.
    """

    def __init__(self, weights: Sequence[float], limits: Sequence[int | None]):
        parts = parts_of_weights(weights)
        self.total: int | None = None
        """Sequences within the limits of all sources; None for no limit."""
        self._phases: list[_Phase] = []
        start, taken = 0, np.zeros(len(parts), np.int64)
        left = [i for i, limit in enumerate(limits) if limit is None or limit > 0]
        while left:
            phase = _Phase(start, taken, parts, left)
            self._phases.append(phase)
            ends = {i: phase.end_of(i, limit) for i in left if (limit := limits[i]) is not None}
            if not ends:
                return
            start = min(ends.values())
            rounds, turn = divmod(start - phase.start, len(phase.turns))
            taken = phase.taken + rounds * phase.parts + np.bincount(phase.turns[:turn], minlength=len(parts))
            left = [i for i in left if i not in ends or ends[i] > start]
        self.total = start

    def at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of some sequences of the mixture, and how many of that source came before: both int64."""
        numbers = np.asarray(numbers, np.int64)
        phases = np.searchsorted([phase.start for phase in self._phases], numbers, side="right") - 1
        source, before = np.empty_like(numbers), np.empty_like(numbers)
        for i in np.unique(phases):
            chosen = phases == i
            source[chosen], before[chosen] = self._phases[i].at(numbers[chosen])
        return source, before

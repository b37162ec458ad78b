"""Which source each sequence of a mixture comes from: computed from its number, never a sequence off the weights."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import numpy as np

MOST_PARTS = 100_000
"""Weights are exact as shares of up to so many parts, which weights of up to five decimals are."""


def parts_of_weights(weights: Sequence[float]) -> list[int]:
    """Return weights above 0 as whole numbers in their ratio; rounded to shares of MOST_PARTS where it takes more."""
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
    """Return the source of each of ``sum(parts)`` sequences, after which it begins anew: (sum(parts),) int64.

    After n sequences a source of share w has more than wn - 1 and less than wn + 1 of them: the j-th of a source, from
    0, comes between j / w and (j + 1) / w, and of those whose time has come, the one whose time ends first is taken
    (Baruah, Cohen, Plaxton, Varvel, Algorithmica 1996, for one processor).
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


@dataclass(frozen=True, slots=True, eq=False)
class _Phase:
    """A part of the order in which the same sources take turns."""

    start: int
    taken: np.ndarray
    """Sequences of each source before it: (sources,) int64."""
    turns: np.ndarray
    """The source of each turn: (turns,) int64."""
    before: np.ndarray
    """How many turns of the same source came before in ``turns``: (turns,) int64."""
    parts: np.ndarray
    """Turns of each source: (sources,) int64."""

    def at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rounds, turn = np.divmod(numbers - self.start, len(self.turns))
        source = self.turns[turn]
        return source, self.taken[source] + rounds * self.parts[source] + self.before[turn]


class Mixture:
    """Deals out the sequences of sources by weight.

    Args:
        weights: of each source, above 0; only their ratio counts.
        limits: most sequences of each source, None for any number. A source that has given them all leaves its turns to
            the others.
    """

    def __init__(self, weights: Sequence[float], limits: Sequence[int | None]):
        parts = parts_of_weights(weights)
        self.total: int | None = None
        """Sequences that all sources have within their limits; None without an end."""
        self._phases: list[_Phase] = []
        start, taken = 0, np.zeros(len(parts), np.int64)
        left = [i for i, limit in enumerate(limits) if limit is None or limit > 0]
        while left:
            phase = _phase(start, taken, parts, left)
            self._phases.append(phase)
            ends = {i: _end(phase, i, limit) for i in left if (limit := limits[i]) is not None}
            if not ends:
                return
            start = min(ends.values())
            taken = _taken(phase, start)
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


def _phase(start: int, taken: np.ndarray, parts: Sequence[int], left: Sequence[int]) -> _Phase:
    own = [parts[i] // math.gcd(*(parts[j] for j in left)) for i in left]
    sources = np.array(left)[turns(own)]
    before, counts = np.empty_like(sources), np.zeros(len(parts), np.int64)
    for i in left:
        places = np.flatnonzero(sources == i)
        before[places], counts[i] = np.arange(len(places)), len(places)
    return _Phase(start, taken, sources, before, counts)


def _end(phase: _Phase, source: int, limit: int) -> int:
    """Return the number of the sequence behind the last that ``source`` gives."""
    rounds, turn = divmod(limit - int(phase.taken[source]) - 1, int(phase.parts[source]))
    place = int(np.flatnonzero(phase.turns == source)[turn])
    return phase.start + rounds * len(phase.turns) + place + 1


def _taken(phase: _Phase, number: int) -> np.ndarray:
    rounds, turn = divmod(number - phase.start, len(phase.turns))
    return phase.taken + rounds * phase.parts + np.bincount(phase.turns[:turn], minlength=len(phase.parts))

"""Assign the sequences of a mixture to sources by weight, with an error of less than one sequence at any time."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import numpy as np

MOST_PARTS = 100_000
"""Denominator up to which weights are exact; enough for weights with five decimals."""


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


@dataclass(frozen=True, slots=True, eq=False)
class _Phase:
    """A part of the order with the same set of sources."""

    start: int
    taken: np.ndarray
    """Sequences of each source before this phase: (sources,) int64."""
    turns: np.ndarray
    """Source of each turn: (turns,) int64."""
    before: np.ndarray
    """Number of earlier turns of the same source: (turns,) int64."""
    parts: np.ndarray
    """Turns of each source: (sources,) int64."""

    def at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rounds, turn = np.divmod(numbers - self.start, len(self.turns))
        source = self.turns[turn]
        return source, self.taken[source] + rounds * self.parts[source] + self.before[turn]


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

"""Thinning: fewer points with the same curve, and fewer pictures over the same time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
P = TypeVar("P", bound=tuple[float, float])


def thinned(points: Sequence[P], most: int) -> list[P]:
    """Pick at most ``most`` (at least 4) of ``points``: both ends, and the extremes of every interval between them."""
    if len(points) <= most:
        return list(points)
    inner = range(1, len(points) - 1)
    size = -(-len(inner) // ((most - 2) // 2))  # two of each stretch are kept
    chosen = {0, len(points) - 1}
    for start in range(0, len(inner), size):
        stretch = inner[start : start + size]
        chosen.add(min(stretch, key=lambda i: points[i][1]))
        chosen.add(max(stretch, key=lambda i: points[i][1]))
    return [points[i] for i in sorted(chosen)]


def spread(items: Sequence[T], most: int) -> list[T]:
    """Pick at most ``most`` (at least 2) of ``items`` at even intervals, including the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


class EvenlyApart(Generic[T]):
    """Every k-th item of a stream and its last one: at most ``most`` (at least 2) and one more. k doubles as needed."""

    def __init__(self, most: int):
        self._most, self._stride, self._seen = most, 1, 0
        self._kept: list[T] = []
        self._last: list[T] = []
        """The last item, unless it is among the kept."""

    @property
    def items(self) -> list[T]:
        return self._kept + self._last

    def add(self, item: T) -> None:
        is_kept = self._seen % self._stride == 0
        self._seen += 1
        self._last = [] if is_kept else [item]
        self._kept += [item] if is_kept else []
        if len(self._kept) > self._most:
            self._last = self._kept[-1:] if len(self._kept) % 2 == 0 else []
            self._kept, self._stride = self._kept[::2], 2 * self._stride

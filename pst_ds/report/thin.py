"""Fewer points that draw the same curve, and fewer pictures that tell the same story."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar, overload

T = TypeVar("T")
P = TypeVar("P", bound=tuple[float, float])


def thinned(points: Sequence[P], most: int) -> list[P]:
    """At most ``most`` (at least 4) of ``points``, in their order: the first, the last, and of every stretch between
    them the lowest and the highest."""
    if len(points) <= most:
        return list(points)
    inner = range(1, len(points) - 1)
    size = -(-2 * len(inner) // (most - 2))  # two of each stretch are kept
    chosen = {0, len(points) - 1}
    for start in range(0, len(inner), size):
        stretch = inner[start : start + size]
        chosen.add(min(stretch, key=lambda i: points[i][1]))
        chosen.add(max(stretch, key=lambda i: points[i][1]))
    return [points[i] for i in sorted(chosen)]


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most ``most`` (at least 2) of ``items``, evenly apart, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


class EvenlyApart(Sequence[T], Generic[T]):
    """Of a stream of items every k-th from the first on, and the last: at most ``most`` (at least 2) and one more. k
    doubles whenever there are too many."""

    def __init__(self, most: int):
        self._most, self._stride, self._seen = most, 1, 0
        self._kept: list[T] = []
        self._last: list[T] = []
        """The last item, while it is not among the kept."""

    def add(self, item: T) -> None:
        self._last = [item]
        if self._seen % self._stride == 0:
            self._kept.append(item)
            self._last = []
        self._seen += 1
        if len(self._kept) > self._most:
            self._last = self._kept[-1:] if len(self._kept) % 2 == 0 else []
            self._kept, self._stride = self._kept[::2], 2 * self._stride

    def __len__(self) -> int:
        return len(self._kept) + len(self._last)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        return (self._kept + self._last)[index]

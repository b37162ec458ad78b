"""Fewer points that draw the same curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

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

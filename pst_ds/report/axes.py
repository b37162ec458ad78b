"""Axes of a drawing: positions of numbers, ticks, and number formats."""

from __future__ import annotations

import math
from dataclasses import dataclass

WIDTH, HEIGHT = 360, 190
"""Size of a chart in its units: a phone's width, so that text has its nominal size."""
LEFT, RIGHT, TOP, BOTTOM = 54, 350, 10, 166
"""Edges of the plot in the chart."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A label and its position."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Axis:
    """Values from ``low`` to ``high``, drawn at positions from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        low, high, at = (math.log10(v) if self.is_log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int) -> list[Tick]:
        """Return about ``most`` ticks or fewer, with enough digits to distinguish them."""
        values = decades(self.low, self.high, most) if self.is_log else round_numbers(self.low, self.high, most)
        step = math.inf if self.is_log else round_step(self.low, self.high, most)
        return [Tick(round(self.place(value), 1), short(value, digits_to(step, value))) for value in values]


def axis_of(
    low: float, high: float, start: float, end: float, *, is_log: bool = False, least_share: float = 0.0
) -> Axis:
    """Return an axis from ``low`` to ``high``, widened if they are closer than ``least_share`` of the greater.

    Values that are nearly the same then look so.
    """
    if is_log:
        return Axis(10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high * 1.0001)), start, end, True)
    least = least_share * max(abs(low), abs(high))
    if low == high:
        room = abs(low) / 2 or 0.5
        low, high = low - room, high + room
    elif high - low < least:
        middle = low + (high - low) / 2
        low, high = middle - least / 2, middle + least / 2
    return Axis(low, high, start, end)


def round_numbers(low: float, high: float, most: int) -> list[float]:
    """Return at most ``most`` + 1 multiples of 1, 2 or 5 times a power of ten in [low, high]."""
    step = round_step(low, high, most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def round_step(low: float, high: float, most: int) -> float:
    """Return 1, 2 or 5 times a power of ten that fits at most ``most`` times into [low, high]."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    return step * next(factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) <= most)


def digits_to(step: float, value: float) -> int:
    """Return the number of digits of ``value`` down to the first one of ``step``, at least four."""
    if not value or math.isinf(step):
        return 4
    return max(4, math.floor(math.log10(abs(value)) + 1e-9) - math.floor(math.log10(step) + 1e-9) + 1)


def decades(low: float, high: float, most: int) -> list[float]:
    """Return about ``most`` powers of ten or fewer in [low, high]."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    return [10.0**power for power in range(first, last + 1, max(1, math.ceil((last - first) / most)))]


def short(value: float, digits: int = 4) -> str:
    """Format a value with at most ``digits`` digits: "0.8999", "12.3k", "4.5M", "2e-05"."""
    value = float(f"{value:.{digits}g}")
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if max(size, 1e4) <= abs(value) < 1e13:
            return f"{value / size:.{digits}g}{unit}"
    return f"{value:.{digits}g}"


def whole(value: float) -> str:
    """Format a value as "12,345"."""
    return f"{round(value):,}"

"""The curves of runs as charts: axes with their ticks, number formats, and SVG paths."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from pst_ds.report.run_data import RunData
from pst_ds.train.monitor.curves import EVALUATION, Point

WIDTH, HEIGHT = 360, 190
"""Size of a chart in its units: a phone's width, so that text has its nominal size."""
LEFT, RIGHT, TOP, BOTTOM = 54, 350, 10, 166
"""Edges of the plot in the chart."""
MOST_POINTS = 600
"""Most points of a curve, about two per pixel."""
_MOST_MARKS = 20
"""Most points of a line that has visible marks."""
_LEAST_LOG_RANGE = 10.0
"""Smallest ratio of the largest to the smallest value on a logarithmic axis."""
_LEAST_SHARE = 1e-3
"""Smallest range of an axis relative to the largest value, so that rounding does not fill the chart."""
_TINY, _LEAST_SHARE_OF_TINY = 1e-4, 0.5
"""Values below the first need an exponent, which leaves room for two digits next to the plot."""
LEARNING_RATE = "lr/"
P = TypeVar("P", bound=tuple[float, float])


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


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart. ``colour`` is an index into the page's palette."""

    label: str
    colour: int
    points: list[Point]
    is_dashed: bool = False

    @property
    def last(self) -> str:
        return short(self.points[-1][1])


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing of series, with the data that a script needs to show the value at the pointer."""

    title: str
    note: str
    steps: Axis
    values: Axis
    series: list[Series]

    @property
    def has_curve(self) -> bool:
        """True if a series has two points or more."""
        return any(len(one.points) > 1 for one in self.series)

    def path(self, series: Series) -> str:
        return "M" + "L".join(f"{x:g} {y:g}" for x, y in self._places(series))

    def marks(self, series: Series) -> list[tuple[float, float]]:
        """Return where a series of few points has visible marks."""
        return self._places(series) if len(series.points) <= _MOST_MARKS else []

    def _places(self, series: Series) -> list[tuple[float, float]]:
        return [(round(self.steps.place(x), 1), round(self.values.place(y), 1)) for x, y in series.points]

    @property
    def data(self) -> dict[str, object]:
        """The domain of steps, and the steps and values (six digits) of every series."""
        series = [
            {"x": [step for step, _ in one.points], "y": [float(f"{v:.6g}") for _, v in one.points]}
            for one in self.series
        ]
        return {"low": self.steps.low, "high": self.steps.high, "series": series}


def charts(runs: Sequence[RunData]) -> Iterator[Chart]:
    """Yield the charts for which the runs have curves, all over the same steps."""
    yield from _chart(runs, "Loss", "mean since the previous point", "loss")
    sparsity = ("target", "sparsity/target", True), ("actual", "sparsity/actual", False)
    yield from _pair(runs, "Sparsity", "of the pruned matrices", *sparsity)
    yield from _chart(runs, "Flip rate", "fraction of mask bits per update", "flip_rate", is_log=True)
    yield from _chart(runs, "Correlation of S with |W|", "mean over layers", "correlation")
    for name in _names(runs, EVALUATION):
        yield from _chart(runs, f"Evaluation: {name.removeprefix(EVALUATION)}", "", name)
    yield from _learning_rates(runs)
    yield from _chart(runs, "Tokens per second", "over all ranks", "tokens_per_second")
    pace = ("slowest", "ranks/most_seconds", False), ("median", "ranks/median_seconds", True)
    yield from _pair(runs, "Seconds per step", "without waiting for others", *pace)


def _names(runs: Sequence[RunData], prefix: str) -> list[str]:
    """List the curves of any run with this prefix, in the order of their first values."""
    return list(dict.fromkeys(name for run in runs for name in run.curves if name.startswith(prefix)))


def _chart(runs: Sequence[RunData], title: str, note: str, curve: str, *, is_log: bool = False) -> Iterator[Chart]:
    """Draw a curve of each run."""
    series = [Series(run.name, i, run.curves[curve]) for i, run in enumerate(runs) if curve in run.curves]
    yield from drawn(title, note, series, _last_step(runs), is_log=is_log)


def _pair(runs: Sequence[RunData], title: str, note: str, *curves: tuple[str, str, bool]) -> Iterator[Chart]:
    """Draw two curves of each run from 0, given as (label, name, is dashed); one that is 0 throughout is omitted."""
    series = []
    for i, run in enumerate(runs):
        for label, curve, is_dashed in curves:
            points = run.curves.get(curve, [])
            if any(value for _, value in points):
                series.append(Series(label if len(runs) == 1 else f"{run.name}, {label}", i, points, is_dashed))
    yield from drawn(title, note, series, _last_step(runs), from_zero=True)


def _learning_rates(runs: Sequence[RunData]) -> Iterator[Chart]:
    """Draw all parameter groups of one run in one chart, or one chart per group for several runs."""
    names = _names(runs, LEARNING_RATE)
    if len(runs) > 1:
        for name in names:
            yield from _chart(runs, f"Learning rate of {name.removeprefix(LEARNING_RATE)}", "", name, is_log=True)
        return
    series = [Series(name.removeprefix(LEARNING_RATE), i, runs[0].curves[name]) for i, name in enumerate(names)]
    yield from drawn("Learning rates", "by parameter group", series, _last_step(runs), is_log=True)


def _last_step(runs: Sequence[RunData]) -> int:
    return max(run.last_step for run in runs)


def drawn(
    title: str, note: str, series: Sequence[Series], end: int, *, is_log: bool = False, from_zero: bool = False
) -> Iterator[Chart]:
    """Yield the chart, from step 0 to ``end``, unless no series has a point.

    ``is_log``: use a logarithmic axis, omitting 0, if values are far apart. ``from_zero``: the axis contains 0.
    """
    positive = [value for one in series for _, value in one.points if value > 0]
    is_log = is_log and bool(positive) and max(positive) / min(positive) > _LEAST_LOG_RANGE
    if is_log:
        series = [replace(one, points=[point for point in one.points if point[1] > 0]) for one in series]
        note = ", ".join(filter(None, [note, "log scale"]))
    series = [replace(one, points=thinned(one.points, MOST_POINTS)) for one in series if one.points]
    if not series:
        return
    values = [value for one in series for _, value in one.points] + ([0.0] if from_zero else [])
    share = _LEAST_SHARE if max(map(abs, values)) >= _TINY else _LEAST_SHARE_OF_TINY
    axis = axis_of(min(values), max(values), BOTTOM, TOP, is_log=is_log, least_share=share)
    yield Chart(title, note, axis_of(0, end, LEFT, RIGHT), axis, series)


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

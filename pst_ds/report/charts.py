"""The curves of runs as charts: which there are, and their drawing as SVG paths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pst_ds.report.axes import BOTTOM, LEFT, RIGHT, TOP, Axis, Tick, axis_of, short
from pst_ds.report.run_data import Point, RunData
from pst_ds.report.thin import thinned

MOST_POINTS = 600
"""Of a curve, which is about two a pixel."""
_MOST_MARKS = 20
"""Of a line that shows its points."""
_LEAST_LOG_RANGE = 10.0
"""Between the least and the greatest value of a chart on a logarithmic axis."""
_LEAST_SHARE = 1e-3
"""Of the greatest value of a chart that an axis reaches over: rounding does not fill it."""
_TINY, _LEAST_SHARE_OF_TINY = 1e-4, 0.5
"""What is smaller is written with an exponent, and beside the plot is room for two digits of it."""
LEARNING_RATE, EVALUATION = "lr/", "eval/"


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart. ``colour`` counts the colours of the page; ``is_dashed`` is for a line of the same run."""

    label: str
    colour: int
    points: list[Point]
    is_dashed: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """A series as it is drawn."""

    series: Series
    path: str
    marks: list[tuple[float, float]]
    last: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing of lines, with what a script needs to say the value at the pointer."""

    title: str
    note: str
    steps: Axis
    values: Axis
    lines: list[Line]

    @property
    def step_ticks(self) -> list[Tick]:
        return self.steps.ticks(5)

    @property
    def value_ticks(self) -> list[Tick]:
        return self.values.ticks(5)

    @property
    def data(self) -> dict[str, object]:
        """Its domain of steps, and the points of every line: two lists, of steps and of values of six digits."""
        series = [
            {"x": [step for step, _ in line.series.points], "y": [float(f"{v:.6g}") for _, v in line.series.points]}
            for line in self.lines
        ]
        return {"low": self.steps.low, "high": self.steps.high, "series": series}


def charts(runs: Sequence[RunData]) -> Iterator[Chart]:
    """Every chart that the runs have curves for, all over the same steps."""
    yield from _chart(runs, "Loss", "mean since the point before", "loss")
    yield from _sparsity(runs)
    yield from _chart(runs, "Flip rate", "of mask bits, at an update", "flip_rate", is_log=True)
    yield from _chart(runs, "Correlation of S with |W|", "mean of the layers", "correlation")
    for name in _names(runs, EVALUATION):
        yield from _chart(runs, f"Evaluation: {name.removeprefix(EVALUATION)}", "", name)
    yield from _learning_rates(runs)
    yield from _chart(runs, "Tokens a second", "all ranks together", "tokens_per_second")


def _names(runs: Sequence[RunData], prefix: str) -> list[str]:
    """Curves of any run that begin so, in the order they were first written in."""
    return list(dict.fromkeys(name for run in runs for name in run.curves if name.startswith(prefix)))


def _chart(runs: Sequence[RunData], title: str, note: str, curve: str, *, is_log: bool = False) -> Iterator[Chart]:
    series = [Series(run.name, i, run.curves[curve]) for i, run in enumerate(runs) if curve in run.curves]
    yield from drawn(title, note, series, _last_step(runs), is_log=is_log)


def _sparsity(runs: Sequence[RunData]) -> Iterator[Chart]:
    """The target dashed, the actual solid, in the colour of the run; from 0, for the two are nearly the same."""
    series = []
    for i, run in enumerate(runs):
        for name in ("target", "actual"):
            points = run.curves.get(f"sparsity/{name}", [])
            if any(value for _, value in points):
                label = name if len(runs) == 1 else f"{run.name}, {name}"
                series.append(Series(label, i, points, is_dashed=name == "target"))
    yield from drawn("Sparsity", "zeros in the pruned matrices", series, _last_step(runs), from_zero=True)


def _learning_rates(runs: Sequence[RunData]) -> Iterator[Chart]:
    """Of one run all parameter groups in one chart; of several one chart a group."""
    names = _names(runs, LEARNING_RATE)
    if len(runs) > 1:
        for name in names:
            title = f"Learning rate of {name.removeprefix(LEARNING_RATE)}"
            yield from _chart(runs, title, "", name, is_log=True)
        return
    series = [Series(name.removeprefix(LEARNING_RATE), i, runs[0].curves[name]) for i, name in enumerate(names)]
    yield from drawn("Learning rates", "by parameter group", series, _last_step(runs), is_log=True)


def _last_step(runs: Sequence[RunData]) -> int:
    return max(run.last_step for run in runs)


def drawn(
    title: str, note: str, series: Sequence[Series], end: int, *, is_log: bool = False, from_zero: bool = False
) -> Iterator[Chart]:
    """The chart, from step 0 to ``end``, unless no series has a point. On a logarithmic axis zeros are left out; it is
    one only if values are far apart. ``from_zero``: whether 0 is on the axis of values, whatever they are."""
    points = [point for one in series for point in one.points]
    positive = [value for _, value in points if value > 0]
    is_log = is_log and bool(positive) and max(positive) / min(positive) > _LEAST_LOG_RANGE
    if is_log:
        series = [Series(one.label, one.colour, [p for p in one.points if p[1] > 0], one.is_dashed) for one in series]
        points = [point for one in series for point in one.points]
        note = ", ".join(filter(None, [note, "log scale"]))
    if not points:
        return
    steps = axis_of(0, end, LEFT, RIGHT)
    found = [value for _, value in points] + ([0.0] if from_zero else [])
    share = _LEAST_SHARE if max(map(abs, found)) >= _TINY else _LEAST_SHARE_OF_TINY
    values = axis_of(min(found), max(found), BOTTOM, TOP, is_log=is_log, least_share=share)
    lines = [_line(one, steps, values) for one in series if one.points]
    yield Chart(title, note, steps, values, lines)


def _line(series: Series, steps: Axis, values: Axis) -> Line:
    points = thinned(series.points, MOST_POINTS)
    places = [(round(steps.place(step), 1), round(values.place(value), 1)) for step, value in points]
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in places)
    marks = places if len(places) <= _MOST_MARKS else []
    kept = Series(series.label, series.colour, points, series.is_dashed)
    return Line(kept, path, marks, short(points[-1][1]))

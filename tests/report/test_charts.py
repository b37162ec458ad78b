"""Axes, ticks, and which curves come to stand in which chart."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pst_ds.report.charts import (
    BOTTOM,
    LEFT,
    MOST_POINTS,
    RIGHT,
    TOP,
    Series,
    axis_of,
    charts,
    decades,
    drawn,
    round_numbers,
    short,
    thinned,
)
from pst_ds.report.run_data import read_runs


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(3, 6))
def test_ticks_are_few_round_and_within(low, span, most):
    ticks = round_numbers(low, low + span, most)
    room = 1e-6 * (abs(low) + span)
    assert len(ticks) <= most + 1
    assert all(low - room <= tick <= low + span + room for tick in ticks)


def test_ticks_of_usual_ranges():
    assert round_numbers(0, 240, 5) == [0, 50, 100, 150, 200]
    assert round_numbers(0, 0.9, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert decades(1e-7, 1e-1, 6) == pytest.approx([1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
    assert len(decades(1e-12, 1.0, 5)) <= 6


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.89999, "0.9"), (523.84, "523.8"), (12300.0, "12.3k"), (4.5e6, "4.5M"), (2e9, "2G"), (0, "0"),
        (9999.4, "9999"), (9999.6, "10k"), (-9999.6, "-10k"), (999_960.0, "1M"), (999_999_999, "1G"), (2e-5, "2e-05"),
        (9.9999e12, "1e+13"),
    ],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert short(value) == text


def test_an_axis_of_one_value_has_room():
    axis = axis_of(3.0, 3.0, 0.0, 100.0)
    assert axis.place(3.0) == 50.0
    assert axis_of(0.0, 0.0, 0.0, 100.0).place(0.0) == 50.0


def _number(text):
    """What a label stands for."""
    units = {"k": 1e3, "M": 1e6, "G": 1e9}
    return float(text.rstrip("kMG")) * units.get(text[-1], 1.0)


@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1.0))
def test_a_label_says_where_its_tick_is(middle, share):
    half = max(abs(middle), 1e-6) * share
    axis = axis_of(middle - half, middle + half, 0.0, 1000.0)
    ticks = axis.ticks(5)
    assert len({tick.text for tick in ticks}) == len(ticks) >= 2
    for tick in ticks:
        assert axis.place(_number(tick.text)) == pytest.approx(tick.at, abs=0.1)


@pytest.mark.parametrize("value", [0.9, -3.0, 523.8, 12_300.0])
def test_lines_that_lie_close_together_are_drawn_so(value):
    chart = _only(
        drawn("t", "", [Series("a", 0, [(0, value), (9, value)]), Series("b", 1, [(0, value * (1 - 1e-6))])], 9)
    )
    (one, two) = [float(re.match(r"M\S+ ([\d.]+)", chart.path(line))[1]) for line in chart.series]
    assert abs(one - two) <= 0.2
    texts = [tick.text for tick in chart.values.ticks(5)]
    assert len(set(texts)) == len(texts) >= 3
    assert max(map(len, texts)) <= 7  # which is what there is room for beside the plot
    assert TOP < one < BOTTOM


def test_sparsity_begins_at_zero(write_run):
    metrics = [
        {"step": step, "event": "step", "loss": 1.0, "sparsity/target": 0.9, "sparsity/actual": 0.899998}
        for step in (1, 2)
    ]
    chart = {chart.title: chart for chart in charts(read_runs([write_run(metrics=metrics)]))}["Sparsity"]
    assert (chart.values.low, chart.values.high) == (0.0, 0.9)
    assert [tick.text for tick in chart.values.ticks(5)] == ["0", "0.2", "0.4", "0.6", "0.8"]


def _only(found):
    (chart,) = found
    return chart


def test_a_line_runs_from_corner_to_corner():
    chart = _only(drawn("t", "", [Series("a", 0, [(0, 1.0), (10, 3.0)])], 10))
    assert chart.path(chart.series[0]) == f"M{LEFT} {BOTTOM}L{RIGHT} {TOP}"
    assert chart.data["series"] == [{"x": [0, 10], "y": [1.0, 3.0]}]


def test_zeros_have_no_place_on_a_logarithmic_axis():
    points = [(0, 0.1), (1, 0.0), (2, 0.001)]
    chart = _only(drawn("t", "of it", [Series("a", 0, points), Series("b", 1, [(0, 0.0)])], 2, is_log=True))
    assert chart.note == "of it, log scale"
    assert [line.points for line in chart.series[:1]] == [[(0, 0.1), (2, 0.001)]]
    near = _only(drawn("t", "of it", [Series("a", 0, [(0, 0.1), (1, 0.05)])], 1, is_log=True))
    assert near.note == "of it"
    assert list(drawn("t", "", [Series("a", 0, [])], 2)) == []


def test_a_long_curve_is_thinned_and_keeps_its_spike():
    points = [(step, 9.0 if step == 54_321 else 1.0) for step in range(100_000)]
    chart = _only(drawn("t", "", [Series("a", 0, points)], 100_000))
    (line,) = chart.series
    assert len(line.points) <= MOST_POINTS
    assert (54_321, 9.0) in line.points
    assert len(re.findall("[ML]", chart.path(line))) == len(line.points)


def test_one_run_has_its_rates_in_one_chart_and_several_a_chart_a_group(a_run):
    one = list(charts(read_runs([a_run("one")])))
    titles = ["Loss", "Sparsity", "Flip rate", "Correlation of S with |W|", "Evaluation: accuracy", "Learning rates"]
    assert [chart.title for chart in one] == [*titles, "Tokens per second"]
    assert [line.label for line in one[5].series] == ["head", "scores"]
    assert {line.label: line.is_dashed for line in one[1].series} == {"target": True, "actual": False}
    two = {chart.title: chart for chart in charts(read_runs([a_run("a"), a_run("b", steps=20)]))}
    assert [line.label for line in two["Learning rate of head"].series] == ["a", "b"]
    assert {chart.steps.high for chart in two.values()} == {40}
    assert [line.colour for line in two["Sparsity"].series] == [0, 0, 1, 1]


def test_a_run_without_masks_has_no_chart_of_them(write_run):
    nothing = {"sparsity/target": 0.0, "sparsity/actual": 0.0}
    metrics = [{"step": step, "event": "step", "loss": 1.0, **nothing} for step in (1, 2)]
    assert [chart.title for chart in charts(read_runs([write_run(metrics=metrics)]))] == ["Loss"]


VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400)


@given(VALUES, st.integers(4, 60))
@example([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0], 5)
def test_ends_and_extremes_stay(values, most):
    points = list(enumerate(values))
    found = thinned(points, most)
    assert len(found) <= most or len(points) <= most
    assert [step for step, _ in found] == sorted({step for step, _ in found})
    assert set(found) <= set(points)
    assert (found[0], found[-1]) == (points[0], points[-1])
    assert (min(v for _, v in found), max(v for _, v in found)) == (min(values), max(values))


def test_every_stretch_keeps_its_own_spike():
    points = [(i, 5.0 if i % 100 == 50 else 0.0) for i in range(10_000)]
    found = thinned(points, 300)
    assert len(found) <= 300
    assert sum(value == 5.0 for _, value in found) == 100

"""Thinned curves: a part of the points, in order, with the same ends, least and greatest."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from pst_ds.report.charts import thinned
from pst_ds.report.run_data import EvenlyApart, spread

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


@given(st.lists(st.integers(), min_size=1, max_size=50, unique=True), st.integers(2, 10))
def test_what_is_spread_has_both_ends_and_is_in_order(items, most):
    found = spread(items, most)
    assert len(found) == min(len(items), most)
    assert (found[0], found[-1]) == (items[0], items[-1])
    places = [items.index(item) for item in found]
    assert places == sorted(set(places))
    gaps = [b - a for a, b in pairwise(places)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@given(st.integers(1, 2000), st.integers(2, 70))
def test_a_stream_is_kept_evenly_apart_in_little_memory(count, most):
    kept = EvenlyApart(most)
    for item in range(count):
        kept.add(item)
        assert len(kept.items) <= most + 1
    found = kept.items
    assert (found[0], found[-1]) == (0, count - 1)
    assert len(found) >= min(count, most // 2)
    gaps = {b - a for a, b in pairwise(found[:-1])}
    assert len(gaps) <= 1
    assert not gaps or found[-1] - found[-2] <= gaps.pop()


def test_nothing_is_kept_of_nothing():
    assert EvenlyApart(4).items == []

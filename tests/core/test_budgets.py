"""Shares of zeros by how much the weights of blocks stand out: counts that are exact, bounded and in order."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.core.one_shot.budgets import outlier_share, zeros_by_outliers


def test_outliers_are_counted_over_all_parts_together():
    parts = [torch.rand(7, 5, generator=torch.Generator().manual_seed(seed)) ** 8 for seed in range(3)]
    values = [float(v) for part in parts for v in part.flatten()]
    mean = sum(values) / len(values)
    expected = sum(v > 5 * mean for v in values) / len(values)
    assert 0 < expected < 1
    assert outlier_share(lambda: iter(parts)) == expected
    assert outlier_share(lambda: iter(parts), multiple=2.0) > expected
    assert outlier_share(lambda: iter([torch.ones(3, 3)])) == 0.0
    assert outlier_share(lambda: iter([torch.zeros(3, 3)])) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(FloatingPointError, match="not finite"):
        outlier_share(lambda: iter([torch.tensor([1.0, bad])]))


@given(
    outliers=st.lists(st.integers(0, 1000).map(lambda i: i / 1000), min_size=1, max_size=40),
    size=st.integers(1, 2000),
    share=st.floats(0.0, 0.999),
    spread=st.floats(0.001, 0.5),
)
def test_counts_add_up_stay_near_the_mean_and_fall_with_outliers(outliers, size, share, spread):
    count = math.floor(share * size)
    found = zeros_by_outliers(outliers, count, size, spread)
    assert sum(found) == count * len(outliers)
    reach = min(math.floor(spread * size), count, size - 1 - count)
    assert all(abs(one - count) <= reach for one in found)
    assert all(0 <= one < size for one in found)
    if max(outliers) > min(outliers):
        assert max(abs(one - count) for one in found) == reach
    for few, many in zip(sorted(outliers), sorted(outliers)[1:], strict=False):
        assert found[outliers.index(few)] >= found[outliers.index(many)]


def test_the_numbers_of_an_example():
    assert zeros_by_outliers([0.01, 0.02, 0.06], 70, 100, 0.08) == [75, 73, 62]
    assert zeros_by_outliers([0.02, 0.02, 0.02], 70, 100) == [70, 70, 70]
    assert zeros_by_outliers([0.003, 0.003, 0.003], 1, 3, 0.5) == [1, 1, 1]  # their sum by three is another float
    assert zeros_by_outliers([0.0, 0.0, 0.0, 0.3], 70, 100, 0.08) == [73, 73, 72, 62]  # of equals the first lose more
    assert zeros_by_outliers([0.5, 0.1], 95, 100, 0.08) == [91, 99]  # one is left

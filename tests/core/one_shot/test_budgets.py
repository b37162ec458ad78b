"""Shares of zeros by one ranking of all weights: what is counted, bounded, and whole."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.core.one_shot.budgets import BINS, saliency_scores, score_histogram, zeros_by_saliency


def _scores(shape, seed, spread=1.0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).pow(3).mul(spread)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_score_is_the_weight_times_both_norms(transposed):
    weight, inputs, outputs = torch.randn(5, 7), torch.rand(7), torch.rand(5)
    expected = weight.abs() * inputs * outputs.unsqueeze(1)
    stored = weight.t() if transposed else weight
    found = saliency_scores(stored, inputs, outputs, transposed=transposed)
    torch.testing.assert_close(found.t() if transposed else found, expected)


def test_bins_are_in_order_and_hold_every_score():
    scores = torch.tensor([0.0, -0.0, 1e-30, 1.0, 1.0, 3.0, 3e38])
    histogram = score_histogram(scores)
    assert histogram.shape == (BINS,)
    assert histogram[histogram > 0].tolist() == [2, 1, 2, 1, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -math.nan])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(FloatingPointError, match="not finite"):
        score_histogram(torch.tensor([1.0, bad]))


def test_layers_lose_what_they_have_of_the_smallest():
    layers = [_scores((40, 50), 0), _scores((20, 50), 1, spread=30.0), _scores((40, 50), 2, spread=0.1)]
    wanted = 2500
    found = zeros_by_saliency([score_histogram(s) for s in layers], wanted, [2000, 1000, 2000], [1, 1, 1], 0.0)
    together = torch.cat([s.flatten() for s in layers]).sort().values
    exact = [int((s < together[wanted]).sum()) for s in layers]
    assert sum(found) == wanted
    assert found == pytest.approx(exact, abs=25)  # a bin is 1 % wide
    assert found[1] < found[0] < found[2]


@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(2, 60), st.floats(1e-3, 1e3)), min_size=1, max_size=6),
    share=st.floats(0.0, 1.0),
    least=st.floats(0.0, 0.3),
)
def test_counts_stay_within_bounds_and_reach_what_is_wanted(shapes, share, least):
    rows, sizes = [s[0] for s in shapes], [s[1] for s in shapes]
    most = [size - max(1, math.ceil(least * size)) for size in sizes]
    wanted = math.floor(share * sum(n * each for n, each in zip(most, rows, strict=True)))
    histograms = [score_histogram(_scores((o, i), i, spread)) for o, i, spread in shapes]
    found = zeros_by_saliency(histograms, wanted, sizes, rows, least)
    assert all(0 <= one <= n for one, n in zip(found, most, strict=True))
    left = wanted - sum(n * each for n, each in zip(found, rows, strict=True))
    room = [each for n, each, limit in zip(found, rows, most, strict=True) if n < limit]
    assert left >= 0
    assert left < min(room, default=1)


def test_equal_scores_are_shared_out_by_what_layers_have_of_them():
    histograms = [score_histogram(torch.ones(30)), score_histogram(torch.ones(60))]
    assert zeros_by_saliency(histograms, 45, [30, 60], [1, 1]) == [15, 30]


def test_more_than_layers_can_lose_is_refused():
    with pytest.raises(ValueError, match="99 weights are to go, and 95 can"):
        zeros_by_saliency([score_histogram(torch.ones(100))], 99, [100], [1])

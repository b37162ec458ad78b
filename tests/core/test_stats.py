"""Figures of layers against their definitions in float64, and the same whatever parts a weight is cut into."""

import itertools
import math

import numpy as np
import pytest
import torch

from pst_ds.core import stats
from pst_ds.core.factors import Constants, Factors
from pst_ds.core.keys import order_keys
from pst_ds.core.layout import WeightLayout
from tests.pairs import every_pair

CONSTANTS = Constants(alpha1=0.7, alpha2=1.9, beta=-1.3)
LAYOUTS = [WeightLayout(36, 61, transposed, parts) for transposed in (False, True) for parts in (1, 3)]
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _factors(layout, rank=4):
    outputs, inputs, parts = layout.out_features, layout.in_features, layout.num_matrices
    return Factors(
        A=_normal(outputs, rank), B=_normal(parts * rank, inputs), R=_normal(outputs), C=_normal(parts, inputs),
        U=_normal(outputs, 2), V=_normal(parts * 2, inputs),
    )  # fmt: skip


def _by_part(left, right, parts):
    pairs = zip(left.double().chunk(parts), right.double().chunk(parts), strict=True)
    return torch.cat([a @ b for a, b in pairs])


@each_layout
def test_norms_are_those_of_the_whole_matrices(layout):
    f = _factors(layout)
    update = CONSTANTS.beta * _by_part(f.U, f.V, layout.num_matrices)
    assert float(stats.update_norm(layout, f, CONSTANTS)) == pytest.approx(float(update.norm()), rel=1e-12)
    structured = f.R.double()[:, None] + f.C.double().repeat_interleave(layout.out_features // layout.num_matrices, 0)
    low_rank = CONSTANTS.alpha1 * _by_part(f.A, f.B, layout.num_matrices)
    whole = low_rank + CONSTANTS.alpha2 * structured
    assert float(stats.learned_score_norm(layout, f, CONSTANTS)) == pytest.approx(float(whole.norm()), rel=1e-12)
    without = Factors(A=f.A, B=f.B)
    assert float(stats.learned_score_norm(layout, without, CONSTANTS)) == pytest.approx(
        float(low_rank.norm()), rel=1e-12
    )
    assert stats.update_norm(layout, without, CONSTANTS) == 0.0
    assert stats.learned_score_norm(layout, Factors(U=f.U, V=f.V), CONSTANTS) == 0.0


def test_a_norm_of_nothing_is_zero_exactly():
    assert stats.product_norm(_normal(40, 3), torch.zeros(3, 50)) == 0.0


@pytest.mark.parametrize("cuts", [(0, 5000), (0, 17, 17, 2600, 5000)])
def test_the_correlation_is_pearson_s_over_all_parts(cuts):
    x, noise = _normal(5000).double(), _normal(5000, seed=1).double()
    y = 1e3 + 0.3 * x + noise
    sums = torch.stack([stats.moment_sums(x[a:b], y[a:b]) for a, b in itertools.pairwise(cuts)]).sum(0)
    assert stats.correlation(sums, 5000) == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-9)


def test_what_is_equal_has_correlation_one_and_what_does_not_vary_none():
    x = _normal(1000).abs() + 3.0
    assert stats.correlation(stats.moment_sums(x, x), 1000) == pytest.approx(1.0, abs=1e-12)
    assert stats.correlation(stats.moment_sums(x, -x), 1000) == pytest.approx(-1.0, abs=1e-12)
    assert stats.correlation(stats.moment_sums(x, torch.full_like(x, 0.1)), 1000) is None
    assert stats.correlation(stats.moment_sums(x, torch.zeros_like(x)), 1000) is None
    for bad in (math.nan, math.inf):
        x[7] = bad
        assert stats.correlation(stats.moment_sums(x, x), 1000) is None


@every_pair
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64), (40, 61)])
def test_moments_of_keys_and_squares_are_those_of_the_numbers(native, shape, monkeypatch):
    if not native:
        monkeypatch.setattr(stats, "library", lambda: None)
    scores, weights = _normal(*shape) - 0.5, _normal(*shape, seed=1)
    found = stats.score_moments(order_keys(scores), weights, 0.25)
    expected = stats.moment_sums(scores, weights.double().abs() / 0.25)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    for values in (weights, weights.bfloat16(), weights[:, : shape[1] // 2 + 1], weights.t(), weights.double()):
        found = stats.square_sum(values)
        assert found.dtype == torch.float64
        assert float(found) == pytest.approx(
            float((values.double() ** 2).sum()), rel=1e-6 if values.dtype == torch.float64 else 1e-12
        )


@pytest.mark.parametrize("native", [True, False])
def test_what_is_not_finite_is_not_in_moments_either(native, monkeypatch):
    if not native:
        monkeypatch.setattr(stats, "library", lambda: None)
    weights = _normal(4, 9)
    weights[3, 8] = math.inf
    assert stats.score_moments(order_keys(weights), weights, 1.0).isfinite().tolist() == [False] * 5
    assert not stats.square_sum(weights).isfinite()

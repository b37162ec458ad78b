"""ALPS against SparseGPT, the best of all masks, and least squares under a mask."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.core.layout import WeightLayout
from pst_ds.core.one_shot.alps import alps
from pst_ds.core.one_shot.gram import DAMPING, regularised_inverse, unit_gram
from pst_ds.core.one_shot.sparsegpt import inverse_factor
from pst_ds.core.patterns import parse_pattern
from tests.core.one_shot_references import correlated_inputs, keep_by_score, normal_weight, output_error, sparsegpt
from tests.pairs import every_pair

PATTERNS = ["matrix", "row", "2:4", "4:8"]


def _damped(gram):
    return gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def _best_under(row, columns, gram):
    """The weights of a row that use some inputs alone and change its outputs least: the normal equations."""
    found = np.zeros_like(row)
    found[columns] = np.linalg.solve(gram[np.ix_(columns, columns)], gram[columns] @ row)
    return found


@given(name=st.sampled_from([*PATTERNS, "4x2"]), outputs=st.integers(1, 3), groups=st.integers(1, 6),
       sparsity=st.floats(0.0, 0.99), seed=st.integers(0, 99))  # fmt: skip
def test_it_prunes_exactly_so_many(name, outputs, groups, sparsity, seed):
    weight, x = normal_weight(4 * outputs, 8 * groups, seed), torch.tensor(correlated_inputs(40, 8 * groups, seed))
    made, pattern = alps(weight, unit_gram(x.T @ x), parse_pattern(name), sparsity), parse_pattern(name)
    by_size = keep_by_score(weight.abs(), WeightLayout(*weight.shape), pattern, sparsity)
    assert int(made.keep.sum()) == int(by_size.sum())
    if name == "row":
        assert (made.keep.sum(1) == by_size.sum(1)).all()
    elif name == "4x2":
        blocks = made.keep.view(outputs, 4, 4 * groups, 2).sum((1, 3))
        assert set(blocks.flatten().tolist()) <= {0, 8}
    elif ":" in name:
        n, m = map(int, name.split(":"))
        assert (made.keep.view(-1, m).sum(1) == n).all()
    assert bool((made.weight[made.keep == 0].view(torch.int32) == 0).all())  # +0.0


@every_pair
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_outputs_change_less_than_with_sparsegpt(name, sparsity):
    weight, x = normal_weight(64, 96, 1), torch.tensor(correlated_inputs(1000, 96, 11))
    gram, pattern = x.T @ x, parse_pattern(name)
    before = sparsegpt(weight, inverse_factor(gram), pattern, sparsity).weight
    after = alps(weight, unit_gram(gram), pattern, sparsity).weight
    assert output_error(after - weight, gram) < 0.9 * output_error(before - weight, gram)


@pytest.mark.few(1)
@pytest.mark.parametrize("seed", [0, 1, 3])
def test_the_masks_are_nearly_the_best_of_all(seed):
    weight, x = normal_weight(24, 10, seed), torch.tensor(correlated_inputs(200, 10, seed + 1))
    gram, best = _damped(x.T @ x), 0.0
    for row in weight.double().numpy():
        choices = itertools.combinations(range(10), 5)
        changes = (torch.tensor(_best_under(row, list(kept), gram.numpy()) - row) for kept in choices)
        best += min(output_error(change[None], gram) for change in changes)
    made = alps(weight, unit_gram(x.T @ x), parse_pattern("row"), 0.5)
    one_pass = sparsegpt(weight, inverse_factor(x.T @ x), parse_pattern("row"), 0.5)
    found, before = (output_error(each.weight - weight, gram) for each in (made, one_pass))
    assert best <= found * (1 + 1e-6)
    assert found < 1.1 * best
    assert found < before


@pytest.mark.parametrize("name", [*PATTERNS, "8x4"])
def test_kept_weights_are_the_least_squares_under_the_mask(name):
    weight, x = normal_weight(16, 32, 4), torch.tensor(correlated_inputs(300, 32, 5))
    made, gram = alps(weight, unit_gram(x.T @ x), parse_pattern(name), 0.5), _damped(x.T @ x)
    for row, found, keep in zip(weight.double().numpy(), made.weight, made.keep, strict=True):
        best = torch.tensor(_best_under(row, np.flatnonzero(keep), gram.numpy()))
        least = output_error(best[None] - row, gram)
        assert output_error(found.double()[None] - row, gram) <= least * 1.001 + 1e-9


def test_statistics_are_damped_at_any_scale():
    x = torch.tensor(correlated_inputs(100, 20, 8))
    gram = x.T @ x
    made, larger = unit_gram(gram), unit_gram(gram * 4.0**10)
    whole = made.norms[:, None].double() * made.gram.double() * made.norms.double()
    torch.testing.assert_close(whole, _damped(gram), rtol=1e-5, atol=1e-7 * float(gram.abs().max()))
    expected = torch.linalg.inv(made.gram.double() + 0.3 * torch.eye(20))
    torch.testing.assert_close(regularised_inverse(made.gram, 0.3).double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(larger.gram, made.gram, rtol=1e-6, atol=1e-7)


def test_inputs_that_were_never_there_go_first():
    weight, x = normal_weight(6, 16, 4), torch.tensor(correlated_inputs(60, 16, 4))
    weight[:, 6] = 100.0
    x[:, [1, 6, 11]] = 0.0
    made = alps(weight, unit_gram(x.T @ x), parse_pattern("row"), 3 / 16)
    assert [row.tolist() for row in (made.keep == 0).nonzero()[:, 1].view(6, 3)] == [[1, 6, 11]] * 6


def test_nothing_pruned_changes_nothing():
    weight, x = normal_weight(6, 16, 4), torch.tensor(correlated_inputs(60, 16, 4))
    made = alps(weight, unit_gram(x.T @ x), parse_pattern("row"), 0.0)
    assert bool(made.keep.all())
    torch.testing.assert_close(made.weight, weight, rtol=1e-4, atol=1e-4)


def test_what_is_not_finite_is_refused():
    weight, x = normal_weight(4, 8, 0), torch.tensor(correlated_inputs(30, 8, 0))
    spectrum = unit_gram(x.T @ x)
    weight[1, 2] = math.nan
    with pytest.raises(FloatingPointError, match="weights are not finite"):
        alps(weight, spectrum, parse_pattern("row"), 0.5)
    with pytest.raises(FloatingPointError, match="inputs are not finite"):
        unit_gram(torch.full((3, 3), math.inf))
    with pytest.raises(ValueError, match="ranks the weights of several matrices"):
        alps(torch.ones(4, 8), spectrum, parse_pattern("stack"), 0.5)

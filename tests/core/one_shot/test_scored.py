"""One-shot masks against loops written out in double precision."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.core.layout import WeightLayout
from pst_ds.core.one_shot.scored import wanda_scores
from pst_ds.core.patterns import parse_pattern
from pst_ds.core.select import prune_count
from tests.core.one_shot_references import (
    correlated_inputs,
    counter,
    keep_by_score,
    normal_weight,
    output_error,
    ranked_together,
    without_smallest,
)
from tests.pairs import every_pair

PATTERNS = ["matrix", "row", "2:4", "4:8"]


@every_pair
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("transposed", [False, True])
def test_wanda_keeps_what_a_loop_keeps(name, transposed):
    weight, x = normal_weight(12, 16, 1), correlated_inputs(50, 16, 2)
    scores = np.empty((12, 16))
    for i in range(12):
        for j in range(16):
            scores[i, j] = abs(float(weight[i, j])) * math.sqrt(sum(float(v) ** 2 for v in x[:, j]))
    expected = without_smallest(scores, ranked_together((12, 16), name), counter(name, 0.5))
    stored = weight.t().contiguous() if transposed else weight
    found = wanda_scores(stored, torch.tensor(x).square().sum(0).sqrt(), transposed=transposed)
    keep = keep_by_score(found, WeightLayout(12, 16, transposed=transposed), parse_pattern(name), 0.5)
    assert keep.shape == stored.shape
    assert np.array_equal((keep.t() if transposed else keep).numpy(), expected)


@given(name=st.sampled_from(["matrix", "row", "2:4", "1:8", "4x2", "1x4"]), transposed=st.booleans(),
       parts=st.sampled_from([1, 3]), sparsity=st.floats(0.0, 0.99), seed=st.integers(0, 99))  # fmt: skip
def test_counts_are_exact_in_every_matrix_and_unit(name, transposed, parts, sparsity, seed):
    layout = WeightLayout(24, 16, transposed=transposed, num_matrices=parts)
    scores = torch.randint(0, 6, layout.shape, generator=torch.Generator().manual_seed(seed)).float()  # many equals
    keep = keep_by_score(scores, layout, parse_pattern(name), sparsity)
    keep = (keep.t() if transposed else keep).contiguous()
    pruned = (keep == 0).view(parts, 24 // parts, 16)
    if name == "matrix":
        assert (pruned.sum((1, 2)) == prune_count(sparsity, 24 // parts * 16)).all()
    elif name == "row":
        assert (pruned.sum(2) == prune_count(sparsity, 16)).all()
    elif ":" in name:
        n, m = map(int, name.split(":"))
        assert (pruned.view(parts, -1, m).sum(2) == m - n).all()
    else:
        outputs, inputs = map(int, name.split("x"))
        blocks = pruned.view(parts, 24 // parts // outputs, outputs, 16 // inputs, inputs).sum((2, 4))
        assert bool(((blocks == 0) | (blocks == outputs * inputs)).all())
        assert ((blocks > 0).sum((1, 2)) == prune_count(sparsity, blocks[0].numel())).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_a_fused_matrix_is_ranked_by_itself(transposed):
    weight = normal_weight(12, 4, 3).round(decimals=1)
    weight[4:8] *= 100
    stored = weight.t().contiguous() if transposed else weight
    layout = WeightLayout(12, 4, transposed=transposed, num_matrices=3)
    keep = keep_by_score(stored.abs(), layout, parse_pattern("matrix"), 0.3)
    by_output = keep.t() if transposed else keep
    for own, magnitudes in zip(by_output.split(4), weight.abs().split(4), strict=True):
        order = magnitudes.flatten().argsort(stable=True)
        expected = torch.ones(16, dtype=torch.uint8).index_fill_(0, order[: prune_count(0.3, 16)], 0)
        assert torch.equal(own.flatten(), expected)


def test_what_no_mask_can_be_made_of_is_refused():
    layout = WeightLayout(4, 6)
    with pytest.raises(ValueError, match="several matrices together"):
        keep_by_score(torch.ones(4, 6), layout, parse_pattern("global"), 0.5)
    with pytest.raises(ValueError, match="in_features divisible by 4, got 6"):
        keep_by_score(torch.ones(4, 6), layout, parse_pattern("2:4"), 0.5)
    for bad in (math.nan, math.inf):
        for name in ("row", "matrix"):
            with pytest.raises(FloatingPointError):
                keep_by_score(torch.tensor([[1.0, bad], [0.0, 2.0]]), WeightLayout(2, 2), parse_pattern(name), 0.5)


def test_output_error_is_the_change_of_all_outputs():
    x, change = torch.tensor(correlated_inputs(30, 6, 1)), normal_weight(4, 6, 2)
    assert output_error(change, x.T @ x) == pytest.approx(float((x @ change.double().T).square().sum()))

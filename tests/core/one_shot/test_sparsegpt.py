"""SparseGPT against a plain optimal brain surgeon, and rounding in the same pass."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.core.layout import WeightLayout
from pst_ds.core.one_shot.gram import DAMPING
from pst_ds.core.one_shot.scored import wanda_scores
from pst_ds.core.one_shot.shares import Share
from pst_ds.core.one_shot.sparsegpt import inverse_factor, round_under_mask
from pst_ds.core.patterns import parse_pattern
from pst_ds.core.quantization import Grid, dequantize, group_scales, quantize, round_to_grid
from pst_ds.core.select import prune_count
from tests.core.one_shot_references import (
    correlated_inputs,
    counter,
    keep_by_score,
    normal_weight,
    output_error,
    ranked_together,
    sparsegpt,
    without_smallest,
)
from tests.pairs import every_pair


def _rounded(weight, keep, factor, grid, columns_at_a_time=128, dtype=torch.float32):
    share = Share.of(weight, parse_pattern("matrix"), 0.0)
    return round_under_mask(share, keep, factor, grid, columns_at_a_time, dtype=dtype)


PATTERNS = ["matrix", "row", "2:4", "4:8"]
GRIDS = [Grid(bits, group) for bits in (8, 4) for group in (None, 32, 64)]


def _surgeon(weight, gram, name, sparsity, together):
    """Optimal brain surgery from the first input to the last, (weight, mask): no Cholesky factor, no lazy blocks.

    Before input j the inverse of the Gram matrix of the inputs from j on is made anew; a pruned weight moves all
    weights of its row from j on by w_j / [H^-1]_jj times row j of that inverse.
    """
    left, (outputs, inputs) = weight.double().numpy().copy(), weight.shape
    damped = gram + DAMPING * np.mean(np.diag(gram)) * np.eye(inputs)
    inverses = [np.linalg.inv(damped[j:, j:]) for j in range(inputs)]
    keep = np.ones((outputs, inputs), dtype=np.uint8)
    for j in range(inputs):
        if j % together == 0:
            stop = min(j + together, inputs)
            saliency = np.stack([left[:, k] ** 2 / inverses[k][0, 0] for k in range(j, stop)], 1)
            before = _pruned_before(name, sparsity, outputs, j)
            count = counter(name, sparsity)
            if ":" not in name:
                wanted = _pruned_before(name, sparsity, outputs, stop) - before
                count = lambda size, wanted=wanted: wanted  # noqa: E731
            keep[:, j:stop] = without_smallest(saliency, ranked_together(saliency.shape, name), count)
        move = np.where(keep[:, j] == 0, left[:, j], 0.0) / inverses[j][0, 0]
        left[:, j:] -= np.outer(move, inverses[j][0])
    return left * keep, keep


def _pruned_before(name, sparsity, outputs, inputs):
    return math.floor(sparsity * inputs * (outputs if name == "matrix" else 1))


@pytest.mark.parametrize(
    ("name", "sparsity", "columns"),
    [("matrix", 0.5, 64), ("matrix", 0.7, 16), ("row", 0.5, 64), ("row", 0.6, 12), ("row", 0.5, 1), ("2:4", 0.5, 64),
     ("2:4", 0.5, 8), ("4:8", 0.5, 20), ("1:4", 0.75, 128)],
)  # fmt: skip
def test_sparsegpt_is_the_plain_surgeon(name, sparsity, columns):
    weight, x = normal_weight(24, 64, 5), correlated_inputs(300, 64, 6)
    together = int(name.partition(":")[2] or columns)
    expected, mask = _surgeon(weight, x.T @ x, name, sparsity, together)
    made = sparsegpt(weight, inverse_factor(torch.tensor(x.T @ x)), parse_pattern(name), sparsity, columns)
    found, keep = made.weight, made.keep
    assert np.array_equal(keep.numpy(), mask)
    assert np.abs(found.double().numpy() - expected).max() < 2e-5 * np.abs(expected).max()
    assert bool((found[keep == 0].view(torch.int32) == 0).all())  # +0.0


@given(name=st.sampled_from(PATTERNS), outputs=st.integers(1, 9), groups=st.integers(1, 9),
       sparsity=st.floats(0.0, 0.99), columns=st.integers(1, 40), seed=st.integers(0, 99))  # fmt: skip
def test_sparsegpt_prunes_exactly_so_many(name, outputs, groups, sparsity, columns, seed):
    weight, x = normal_weight(outputs, 8 * groups, seed), torch.tensor(correlated_inputs(40, 8 * groups, seed))
    pruned = sparsegpt(weight, inverse_factor(x.T @ x), parse_pattern(name), sparsity, columns).keep == 0
    if name == "matrix":
        assert int(pruned.sum()) == prune_count(sparsity, pruned.numel())
    elif name == "row":
        assert (pruned.sum(1) == prune_count(sparsity, 8 * groups)).all()
    else:
        n, m = map(int, name.split(":"))
        assert (pruned.view(-1, m).sum(1) == m - n).all()


@every_pair
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("seed", range(3))
def test_sparsegpt_changes_the_outputs_least(name, seed):
    weight, x = normal_weight(64, 96, seed), torch.tensor(correlated_inputs(1000, 96, seed + 10))
    gram, layout, pattern = x.T @ x, WeightLayout(64, 96), parse_pattern(name)
    by_size = keep_by_score(weight.abs(), layout, pattern, 0.5)
    wanda = keep_by_score(wanda_scores(weight, gram.diagonal().sqrt()), layout, pattern, 0.5)
    found = sparsegpt(weight, inverse_factor(gram), pattern, 0.5).weight
    errors = [output_error(w - weight, gram) for w in (found, weight * wanda, weight * by_size)]
    assert errors[0] < 0.9 * errors[1]
    assert errors[1] < 0.9 * errors[2]


def test_the_factor_is_that_of_the_damped_inverse_at_any_scale():
    x = torch.tensor(correlated_inputs(100, 20, 8))
    gram = x.T @ x
    upper = inverse_factor(gram).upper.double()
    inverse = torch.linalg.inv(gram + DAMPING * gram.diagonal().mean() * torch.eye(20))
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper, inverse, rtol=1e-5, atol=1e-7 * float(inverse.max()))
    torch.testing.assert_close(inverse_factor(gram * 4.0**10).upper.double() * 2.0**10, upper, rtol=1e-6, atol=0.0)


def test_inputs_that_were_never_there_go_first_and_move_nothing():
    weight, x = normal_weight(6, 16, 4), torch.tensor(correlated_inputs(60, 16, 4))
    x[:, [1, 6, 11]] = 0.0
    factor = inverse_factor(x.T @ x)
    assert factor.dead.nonzero().flatten().tolist() == [1, 6, 11]
    made = sparsegpt(weight, factor, parse_pattern("row"), 3 / 16)
    found, keep = made.weight, made.keep
    assert (keep == 0).nonzero()[:, 1].view(6, 3).tolist() == [[1, 6, 11]] * 6
    assert torch.equal(found, weight * keep)


def test_sparsegpt_of_inputs_that_are_all_zero_is_a_mask_alone():
    weight = normal_weight(3, 8, 1)
    made = sparsegpt(weight, inverse_factor(torch.zeros(8, 8)), parse_pattern("2:4"), 0.5)
    assert torch.equal(made.weight, weight * made.keep)


def test_a_weight_that_is_zero_already_goes_first():
    weight, x = normal_weight(8, 32, 9), torch.tensor(correlated_inputs(100, 32, 9))
    gone = keep_by_score(weight.abs(), WeightLayout(8, 32), parse_pattern("2:4"), 0.5) == 0
    weight[gone] = 0.0
    made = sparsegpt(weight, inverse_factor(x.T @ x), parse_pattern("2:4"), 0.5)
    assert torch.equal(made.keep == 0, gone)
    assert torch.equal(made.weight, weight)  # nothing was lost, so nothing is made up for


def test_sparsegpt_refuses_what_it_cannot_do():
    factor = inverse_factor(torch.eye(6))
    with pytest.raises(ValueError, match="divisible by 4, got 6"):
        sparsegpt(torch.ones(2, 6), factor, parse_pattern("2:4"), 0.5)
    with pytest.raises(FloatingPointError, match="weights are not finite"):
        sparsegpt(torch.tensor([[1.0, math.nan]]), inverse_factor(torch.eye(2)), parse_pattern("row"), 0.5)
    with pytest.raises(FloatingPointError, match="inputs are not finite"):
        inverse_factor(torch.full((2, 2), math.inf))
    with pytest.raises(FloatingPointError, match="more damping"):
        inverse_factor(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))


# on a grid


def _gram(inputs, seed, tokens=600):
    x = torch.tensor(correlated_inputs(tokens, inputs, seed))
    return x.T @ x


def _assert_on_grid(made, grid, dtype=torch.float32):
    """Codes and scales can be told from what is stored, and give it back."""
    stored = made.weight.to(dtype)
    codes, scales = quantize(stored, made.keep.bool(), grid, made.scales)
    assert torch.equal(dequantize(codes, scales, dtype), stored)
    assert torch.equal(dequantize(codes, scales), made.weight)
    assert bool((made.weight[made.keep == 0].view(torch.int32) == 0).all())


@every_pair
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", [*PATTERNS, "given"])
def test_inputs_that_have_nothing_in_common_make_it_plain_rounding(grid, name):
    """There is nobody to give an error to, so masks, scales and codes are those of the weight as it was."""
    weight, factor = normal_weight(24, 192, 3), inverse_factor(torch.eye(192))
    if name == "given":
        keep = keep_by_score(weight.abs(), WeightLayout(24, 192), parse_pattern("row"), 0.6)
        made = _rounded(weight, keep, factor, grid)
    else:
        keep = sparsegpt(weight, factor, parse_pattern(name), 0.6).keep
        made = sparsegpt(weight, factor, parse_pattern(name), 0.6, grid=grid)
    assert torch.equal(made.keep, keep)
    codes, scales = quantize(weight, keep.bool(), grid)
    if name in ("matrix", "row") and grid.group is None:  # it is searched before the masks of later inputs are chosen
        scales = made.scales
        codes, _ = quantize(weight, keep.bool(), grid, scales)
    assert torch.equal(made.scales, scales)
    assert torch.equal(made.weight, dequantize(codes, scales))


def _rounding_surgeon(weight, gram, keep, grid):
    """Column by column in double precision, the inverse made anew for each: (weight, scales)."""
    left, (outputs, inputs) = weight.double().numpy().copy(), weight.shape
    damped = gram.numpy() + DAMPING * np.mean(np.diag(gram)) * np.eye(inputs)
    size = inputs // grid.num_groups(inputs)
    scales = torch.ones(outputs, inputs // size)
    for j in range(inputs):
        if j % size == 0:
            group = torch.tensor(left[:, j : j + size] * keep[:, j : j + size]).float().contiguous()
            scales[:, j // size] = group_scales(group, grid).float()
        scale = scales[:, j // size].double().numpy()
        value = np.clip(np.rint(left[:, j] / scale), *((-127, 127) if grid.bits == 8 else (-8, 7))) * scale * keep[:, j]
        inverse = np.linalg.inv(damped[j:, j:])[0]
        left[:, j:] -= np.outer((left[:, j] - value) / inverse[0], inverse)
        left[:, j] = value
    return torch.tensor(left), scales


@pytest.mark.parametrize("grid", [Grid(8), Grid(4, 32), Grid(4, 64)], ids=str)
def test_rounding_under_a_mask_is_the_plain_surgeons(grid):
    """But for ties that fp32 decides in another way, after which a row goes another way."""
    weight, gram = normal_weight(32, 128, 5), _gram(128, 6)
    keep = keep_by_score(weight.abs(), WeightLayout(32, 128), parse_pattern("2:4"), 0.5)
    expected, scales = _rounding_surgeon(weight, gram, keep.numpy(), grid)
    made = _rounded(weight, keep, inverse_factor(gram), grid, columns_at_a_time=32)
    rows = ((made.weight.double() - expected).abs() < 1e-9).all(1)
    assert rows.float().mean() > 0.8
    assert torch.equal(made.scales.float()[rows], scales[rows])
    found, wanted = (output_error(w.double() - weight.double(), gram) for w in (made.weight, expected))
    assert found == pytest.approx(wanted, rel=0.02)


@given(name=st.sampled_from([*PATTERNS, "given"]), grid=st.sampled_from(GRIDS), outputs=st.integers(1, 5),
       groups=st.integers(1, 3), sparsity=st.floats(0.0, 0.99), columns=st.integers(1, 130), seed=st.integers(0, 99),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
       size=st.sampled_from([1.0, 1e-3, 1e-9]))  # fmt: skip
def test_every_weight_is_on_its_grid_in_the_dtype_that_stores_it(
    name, grid, outputs, groups, sparsity, columns, seed, dtype, size
):
    weight, gram = normal_weight(outputs, 64 * groups, seed) * size, _gram(64 * groups, seed, 80)
    factor = inverse_factor(gram)
    if name == "given":
        keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) >= sparsity
        made = _rounded(weight, keep, factor, grid, columns, dtype=dtype)
        assert torch.equal(made.keep.bool(), keep)
    else:
        made = sparsegpt(weight, factor, parse_pattern(name), sparsity, columns, grid=grid, dtype=dtype)
        pruned = made.keep == 0
        if name == "matrix":
            assert int(pruned.sum()) == prune_count(sparsity, pruned.numel())
        elif name == "row":
            assert (pruned.sum(1) == prune_count(sparsity, 64 * groups)).all()
        else:
            n, m = map(int, name.split(":"))
            assert (pruned.view(-1, m).sum(1) == m - n).all()
    _assert_on_grid(made, grid, dtype)


@every_pair
@pytest.mark.parametrize("grid", [Grid(8), Grid(4, 32), Grid(4, 64), Grid(4)], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_what_rounding_takes_is_given_back(grid, name):
    """Less of the outputs changes than where the pruned weight is rounded afterwards, each weight by itself."""
    weight, gram = normal_weight(64, 192, 7), _gram(192, 8)
    factor = inverse_factor(gram)
    pruned = sparsegpt(weight, factor, parse_pattern(name), 0.5)
    afterwards = round_to_grid(pruned.weight, pruned.keep.bool(), grid)
    together = sparsegpt(weight, factor, parse_pattern(name), 0.5, grid=grid)
    errors = [output_error(w - weight, gram) for w in (pruned.weight, together.weight, afterwards)]
    assert grid.bits == 8 or errors[1] - errors[0] < 0.8 * (errors[2] - errors[0])  # int8 takes next to nothing
    given = _rounded(pruned.weight, pruned.keep, factor, grid)
    errors = [output_error(w - pruned.weight, gram) for w in (given.weight, afterwards)]
    assert errors[0] < 0.9 * errors[1]


def test_a_dense_weight_is_one_whose_mask_keeps_all():
    weight, factor, grid = normal_weight(8, 128, 1), inverse_factor(_gram(128, 2)), Grid(4, 64)
    dense = sparsegpt(weight, factor, parse_pattern("row"), 0.0, grid=grid)
    masked = _rounded(weight, torch.ones(8, 128), factor, grid)
    assert torch.equal(dense.weight, masked.weight)
    assert torch.equal(dense.scales, masked.scales)


def test_a_weight_on_its_grid_already_stays_as_it_is():
    weight, factor, grid = normal_weight(8, 128, 1), inverse_factor(_gram(128, 2)), Grid(4, 64)
    keep = keep_by_score(weight.abs(), WeightLayout(8, 128), parse_pattern("2:4"), 0.5)
    codes = torch.randint(-7, 8, (8, 128), generator=torch.Generator().manual_seed(3)) * keep
    codes[:, ::32] = 7  # so that the largest magnitude divided by 7 is the scale
    weight = dequantize(codes.to(torch.int8), torch.full((8, 2), 0.01171875).bfloat16())
    made = _rounded(weight, weight != 0, factor, grid)
    assert torch.equal(made.weight, weight)


def test_what_cannot_be_rounded_is_refused():
    factor, weight = inverse_factor(torch.eye(48)), torch.ones(2, 48)
    with pytest.raises(ValueError, match="groups of 32 do not divide 48 inputs; take row"):
        sparsegpt(weight, factor, parse_pattern("row"), 0.5, grid=Grid(4, 32))
    with pytest.raises(ValueError, match="groups of 64 do not divide 48 inputs"):
        _rounded(weight, torch.ones(2, 48), factor, Grid(8, 64))
    with pytest.raises(FloatingPointError, match="weights are not finite"):
        _rounded(weight / 0, torch.ones(2, 48), factor, Grid(8))

"""Scores and merged weights against their formulas in float64, and the same bits wherever they are computed."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.core.bits import pack_mask
from pst_ds.core.factors import Constants, Factors, tile_factors
from pst_ds.core.layout import Rect, WeightLayout, shard_tiles, view_in_shard
from pst_ds.core.scores import abs_sum_fixed_point, fixed_point_exponent, importance, masked_weight
from tests.pairs import every_pair

SCORE_RANK, UPDATE_RANK = 3, 2
CONSTANTS = Constants(alpha1=0.7, alpha2=1.9, beta=1.3)
SCALE = 0.37
LAYOUTS = [WeightLayout(36, 61, transposed, parts) for transposed in (False, True) for parts in (1, 3)]
LAYOUT_IDS = [f"{'conv1d' if layout.transposed else 'linear'}-{layout.num_matrices}" for layout in LAYOUTS]

each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)


def random_layer(layout: WeightLayout, seed: int = 0, dtype=torch.float32) -> tuple[torch.Tensor, Factors]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    outputs, inputs, parts = layout.out_features, layout.in_features, layout.num_matrices
    factors = Factors(
        A=normal(outputs, SCORE_RANK),
        B=normal(parts * SCORE_RANK, inputs),
        R=normal(outputs),
        C=normal(parts, inputs),
        U=normal(outputs, UPDATE_RANK),
        V=normal(parts * UPDATE_RANK, inputs),
    )
    return normal(*layout.shape), factors


def low_rank(left: torch.Tensor, right: torch.Tensor, parts: int) -> torch.Tensor:
    """(O, k) and (P*k, I) to (O, I) in float64, part by part."""
    pairs = zip(left.double().chunk(parts), right.double().chunk(parts), strict=True)
    return torch.cat([a @ b for a, b in pairs])


def written_out(weight: torch.Tensor, f: Factors, layout: WeightLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """(S, W) in storage shape and float64, from the formulas of the paper."""
    dense = weight.double().t() if layout.transposed else weight.double()
    merged = dense + CONSTANTS.beta * low_rank(f.U, f.V, layout.num_matrices)
    by_row = f.R.double().unsqueeze(1)
    by_col = f.C.double().repeat_interleave(layout.out_features // layout.num_matrices, 0)
    structured = by_row + by_col
    scores = (
        merged.abs() / SCALE
        + CONSTANTS.alpha1 * low_rank(f.A, f.B, layout.num_matrices)
        + CONSTANTS.alpha2 * structured
    )
    return (scores.t(), merged.t()) if layout.transposed else (scores, merged)


def scores_of(weight, factors, layout, block, rect: Rect) -> torch.Tensor:
    tile = tile_factors(factors, layout, block, rect)
    return importance(weight[rect.r0 : rect.r1, rect.c0 : rect.c1], tile, CONSTANTS, SCALE)


def whole_scores(weight, factors, layout) -> torch.Tensor:
    found = torch.empty(layout.shape)
    for block in layout.matrices():
        r = block.rect
        found[r.r0 : r.r1, r.c0 : r.c1] = scores_of(weight, factors, layout, block, r)
    return found


@every_pair
@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_follow_the_formula(layout, dtype):
    weight, factors = random_layer(layout, dtype=dtype)
    found = whole_scores(weight, Factors(*(getattr(factors, n).float() for n in "ABRCUV")), layout)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), written_out(weight, factors, layout)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("left_out", ["AB", "RC", "UV", "ABRC", "ABRCUV"])
def test_factors_that_are_left_out_count_as_zero(left_out):
    layout = LAYOUTS[3]
    weight, factors = random_layer(layout)
    names = [n for n in "ABRCUV" if n not in left_out]
    fewer = Factors(**{n: getattr(factors, n) for n in names})
    zeroed = Factors(**{n: getattr(factors, n) * (n in names) for n in "ABRCUV"})
    found = whole_scores(weight, fewer, layout)
    torch.testing.assert_close(found.double(), written_out(weight, zeroed, layout)[0], rtol=1e-5, atol=1e-5)


def test_scores_leave_the_weight_alone():
    layout = LAYOUTS[0]
    weight, factors = random_layer(layout)
    before = weight.clone()
    whole_scores(weight, factors, layout)
    assert torch.equal(weight, before)


@given(layout=st.sampled_from(LAYOUTS), data=st.data())
def test_same_bits_in_any_rectangle(layout, data):
    weight, factors = random_layer(layout, seed=1)
    block = data.draw(st.sampled_from(layout.matrices()))
    r0 = data.draw(st.integers(block.rect.r0, block.rect.r1 - 1))
    c0 = data.draw(st.integers(block.rect.c0, block.rect.c1 - 1))
    rect = Rect(r0, data.draw(st.integers(r0 + 1, block.rect.r1)), c0, data.draw(st.integers(c0 + 1, block.rect.c1)))
    whole = whole_scores(weight, factors, layout)
    assert torch.equal(scores_of(weight, factors, layout, block, rect), whole[rect.r0 : rect.r1, rect.c0 : rect.c1])


@every_pair
@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_on_any_number_of_ranks(layout, dtype):
    weight, factors = random_layer(layout, seed=2)
    weight = weight.to(dtype)
    whole = whole_scores(weight, factors, layout)
    row_length = layout.shape[1]
    for world, max_elements in itertools.product((1, 2, 3, 7), (50, 10_000)):
        share = -(-layout.numel // world)
        found = torch.full((layout.numel,), float("nan"))
        for start in range(0, layout.numel, share):
            shard = weight.flatten()[start : start + share].clone()
            for block in layout.matrices():
                for rect in shard_tiles(block.rect, row_length, start, start + shard.numel(), max_elements):
                    tile = tile_factors(factors, layout, block, rect)
                    scores = importance(view_in_shard(shard, rect, row_length, start), tile, CONSTANTS, SCALE)
                    view_in_shard(found, rect, row_length, 0).copy_(scores)
        assert torch.equal(found.view(layout.shape), whole)


@every_pair
@each_layout
@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_masked_weight_follows_the_formula(layout, num_shards):
    weight, factors = random_layer(layout, seed=3)
    mask = torch.rand(layout.shape, generator=torch.Generator().manual_seed(4)) > 0.6
    found = masked_weight(weight, pack_mask(mask, num_shards), num_shards, layout, factors, CONSTANTS)
    expected = written_out(weight, factors, layout)[1]
    torch.testing.assert_close(found.double(), expected * mask, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.view(torch.int32) != 0, mask)  # pruned entries are +0.0, bit for bit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_masked_weight_keeps_dtype_and_without_an_update_the_values(dtype):
    layout = LAYOUTS[1]
    weight, _ = random_layer(layout, seed=5, dtype=dtype)
    weight[0, 0] = float("nan")
    mask = torch.rand(layout.shape, generator=torch.Generator().manual_seed(6)) > 0.5
    mask[0, 0] = False
    before = weight.clone()
    found = masked_weight(weight, pack_mask(mask), 1, layout, Factors(), CONSTANTS)
    assert found.dtype == dtype
    assert torch.equal(found, torch.where(mask, weight, torch.zeros((), dtype=dtype)))
    assert torch.equal(weight.nan_to_num(7.0), before.nan_to_num(7.0))


@each_layout
def test_tile_factors_are_views(layout):
    """Gradients are accumulated through them."""
    _, factors = random_layer(layout)
    block = layout.matrices()[-1]
    tile = tile_factors(factors, layout, block, block.rect)
    for view in (tile.score_left, tile.score_right, tile.update_left, tile.update_right):
        view.zero_()
    tile.score_rows.zero_()
    tile.score_cols.zero_()
    own = slice(block.outputs.start, block.outputs.stop)
    assert not any(f[own].any() for f in (factors.A, factors.R, factors.U))
    assert not factors.C[block.index].any()
    for by_input in (factors.B, factors.V):
        *others, last = by_input.chunk(layout.num_matrices)
        assert not last.any()
        assert all(other.all() for other in others)


finite_weights = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50)


@given(values=finite_weights, data=st.data())
def test_fixed_point_sum_does_not_depend_on_order_or_cut(values, data):
    weight = torch.tensor(values, dtype=torch.float32)
    exponent = fixed_point_exponent(float(weight.abs().max()))
    whole = int(abs_sum_fixed_point(weight, exponent))
    shuffled = torch.tensor(data.draw(st.permutations(values)), dtype=torch.float32)
    cut = data.draw(st.integers(0, len(values)))
    assert sum(int(abs_sum_fixed_point(part, exponent)) for part in (shuffled[:cut], shuffled[cut:])) == whole


@given(values=finite_weights)
def test_fixed_point_sum_is_close(values):
    weight = torch.tensor(values, dtype=torch.float32)
    largest = float(weight.abs().max())
    exponent = fixed_point_exponent(largest)
    found = int(abs_sum_fixed_point(weight, exponent))
    assert abs(found - float(weight.double().abs().sum()) * 2.0**exponent) <= 0.5 * len(values) + 1e-3


@pytest.mark.parametrize("largest", [2.0**-149, 1e-20, 0.5, 0.999, 1.0, 3.0, 1e30, torch.finfo(torch.float32).max])
def test_the_largest_term_is_below_2_to_30(largest):
    term = int(abs_sum_fixed_point(torch.tensor([-largest], dtype=torch.float64), fixed_point_exponent(largest)))
    assert 2**29 <= term <= 2**30


def test_terms_are_rounded_to_the_nearest_integer():
    assert int(abs_sum_fixed_point(torch.tensor([0.75, -0.75, 0.25, -1.0]), 0)) == 3
    assert int(abs_sum_fixed_point(torch.tensor([0.75, -0.75, 0.25, -1.0]), 2)) == 11


def test_an_empty_or_zero_matrix_sums_to_zero():
    assert fixed_point_exponent(0.0) == 0
    assert int(abs_sum_fixed_point(torch.zeros(3), 0)) == int(abs_sum_fixed_point(torch.empty(0), 0)) == 0

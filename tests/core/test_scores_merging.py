"""Updates of bf16 weights by compiled code: the formula, equal bits in any rectangle, and masks put on in the pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pst_ds.core import scores
from pst_ds.core.bits import apply_mask_, pack_mask
from pst_ds.core.factors import Constants, Factors, TileFactors, tile_factors
from pst_ds.core.layout import Rect, WeightLayout
from pst_ds.core.scores import masked_weight, merged_weight, updated_weight
from tests.pairs import every_pair

CONSTANTS = Constants(beta=1.3)
LAYOUTS = [WeightLayout(48, 72, transposed, parts) for transposed in (False, True) for parts in (1, 3)]

needs_compiler = pytest.mark.skipif(scores.merges() is None, reason="no C++ compiler")
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).bfloat16()


def factors_of(layout: WeightLayout, rank: int) -> Factors:
    return Factors(U=normal(layout.out_features, rank), V=normal(layout.num_matrices * rank, layout.in_features))


def tile_of(left: Tensor, right: Tensor) -> TileFactors:
    return TileFactors(None, None, None, None, left, right)


def shuffled_mask(layout: WeightLayout) -> Tensor:
    return torch.rand(layout.numel, generator=torch.Generator().manual_seed(0)) > 0.5


@every_pair
@needs_compiler
@pytest.mark.parametrize("rank", [1, 2, 5, 8, 16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (4, 32), (9, 100), (36, 61)])
def test_the_update_is_rounded_once(rank, shape):
    (rows, cols), beta = shape, CONSTANTS.beta
    weight, left, right = normal(rows, cols), normal(rows, rank), normal(rank, cols)
    assert scores.merges_natively(weight, left, right)
    found = updated_weight(weight, tile_of(left, right), CONSTANTS)
    expected = weight.double() + beta * (left.double() @ right.double())
    bound = 2**-8 * expected.abs() + 1e-5 * (1.0 + beta * (left.double().abs() @ right.double().abs()))
    assert bool(((found.double() - expected).abs() <= bound).all())
    in_place = weight.clone()
    updated_weight(in_place, tile_of(left, right), CONSTANTS, out=in_place)
    assert torch.equal(found, in_place)
    by_column = updated_weight(weight, tile_of(left.t().contiguous().t(), right.t().contiguous().t()), CONSTANTS)
    assert torch.equal(found, by_column)


@needs_compiler
def test_a_weight_has_the_same_bits_in_whatever_rectangle():
    weight, left, right = normal(37, 150), normal(37, 4), normal(4, 150)
    whole = updated_weight(weight, tile_of(left, right), CONSTANTS)
    for rows, cols in ((slice(0, 1), slice(0, 150)), (slice(5, 30), slice(7, 8)), (slice(36, 37), slice(33, 149))):
        part = updated_weight(weight[rows, cols], tile_of(left[rows], right[:, cols]), CONSTANTS)
        assert torch.equal(part, whole[rows, cols])


@every_pair
@needs_compiler
@each_layout
@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_masks_are_put_on_in_the_pass_or_after_it(layout, num_shards):
    weight, factors, keep = normal(*layout.shape), factors_of(layout, 3), shuffled_mask(layout)
    found = masked_weight(weight, pack_mask(keep, num_shards), num_shards, layout, factors, CONSTANTS)
    expected = merged_weight(weight, layout, factors, CONSTANTS)
    assert torch.equal(apply_mask_(expected, keep.view(layout.shape).byte()), found)
    assert not torch.signbit(found[~keep.view(layout.shape)]).any()


@needs_compiler
def test_what_is_not_finite_stays_so_where_it_is_kept():
    layout, keep = WeightLayout(8, 40), torch.ones(320, dtype=torch.bool)
    weight, factors = torch.zeros(layout.shape, dtype=torch.bfloat16), factors_of(layout, 2)
    weight[0, 0], weight[1, 1], weight[2, 39], weight[3, 3] = (float(v) for v in ("nan", "inf", "-inf", "nan"))
    keep[3 * 40 + 3] = False
    found = masked_weight(weight, pack_mask(keep), 1, layout, factors, CONSTANTS)
    assert found[0, 0].isnan()
    assert (found[1, 1].item(), found[2, 39].item(), found[3, 3].item()) == (float("inf"), float("-inf"), 0.0)


@each_layout
def test_without_a_compiler_torch_makes_the_same_up_to_the_order_of_sums(layout, monkeypatch):
    weight, factors, keep = normal(*layout.shape), factors_of(layout, 8), shuffled_mask(layout)
    bits = pack_mask(keep)
    native = masked_weight(weight, bits, 1, layout, factors, CONSTANTS)
    monkeypatch.setattr(scores, "merges", lambda: None)
    twin = masked_weight(weight, bits, 1, layout, factors, CONSTANTS)
    torch.testing.assert_close(native, twin, rtol=2**-7, atol=2e-2)
    assert torch.equal(native == 0, twin == 0)


def test_only_small_updates_of_bf16_weights_are_taken():
    weight, left, right = normal(8, 8), normal(8, 2), normal(2, 8)
    large = normal(8, scores.MOST_RANK + 1), normal(scores.MOST_RANK + 1, 8)
    refused = [
        (weight.float(), left.float(), right.float()),
        (weight.t(), left, right),
        (weight, None, None),
        (weight, *large),
    ]
    assert not any(scores.merges_natively(*arguments) for arguments in refused)
    expected = torch.addmm(weight, left, right, alpha=CONSTANTS.beta)
    out = torch.empty(8, 8, dtype=torch.bfloat16).t()  # rows that are not contiguous are torch's
    torch.testing.assert_close(updated_weight(weight, tile_of(left, right), CONSTANTS, out=out), expected)


@needs_compiler
def test_a_rectangle_of_a_matrix_is_merged_where_it_lies():
    layout = WeightLayout(16, 48, transposed=True, num_matrices=2)
    weight, factors = normal(*layout.shape), factors_of(layout, 2)
    whole = merged_weight(weight, layout, factors, CONSTANTS)
    for matrix in layout.matrices():
        rect = Rect(3, 20, matrix.rect.c0 + 1, matrix.rect.c1)
        at = slice(rect.r0, rect.r1), slice(rect.c0, rect.c1)
        part = updated_weight(weight[at], tile_factors(factors, layout, matrix, rect), CONSTANTS)
        assert torch.equal(part, whole[at])

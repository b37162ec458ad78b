"""Rounding a stored weight in place, in the forward and the backward pass, against whole matrices of codes."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.core import quantization
from pst_ds.core.bits import pack_mask
from pst_ds.core.factors import Constants, Factors, TileFactors
from pst_ds.core.layout import Rect, WeightLayout
from pst_ds.core.masked_linear import LayerState, backward, forward
from pst_ds.core.quantization import (
    Grid,
    Rounding,
    StoredGrid,
    dequantize,
    group_losses,
    group_moments,
    group_scales,
    quantize,
    whole_weights,
)
from pst_ds.core.scores import sliced_weight
from pst_ds.core.tiles import least_tile_bytes
from tests.pairs import every_pair

GRIDS = [Grid(bits, group) for bits in (8, 4) for group in (None, 32, 64)]
LAYOUTS = [WeightLayout(36, 128, transposed, parts) for transposed in (False, True) for parts in (1, 3)]
LAYOUT_IDS = [f"{'conv1d' if layout.transposed else 'linear'}-{layout.num_matrices}" for layout in LAYOUTS]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]

each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


@pytest.fixture(params=["native", "torch"])
def loops(request, monkeypatch):
    """Both ways to compute; native code is skipped where there is no compiler."""
    if request.param == "torch":
        monkeypatch.setattr(quantization, "native_for", lambda *_: None)
    elif quantization.library() is None:
        pytest.skip("no compiler")


def outputs_first(values: torch.Tensor, layout: WeightLayout) -> torch.Tensor:
    """A stored weight, or scales, as (O, ...)."""
    return values.t() if layout.transposed else values


def stored_weight(layout: WeightLayout, dtype=torch.float32, zeros: float = 0.5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(layout.shape, generator=generator) * 0.1
    return torch.where(torch.rand(layout.shape, generator=generator) < zeros, 0.0, weight).to(dtype)


def random_rounding(layout: WeightLayout, grid: Grid) -> Rounding:
    """Scales that no search chose, and some of which clip."""
    of_layer, generator = StoredGrid(layout, grid), torch.Generator().manual_seed(1)
    found = (torch.rand(of_layer.shape, generator=generator) + 0.2) * 0.3 / grid.largest
    return Rounding(of_layer, found.to(torch.bfloat16))


def codes_times_scales(weight: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    layout = rounding.stored.layout
    codes, held = quantize(
        outputs_first(weight, layout), None, rounding.stored.grid, outputs_first(rounding.scales, layout)
    )
    return outputs_first(dequantize(codes, held, weight.dtype), layout)


@every_pair
@each_layout
@each_grid
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("loops")
def test_rounded_weight_is_what_codes_and_scales_give(layout, grid, dtype):
    weight, rounding = stored_weight(layout, dtype), random_rounding(layout, grid)
    expected = codes_times_scales(weight, rounding)
    rounded = rounding.round_(weight.clone())
    assert torch.equal(rounded, expected)
    assert not torch.equal(rounded, weight)
    assert not rounded.signbit()[rounded == 0].any(), "a zero is -0.0"
    assert torch.equal(rounding.round_(rounded.clone()), rounded), "rounding twice is not rounding once"


@every_pair
@each_grid
@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("transposed", [False, True])
@given(st.data())
def test_rectangles_are_rounded_as_the_whole(grid, transposed, data):
    layout = WeightLayout(36, 128, transposed)
    rows, cols = (sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2))) for n in layout.shape)
    weight, rounding = stored_weight(layout), random_rounding(layout, grid)
    whole = rounding.round_(weight.clone())
    rect = Rect(*rows, *cols)
    part = weight[slice(*rows), slice(*cols)]
    if rect.numel:
        rounding.round_(part, rect)
        assert torch.equal(part, whole[slice(*rows), slice(*cols)])


@each_grid
@pytest.mark.skipif(quantization.library() is None, reason="no compiler")
def test_both_loops_have_the_same_sums(grid, monkeypatch):
    grouped = stored_weight(WeightLayout(40, 96)).float()
    largest = grouped.abs().amax(1)
    whole = whole_weights(grouped, largest)
    losses = group_losses(grouped, largest / grid.largest, grid)
    tried = [largest / grid.largest * factor for factor in (0.5, 1.0, 1.7)]
    found = [group_moments(grouped, whole, scale, grid) for scale in tried]
    monkeypatch.setattr(quantization, "native_for", lambda *_: None)
    assert torch.equal(whole_weights(grouped, largest), whole)
    for of_native, of_torch in zip(losses, group_losses(grouped, largest / grid.largest, grid), strict=True):
        torch.testing.assert_close(of_native, of_torch, rtol=1e-12, atol=0.0)
    for scale, (by_weight, by_code) in zip(tried, found, strict=True):
        weight_again, code_again = group_moments(grouped, whole, scale, grid)
        assert torch.equal(by_weight, weight_again)
        assert torch.equal(by_code, code_again)


@every_pair
@each_layout
@each_grid
def test_groups_are_in_the_order_of_their_scales(layout, grid):
    weight, of_layer = stored_weight(layout), StoredGrid(layout, grid)
    found = group_scales(of_layer.grouped(weight), grid).view(of_layer.shape)
    _, expected = quantize(outputs_first(weight, layout), None, grid)
    assert torch.equal(outputs_first(found, layout), expected)
    assert of_layer.num_scales == expected.numel()


@every_pair
@each_layout
@each_grid
def test_a_period_holds_whole_groups(layout, grid):
    of_layer = StoredGrid(layout, grid)
    rows, cols = (torch.arange(n) // size for n, size in zip(layout.shape, of_layer.unit, strict=True))
    group_of_weight = (rows.unsqueeze(1) * of_layer.shape[1] + cols).flatten()
    per_period = [set(run.tolist()) for run in group_of_weight.split(of_layer.period)]
    assert sum(map(len, per_period)) == of_layer.num_scales


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="groups of 64 do not divide 96 inputs; take 32 or row"):
        StoredGrid(WeightLayout(8, 96), Grid(4, 64))


def layer_state(layout: WeightLayout, grid: Grid, constants: Constants, num_shards: int) -> LayerState:
    generator = torch.Generator().manual_seed(2)
    parts, (outputs, inputs) = layout.num_matrices, (layout.out_features, layout.in_features)
    factors = Factors(
        U=torch.randn(outputs, 2, generator=generator) * 0.1,
        V=torch.randn(parts * 2, inputs, generator=generator) * 0.1,
    )
    mask = torch.rand(layout.shape, generator=generator) > 0.5
    return LayerState(
        stored_weight(layout, zeros=0.0), pack_mask(mask, num_shards), num_shards, layout, factors, constants,
        (1.0,) * parts, False, random_rounding(layout, grid),
    )  # fmt: skip


@every_pair
@each_layout
@each_grid
@pytest.mark.parametrize("budget", [1.0, 1.5, 0.0])
@pytest.mark.usefixtures("loops")
def test_gradient_is_that_of_the_layer_at_the_rounded_weight(layout, grid, budget):
    state = layer_state(layout, grid, Constants(beta=1.3), num_shards=3)
    unrounded = dataclasses.replace(state, rounding=None)
    generator = torch.Generator().manual_seed(3)
    x, grad_y = (torch.randn(17, n, generator=generator) for n in (layout.in_features, layout.out_features))
    merged = codes_times_scales(unrounded.masked_weight(), state.rounding)
    assert torch.equal(state.masked_weight(), merged)
    weight = outputs_first(merged, layout)
    assert torch.equal(forward(x, None, state), torch.nn.functional.linear(x, weight))
    tile_bytes = int(budget * least_tile_bytes(layout, 4))
    options = {"need_x": True, "need_weight": True, "need_bias": False, "tile_bytes": tile_bytes}
    found, without = backward(x, grad_y, state, **options), backward(x, grad_y, unrounded, **options)
    torch.testing.assert_close(found.x, grad_y @ weight, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found.x, without.x, rtol=1e-4, atol=1e-5)
    for name in ("U", "V", "weight"):  # straight through: of the same x and dY the same
        assert torch.equal(getattr(found, name), getattr(without, name)), name


def test_a_sliced_weight_has_the_same_bits_in_any_rectangle():
    generator = torch.Generator().manual_seed(4)
    weight, left, right = (torch.randn(*shape, generator=generator) for shape in ((23, 71), (23, 5), (5, 71)))
    constants = Constants(beta=0.7)

    def of(rows: slice, cols: slice) -> torch.Tensor:
        tile = TileFactors(None, None, None, None, left[rows], right[:, cols])
        return sliced_weight(weight[rows, cols], tile, constants)

    whole = of(slice(0, 23), slice(0, 71))
    expected = weight.double() + 0.7 * left.double() @ right.double()
    torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=1e-6)
    for rows, cols in ((slice(3, 4), slice(0, 71)), (slice(0, 23), slice(5, 6)), (slice(7, 19), slice(13, 66))):
        assert torch.equal(of(rows, cols), whole[rows, cols])

"""The byte budget of the backward pass: refused where it is useless, and held as the allocator counts it."""

import tracemalloc
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.core.bits import all_ones
from pst_ds.core.factors import Constants, Factors
from pst_ds.core.layout import Rect, WeightLayout
from pst_ds.core.masked_linear import LayerState, backward, forward
from pst_ds.core.tiles import MIN_STRIP, TileBudgetError, Tiles, least_tile_bytes, plan_tiles, tile_bytes_of
from tests.pairs import every_pair

NUM_TOKENS, RANK = 16, 2
LAYOUTS = {
    "square": WeightLayout(640, 640),
    "tall": WeightLayout(2048, 256),
    "wide": WeightLayout(256, 1536),
    "odd": WeightLayout(571, 703),
    "conv1d": WeightLayout(512, 768, transposed=True),
    "conv1d-odd": WeightLayout(703, 571, transposed=True),
    "fused": WeightLayout(3 * 192, 768, num_matrices=3),
    "conv1d-fused": WeightLayout(3 * 384, 384, transposed=True, num_matrices=3),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))


def layer_state(layout: WeightLayout, dtype: torch.dtype, num_shards: int) -> LayerState:
    parts, outputs, inputs = layout.num_matrices, layout.out_features, layout.in_features
    ones = {
        "A": (outputs, RANK), "B": (parts * RANK, inputs), "R": (outputs,), "C": (parts, inputs),
        "U": (outputs, RANK), "V": (parts * RANK, inputs),
    }  # fmt: skip
    return LayerState(
        weight=torch.ones(layout.shape, dtype=dtype),
        bits=all_ones(layout.numel, num_shards),
        num_shards=num_shards,
        layout=layout,
        factors=Factors(**{name: torch.ones(shape, dtype=dtype) for name, shape in ones.items()}),
        constants=Constants(),
        magnitude_scales=(1.0,) * parts,
        scores_train=True,
    )


@pytest.fixture
def peak_bytes(torch_bytes) -> Callable[[Callable[[], object]], int]:
    """The most bytes that torch and numpy hold at a time while a function runs."""

    def measure(run: Callable[[], object]) -> int:
        of_torch, _ = torch_bytes(run)
        tracemalloc.start()
        run()
        of_numpy = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return of_torch + of_numpy

    return measure


def not_in_the_budget(state: LayerState, x: torch.Tensor, cut_outputs: bool) -> int:
    """Bytes of what is as large as x (dX, and as a sum its fp32 and one product) and as the factors."""
    of_factors = (state.layout.out_features + state.layout.num_matrices * state.layout.in_features) * (2 * RANK + 1)
    widths = 4 + 4 + 2 * x.element_size()  # their sums over tiles, their gradients, A and B with ones, a product
    return x.numel() * (x.element_size() + 4 * cut_outputs) + of_factors * widths + (64 << 10)


@pytest.fixture
def scratch_bytes(torch_bytes) -> Callable[[torch.Tensor, torch.Tensor], int]:
    """What the BLAS library holds beside left @ right: with AMX, oneDNN copies operands through torch's allocator."""

    def measure(left: torch.Tensor, right: torch.Tensor) -> int:
        product = left.shape[0] * right.shape[1] * left.element_size()
        return max(0, torch_bytes(lambda: left @ right)[0] - product)

    return measure


def tile_products(x: torch.Tensor, grad_y: torch.Tensor, layout: WeightLayout, tiles: Tiles, rect: Rect):
    """(left, right) of the products that the backward pass takes of a tile: G, dX, and of a band dA and dB."""
    rows, cols = rect.r1 - rect.r0, rect.c1 - rect.c0
    outputs, inputs = (cols, rows) if layout.transposed else (rows, cols)
    x, grad_y = x[:, :inputs], grad_y[:, :outputs]
    merged = x.new_ones(rows, cols)
    yield (x.t(), grad_y) if layout.transposed else (grad_y.t(), x)
    yield grad_y, merged.t() if layout.transposed else merged
    band = merged[: max(1, tiles.band_elements // cols)]
    yield band, x.new_ones(RANK + 1, cols).t()
    yield x.new_ones(band.shape[0], RANK + 1).t(), band


@every_pair
@pytest.mark.few(2)
@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.15, 2.0])
def test_the_backward_pass_keeps_to_its_budget(layout, dtype, share, peak_bytes, scratch_bytes):
    """Budgets: the least, and 15 and 200 % of what five buffers of the whole matrix take."""
    state = layer_state(layout, dtype, num_shards=3)
    x, grad_y = (torch.ones(NUM_TOKENS, n, dtype=dtype) for n in (layout.in_features, layout.out_features))
    itemsize = dtype.itemsize
    whole = tile_bytes_of(layout.numel, layout.numel, itemsize)
    budget = max(least_tile_bytes(layout, itemsize), int(share * whole))
    tiles = plan_tiles(layout, itemsize, budget)

    peak = peak_bytes(
        lambda: backward(x, grad_y, state, need_x=True, need_weight=False, need_bias=False, tile_bytes=budget)
    )
    widest = max(tiles.rects, key=lambda rect: rect.numel)
    scratch = max(scratch_bytes(*pair) for pair in tile_products(x, grad_y, layout, tiles, widest))
    outside = not_in_the_budget(state, x, tiles.cut_outputs) + scratch
    assert peak <= budget + outside
    used = tile_bytes_of(tiles.max_numel, tiles.max_band_numel, itemsize)
    assert peak >= 0.8 * used  # the account is no looser than that
    assert used <= budget
    if share < 1:
        assert len(tiles.rects) > 1


@every_pair
@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_forward_pass_keeps_one_merged_weight(layout, dtype, monkeypatch, peak_bytes, scratch_bytes):
    monkeypatch.setattr("pst_ds.core.scores.MASK_BAND_ELEMENTS", {"cpu": 1 << 14})
    state = layer_state(layout, dtype, num_shards=1)
    x = torch.ones(NUM_TOKENS, layout.in_features, dtype=dtype)
    of_y = NUM_TOKENS * layout.out_features * dtype.itemsize
    outside = of_y + scratch_bytes(x, state.weight if layout.transposed else state.weight.t()) + (192 << 10)
    assert peak_bytes(lambda: forward(x, None, state)) <= layout.numel * dtype.itemsize + outside


layouts = st.builds(
    lambda width, inputs, transposed, parts: WeightLayout(parts * width, inputs, transposed, parts),
    st.integers(1, 700), st.integers(1, 2000), st.booleans(), st.sampled_from([1, 3]),
)  # fmt: skip


@given(layout=layouts, itemsize=st.sampled_from([2, 4, 8]), excess=st.floats(1.0, 100.0))
def test_tiles_cover_the_weight_once_and_fit(layout, itemsize, excess):
    budget = int(least_tile_bytes(layout, itemsize) * excess)
    tiles = plan_tiles(layout, itemsize, budget)
    covered = torch.zeros(layout.shape, dtype=torch.int8)
    for rect in tiles.rects:
        assert tile_bytes_of(rect.numel, tiles.max_band_numel, itemsize) <= budget
        covered[rect.r0 : rect.r1, rect.c0 : rect.c1] += 1
        height, width = rect.r1 - rect.r0, rect.c1 - rect.c0
        outputs, inputs = (width, height) if layout.transposed else (height, width)
        assert (inputs if tiles.cut_outputs else outputs) == (
            layout.in_features if tiles.cut_outputs else layout.out_features
        )
    assert bool((covered == 1).all())


def test_the_cut_follows_the_shape():
    """Of all outputs, so that dX is written once, unless that makes thin tiles of a tall matrix."""
    budget = 1 << 20
    assert not plan_tiles(WeightLayout(1024, 1024), 2, budget).cut_outputs
    assert not plan_tiles(WeightLayout(256, 2048), 2, budget).cut_outputs
    assert plan_tiles(WeightLayout(8192, 256), 2, budget).cut_outputs
    assert not plan_tiles(WeightLayout(8192, 256), 2, 64 << 20).cut_outputs


def test_a_tile_on_a_cpu_is_no_wider_than_pays():
    layout = WeightLayout(1024, 4096)
    assert len(plan_tiles(layout, 2, 1 << 30, device_type="cpu").rects) == 4
    assert len(plan_tiles(layout, 2, 1 << 30, device_type="cuda").rects) == 1


@each_layout
def test_a_budget_without_a_useful_tile_is_refused(layout):
    least = least_tile_bytes(layout, 2)
    short = min(layout.out_features, layout.in_features)
    assert least == tile_bytes_of(short * MIN_STRIP, layout.shape[1], 2)
    plan_tiles(layout, 2, least)
    with pytest.raises(
        TileBudgetError, match=rf"^a\.b: a tile of {least - 1} bytes .* set pst.tile_bytes to at least {least},"
    ):
        plan_tiles(layout, 2, least - 1, name="a.b")


def test_the_default_takes_any_layer():
    huge = WeightLayout(400_000, 200_000)
    assert least_tile_bytes(huge, 8) > 64 << 20
    assert plan_tiles(huge, 8).max_numel >= MIN_STRIP * 200_000

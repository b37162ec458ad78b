"""Frozen weights as codes and scales: what is made of them, in whole, by shards, by rectangles and one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.core import masked_linear, quantization
from pst_ds.core.bits import pack_mask
from pst_ds.core.coded_weight import CodedWeight, CodeLayout, OwnWeights, coded_run, weights_at
from pst_ds.core.factors import Constants, Factors
from pst_ds.core.layout import Rect, WeightLayout
from pst_ds.core.quantization import Grid, StoredGrid, round_to_grid
from tests.pairs import every_pair

DTYPES = (torch.float32, torch.bfloat16)


@st.composite
def cases(draw):
    """(layout, stored weight)"""
    grid = Grid(draw(st.sampled_from((4, 8))), draw(st.sampled_from((None, 32))))
    inputs = draw(st.integers(1, 3)) * 32 if grid.group else draw(st.integers(1, 40))
    matrices = draw(st.integers(1, 2))
    layout = WeightLayout(matrices * draw(st.integers(1, 5)), inputs, draw(st.booleans()), matrices)
    seed, dtype = draw(st.integers(0, 1 << 30)), draw(st.sampled_from(DTYPES))
    weight = torch.randn(layout.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return CodeLayout(StoredGrid(layout, grid), draw(st.integers(1, 4))), weight


def expected(codes, weight):
    """The weight rounded by other code, a whole matrix at a time."""
    transposed = codes.stored.layout.transposed
    rounded = round_to_grid(weight.t() if transposed else weight, None, codes.stored.grid)
    return rounded.t().contiguous() if transposed else rounded


def coded(codes, weight):
    parts = [codes.encode(weight, shard) for shard in range(codes.num_shards)]
    data, scales = (torch.cat(part) for part in zip(*parts, strict=True))
    assert (data.numel(), scales.numel()) == (codes.num_code_bytes, codes.num_scale_bytes)
    return CodedWeight(codes, data, scales, weight.dtype), parts


@pytest.fixture(params=["native", "torch"])
def loops(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(quantization, "library", lambda: None)
    elif quantization.library() is None:
        pytest.skip("no C++ compiler")
    return request.param


@given(case=cases(), data=st.data())
def test_every_way_to_read_gives_the_rounded_weight(case, data):
    codes, weight = case
    whole, parts = coded(codes, weight)
    wanted = expected(codes, weight)
    assert torch.equal(whole.dense(), wanted)
    height, width = codes.stored.layout.shape
    r0, c0 = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    r1, c1 = data.draw(st.integers(r0 + 1, height)), data.draw(st.integers(c0 + 1, width))
    out = torch.empty(r1 - r0, c1 - c0, dtype=weight.dtype)
    assert torch.equal(weights_at(whole, Rect(r0, r1, c0, c1), out), wanted[r0:r1, c0:c1])
    assert torch.equal(weights_at(wanted, Rect(r0, r1, c0, c1), out), wanted[r0:r1, c0:c1])
    for shard, (own_codes, own_scales) in enumerate(parts):
        run = coded_run(codes, own_codes, own_scales, weight.dtype, shard)
        start, stop = codes.weights_of(shard)
        flat = wanted.flatten()[start:stop]
        assert (run.start, run.stop, run.numel()) == (start, stop, len(flat))
        assert torch.equal(run[:], flat)
        first = data.draw(st.integers(0, len(flat)))
        assert torch.equal(run[first:], flat[first:])
        assert run[len(flat) :].numel() == 0
        index = torch.arange(start, stop)
        assert torch.equal(run.at(index), flat)
        own, plain = OwnWeights(run, start, width), OwnWeights(flat, start, width)
        assert torch.equal(own.at(index), plain.at(index))
        assert torch.equal(own.flat(start - 3, stop + 3), plain.flat(start - 3, stop + 3))


@every_pair
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_native_and_torch_loops_agree(loops, dtype, bits, transposed):
    layout = WeightLayout(24, 96, transposed)
    weight = torch.randn(layout.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for shards in (1, 2, 3, 5):
        codes = CodeLayout(StoredGrid(layout, Grid(bits, 32)), shards)
        whole, _ = coded(codes, weight)
        assert torch.equal(whole.dense(), expected(codes, weight))
        assert not torch.signbit(whole.dense()[whole.dense() == 0]).any()


def test_codes_take_a_quarter_of_bf16_and_shards_line_up_with_those_of_masks():
    layout = WeightLayout(256, 512)
    codes = CodeLayout(StoredGrid(layout, Grid(4, 64)), 2)
    assert (codes.num_code_bytes, codes.num_scale_bytes) == (layout.numel // 2, layout.numel // 64 * 2)
    assert codes.is_contiguous
    odd = CodeLayout(StoredGrid(WeightLayout(3, 35), Grid(4)), 2)
    assert (odd.shard_numel, odd.shard_code_bytes, odd.is_contiguous) == (53, 27, False)
    assert odd.shard_num_scales == 2, "both shards hold the scale of the row that the boundary cuts"


def test_a_weight_that_is_not_finite_gets_codes_of_its_group_all_the_same():
    layout = WeightLayout(1, 4)
    codes = CodeLayout(StoredGrid(layout, Grid(8)))
    whole, _ = coded(codes, torch.tensor([[127.0, float("nan"), -127.0, float("inf")]]))
    assert torch.equal(whole.dense(), torch.tensor([[127.0, 0.0, -127.0, 0.0]]))


@given(case=cases())
def test_a_layer_over_codes_computes_as_over_the_rounded_weight(case):
    """M . (W0 + beta U V), its output and all gradients, bit for bit."""
    codes, weight = case
    layout, (whole, _) = codes.stored.layout, coded(codes, weight)
    random = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(weight.dtype)

    outputs, inputs, count = layout.out_features, layout.in_features, layout.num_matrices
    factors = Factors(
        A=normal(outputs, 2), B=normal(2 * count, inputs), R=normal(outputs), C=normal(count, inputs),
        U=normal(outputs, 2), V=normal(2 * count, inputs),
    )  # fmt: skip
    bits = pack_mask(torch.rand(layout.numel, generator=random) < 0.5)
    x, grad_y = normal(3, inputs), normal(3, outputs)
    found = []
    for base in (whole, expected(codes, weight)):
        state = masked_linear.LayerState(base, bits, 1, layout, factors, Constants(), (1.0,) * count, True)
        grads = masked_linear.backward(x, grad_y, state, need_x=True, need_weight=False, need_bias=False)
        values = [state.masked_weight(), masked_linear.forward(x, None, state), grads.x]
        found.append([*values, grads.A, grads.B, grads.R, grads.C, grads.U, grads.V])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)

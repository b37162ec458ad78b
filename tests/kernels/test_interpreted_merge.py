"""The merge and the backward pass with kernels, in Triton's interpreter, against the path of CPUs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pairs import every_pair

pytest.importorskip("triton", minversion="3.6", reason="needs triton 3.6, the extra of that name")

from pst_ds.core import masked_linear, scores
from pst_ds.core.bits import pack_mask, shard_bytes, shard_numel, unpack_range
from pst_ds.core.factors import Constants, Factors, TileFactors
from pst_ds.core.kernels.triton import merge
from pst_ds.core.layout import WeightLayout
from pst_ds.core.masked_linear import LayerState, backward

pytestmark = pytest.mark.interpreted
CONSTANTS = Constants(alpha1=0.7, alpha2=0.9, beta=1.3)
LAYOUTS = {
    "two tiles each way": WeightLayout(35, 136),
    "Conv1D": WeightLayout(24, 37, transposed=True),
    "fused": WeightLayout(42, 24, num_matrices=3),
    "fused Conv1D": WeightLayout(48, 9, transposed=True, num_matrices=3),
}


def state_of(layout, dtype=torch.float32, rank=3, num_shards=1, **changed):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    outputs, inputs, parts = layout.out_features, layout.in_features, layout.num_matrices
    factors = Factors(
        A=normal(outputs, 2), B=normal(parts * 2, inputs), R=normal(outputs), C=normal(parts, inputs),
        U=normal(outputs, rank), V=normal(parts * rank, inputs), norms=normal(inputs).abs().float(),
    )  # fmt: skip
    mask = torch.rand(layout.shape, generator=generator) > 0.5
    given = {
        "weight": normal(*layout.shape), "bits": pack_mask(mask, num_shards), "num_shards": num_shards,
        "layout": layout, "factors": factors, "constants": CONSTANTS, "magnitude_scales": (0.8,) * parts,
        "scores_train": True,
    }  # fmt: skip
    return LayerState(**given | changed)


@pytest.fixture
def both_ways(monkeypatch):
    """What a function returns with kernels, which must have been launched, and without."""

    def run(function):
        launched = []
        real = merge.launch
        with monkeypatch.context() as patch:
            patch.setattr(merge, "launch", lambda *args, **constants: (launched.append(1), real(*args, **constants)))
            found = function()
        assert launched
        with monkeypatch.context() as patch:
            for module in (scores, masked_linear):
                patch.setattr(module, "kernel_mask", lambda *_: None)
            return found, function()

    return run


@every_pair
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("rank", [1, 17])
def test_the_merged_weight(layout, rank, both_ways):
    state = state_of(layout, rank=rank, num_shards=3 if layout.numel % 24 == 0 else 1)
    state.weight[0, 0] = torch.nan
    found, expected = both_ways(state.masked_weight)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert torch.equal(found.view(torch.int32) == 0, expected.view(torch.int32) == 0)  # +0.0 where pruned, bit for bit


def test_a_layer_without_update_keeps_its_bits(both_ways):
    state = state_of(LAYOUTS["two tiles each way"], torch.bfloat16, factors=Factors())
    found, expected = both_ways(state.masked_weight)
    assert torch.equal(found, expected)


@given(
    st.integers(1, 70),
    st.integers(1, 140),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 3]),
)
@settings(max_examples=40, deadline=None)
def test_shards_start_at_any_bit(height, width, num_shards, transposed, parts, experts):
    """The kernels read the mask of a layer, or of a stack, that torch reads in one shard: without an update, the same
    bits; and they say beforehand which layers they do not serve."""
    outputs, inputs = (width, height) if transposed else (height, width)
    layout = WeightLayout(experts * parts * outputs, inputs, transposed, experts * parts, experts)
    generator = torch.Generator().manual_seed(height)
    weight = torch.randn(layout.shape, generator=generator).bfloat16()
    keep = torch.rand(layout.shape, generator=generator) > 0.5
    mask = merge.kernel_mask(weight, pack_mask(keep, num_shards), layout.shape, num_shards)
    if not merge.supports(weight.dtype, layout.numel, num_shards):
        assert mask is None
        assert layout.numel / num_shards < 8
        return
    merged = merge.merge_layer(weight, mask, layout, Factors(), CONSTANTS)
    assert torch.equal(merged.view(torch.int16), torch.where(keep, weight, 0.0).view(torch.int16))


def test_shards_behind_more_weights_than_32_bits_count(tmp_path):
    """Of a file that is holes but for the mask of the tile."""
    width, num_shards, shape = 7168, 504, (40, 200)
    numel = 256 * 4096 * width
    per_shard = shard_numel(numel, num_shards)
    bits = torch.from_file(str(tmp_path / "bits"), True, num_shards * shard_bytes(numel, num_shards), dtype=torch.uint8)
    mask = merge.mask_bits(bits, (numel // width, width), num_shards)
    assert mask.pad
    first = 503 * per_shard - 20 * width - 100  # the last shard starts in row 20
    for row in range(shape[0]):
        at = (first + row * width) // per_shard * mask.pad + first + row * width
        bits[at // 8 : at // 8 + 30].random_(generator=torch.Generator().manual_seed(row))
    weight, scores = torch.ones(shape), torch.empty(shape)
    merged = torch.empty_like(weight)
    place = merge.Matrices(shape, first)
    merge.gradients_into(merged, scores, None, weight, weight, mask, place, TileFactors(), CONSTANTS, 0.0)
    ends = [(first + row * width, first + row * width + shape[1]) for row in range(shape[0])]
    assert torch.equal(merged, torch.stack([unpack_range(bits, numel, num_shards, *end) for end in ends]).float())


@pytest.mark.parametrize("ranks", [24, 40, 56, 72, 96, 120, 248, 504])
def test_every_number_of_ranks_is_served(ranks):
    """Layers of 7B and 70B Llamas and of DeepSeek-V3, of which the last two are stacks of experts."""
    shapes = [(4096, 4096), (11008, 4096), (8192, 8192), (1024, 8192), (28672, 8192), (24576, 1536), (7168, 16384)]
    shapes += [(256 * 4096, 7168), (256 * 7168, 2048)]
    assert all(merge.supports(torch.bfloat16, rows * cols, ranks) for rows, cols in shapes)


@every_pair
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_other_path(layout, dtype, both_ways):
    state = state_of(layout, dtype, num_shards=7)
    assert_same_gradients(state, dtype, both_ways)


@pytest.mark.parametrize(
    "changed", [{"scores_train": False}, {"constants": Constants(frozen_magnitude=True)}], ids=["fixed masks", "frozen"]
)
def test_gradients_of_other_kinds(changed, both_ways):
    assert_same_gradients(state_of(LAYOUTS["fused"], **changed), torch.float32, both_ways)


def assert_same_gradients(state, dtype, both_ways):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, state.layout.in_features, generator=generator).to(dtype)
    grad_y = torch.randn(5, state.layout.out_features, generator=generator).to(dtype)

    def run():
        return backward(x, grad_y, state, need_x=True, need_weight=False, need_bias=True)

    found, expected = both_ways(run)
    allowed = 1e-5 if dtype == torch.float32 else 0.02  # the interpreter cuts what a GPU rounds to bf16
    for name in ("x", "bias", *"ABRCUV"):
        pair = getattr(found, name), getattr(expected, name)
        assert (pair[0] is None) == (pair[1] is None)
        if pair[0] is not None:
            there, here = (value.double() for value in pair)
            assert (there - here).norm() <= allowed * here.norm(), name

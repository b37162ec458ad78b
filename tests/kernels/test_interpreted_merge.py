"""The merge and the backward pass with kernels, in Triton's interpreter, against the path of CPUs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", minversion="3.6", reason="needs triton 3.6, the extra of that name")

from pst_ds.core import masked_linear, scores
from pst_ds.core.bits import pack_mask
from pst_ds.core.factors import Constants, Factors
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
                patch.setattr(module, "mask_bytes", lambda *_: None)
            return found, function()

    return run


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


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_other_path(layout, dtype, both_ways):
    state = state_of(layout, dtype)
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

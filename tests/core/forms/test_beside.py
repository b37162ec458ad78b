"""The update next to the mask against autograd through the dense formula, also fused, transposed and in tiles."""

import pytest
import torch

from pst_ds.core.bits import pack_mask
from pst_ds.core.factors import Constants, Factors
from pst_ds.core.forms.beside import Beside
from pst_ds.core.layout import WeightLayout
from pst_ds.core.masked_linear import LayerState, backward, forward
from pst_ds.core.stats import update_norm

OUTPUTS, INPUTS, RANK, SCORE_RANK, TOKENS = 30, 24, 3, 2, 7
CONSTANTS = Constants(alpha1=0.7, alpha2=0.9, beta=1.3, form=Beside())
LAYOUTS = {
    "plain": WeightLayout(OUTPUTS, INPUTS),
    "fused": WeightLayout(OUTPUTS, INPUTS, num_matrices=3),
    "transposed": WeightLayout(OUTPUTS, INPUTS, transposed=True),
    "fused and transposed": WeightLayout(OUTPUTS, INPUTS, transposed=True, num_matrices=3),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def _values(layout, dtype):
    generator = torch.Generator().manual_seed(3)
    parts = layout.num_matrices
    shapes = {
        "A": (OUTPUTS, SCORE_RANK),
        "B": (parts * SCORE_RANK, INPUTS),
        "R": (OUTPUTS,),
        "C": (parts, INPUTS),
        "U": (OUTPUTS, RANK),
        "V": (parts * RANK, INPUTS),
    }
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def _state(layout, dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)
    keep = torch.rand(OUTPUTS, INPUTS, generator=generator) > 0.6
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator).to(dtype)
    stored = keep
    if layout.transposed:
        weight, stored = weight.t().contiguous(), keep.t()
    state = LayerState(
        weight=weight,
        bits=pack_mask(stored, 1),
        num_shards=1,
        layout=layout,
        factors=Factors.of(_values(layout, dtype), Beside()),
        constants=CONSTANTS,
        magnitude_scales=tuple(2.0 + part for part in range(layout.num_matrices)),
        scores_train=True,
    )
    return state, keep


def _dense_product(layout, left, right):
    """Return U V of all matrices, (O, I), from their stacked factors."""
    lefts = left.chunk(layout.num_matrices)
    rights = right.chunk(layout.num_matrices)
    return torch.cat([of_left @ of_right for of_left, of_right in zip(lefts, rights, strict=True)])


def _dense_scores(state, leaves):
    """Return the scores of all weights, (O, I), from the written-out formula."""
    layout = state.layout
    weight = state.weight.double()
    if layout.transposed:
        weight = weight.t()
    height = OUTPUTS // layout.num_matrices
    scales = torch.tensor(state.magnitude_scales, dtype=torch.float64).repeat_interleave(height)
    columns = leaves["C"].repeat_interleave(height, 0)
    product = _dense_product(layout, leaves["A"], leaves["B"])
    learned = CONSTANTS.alpha1 * product + CONSTANTS.alpha2 * (leaves["R"][:, None] + columns)
    return weight.abs() / scales[:, None] + learned


@each_layout
@pytest.mark.parametrize("budget", [0, 1 << 14], ids=["one tile", "tiles"])
def test_outputs_and_gradients_are_those_of_the_dense_formula(layout, budget):
    state, keep = _state(layout)
    leaves = {name: value.double().requires_grad_() for name, value in _values(layout, torch.float32).items()}
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, TOKENS, INPUTS, generator=generator)
    bias = torch.randn(OUTPUTS, generator=generator)
    grad_y = torch.randn(2, TOKENS, OUTPUTS, generator=generator)
    weight = state.weight.double()
    if layout.transposed:
        weight = weight.t()
    scores = _dense_scores(state, leaves)
    mask = scores + (keep.double() - scores).detach()  # straight-through: dM/dS = 1
    wide = x.double().requires_grad_()
    update = CONSTANTS.beta * _dense_product(layout, leaves["U"], leaves["V"])
    expected = wide @ (mask * weight + update).t() + bias.double()
    expected.backward(grad_y.double())

    assert torch.allclose(forward(x, bias, state).double(), expected, atol=1e-4)
    grads = backward(
        x.flatten(0, 1), grad_y.flatten(0, 1), state, need_x=True, need_weight=False, need_bias=True, tile_bytes=budget
    )
    assert torch.allclose(grads.x.double(), wide.grad.flatten(0, 1), atol=1e-4)
    for name, leaf in leaves.items():
        assert torch.allclose(grads.of_parameter(name).double(), leaf.grad, rtol=1e-4, atol=1e-4), name


@each_layout
def test_gradients_in_bf16_are_sums_in_fp32(layout):
    state, _ = _state(layout, torch.bfloat16)
    exact, _ = _state(layout)
    x = torch.randn(TOKENS, INPUTS).bfloat16()
    grad_y = torch.randn(TOKENS, OUTPUTS).bfloat16()
    found = backward(x, grad_y, state, need_x=True, need_weight=False, need_bias=False, tile_bytes=1 << 14)
    expected = backward(x.float(), grad_y.float(), exact, need_x=True, need_weight=False, need_bias=False)
    for name in ("U", "V"):
        gradient = found.of_parameter(name)
        assert gradient.dtype == torch.float32
        assert (gradient - expected.of_parameter(name)).norm() < 0.02 * expected.of_parameter(name).norm(), name
    assert (found.x.float() - expected.x).norm() < 0.02 * expected.x.norm()


@each_layout
def test_what_is_masked_and_ranked_is_the_base(layout):
    state, keep = _state(layout)
    merged = state.masked_weight()
    weight = state.weight
    if layout.transposed:
        merged, weight = merged.t(), weight.t()
    assert torch.equal(merged, weight * keep)


@each_layout
def test_the_norm_of_the_update_is_that_of_the_product(layout):
    state, _ = _state(layout)
    values = _values(layout, torch.float64)
    expected = CONSTANTS.beta * _dense_product(layout, values["U"], values["V"]).norm()
    assert float(update_norm(layout, state.factors, CONSTANTS)) == pytest.approx(float(expected))

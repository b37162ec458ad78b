"""Inputs of 8 bits: against numpy, in torch and in native loops, and what a layer and its gradient make of them."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.core import quantization
from pst_ds.core.bits import pack_mask
from pst_ds.core.experts import products
from pst_ds.core.experts.routing import Routing
from pst_ds.core.factors import Constants, Factors
from pst_ds.core.layout import WeightLayout
from pst_ds.core.masked_linear import LayerState, backward, forward
from pst_ds.core.quantization import Grid, InputGrid

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture(params=["native", "torch"])
def loops(request, monkeypatch):
    """Both ways to compute; native code is skipped where there is no compiler."""
    if request.param == "torch":
        monkeypatch.setattr(quantization, "native_for", lambda *_: None)
        monkeypatch.setattr(quantization, "_INPUTS_AT_A_TIME", 1000)
    elif quantization.library() is None:
        pytest.skip("no compiler")


def in_numpy(x: torch.Tensor, word: int) -> torch.Tensor:
    """q * scale, one word of one token after the other, in numpy's fp32."""
    rows = x.float().reshape(-1, x.shape[-1]).numpy()
    found = np.zeros_like(rows)
    for row, out in zip(rows, found, strict=True):
        for first in range(0, len(row), word):
            part = row[first : first + word]
            most = np.float32(np.abs(part).max())
            if most > 1e-30:
                q = np.rint(part * (np.float32(127) / most))
                out[first : first + word] = q * (most / np.float32(127))
    return torch.from_numpy(found).view(x.shape).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("word", [32, 64])
@pytest.mark.parametrize("columns", [1, 31, 64, 130, 513])
@pytest.mark.usefixtures("loops")
def test_every_word_has_its_scale(dtype, word, columns):
    x = torch.randn(2, 7, columns, generator=torch.Generator().manual_seed(columns)).to(dtype)
    x[0, 1] = 0.0
    x[0, 2] *= 1e-32  # below what a scale is made for
    x[1, 3, : columns // 2] *= 1e5
    found = InputGrid(word).rounded(x)
    assert (found.shape, found.dtype) == (x.shape, dtype)
    assert torch.equal(found, in_numpy(x, word))
    assert not found[0, 1].any()
    assert not found[0, 2].any()


@given(st.integers(0, 10_000), st.floats(-30, 30), st.sampled_from(DTYPES))
def test_nothing_moves_by_more_than_half_a_step_nor_is_clipped(seed, power, dtype):
    x = torch.randn(3, 150, generator=torch.Generator().manual_seed(seed)).mul_(10.0**power).to(dtype)
    grid = InputGrid(64)
    found = grid.rounded(x)
    step = torch.cat([part.abs().amax(1, keepdim=True).expand_as(part) for part in x.split(64, 1)], 1).double() / 127
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-22
    assert ((found.double() - x.double()).abs() <= step * 0.5001 + x.double().abs() * rounding).all()
    largest = x.abs() == torch.cat([part.abs().amax(1, keepdim=True).expand_as(part) for part in x.split(64, 1)], 1)
    torch.testing.assert_close(found[largest], x[largest], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("loops")
def test_a_word_with_what_is_no_number_is_none(value, dtype):
    x = torch.ones(2, 200, dtype=dtype)
    x[1, 70] = value
    is_nan = InputGrid(64).rounded(x).isnan()
    assert is_nan[1, 64:128].all()
    assert int(is_nan.sum()) == 64


@pytest.mark.parametrize(
    ("grid", "word"), [(Grid(8), 64), (Grid(4), 64), (Grid(8, 32), 32), (Grid(4, 64), 64), (Grid(4, 128), 64)], ids=str
)
def test_words_fit_into_the_groups_of_weights(grid, word):
    assert InputGrid.of(grid).word == word


def test_no_tokens_are_no_error():
    for shape in ((0, 64), (2, 0, 70)):
        assert InputGrid(64).rounded(torch.empty(shape)).shape == shape


def _state(layout: WeightLayout, scores_train: bool) -> LayerState:
    generator = torch.Generator().manual_seed(2)
    outputs, columns = layout.out_features, layout.in_features
    factors = Factors(
        A=torch.randn(outputs, 2, generator=generator) * 0.1,
        B=torch.randn(layout.num_matrices * 2, columns, generator=generator) * 0.1,
        U=torch.randn(outputs, 2, generator=generator) * 0.1,
        V=torch.randn(layout.num_matrices * 2, columns, generator=generator) * 0.1,
    )
    mask = torch.rand(layout.shape, generator=generator) > 0.5
    weight = torch.randn(layout.shape, generator=generator) * 0.1
    scales = (1.0,) * layout.num_matrices
    return LayerState(
        weight, pack_mask(mask, 1), 1, layout, factors, Constants(beta=1.3), scales, scores_train, None, InputGrid(64)
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scores_train", [False, True])
@pytest.mark.usefixtures("loops")
def test_a_layer_multiplies_with_rounded_inputs_and_its_gradient_passes_through(transposed, scores_train):
    state = _state(WeightLayout(36, 130, transposed), scores_train)
    exact = dataclasses.replace(state, inputs=None)
    generator = torch.Generator().manual_seed(3)
    x, grad_y = (torch.randn(17, columns, generator=generator) for columns in (130, 36))
    rounded = in_numpy(x, 64)
    assert torch.equal(forward(x, None, state), forward(rounded, None, exact))
    assert not torch.equal(forward(x, None, state), forward(x, None, exact))
    options = {"need_x": True, "need_weight": True, "need_bias": True}
    found, of_rounded = backward(x, grad_y, state, **options), backward(rounded, grad_y, exact, **options)
    for name in ("x", "weight", "bias", "A", "B", "U", "V"):
        assert torch.equal(getattr(found, name), getattr(of_rounded, name)), name
    assert torch.equal(found.x, backward(x, grad_y, exact, **options).x), "that of x is as without"


@pytest.mark.parametrize("by_token", [False, True])
def test_experts_round_what_each_is_given(by_token):
    layout = WeightLayout(3 * 20, 70, num_matrices=3, num_experts=3)
    state = _state(layout, scores_train=False)
    exact = dataclasses.replace(state, inputs=None)
    generator = torch.Generator().manual_seed(3)
    index = torch.tensor([[0, 2], [2, 0], [0, 1], [0, 2]])
    routing = Routing.of(index, torch.ones(4, 2), 3)
    x = torch.randn(4 if by_token else 8, 70, generator=generator)
    grad_y, rounded = torch.randn(8, 20, generator=generator), in_numpy(x, 64)
    found = products.forward(x, state, routing, by_token=by_token)
    torch.testing.assert_close(found, products.forward(rounded, exact, routing, by_token=by_token))
    assert not torch.allclose(found, products.forward(x, exact, routing, by_token=by_token), atol=1e-4)
    options = {"by_token": by_token, "need_x": True}
    ours = products.backward(x, grad_y, state, routing, **options)
    theirs = products.backward(rounded, grad_y, exact, routing, **options)
    for name in ("x", "U", "V"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))

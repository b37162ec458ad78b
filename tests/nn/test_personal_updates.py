"""The update of a layer for one user: its gradients are those of the product."""

from __future__ import annotations

import torch
from torch import nn

from pst_ds.nn.model_structure import linear_shape
from pst_ds.nn.personal_updates import LEFT, RIGHT, add_update
from tools.packed_layers import packed_linear

OUT, IN, RANK, BETA = 6, 5, 2, 0.7


def _random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def _sparse():
    weight = _random(OUT, IN).float()
    weight[weight.abs() < 0.5] = 0.0
    return packed_linear(weight)


def test_an_update_that_trains_begins_at_nothing_and_has_the_gradients_of_the_product():
    layer = nn.Linear(IN, OUT)
    x = _random(3, IN).float()
    before = layer(x)
    made = add_update(
        layer, "a", outputs=OUT, inputs=IN, rank=RANK, beta=BETA, seed=1, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    assert torch.equal(layer(x), before)
    left, right = made[f"a.{LEFT}"], made[f"a.{RIGHT}"]
    grad = _random(3, OUT).float()
    layer(x).backward(grad)
    torch.testing.assert_close(left.grad, BETA * grad.t() @ x @ right.detach().t(), rtol=1e-4, atol=1e-5)
    assert torch.equal(right.grad, torch.zeros_like(right))


def test_features_of_layers_of_either_order():
    from transformers.pytorch_utils import Conv1D

    assert linear_shape(nn.Linear(IN, OUT)) == linear_shape(Conv1D(OUT, IN)) == linear_shape(_sparse()) == (OUT, IN)

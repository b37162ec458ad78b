"""Updates beside layers, against weights that are merged one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pst_ds.core.updates.rows import beside, with_beside_each
from pst_ds.inference.runtime.linear import SparseLinear
from pst_ds.nn.batched_updates import LEFT, RIGHT, BatchUpdates, add_update
from pst_ds.nn.model_structure import linear_shape

OUT, IN, RANK, BETA = 6, 5, 2, 0.7


def _random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("between", [(), (3,), (3, 2)])
def test_each_sample_is_multiplied_by_its_own_product(between):
    x, left, right = _random(4, *between, IN), _random(4, OUT, RANK), _random(4, RANK, IN)
    given = _random(4, *between, OUT)
    y = with_beside_each(given, x, left, right, BETA)
    for i in range(4):
        wanted = x[i] @ (BETA * left[i] @ right[i]).t()
        torch.testing.assert_close(y[i], given[i] + wanted)
        torch.testing.assert_close(beside(x[i], left[i], right[i], BETA), wanted)
    low = with_beside_each(given.bfloat16(), x.bfloat16(), left.float(), right.float(), BETA)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), y, rtol=2e-2, atol=2e-2)


def _sparse():
    weight = _random(OUT, IN).float()
    weight[weight.abs() < 0.5] = 0.0
    return nn.ModuleDict({"a": SparseLinear.from_dense(weight)}), weight


def _state(seed):
    generator = torch.Generator().manual_seed(seed)
    return {f"a.{LEFT}": torch.randn(OUT, RANK, generator=generator).bfloat16(),
            f"a.{RIGHT}": torch.randn(RANK, IN, generator=generator).bfloat16()}  # fmt: skip


SHAPES = {f"a.{LEFT}": [OUT, RANK], f"a.{RIGHT}": [RANK, IN]}


def test_a_batch_over_a_packed_layer_is_that_of_merged_weights():
    model, weight = _sparse()
    updates, x = BatchUpdates(model, SHAPES, BETA), _random(3, 4, IN).float()
    torch.testing.assert_close(model["a"](x), x @ weight.t(), rtol=1e-5, atol=1e-5)
    states = [_state(1), None, _state(2)]
    updates.assign(states, like=weight)
    y = model["a"](x)
    for i, state in enumerate(states):
        merged = weight if state is None else weight + BETA * state[f"a.{LEFT}"].float() @ state[f"a.{RIGHT}"].float()
        torch.testing.assert_close(y[i], x[i] @ merged.t(), rtol=1e-5, atol=1e-5)
    updates.assign([_state(1)] * 3, like=weight)
    torch.testing.assert_close(model["a"](x)[0], y[0], rtol=1e-5, atol=1e-5)
    updates.remove()
    torch.testing.assert_close(model["a"](x)[0], x[0] @ weight.t())


def test_updates_of_other_layers_or_sizes_are_refused():
    model, _ = _sparse()
    with pytest.raises(KeyError):
        BatchUpdates(model, {f"b.{LEFT}": [OUT, RANK], f"b.{RIGHT}": [RANK, IN]}, BETA)
    with pytest.raises(ValueError, match=r"a has \(6, 5\) outputs and inputs, and the updates \(6, 9\)"):
        BatchUpdates(model, {f"a.{LEFT}": [OUT, RANK], f"a.{RIGHT}": [RANK, 9]}, BETA)


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

    assert (
        linear_shape(nn.Linear(IN, OUT))
        == linear_shape(Conv1D(OUT, IN))
        == linear_shape(_sparse()[0]["a"])
        == (OUT, IN)
    )

"""Gates of learned ranks: their gradients against autograd, what a budget keeps, and that what is shut stays so."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.core.layout import WeightLayout
from pst_ds.core.updates.gates import (
    DROPPED,
    gate_gradients,
    gate_values,
    gated_rows,
    importance,
    is_dropped,
    kept_gates,
    rank_budget,
)


def _random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("num_gates", [6, 2])
def test_gradients_are_those_of_autograd(num_gates):
    V, gates, grad = _random(6, 5).requires_grad_(), _random(num_gates).requires_grad_(), _random(6, 5)
    gated = torch.stack([2 * torch.sigmoid(gates[row * num_gates // 6]) * V[row] for row in range(6)])
    torch.testing.assert_close(gated_rows(V, gates, 2), gated)
    expected = torch.autograd.grad(gated, (V, gates), grad)
    found = gate_gradients(grad, V.detach(), gates.detach(), 2)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_shut_gate_is_zero_and_without_gradient_in_every_dtype(dtype):
    gates = torch.tensor([0.0, DROPPED, 3.0, -20.0]).to(dtype)
    V, grad = torch.ones(4, 3, dtype=dtype), torch.full((4, 3), 7.0)
    assert gated_rows(V, gates, 1)[1].eq(0).all()
    of_V, of_gates = gate_gradients(grad, V, gates, 1)
    assert of_V[1].eq(0).all()
    assert of_gates[1] == 0.0
    assert is_dropped(gates).tolist() == [False, True, False, False]
    assert gate_values(gates)[0] == 1.0


def test_importance_is_the_relative_norm_of_what_a_gate_adds():
    layout, U, V = WeightLayout(8, 5, num_matrices=2), _random(8, 3), _random(6, 5)
    gates, scales = _random(6), (0.5, 2.0)
    by_component = importance(U, V, gates, layout, scales)
    of_matrix = importance(U, V, gates[:2], layout, scales)
    for part in range(2):
        own, rows = U[part * 4 : part * 4 + 4], slice(part * 3, part * 3 + 3)
        for j in range(3):
            added = torch.outer(own[:, j], V[rows][j]) * gate_values(gates)[part * 3 + j]
            expected = added.norm() / math.sqrt(20) / scales[part]
            torch.testing.assert_close(by_component[part * 3 + j], expected)
        whole = own @ V[rows] * gate_values(gates)[part]
        torch.testing.assert_close(of_matrix[part], whole.norm() / math.sqrt(20) / scales[part])
    assert importance(U, V, torch.tensor([0.0, DROPPED] * 3), layout, scales)[1::2].tolist() == [-1.0] * 3


@given(st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=4), min_size=1, max_size=4),
       st.integers(0, 16))  # fmt: skip
def test_the_most_important_are_kept_and_shut_gates_never(values, budget):
    kept = kept_gates([torch.tensor(one) for one in values], [1] * len(values), budget)
    flat = [value for one in values for value in one]
    order = sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:budget]
    expected = [i in order and flat[i] >= 0 for i in range(len(flat))]
    assert [bool(flag) for one in kept for flag in one] == expected


def test_gates_of_whole_matrices_cost_their_rank():
    found = [torch.tensor([3.0, 1.0]), torch.tensor([2.0])]
    assert [one.tolist() for one in kept_gates(found, [4, 2], 6)] == [[True, False], [True]]
    assert [one.tolist() for one in kept_gates(found, [4, 2], 5)] == [[True, False], [False]]


def test_a_budget_is_what_is_left_of_a_share():
    assert rank_budget(144, 0.75) == 36
    assert rank_budget(7, 1.0 - 2 / 3) == 4
    assert rank_budget(9, 1.0 - 1 / 3) == 3
    assert rank_budget(8, 0.0) == 8

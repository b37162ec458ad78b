"""Packed stacks of experts: each token's product with its own expert, in every format."""

import pytest
import torch

from pst_ds.core.experts.routing import Routing
from pst_ds.core.quantization import Grid, round_to_grid
from pst_ds.runtime import experts
from pst_ds.storage_format import packed_format
from tests.pairs import every_pair
from tools.packed_layers import packed_experts

EXPERTS, OUTPUTS, INPUTS, TOKENS = 5, 6, 64, 9


def _stack(*, two_four=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    stack = torch.randn(EXPERTS, OUTPUTS, INPUTS, generator=generator).to(dtype)
    if two_four:
        lowest = stack.abs().view(-1, 4).argsort(1)[:, :2]
        stack.view(-1, 4).scatter_(1, lowest, 0.0)
        return stack
    stack[torch.rand(stack.shape, generator=generator) < 0.6] = 0.0
    stack[2, 3] = 0.0  # a row without a value
    return stack


def _routed(dtype=torch.float32):
    """Two experts for each token; the last has none."""
    generator = torch.Generator().manual_seed(2)
    index = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:2] for _ in range(TOKENS)])
    return torch.randn(TOKENS, INPUTS, generator=generator).to(dtype), Routing.of(
        index, torch.ones(index.shape), EXPERTS
    )


def _expected(stack, x, routing, *, by_token):
    rows = x[routing.tokens] if by_token else x
    return torch.stack([stack[expert] @ row for expert, row in zip(routing.experts.tolist(), rows, strict=True)])


FORMS = {
    "bitmask": (packed_format("bitmask"), {}), "2:4": (packed_format("2:4"), {"two_four": True}),
    "csr": (packed_format("csr"), {}), "int8": (packed_format("bitmask", Grid(8, 32)), {}),
    "int4 2:4": (packed_format("2:4", Grid(4, 32)), {"two_four": True}),
    "int4": (packed_format("dense", Grid(4, 32)), {}),
}  # fmt: skip


@every_pair
@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("kind", FORMS)
def test_a_product_is_with_the_expert_of_each_token(kind, by_token):
    form, how = FORMS[kind]
    stack = _stack(**how)
    layer = packed_experts(stack, form)
    layer.check(kind)
    if layer.is_quantized:
        stack = round_to_grid(stack.flatten(0, 1), None, form.grid).view(stack.shape)
    assert torch.equal(layer.dense_weight().view(stack.shape), stack)
    x, routing = _routed()
    x = x if by_token else x[routing.order // 2]
    expected = _expected(stack, x, routing, by_token=by_token)
    torch.testing.assert_close(layer(x, routing, by_token), expected)
    x.requires_grad_()
    with_grad = layer(x, routing, by_token)
    torch.testing.assert_close(with_grad, expected)
    with_grad.sum().backward()
    wanted = torch.zeros(TOKENS if by_token else 2 * TOKENS, INPUTS)
    pairs = routing.order // 2 if by_token else torch.arange(2 * TOKENS)
    wanted.index_add_(0, pairs, stack.sum(1)[routing.experts])
    torch.testing.assert_close(x.grad, wanted)


@every_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bitmask", "2:4"])
def test_one_call_for_all_experts_gives_what_a_call_for_each_does(kind, dtype, monkeypatch):
    form, how = FORMS[kind]
    layer = packed_experts(_stack(**how, dtype=dtype), form)
    x, routing = _routed(dtype)
    together = layer(x, routing, True)
    monkeypatch.setattr(experts, "FEW_PAIRS", 0)
    assert torch.equal(layer(x, routing, True), together)


@pytest.mark.parametrize("kind", ["bitmask", "csr", "2:4"])
def test_the_parts_of_an_expert_are_those_of_its_own_matrix(kind):
    form, how = FORMS[kind]
    stack = _stack(**how)
    layer = packed_experts(stack, form)
    for expert in range(EXPERTS):
        parts, expected = layer.expert_parts(expert), form.pack(stack[expert])
        assert parts.keys() == expected.keys()
        assert all(torch.equal(parts[name], expected[name]) for name in parts), expert


def test_a_layer_that_was_loaded_anew_must_be_checked():
    layer = packed_experts(_stack())
    layer.load_state_dict(layer.state_dict())
    x, routing = _routed()
    with pytest.raises(RuntimeError, match="have not been checked"):
        layer(x, routing, True)
    layer.check("x")
    layer(x, routing, True)

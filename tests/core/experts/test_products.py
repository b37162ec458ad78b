"""Products with a stack of experts against float64 autograd of the written-out formula, pair by pair."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.core.bits import pack_mask, shard_bytes, unpack_range
from pst_ds.core.coded_weight import CodedWeight, CodeLayout
from pst_ds.core.experts import products
from pst_ds.core.experts.routing import Routing
from pst_ds.core.factors import Constants, Factors
from pst_ds.core.layout import WeightLayout
from pst_ds.core.masked_linear import LayerState
from pst_ds.core.quantization import Grid, Rounding, StoredGrid
from tests.pairs import every_pair

EXPERTS, OUTPUTS, INPUTS, RANK = 5, 6, 9, 2
GATES = torch.rand(7, 2, generator=torch.Generator().manual_seed(9))
INDEX = torch.tensor([[0, 4], [2, 0], [4, 2], [0, 2], [4, 0], [2, 4], [0, 4]])
"""The experts of seven tokens: 1 and 3 get none."""
CONSTANTS = Constants(alpha1=0.7, alpha2=0.9, beta=1.3)
LAYOUTS = [
    WeightLayout(EXPERTS * OUTPUTS, INPUTS, transposed, EXPERTS * fused, EXPERTS)
    for transposed, fused in itertools.product((False, True), (1, 2))
]
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=["out-in", "out-in fused", "in-out", "in-out fused"])


def make_state(layout: WeightLayout, num_shards: int = 1, **changed) -> LayerState:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    outputs, inputs, matrices = layout.out_features, layout.in_features, layout.num_matrices
    factors = Factors(
        A=normal(outputs, RANK), B=normal(matrices * RANK, inputs), R=normal(outputs), C=normal(matrices, inputs),
        U=normal(outputs, RANK), V=normal(matrices * RANK, inputs), norms=normal(EXPERTS * inputs).abs(),
    )  # fmt: skip
    keep = torch.rand(layout.numel, generator=generator) > 0.5
    state = LayerState(
        weight=normal(*layout.shape), bits=pack_mask(keep, num_shards), num_shards=num_shards, layout=layout,
        factors=factors, constants=CONSTANTS, magnitude_scales=tuple(2.0 + i for i in range(matrices)),
        scores_train=True,
    )  # fmt: skip
    return dataclasses.replace(state, **changed)


def by_output(values: torch.Tensor, layout: WeightLayout) -> torch.Tensor:
    """(E, O, I) of what is stored."""
    stack = values.view(EXPERTS, *layout.expert.shape)
    return stack.transpose(1, 2) if layout.transposed else stack


def reference(state: LayerState, x: torch.Tensor, index: torch.Tensor, grad_y: torch.Tensor):
    """(y (N, k, O), gradients by name) in float64, with a score and an update for each expert written out."""
    layout, leaves = state.layout, {n: getattr(state.factors, n).double() for n in "ABRCUV"}
    leaves |= {"x": x.double(), "weight": by_output(state.weight, layout).double()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    fused, keep = (
        layout.num_matrices // EXPERTS,
        unpack_range(state.bits, layout.numel, state.num_shards, 0, layout.numel),
    )
    keep, norms = by_output(keep, layout).double(), state.factors.norms.double().view(EXPERTS, INPUTS)
    weights = []
    for e in range(EXPERTS):
        rows = []
        for part in range(fused):
            i, width = e * fused + part, OUTPUTS // fused
            outs, ranks = slice(i * width, (i + 1) * width), slice(i * RANK, (i + 1) * RANK)
            own = slice(part * width, (part + 1) * width)
            merged = leaves["weight"][e, own] + CONSTANTS.beta * leaves["U"][outs] @ leaves["V"][ranks]
            score = merged.abs() * norms[e] / state.magnitude_scales[i]
            score = score + CONSTANTS.alpha1 * leaves["A"][outs] @ leaves["B"][ranks]
            score = score + CONSTANTS.alpha2 * (leaves["R"][outs, None] + leaves["C"][i])
            rows.append((keep[e, own] + score - score.detach()) * merged)
        weights.append(torch.cat(rows))
    y = torch.stack(
        [torch.stack([weights[e] @ leaves["x"][n] for e in chosen]) for n, chosen in enumerate(index.tolist())]
    )
    y.backward(grad_y.double())
    return y.detach(), {name: leaf.grad for name, leaf in leaves.items()}


@every_pair
@each_layout
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("by_token", [True, False])
def test_products_and_gradients_are_those_of_the_formula(layout, num_shards, by_token):
    state, generator = make_state(layout, num_shards), torch.Generator().manual_seed(1)
    routing = Routing.of(INDEX, GATES, EXPERTS)
    index = INDEX if by_token else INDEX.reshape(-1, 1)  # a row of x for each pair
    x = torch.randn(len(index), INPUTS, generator=generator)
    grad_y = torch.randn(len(index), index.shape[1], OUTPUTS, generator=generator)
    y, expected = reference(state, x, index, grad_y)
    sorted_x = x if by_token else x[routing.order]
    found_y = products.forward(sorted_x, state, routing, by_token=by_token)
    torch.testing.assert_close(found_y.double(), y.reshape(-1, OUTPUTS)[routing.order], rtol=1e-5, atol=1e-5)

    by_pair = grad_y.reshape(-1, OUTPUTS)[routing.order]
    found = products.backward(sorted_x, by_pair, state, routing, by_token=by_token, need_x=True)
    expected_x = expected["x"] if by_token else expected["x"][routing.order]
    torch.testing.assert_close(found.x.double(), expected_x, rtol=1e-5, atol=1e-5)
    for name in "ABRCUV":
        gradient = getattr(found, name)
        torch.testing.assert_close(gradient.double(), expected[name], rtol=1e-5, atol=1e-5)
        per_expert = gradient.view(EXPERTS, -1).abs().sum(1)
        assert [bool(norm) for norm in per_expert] == [True, False, True, False, True]


@each_layout
def test_trained_weights_have_the_gradient_of_their_experts_and_others_zero(layout):
    state, routing = make_state(layout, scores_train=False), Routing.of(INDEX, GATES, EXPERTS)
    x, grad_y = torch.randn(len(INDEX), INPUTS), torch.randn(len(INDEX), 2, OUTPUTS)
    by_pair = grad_y.reshape(-1, OUTPUTS)[routing.order]
    found = products.backward(x, by_pair, state, routing, by_token=True, need_x=False, need_weight=True)
    keep = by_output(unpack_range(state.bits, layout.numel, 1, 0, layout.numel), layout)
    tokens = torch.einsum("nko,ni,nke->eoi", grad_y, x, torch.nn.functional.one_hot(INDEX, EXPERTS).float())
    torch.testing.assert_close(by_output(found.weight, layout), keep * tokens, rtol=1e-5, atol=1e-5)
    assert found.x is None


@each_layout
def test_a_dense_stack_has_no_mask_and_no_update(layout):
    state, routing = make_state(layout), Routing.of(INDEX, GATES, EXPERTS)
    stack = state.weight.view(EXPERTS, *layout.expert.shape)
    x = torch.randn(len(INDEX), INPUTS, requires_grad=True)
    expected = torch.einsum("eoi,ni->neo", by_output(state.weight, layout), x)
    expected = expected.gather(1, INDEX.unsqueeze(2).expand(-1, -1, OUTPUTS)).reshape(-1, OUTPUTS)[routing.order]
    found = products.dense_forward(x.detach(), stack, routing, by_token=True, transposed=layout.transposed)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    grad_y = torch.randn_like(expected)
    expected.backward(grad_y)
    of_x = products.dense_backward(grad_y, stack, routing, by_token=True, transposed=layout.transposed)
    torch.testing.assert_close(of_x, x.grad, rtol=1e-5, atol=1e-6)


@every_pair
@each_layout
@pytest.mark.parametrize("num_shards", [1, 3])
def test_an_expert_multiplies_with_its_part_of_the_stack(layout, num_shards):
    """To the bit, also from codes and rounded: the export makes one or the other."""
    grid = Grid(bits=8, group=None)
    coded = CodeLayout(StoredGrid(layout, grid), num_shards)
    plain = make_state(layout, num_shards)
    parts = [coded.encode(plain.weight, shard) for shard in range(num_shards)]
    codes, scales = (torch.cat(part) for part in zip(*parts, strict=True))
    stored = StoredGrid(layout, grid)
    rounding = Rounding(stored, torch.full(stored.shape, 0.01).to(torch.bfloat16))
    for state in (
        plain,
        dataclasses.replace(plain, rounding=rounding),
        dataclasses.replace(plain, weight=CodedWeight(coded, codes, scales, torch.float32)),
    ):
        whole = state.masked_weight().view(EXPERTS, *layout.expert.shape)
        for expert in range(EXPERTS):
            assert torch.equal(state.expert(expert).masked_weight(), whole[expert])


@given(st.integers(1, 7), st.integers(1, 3), st.integers(1, 6), st.integers(0, 10**6))
def test_routing_sorts_pairs_by_expert_and_sums_them_by_token(tokens, per_token, experts, seed):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, experts, (tokens, per_token), generator=generator)
    gates = torch.rand(index.shape, generator=generator, requires_grad=True)
    for routing in (Routing.of(index, gates, experts), Routing.of(index, gates, experts, even=True)):
        assert torch.equal(routing.gates, gates.detach().flatten()[routing.order])
        assert routing.experts.tolist() == sorted(index.flatten().tolist())
        assert torch.equal(index.flatten()[routing.order], routing.experts)
        assert len(routing.counts) == experts
        assert sum(routing.counts) == tokens * per_token
        values = torch.randn(tokens, per_token, 3, generator=generator)
        by_expert = values.view(-1, 3)[routing.order]
        assert torch.equal(routing.summed(by_expert), values.sum(1))
    assert Routing.of(index, gates, experts).counts == [int((index == e).sum()) for e in range(experts)]


@pytest.mark.parametrize("transposed", [False, True])
def test_an_expert_behind_more_weights_than_32_bits_count(transposed, tmp_path):
    """Of files that are holes but for the last expert: no memory and no disk for the others."""
    experts, width = 513, 2048
    layout = WeightLayout(experts * width, width, transposed, experts, experts)
    assert layout.matrices()[-1].rect.r0 * width >= 1 << 31
    weight = torch.from_file(str(tmp_path / "w"), True, layout.numel, dtype=torch.bfloat16).view(layout.shape)
    bits = torch.from_file(str(tmp_path / "bits"), True, shard_bytes(layout.numel, 1), dtype=torch.uint8)
    own, kept = weight[-width:], bits[-(width * width // 8) :]
    generator = torch.Generator().manual_seed(0)
    own[:8].normal_(generator=generator)
    kept[: 8 * width // 8].random_(generator=generator)
    state = dataclasses.replace(
        make_state(LAYOUTS[0]), weight=weight, bits=bits, layout=layout, factors=Factors(), scores_train=False,
        magnitude_scales=(1.0,) * experts,
    )  # fmt: skip
    routing = Routing.of(torch.tensor([[experts - 1]]), torch.ones(1, 1), experts)
    x = torch.randn(1, width, generator=generator).bfloat16()
    masked = own[:8] * unpack_range(kept, width * width, 1, 0, 8 * width).view(8, width)
    by_row, by_column = x @ masked.t(), torch.zeros(1, width).bfloat16()
    by_column += x[:, :8] @ masked
    forward = products.forward(x, state, routing, by_token=True)
    backward = products.backward(x, x, state, routing, by_token=True, need_x=True).x
    of_rows, of_columns = (backward, forward) if transposed else (forward, backward)
    torch.testing.assert_close(of_rows[:, :8], by_row, rtol=1e-2, atol=1e-2)
    assert not of_rows[:, 8:].any()
    torch.testing.assert_close(of_columns, by_column, rtol=1e-2, atol=1e-2)
    assert masked.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_over_the_experts_of_a_token_are_the_same_in_parts_and_with_a_gradient(dtype, monkeypatch):
    routing, width = Routing.of(INDEX, GATES, EXPERTS), 5
    values = torch.randn(INDEX.numel(), width, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    whole = routing.summed(values)
    by_pair = values.detach()[routing.order.argsort()].view(*INDEX.shape, width)
    assert torch.equal(whole, by_pair.sum(1))
    monkeypatch.setattr("pst_ds.core.experts.routing.ELEMENTS_AT_A_TIME", {"cpu": 3 * INDEX.shape[1] * width})
    assert torch.equal(routing.summed(values.detach()), whole)
    whole.backward(torch.ones_like(whole))
    assert torch.equal(values.grad, torch.ones_like(values))

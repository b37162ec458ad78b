"""Stacks of experts on the pretended device, with kernels: the same as one by one, and what the device is asked for."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.pairs import every_pair

pytest.importorskip("triton", minversion="3.6", reason="needs triton 3.6, the extra of that name")

from pst_ds.config.pst import PSTConfig
from pst_ds.core.experts import grouped, products
from pst_ds.core.experts.routing import Routing
from pst_ds.core.factors import Constants, Factors
from pst_ds.core.layout import WeightLayout
from pst_ds.core.quantization import Grid, Rounding, StoredGrid
from pst_ds.nn.experts import PSTExpertStack, experts_forward
from pst_ds.nn.inject import inject_pst
from tests.core.experts.test_products import EXPERTS, GATES, INDEX, make_state
from tests.device.pretended import module_to_device, pretended, to_device, to_host
from tests.nn.expert_families import tiny_model

from .test_interpreted_counts import kernels_on_device

pytestmark = pytest.mark.interpreted
__all__ = ["kernels_on_device"]
INPUTS, OUTPUTS = 40, 48
LAYOUTS = {
    f"{'in-out' if transposed else 'out-in'}{' fused' * (parts - 1)}": WeightLayout(
        EXPERTS * OUTPUTS, INPUTS, transposed, EXPERTS * parts, EXPERTS
    )
    for transposed in (False, True)
    for parts in (1, 2)
}
LAUNCHES = 12


def state_on_device(state):
    factors = Factors(**{name: to_device(value) for name, value in state.factors.held().items()})
    rounding = state.rounding and Rounding(state.rounding.stored, to_device(state.rounding.scales))
    weight, bits = to_device(state.weight), to_device(state.bits)
    return dataclasses.replace(state, weight=weight, bits=bits, factors=factors, rounding=rounding)


def as_on_blackwell(left, right, routing, _real=grouped.product):
    """A grouped product with no defined gradient for experts without tokens."""
    found = _real(left, right, routing)
    if right.dim() == 2:
        to_host(found)[to_host(routing.ends).diff(prepend=torch.zeros(1)) == 0] = torch.nan
    return found


@every_pair
@pytest.mark.parametrize("by_token", [True, False], ids=["tokens", "pairs"])
@pytest.mark.parametrize("kind", ["plain", "fixed masks", "frozen magnitude", "rounded", "two at a time", "too large"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_all_experts_at_once_are_those_one_by_one(layout, kind, by_token, kernels_on_device, monkeypatch):
    state = make_state(layout, num_shards=1 if kind == "plain" else 7)
    factors = Factors(**{n: v if n == "norms" else v.bfloat16() for n, v in state.factors.held().items()})
    state = dataclasses.replace(state, weight=state.weight.bfloat16(), factors=factors)
    if kind == "fixed masks":
        state = dataclasses.replace(state, scores_train=False)
    if kind == "frozen magnitude":
        state = dataclasses.replace(state, constants=Constants(0.7, 0.9, 1.3, frozen_magnitude=True))
    if kind == "rounded":
        stored = StoredGrid(layout, Grid(bits=8, group=None))
        state = dataclasses.replace(state, rounding=Rounding(stored, torch.full(stored.shape, 0.03).bfloat16()))
    tile_bytes = 2 * 2 * 2 * layout.expert.numel if kind == "two at a time" else 0
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(INDEX) if by_token else INDEX.numel(), INPUTS, generator=generator).bfloat16()
    grad_y = torch.randn(INDEX.numel(), OUTPUTS, generator=generator).bfloat16()

    def run(x, grad_y, state, routing):
        y = products.forward(x, state, routing, by_token=by_token)
        some = {"by_token": by_token, "need_x": True, "tile_bytes": tile_bytes}
        grads = products.backward(x, grad_y, state, routing, **some)
        return {"y": y, **{name: getattr(grads, name) for name in ("x", *"ABRCUV")}}

    expected = run(x, grad_y, state, Routing.of(INDEX, GATES, EXPERTS))
    monkeypatch.setattr(grouped, "product", as_on_blackwell)
    if kind == "too large":
        monkeypatch.setattr(grouped, "MOST_MERGED_BYTES", 2 * layout.numel - 1)
    with pretended() as counts:
        given = to_device(x), to_device(grad_y), state_on_device(state)
        routing = Routing.of(to_device(INDEX), to_device(GATES), EXPERTS)
        before = counts.num_waits
        found = run(*given, routing)
        assert (counts.num_waits > before) == (kind == "too large")
    for name, value in expected.items():
        there, here = to_host(found[name]).double(), value.double()
        assert there.shape == here.shape
        assert (there - here).norm() <= 0.02 * here.norm(), name


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_an_experts_module_launches_little_and_does_not_wait(training, kernels_on_device):
    """With its routing, and for its two stacks together."""
    model, tokens = tiny_model("qwen3_moe").bfloat16(), 24
    inject_pst(model, PSTConfig(modules_to_save=()))
    (experts, *_) = [m for m in model.modules() if isinstance(getattr(m, "down_proj", None), PSTExpertStack)]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 16, generator=generator).bfloat16()
    weights, index = torch.rand(tokens, 4, generator=generator).bfloat16().topk(2)
    experts.train(training)
    with torch.no_grad():
        expected = experts_forward(experts, hidden, index, weights)
    seen = experts.down_proj.tokens_seen
    with pretended() as counts:
        module_to_device(experts)
        given = [to_device(t) for t in (hidden, index, weights)]
        given[0].requires_grad_()
        experts_forward(experts, *given)
        launches, waits = counts.launches, counts.num_waits
        y = experts_forward(experts, *given)
        assert counts.num_waits == waits
        assert counts.launches - launches <= LAUNCHES
        y.sum().backward()
        assert torch.equal(experts.down_proj.tokens_seen.cpu(), 3 * seen)
    assert (to_host(y) - expected).norm() <= 0.02 * expected.norm()

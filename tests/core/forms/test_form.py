"""Update forms against independent formulas: SPP, DoRA and U V, also fused, transposed and in tiles."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pst_ds.config.pst import PSTConfig
from pst_ds.core.bits import pack_shard
from pst_ds.core.factors import Constants, Factors
from pst_ds.core.forms.form import ParamSpec, Tile, UpdateForm
from pst_ds.core.forms.learned_ranks import LearnedRanks
from pst_ds.core.forms.low_rank import LowRank
from pst_ds.core.forms.spp import SPP
from pst_ds.core.layout import WeightLayout
from pst_ds.core.masked_linear import LayerState, backward, forward
from tests.update_forms import DoRA, OutputShift

INPUTS = 24
BETA = 0.7


def _values(form, layout, generator, dtype=torch.float32):
    """Random parameters of a layer, each matrix's below the last."""
    specs = form.parameters(layout.out_features // layout.num_matrices, layout.in_features, PSTConfig(update_rank=3))
    shapes = {name: (spec.shape[0] * layout.num_matrices, *spec.shape[1:]) for name, spec in specs.items()}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def _state(form, layout, *, seed=0, scores_train=False, beta=BETA):
    generator = torch.Generator().manual_seed(seed)
    keep = (torch.rand(layout.numel, generator=generator) > 0.5).byte()
    return LayerState(
        weight=torch.randn(layout.shape, generator=generator),
        bits=pack_shard(keep, -(-layout.numel // 8)),
        num_shards=1,
        layout=layout,
        factors=Factors.of(_values(form, layout, generator), form),
        constants=Constants(beta=beta, form=form),
        magnitude_scales=(1.0,) * layout.num_matrices,
        scores_train=scores_train,
    ), keep.view(layout.shape)


def _spp(weight, u, V):
    """SPP of its authors: a row of V scales the inputs of a run of outputs, u scales every output, times 2.

    Run g of 16 starts at output floor(g O / 16).
    """
    outputs = len(weight)
    borders = [g * outputs // 16 for g in range(17)]
    repeated = torch.cat([V[g].repeat(borders[g + 1] - borders[g], 1) for g in range(16)])
    return weight + 2.0 * BETA * weight * (repeated * u[:, None])


@pytest.mark.parametrize("outputs", [48, 40, 576])
def test_spp_is_the_formula_of_its_authors(outputs):
    layout = WeightLayout(outputs, INPUTS)
    state, keep = _state(SPP(), layout)
    wide = {name: value.double() for name, value in state.factors.update.items()}
    expected = _spp(state.weight.double(), wide["U"], wide["V"]) * keep
    error = (state.masked_weight().double() - expected).abs().max()
    assert error < 1e-6 * expected.abs().max()


def test_spp_keeps_every_zero():
    state, _ = _state(SPP(), WeightLayout(40, INPUTS))
    state.weight[::3] = 0.0
    assert not state.masked_weight()[::3].any()


def test_dora_is_that_of_peft():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0"], use_dora=True, lora_dropout=0.0)
    model = get_peft_model(nn.Sequential(nn.Linear(INPUTS, 40, bias=False)), config)
    theirs = model.base_model.model[0]
    theirs.lora_B["default"].weight.data.normal_()
    magnitude = theirs.lora_magnitude_vector["default"].weight
    magnitude.data.mul_(torch.rand(40) + 0.5)
    x = torch.randn(7, INPUTS)
    grad_y = torch.randn(7, 40)
    expected = theirs(x)
    expected.backward(grad_y)

    weight = theirs.base_layer.weight.detach()
    norms = weight.norm(dim=1)
    layout = WeightLayout(40, INPUTS)
    update = {
        "lora_A": theirs.lora_A["default"].weight.detach(),
        "lora_B": theirs.lora_B["default"].weight.detach(),
        "magnitude": magnitude.detach() / norms,
    }
    state = LayerState(
        weight=weight,
        bits=torch.full((layout.numel // 8,), 255, dtype=torch.uint8),
        num_shards=1,
        layout=layout,
        factors=Factors(update=update),
        constants=Constants(beta=2.0, form=DoRA()),
        magnitude_scales=(1.0,),
        scores_train=False,
    )
    assert torch.allclose(forward(x, None, state), expected, atol=1e-5)
    grads = backward(x, grad_y, state, need_x=True, need_weight=False, need_bias=False, tile_bytes=1 << 14)
    assert torch.allclose(grads.update["lora_A"], theirs.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-4)
    assert torch.allclose(grads.update["lora_B"], theirs.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-4)
    assert torch.allclose(grads.update["magnitude"], magnitude.grad * norms, rtol=1e-4, atol=1e-4)


LAYOUTS = {
    "plain": WeightLayout(40, INPUTS),
    "fused": WeightLayout(120, INPUTS, num_matrices=3),
    "transposed": WeightLayout(40, INPUTS, transposed=True),
    "fused and transposed": WeightLayout(120, INPUTS, transposed=True, num_matrices=3),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("form", [SPP(), DoRA(), OutputShift(), LearnedRanks()], ids=repr)
def test_gradients_are_those_of_autograd_through_whole_matrices(form, layout):
    state, keep = _state(form, layout)
    leaves = {name: value.double().requires_grad_() for name, value in state.factors.update.items()}
    by_output = state.weight.double().t() if layout.transposed else state.weight.double()
    kept = keep.t() if layout.transposed else keep
    height = layout.out_features // layout.num_matrices
    merged = []
    for number, part in enumerate(by_output.split(height)):
        of_matrix = {name: value.chunk(layout.num_matrices)[number] for name, value in leaves.items()}
        whole = Tile(slice(0, height), slice(0, INPUTS), height, INPUTS)
        merged.append(form.apply(part, of_matrix, whole, BETA))
    weight = torch.cat(merged) * kept
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(6, INPUTS, generator=generator)
    grad_y = torch.randn(6, layout.out_features, generator=generator)
    expected = x.double() @ weight.t()
    expected.backward(grad_y.double())
    assert torch.allclose(forward(x, None, state).double(), expected, atol=1e-4)
    # a budget of several tiles, for forms that can be cut
    grads = backward(x, grad_y, state, need_x=True, need_weight=False, need_bias=False, tile_bytes=1 << 14)
    assert torch.allclose(grads.x.double(), grad_y.double() @ weight, atol=1e-4)
    assert grads.update.keys() == leaves.keys()
    for name, leaf in leaves.items():
        assert torch.allclose(grads.update[name].double(), leaf.grad, rtol=1e-3, atol=1e-3), name


def test_the_formula_of_u_v_is_what_the_kernels_compute():
    form = LowRank()
    layout = WeightLayout(40, INPUTS)
    state, keep = _state(form, layout)
    assert not state.factors.update
    values = {"U": state.factors.U, "V": state.factors.V}
    whole = Tile(slice(0, 40), slice(0, INPUTS), 40, INPUTS)
    expected = form.apply(state.weight, values, whole, BETA) * keep
    assert torch.allclose(state.masked_weight(), expected, atol=1e-5)


def test_forms_of_one_class_are_equal():
    assert SPP() == SPP()
    assert hash(SPP()) == hash(SPP())
    assert SPP() != LowRank()


@pytest.mark.parametrize(
    ("name", "spec", "problem"),
    [
        ("mask", ParamSpec((2,)), "has a name that a layer cannot use"),
        ("two words", ParamSpec((2,)), "has a name that a layer cannot use"),
        ("p", ParamSpec(()), r"has the shape \(\)"),
        ("p", ParamSpec((2,), group="scores"), "is in the optimizer group 'scores'"),
        ("p", ParamSpec((2,), rate=0.0), "has the rate 0.0"),
        ("p", ParamSpec((2,), decay=-1.0), "has the decay -1.0"),
    ],
)
def test_parameters_that_no_layer_can_hold_are_refused(name, spec, problem):
    class Wrong(UpdateForm):
        def parameters(self, outputs, inputs, settings):
            return {name: spec}

        def apply(self, weight, parameters, tile, beta):
            return weight

    with pytest.raises(ValueError, match=problem):
        Wrong().checked_parameters(4, 4, PSTConfig())

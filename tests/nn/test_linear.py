"""PSTLinear as a module: adopts its layer, starts dense, and has the gradients of the formula."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from pst_ds.config.pst import PSTConfig
from pst_ds.core.bits import pack_mask
from pst_ds.nn.inject import freeze_scores, inject_pst, pst_layers
from pst_ds.nn.linear import PSTLinear
from pst_ds.parallel import sharding
from tests.pairs import every_pair

INPUTS = 24
KINDS = ["linear", "conv1d", "fused"]
each_kind = pytest.mark.parametrize("kind", KINDS)


def dense_layer(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "linear":
        return nn.Linear(INPUTS, 40)
    layer = Conv1D(3 * INPUTS if kind == "fused" else 40, INPUTS)
    nn.init.normal_(layer.bias)
    return layer


def injected(kind: str, seed: int = 0, *, num_shards: int | None = None, **settings) -> PSTLinear:
    """A PSTLinear by way of inject_pst; ``c_attn`` is a fused name."""
    name = "c_attn" if kind == "fused" else "fc"
    model = nn.ModuleDict({name: dense_layer(kind, seed)})
    config = PSTConfig(target_modules=(name,), **{"score_rank": 3, "update_rank": 2, **settings})
    return inject_pst(model, config, num_shards=num_shards)[name]


def randomised(layer: PSTLinear, seed: int = 1) -> torch.Tensor:
    """Give every factor and the mask random values; returns the mask, in storage shape."""
    generator = torch.Generator().manual_seed(seed)
    for _, param in layer.factor_parameters():
        param.data.copy_(torch.randn(param.shape, generator=generator))
    mask = torch.rand(layer.layout.shape, generator=generator) > 0.5
    sharding.write_shard(layer.pst_mask, pack_mask(mask, layer.num_shards))
    return mask


def random_batch(layer: PSTLinear, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """x (2, 5, I) that wants a gradient, and the gradient of y, (2, 5, O)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, layer.layout.in_features, generator=generator, requires_grad=True)
    return x, torch.randn(2, 5, layer.layout.out_features, generator=generator)


def gradients(layer: PSTLinear, x: torch.Tensor) -> dict[str, torch.Tensor]:
    grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return grads | {"x": x.grad.clone()}


def reference_gradients(layer: PSTLinear, mask: torch.Tensor, x: torch.Tensor, grad_y: torch.Tensor) -> dict:
    """Float64 autograd of y = x (M . W)' + b with M = mask + S - S.detach(); names as in the module."""
    own = {n: p.detach().double().requires_grad_() for n, p in layer.named_parameters() if n != "pst_mask"}
    parts, constants = layer.layout.num_matrices, layer.constants
    width = layer.layout.out_features // parts
    x64 = x.detach().double().requires_grad_()
    pieces = []
    for part in range(parts):
        rows = slice(part * width, (part + 1) * width)
        base = (own["weight"].t() if layer.layout.transposed else own["weight"])[rows]
        keep = (mask.t() if layer.layout.transposed else mask)[rows].double()
        a, r, u = (own[f"pst_{n}"][rows] for n in "ARU")
        b, c, v = (own[f"pst_{n}"].chunk(parts)[part] for n in "BCV")
        weight = base + constants.beta * u @ v
        ranked = base if constants.frozen_magnitude else weight
        scores = ranked.abs() / layer.magnitude_scales[part] + constants.alpha1 * a @ b
        scores = scores + constants.alpha2 * (r.unsqueeze(1) + c)
        straight_through = keep + scores - scores.detach() if layer.scores_train else keep
        pieces.append(straight_through * weight)
    (x64 @ torch.cat(pieces).t() + own["bias"]).backward(grad_y.double())
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in own.items()}
    return grads | {"x": x64.grad}


def assert_close(found: dict, expected: dict, names) -> None:
    for name in names:
        error = (found[name].double() - expected[name]).norm() / expected[name].norm()
        assert error <= 1e-6, name


@every_pair
@each_kind
@pytest.mark.parametrize("num_shards", [None, 3])
@pytest.mark.parametrize("preset", [PSTConfig, PSTConfig.paper], ids=["default", "paper"])
def test_step_0_is_the_dense_layer(kind, num_shards, preset):
    dense = dense_layer(kind)
    config = preset(target_modules=r"fc|c_attn")
    model = nn.ModuleDict({"c_attn" if kind == "fused" else "fc": copy.deepcopy(dense)})
    (layer,) = pst_layers(inject_pst(model, config, num_shards=num_shards)).values()
    x = torch.randn(2, 5, INPUTS)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-6, atol=1e-6)
    assert torch.equal(layer.masked_weight(), dense.weight)


@each_kind
def test_adopts_the_parameters_under_their_names(kind):
    dense = dense_layer(kind)
    weight, bias = dense.weight, dense.bias
    name = "c_attn" if kind == "fused" else "fc"
    layer = inject_pst(nn.ModuleDict({name: dense}), PSTConfig(target_modules=(name,)))[name]
    assert layer.weight is weight
    assert layer.bias is bias
    factors = [f"pst_{n}" for n in "ABRCUV"]
    assert set(layer.state_dict()) == {"weight", "bias", "pst_mask", *factors}
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == set(factors)


def test_shapes_and_start_of_the_factors():
    layer = injected("fused", num_shards=4)
    outputs, shapes = 3 * INPUTS, {n: tuple(p.shape) for n, p in layer.factor_parameters()}
    assert shapes == {
        "A": (outputs, 3), "B": (9, INPUTS), "R": (outputs,), "C": (3, INPUTS), "U": (outputs, 2), "V": (6, INPUTS)
    }  # fmt: skip
    assert {n for n, p in layer.factor_parameters() if not p.any()} == set("BRCV")
    assert layer.pst_mask.dtype == torch.uint8
    assert layer.pst_mask.shape == (4 * (outputs * INPUTS // 4 // 8),)


def test_factors_that_are_left_out_are_none():
    layer = injected("linear", score_rank=0, structured_scores=False)
    assert [n for n, _ in layer.factor_parameters()] == ["U", "V"]
    assert layer.pst_A is layer.pst_R is None
    assert not layer.scores_train


@pytest.mark.parametrize(
    ("settings", "std_a", "std_u", "std_v"),
    [
        ({"score_init_scale": 1.0, "update_init_scale": 0.5}, 1.0, 0.5, 0.0),
        ({"update_init": "lora", "update_init_scale": 2.0}, 0.3, 0.0, 2 / (3 * INPUTS) ** 0.5),
    ],
    ids=["normal", "lora"],
)
def test_standard_deviation_of_the_start(settings, std_a, std_u, std_v):
    layer = injected("linear", score_rank=16, update_rank=16, **settings)
    for factor, std in ((layer.pst_A, std_a), (layer.pst_U, std_u), (layer.pst_V, std_v)):
        assert float(factor.detach().std()) == pytest.approx(std, rel=0.15)


def test_start_depends_on_seed_and_name_alone():
    def start(names, name: str, seed: int | None = 0, torch_seed: int = 0, num_shards: int = 1):
        torch.manual_seed(torch_seed)
        model = nn.ModuleDict({n: nn.Linear(INPUTS, 10) for n in names})
        layer = inject_pst(model, PSTConfig(target_modules=tuple(names), seed=seed), num_shards=num_shards)[name]
        return torch.cat([layer.pst_A.detach(), layer.pst_U.detach()], 1)

    first = start(["one"], "one")
    assert torch.equal(first, start(["zero", "one"], "one", torch_seed=5, num_shards=3))
    assert torch.equal(first, start(["one"], "one", seed=None))
    assert not torch.equal(first, start(["one"], "one", seed=1))
    assert not torch.equal(first, start(["two"], "two"))
    a, u = first[:, :8], first[:, 8:]
    assert not torch.allclose(a / a.std(), u / u.std())


def test_injection_leaves_the_global_generator_alone():
    layer = nn.Linear(INPUTS, 10)
    before = torch.get_rng_state()
    inject_pst(nn.ModuleDict({"fc": layer}), PSTConfig(target_modules=("fc",)))
    assert torch.equal(torch.get_rng_state(), before)


@every_pair
@each_kind
@pytest.mark.parametrize("settings", [{}, {"frozen_magnitude": True}, {"relative_magnitude": False}], ids=repr)
def test_gradients_are_those_of_the_formula(kind, settings):
    layer = injected(kind, num_shards=2, alpha1=0.7, alpha2=0.9, beta=1.3, **settings)
    layer.bias.requires_grad_()
    mask = randomised(layer)
    x, grad_y = random_batch(layer)
    layer(x).backward(grad_y)
    expected = reference_gradients(layer, mask, x, grad_y)
    found = gradients(layer, x)
    assert_close(found, expected, ["x", "bias", *(f"pst_{n}" for n in "ABRCUV")])
    assert set(found) == {"x", "bias", *(f"pst_{n}" for n in "ABRCUV")}  # none for weight and mask


@each_kind
def test_frozen_scores_have_zero_gradients(kind):
    layer = injected(kind)
    freeze_scores(nn.ModuleDict({"fc": layer}))
    mask = randomised(layer)
    x, grad_y = random_batch(layer)
    layer(x).backward(grad_y)
    found = gradients(layer, x)
    assert_close(found, reference_gradients(layer, mask, x, grad_y), ["x", "pst_U", "pst_V"])
    assert not any(found[f"pst_{n}"].any() for n in "ABRC")


@each_kind
def test_a_trained_weight_has_no_gradient_where_it_is_pruned(kind):
    layer = injected(kind, train_weights=True, score_rank=0, update_rank=0, structured_scores=False)
    mask = randomised(layer)
    x, grad_y = random_batch(layer)
    layer(x).backward(grad_y)
    grad = grad_y.flatten(0, 1).t() @ x.detach().flatten(0, 1)
    expected = (grad.t() if layer.layout.transposed else grad) * mask
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-5, atol=1e-5)
    assert not layer.weight.grad[~mask].any()


@each_kind
def test_two_backward_passes_add(kind):
    layer = injected(kind)
    randomised(layer)
    separate = []
    for seed in (3, 4):
        x, grad_y = random_batch(layer, seed)
        layer(x).backward(grad_y)
        separate.append({n: p.grad for n, p in layer.factor_parameters()})
        layer.zero_grad(set_to_none=True)
    for seed in (3, 4):
        x, grad_y = random_batch(layer, seed)
        layer(x).backward(grad_y)
    for name, param in layer.factor_parameters():
        assert torch.equal(param.grad, separate[0][name] + separate[1][name]), name


@each_kind
def test_checkpointing_changes_no_bit(kind):
    layer = injected(kind)
    randomised(layer)
    x, grad_y = random_batch(layer)
    plain = layer(x)
    plain.backward(grad_y)
    expected = gradients(layer, x)
    layer.zero_grad(set_to_none=True)
    again, _ = random_batch(layer)
    y = checkpoint(lambda v: layer(v * 1.0), again, use_reentrant=False)
    y.backward(grad_y)
    assert torch.equal(y, plain)
    found = gradients(layer, again)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)


@every_pair
@each_kind
@pytest.mark.parametrize("train_weights", [False, True])
def test_x_alone_is_saved_for_the_backward_pass(kind, train_weights):
    layer = injected(kind, train_weights=train_weights)
    x, _ = random_batch(layer)
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert type(y.grad_fn).__name__ == "_MaskedLinearBackward"
    assert [(t.data_ptr(), t.shape) for t in saved] == [(x.data_ptr(), x.shape)]


@pytest.mark.parametrize("shape", [(INPUTS,), (1, INPUTS), (0, INPUTS), (2, 3, 4, INPUTS)], ids=str)
def test_any_leading_dimensions(shape):
    layer = injected("linear")
    randomised(layer)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 40)
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.masked_weight().sum(0).expand(shape), rtol=1e-5, atol=1e-5)


def _by_operator(layer, x):
    weight, factors = layer.trained()
    return torch.ops.pst_ds.masked_linear(x, layer._number, layer.out_features, weight, layer.bias, *factors)


CALLS = {
    "plain": lambda layer, x: layer(x),
    "operator": _by_operator,
    "reentrant": lambda layer, x: checkpoint(layer, x, use_reentrant=True),
    "non-reentrant": lambda layer, x: checkpoint(layer, x, use_reentrant=False),
}


@every_pair
@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
@pytest.mark.parametrize("shape", [(INPUTS,), (5, INPUTS), (2, 5, INPUTS), (2, 3, 5, INPUTS)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_output_can_be_changed_in_place(with_bias, shape, call):
    """Models add residuals and divide queries in place; values and gradients are those of new tensors."""
    found = []
    for in_place in (True, False):
        torch.manual_seed(0)
        model = nn.ModuleDict({"fc": nn.Linear(INPUTS, 8, bias=with_bias)})
        layer = inject_pst(model, PSTConfig(target_modules=("fc",)))["fc"]
        if with_bias:
            layer.bias.requires_grad_()
        randomised(layer)
        x = torch.linspace(-2.0, 2.0, math.prod(shape)).view(shape).requires_grad_()
        y = call(layer, x)
        if in_place:
            y += 1
            y /= 2
        else:
            y = (y + 1) / 2
        y.square().sum().backward()
        found.append({"y": y.detach(), **gradients(layer, x)})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@each_kind
def test_it_is_asked_as_a_linear_layer_is(kind):
    layer = injected(kind)
    x, _ = random_batch(layer)
    assert (layer.in_features, layer.out_features) == (layer.layout.in_features, layer.layout.out_features)
    assert torch.equal(layer(input=x), layer(x))


def test_a_layer_without_bias():
    model = inject_pst(nn.ModuleDict({"fc": nn.Linear(INPUTS, 8, bias=False)}), PSTConfig(target_modules=("fc",)))
    x = torch.randn(3, INPUTS)
    model["fc"](x).sum().backward()
    torch.testing.assert_close(model["fc"](x), x @ model["fc"].masked_weight().t())
    assert "bias" not in model["fc"].state_dict()


def test_bfloat16_layers_have_bfloat16_factors_and_gradients():
    model = nn.ModuleDict({"fc": nn.Linear(INPUTS, 8).to(torch.bfloat16)})
    layer = inject_pst(model, PSTConfig(target_modules=("fc",)))["fc"]
    x = torch.randn(3, INPUTS, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    assert {p.grad.dtype for _, p in layer.factor_parameters()} == {x.grad.dtype} == {torch.bfloat16}


@pytest.mark.parametrize("parts", [1, 3])
def test_weight_scales_are_the_mean_magnitude_of_each_matrix(parts):
    layer = injected("fused" if parts == 3 else "linear")
    outputs = layer.weight.detach().double() if parts == 1 else layer.weight.detach().double().t()
    expected = [float(part.abs().mean()) for part in outputs.chunk(parts)]
    assert layer.magnitude_scales == pytest.approx(expected, rel=1e-7)
    assert injected("linear", relative_magnitude=False).magnitude_scales == (1.0,)


def test_state_dict_round_trip_and_deepcopy():
    layer = injected("conv1d")
    randomised(layer)
    other = injected("conv1d", seed=7)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, INPUTS)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_autocast_computes_in_the_weights_dtype():
    layer = injected("linear")
    mask = randomised(layer)
    x, grad_y = random_batch(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float32
    y.backward(grad_y)
    expected = reference_gradients(layer, mask, x.detach(), grad_y)
    ours = gradients(layer, x)
    assert_close(ours, expected, ours)
